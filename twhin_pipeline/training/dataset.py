"""EdgesDataset: the training set as EdgeBatches, in a seeded order, each edge once an epoch at any world size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.kernels import radix
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.prefetch import Prefetcher, in_order
from twhin_pipeline.sharding.machine import threads_per_process
from twhin_pipeline.store import Store
from twhin_pipeline.training.training_tables import Negatives, Positives
from twhin_pipeline.training_set.known_edges import KnownEdges, ranges
from twhin_pipeline.training_set.negatives import files_by_epoch
from twhin_pipeline.training_set.step_sample import StepSample, StepSampler
from twhin_pipeline.words import SIDES

Array = np.ndarray[Any, Any]


def table_sizes(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, int]:
    """Return the rows of each embedding table: `num_embeddings` where it is given, else the vocabulary's.

    Raises:
        UserError: A vocabulary is missing, empty, or has outgrown its table.
    """
    sizes = {}
    for i, table in enumerate(config.model.embeddings.tables):
        rows = store.manifest(f"vocabulary/{table.name}", snapshot).rows
        if table.num_embeddings is not None and rows > table.num_embeddings:
            raise UserError(
                f"model.embeddings.tables[{i}].num_embeddings is {table.num_embeddings}, but the vocabulary of "
                f"{table.name!r} for {snapshot} has {rows} rows; raise it, or leave it out"
            )
        sizes[table.name] = table.num_embeddings or rows
        if not sizes[table.name]:
            raise UserError(f"the vocabulary of {table.name!r} for {snapshot} is empty; no edge of the source uses it")
    return sizes


class EdgesDataset:
    """Batches of one rank, from the present position to the end of the last epoch, assembled in the background.

    Each epoch has its own seeded permutation of all chunks. A step takes the next `world_size * m` of them
    (m = per_replica_batch_size // chunk size, at least 1) and divides them evenly, in order, among the ranks; the last
    step of an epoch takes what is left, and a rank may then get an empty batch. So each edge is read once an epoch at
    any world size, and a position saved at one world size continues at another.

    Memory: the batches read ahead, and some numbers for each chunk. Edges and negatives are in files, of which a rank
    reads the chunks of its own steps. With `global_negatives: all` there are no negatives, but the true edges by either
    end (see KnownEdges), mapped from files that ranks of one machine share, unless `negatives.mask` is `own`. With
    `sampled_per_step` a step's sample depends on `negatives.seed` and the step's position alone: all ranks draw the
    same.
    """

    def __init__(
        self,
        config: TwhinConfig,
        store: Store,
        snapshot: str,
        split: Literal["train", "validation"] = "train",
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the split, for batches that are used on `device`: for a GPU several threads assemble them, `pinned`.

        Raises:
            UserError: It is missing, or does not fit the configuration or vocabularies.
        """
        self.store, self.rank, self.world_size = store, rank, world_size
        self.on_gpu = torch.device(device).type == "cuda"
        # On a CPU they would take the cores that the step computes on.
        self.readers = config.launch.reader_threads or (min(8, threads_per_process(config)) if self.on_gpu else 1)
        training = split == "train"
        assets = (
            ("training_set/positives", "training_set/negatives")
            if training
            else ("held_out/validation", "held_out/validation_negatives")
        )
        data = config.train_data if training else config.validation_data
        manifest = store.manifest(assets[0], snapshot)
        self.version = manifest.version
        self.seed = config.training.seed
        self.num_epochs = config.training.num_epochs if training else 1
        self.everything = data.global_negatives == "all"
        self.in_batch = data.in_batch_negatives
        self.pool = 0 if data.global_negatives == "all" else data.global_negatives
        self.log_q = config.loss.log_q
        relations = config.model.relations
        corrupted = config.corrupted_sides.values()
        self.corrupts = tuple(np.array([side in sides for sides in corrupted]) for side in SIDES)
        self.prefetch = config.launch.prefetch_batches
        sizes = table_sizes(config, store, snapshot)
        if self.everything:
            # A table may have rows to spare; entities are those of the vocabulary.
            sizes = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in sizes}
        self.positives = Positives(config, store, manifest, sizes)
        self.negatives = store.manifest(assets[1], snapshot)
        self.files = files_by_epoch(store.files_of(self.negatives))
        if not self.files:
            raise UserError(f"{assets[1]} for {snapshot} is empty; make it anew (`twhin sample`)")

        # Rows of all tables, one table after the other: a single unique() then finds every table's ids.
        self.model_config = config.model
        self.tables = config.model.table_names
        self.base = np.concatenate([[0], np.cumsum([sizes[name] for name in self.tables])]).astype(np.int64)
        place = {name: self.base[i] for i, name in enumerate(self.tables)}
        self.side_base = tuple(
            np.array([place[getattr(relation, side)] for relation in relations], np.int64) for side in SIDES
        )
        self.known_edges: list[KnownEdges] = []
        """By side that is replaced, true edges by the kept entity, whose key is its row after `known_base` [R]."""
        if self.everything:
            rows = [np.array([sizes[getattr(relation, side)] for relation in relations], np.int64) for side in SIDES]
            self.side_size = rows[0], rows[1]
            if not (training and config.negatives.mask == "own"):
                self._index_edges()
        chunk_size = int(manifest.details.get("chunk_size", self.positives.lengths.max()))
        self.sampler, self.present = self._sampler(config, snapshot, data.sampled_per_step)
        """What a step's candidates are drawn by, or else those of every step; None: all entities."""
        self.chunks_per_rank = max(1, data.per_replica_batch_size // chunk_size)
        self.num_chunks = len(self.positives.relation)
        self.num_edges = int(self.positives.offsets[-1])
        self.counts = self.positives.lengths
        """Edges of each chunk that count, int64 `[chunks]`: all of them, but for what `leave_out` was given."""
        self.epoch, self.chunks_done = 0, 0

    @property
    def chunks_per_step(self) -> int:
        """Chunks that all ranks together take in a step."""
        return self.chunks_per_rank * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that is read from its start."""
        return -(-self.num_chunks // self.chunks_per_step)

    @property
    def steps_left(self) -> int:
        """Steps from the present position to the end of the last epoch."""
        if self.epoch >= self.num_epochs:
            return 0
        here = -(-(self.num_chunks - self.chunks_done) // self.chunks_per_step)
        return here + (self.num_epochs - self.epoch - 1) * self.steps_per_epoch

    @property
    def epoch_of_last_batch(self) -> int:
        """The epoch of the last batch that the loop received, from 0."""
        return self.epoch if self.chunks_done else max(self.epoch - 1, 0)

    def leave_out(self, edges: pa.Table) -> None:
        """Give edges (`rel`, `lhs`, `rhs`) the weight 0: nothing is measured of them; they stay candidates."""
        rel, lhs, rhs = (edges.column(name).to_numpy() for name in ("rel", "lhs", "rhs"))
        known = {n: KnownEdges.from_pairs(lhs[rel == n], rhs[rel == n]) for n in np.unique(rel).tolist()}
        left_out = np.zeros(self.num_edges, bool)
        first = 0
        for piece, relation in self.positives.pieces():
            for number, of_relation in known.items():
                mine = np.flatnonzero(relation == number)
                ends = (piece[side][mine].astype(np.int64) for side in SIDES)
                left_out[first + mine] = of_relation.contains(*ends)
            first += len(piece)
        self.positives.left_out = left_out
        self.counts = self.positives.lengths - np.add.reduceat(left_out, self.positives.offsets[:-1], dtype=np.int64)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the batches that the loop has received, not those read ahead."""
        return {"epoch": self.epoch, "chunks_done": self.chunks_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position, at this or another world size."""
        self.epoch, self.chunks_done = int(state["epoch"]), int(state["chunks_done"])

    def __iter__(self) -> Iterator[EdgeBatch]:
        """Yield the batches that are left; an error of a background thread is raised here."""
        with ThreadPoolExecutor(self.readers, "reader") as pool:
            made = in_order(pool, self._made, self._steps(self.epoch, self.chunks_done), self.readers)
            with Prefetcher(made, self.prefetch) as produced:
                for batch, epoch, chunks_done in produced:
                    self.epoch, self.chunks_done = epoch, chunks_done
                    yield batch

    def _steps(self, epoch: int, done: int) -> Iterator[tuple[Any, ...]]:
        """Yield what `_made` gets for each step that is left."""
        for e in range(epoch, self.num_epochs):
            order = np.random.default_rng([self.seed, e]).permutation(self.num_chunks)
            file_epoch = e % len(self.files)
            negatives = None if self.everything else self._negatives(file_epoch)
            while done < self.num_chunks:
                step = order[done : done + self.chunks_per_step]
                chunks = np.array_split(step, self.world_size)[self.rank]
                sample = self.present if self.sampler is None else self.sampler.draw(e, done)
                done += len(step)
                after = (e + 1, 0) if done == self.num_chunks else (e, done)
                yield (chunks, negatives, sample, file_epoch, int(self.counts[step].sum())), *after
            done = 0

    def _made(self, step: tuple[Any, ...], epoch: int, done: int) -> tuple[EdgeBatch, int, int]:
        """Return a step's batch, and the position after it."""
        batch = self._batch(*step)
        return batch.pinned() if self.on_gpu else batch, epoch, done

    def _negatives(self, epoch: int) -> Negatives:
        lhs, rhs = (corrupts[self.positives.relation] for corrupts in self.corrupts)
        negatives = Negatives(self.store, self.negatives, self.files[epoch], (lhs, rhs), self.pool)
        if self.log_q:
            negatives.check_log_q()
        return negatives

    def _index_edges(self) -> None:
        self.known_base = [np.cumsum(kept) - kept for kept in self.side_size[::-1]]
        self.known_edges = self.positives.known_edges(self.side_size, self.known_base, torch.get_num_threads())

    def _sampler(
        self, config: TwhinConfig, snapshot: str, size: int | None
    ) -> tuple[StepSampler | None, StepSample | None]:
        if not self.everything:
            return None, None
        present = [present_rows(self.store, snapshot, name) for name in self.tables]
        if size is None:
            if all(rows is None for rows in present):
                return None, None
            sizes = np.diff(self.base).tolist()
            each = [np.arange(n) if rows is None else rows for n, rows in zip(sizes, present, strict=True)]
            every = np.concatenate([rows + base for rows, base in zip(each, self.base[:-1], strict=True)])
            return None, StepSample(every, np.zeros(len(every), np.float32))
        degree = self.positives.degrees(self.side_base, int(self.base[-1]))
        tables = np.split(degree, self.base[1:-1])
        negatives = config.negatives
        sampler = StepSampler(size, negatives.degree_share, negatives.alpha, negatives.seed, tables, present)
        return sampler, None

    def _batch(
        self, chunks: Array, negatives: Negatives | None, drawn: StepSample | None, epoch: int, global_edges: int
    ) -> EdgeBatch:
        """Assemble the chunks ([G]) without a loop over them: unique rows of each table, indices into them, padding."""
        if not len(chunks):
            return EdgeBatch.empty(self.model_config, global_edges)
        groups = len(chunks)
        positives, lengths = self.positives.read(chunks)
        width = int(lengths.max())
        group = np.repeat(np.arange(groups), lengths)
        position = ranges(np.zeros_like(lengths), lengths)
        relation = self.positives.relation[chunks]
        bases = [base[relation] for base in self.side_base]
        on = [corrupts[relation] for corrupts in self.corrupts]
        sides = [side for side in (0, 1) if on[side].any()]
        spans: dict[int, int] = {}

        ends = [positives[side] + base[group] for side, base in zip(SIDES, bases, strict=True)]
        keys = [*ends]
        for side in sides:
            if negatives is None:
                pairs = zip(bases[side][on[side]].tolist(), relation[on[side]], strict=True)
                here = {base: base + int(self.side_size[side][r]) for base, r in pairs}
                for span in here.items():
                    keys.append(np.arange(*span) if drawn is None else drawn.rows[drawn.span(*span)])
                spans |= here
            else:
                pool = negatives.pools(side, chunks[on[side]])
                keys.append((pool + bases[side][on[side], None]).ravel())
        unique, _, inverse = radix.unique(np.concatenate(keys))
        cuts = np.searchsorted(unique, self.base)
        ids = {
            name: torch.from_numpy(unique[cuts[i] : cuts[i + 1]] - self.base[i]) for i, name in enumerate(self.tables)
        }

        sample: dict[str, torch.Tensor] = {}
        sample_log_q: dict[str, torch.Tensor] = {}
        for i, name in enumerate(self.tables):
            start, end = self.base[i : i + 2].tolist()
            if drawn is not None and start in spans:
                rows = drawn.span(start, end)
                sample[name] = torch.from_numpy(np.searchsorted(unique, drawn.rows[rows]) - cuts[i])
                if self.log_q:
                    sample_log_q[name] = torch.from_numpy(drawn.log_q[rows])

        def grid(values: Array) -> Array:
            result = np.zeros((groups, width), values.dtype)
            result[group, position] = values
            return result

        edges = len(positives)
        index = [inverse[:edges], inverse[edges : 2 * edges]]
        num_in_batch = np.minimum(lengths, self.in_batch)
        window = int(num_in_batch.max())
        in_batch = (epoch * self.in_batch + np.arange(window)[None, :]) % lengths[:, None]

        taken = 2 * edges
        fields: dict[str, Array] = {}
        for side, name in enumerate(SIDES):
            queries = Queries(group, index[1 - side])
            query = grid(queries.of_edge)
            pool = np.zeros((groups, self.pool if side in sides else 0), np.int64)
            log_q = np.zeros((groups, window + pool.shape[1]), np.float32)
            mask = np.zeros((0, 3), np.int64)
            used = np.flatnonzero(on[side])
            if self.everything:
                replaced = np.flatnonzero(on[side][queries.group])
                if self.known_edges:
                    kept = positives[SIDES[1 - side]][queries.first[replaced]]
                    keys_of_kept = self.known_base[side][relation[queries.group[replaced]]] + kept
                    others, counts = self.known_edges[side].of(keys_of_kept)
                    where = np.repeat(replaced, counts)
                else:
                    where, others = queries.answers(group, positives[name].astype(np.int64))
                    kept = np.isin(where, replaced)
                    where, others = where[kept], others[kept]
                if drawn is not None:
                    start = bases[side][queries.group[where]]
                    place = np.searchsorted(drawn.rows, others + start)
                    hit = drawn.rows[np.minimum(place, len(drawn.rows) - 1)] == others + start
                    where, others = where[hit], (place - np.searchsorted(drawn.rows, start))[hit]
                mask = np.stack([queries.group[where], queries.position[where], others], axis=1).astype(np.int64)
            elif negatives is not None and len(used):
                pool[used] = inverse[taken : taken + len(used) * self.pool].reshape(len(used), self.pool)
                taken += len(used) * self.pool
                masked, counts = negatives.masks(side, chunks[used])
                owner = np.repeat(used, counts)
                column = _column(masked["candidate"], num_in_batch[owner], window)
                mask = np.stack([owner, query[owner, masked["position"]], column], axis=1).astype(np.int64)
                if self.log_q:
                    values, counts = negatives.logs(side, chunks[used])
                    owner = np.repeat(used, counts)
                    candidate = ranges(np.zeros_like(counts), counts)
                    log_q[owner, _column(candidate, num_in_batch[owner], window)] = values
            fields |= {
                f"{name}_index": grid(index[side]),
                f"{name}_query_index": queries.grid(),
                f"{name}_query": query,
                f"{name}_on": on[side],
                f"{name}_pool_index": pool,
                f"{name}_mask": mask,
                f"{name}_log_q": log_q,
            }
        return EdgeBatch(
            ids=ids,
            relation=torch.from_numpy(relation),
            weight=torch.from_numpy(grid(positives["weight"])),
            in_batch=torch.from_numpy(in_batch.astype(np.int64)),
            num_in_batch=torch.from_numpy(num_in_batch),
            num_edges=edges,
            global_edges=global_edges,
            sides=tuple(SIDES[side] for side in sides),
            everything=self.everything,
            sample=sample,
            sample_log_q=sample_log_q,
            **{name: torch.from_numpy(values) for name, values in fields.items()},
        )


class Queries:
    """The distinct kept entities of each chunk, all chunks' end to end."""

    def __init__(self, group: Array, kept: Array) -> None:
        """Take each edge's chunk (ascending from 0, none left out) and kept entity's index (int64 [E])."""
        span = int(kept.max()) + 1
        unique, self.first, inverse = radix.unique(group * span + kept)
        self.group, self.index = np.divmod(unique, span)
        start = np.searchsorted(self.group, np.arange(int(group[-1]) + 1))
        self.position = np.arange(len(unique)) - start[self.group]
        """A query's position in its chunk; `first` is one of its edges, `group` its chunk, `index` its entity's."""
        self.of_edge = inverse - start[group]

    def answers(self, group: Array, other: Array) -> tuple[Array, Array]:
        """Return the distinct (query, other) of the edges, from each one's chunk and other entity (int64 `[E]`)."""
        start = np.searchsorted(self.group, group)
        span = int(other.max()) + 1
        pairs = np.unique((start + self.of_edge) * span + other)
        return pairs // span, pairs % span

    def grid(self) -> Array:
        """Return the indices as int64 `[G, Q]`, 0 behind."""
        result = np.zeros((int(self.group[-1]) + 1, int(self.position.max()) + 1), np.int64)
        result[self.group, self.position] = self.index
        return result


def _column(candidate: Array, num_in_batch: Array, window: int) -> Array:
    """Return the place of a chunk's candidate in the padded list `[window | pool]`."""
    return np.where(candidate >= num_in_batch, candidate + (window - num_in_batch), candidate)
