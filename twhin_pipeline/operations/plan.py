"""Will it fit? Memory, traffic and disk of a training run, estimated before it starts.

Every figure is a formula over the configuration and the tables' sizes (docs/explanation/architecture.md); no data is
loaded. Which rank holds which rows is torchrec's plan, as in training. Counts of a step are upper bounds: rows that
repeat within a step are looked up once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TableConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.operations.rates import Rates, StepTime, Work, step_time
from twhin_pipeline.store import Store

ELEMENT_BYTES = {"fp32": 4, "fp16": 2}
POSITIVE_BYTES = 12  # an edge in a rank's memory: two int32 rows and a float32 weight
PROCESS_BYTES = 800 * 2**20  # torch, torchrec, MLflow and buffers of a rank; 670 to 770 MiB were measured on CPU
TRUE_EDGE_BYTES = (
    20  # an edge and side of what `global_negatives: all` masks by: a row, and at most a key and its start
)
BLOCK_BYTES = 24 * 2**20  # of scores with `global_negatives: all`; all_candidates.BLOCK_BYTES, which would load torch
SCORE_COPIES = 5  # scores, their masked copy, what the loss keeps for the backward pass, and two gradients
VECTOR_COPIES = 6  # looked up, gathered, prepared, and the gradient of each
LOOKUP_COPIES = 2  # of these, looked up, and its gradient
CHUNK_COPIES = 2  # of these, read and written by losses that are taken chunk by chunk: prepared, and its gradient
EXCHANGES = 7  # of numbers of ids, ids, vectors, gradients, the operators' gradients, and two of small numbers
SHARED_EXCHANGES = 5  # where gradients lie, that rows are updated, the operators' gradients, and two of small numbers
OPERATIONS = 500  # of torch in a step, as its profiler counts them
EXCHANGE_COPIES = 4  # put in the order of ranks, received and put back in that of places; and the gradient of each


@dataclass(frozen=True)
class TablePlan:
    """One entity table over all ranks; sizes in bytes."""

    name: str
    rows: int
    origin: str
    """Where the number of rows comes from."""
    weights: int
    optimizer: int


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds; sizes in bytes."""

    rank: int
    rows: dict[str, int]
    tables: int
    """Weights and optimizer state of its shards."""
    step: int
    """Vectors and scores of one step, their gradients, and the batches read ahead."""
    edges: int
    """Training edges, and one epoch's negatives of this rank (what is masked, where all entities are candidates)."""
    process: int
    """The process itself, its libraries loaded."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.tables + self.step + self.edges + self.process


@dataclass(frozen=True)
class Plan:
    """The estimate; sizes in bytes."""

    world_size: int
    ranks_per_node: int
    sharding: str
    tables: list[TablePlan]
    ranks: list[RankPlan]
    edges_per_step: int
    """Of all ranks."""
    steps: int | None
    """Of the whole run; None where the number of edges is not known."""
    sent_per_step: int
    """What a rank sends in one step: ids, vectors, their gradients, and the operators' gradients."""
    checkpoint: int
    checkpoints: int | None
    """How many are kept; None: all."""
    scoring: int
    """Memory of evaluation's blocks of scores."""
    time: StepTime | None = None
    """Of a step, at the rates given; None without rates."""

    @property
    def edges_per_second(self) -> float | None:
        """Of all ranks together; None without rates."""
        return None if self.time is None else self.edges_per_step / self.time.total

    @property
    def node(self) -> int:
        """The most that one node's ranks hold together."""
        totals = sorted((rank.total for rank in self.ranks), reverse=True)
        return sum(totals[: self.ranks_per_node])

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, the sums included."""
        ranks = [{**asdict(rank), "total": rank.total} for rank in self.ranks]
        return {**asdict(self), "ranks": ranks, "node": self.node, "edges_per_second": self.edges_per_second}


@dataclass(frozen=True)
class Step:
    """What one rank does in one step. Counts are upper bounds: a row that repeats is looked up once."""

    edges: int
    places: int
    """Ends of edges and candidates, before repeats are found."""
    looked_up: int
    """Rows of tables."""
    scores: int
    """Of queries with candidates; an edge's ends are queries of their own here, where edges of a kind share one."""
    scores_held: int
    """At a time."""
    ahead: int
    """Bytes of the batches read ahead."""

    def bytes(self, dim: int) -> int:
        """Return the memory that it takes."""
        return VECTOR_COPIES * self.places * dim * 4 + (SCORE_COPIES * 4 + 1) * self.scores_held + self.ahead


def operator_parameters(config: TwhinConfig) -> int:
    """Return how many parameters the operators of all relations have together."""
    dim = config.model.embedding_dim
    of = {"identity": 0, "linear": dim * dim, "affine": dim * dim + dim, "rotation": dim // 2}
    directions = 2 if config.model.reciprocal else 1
    return directions * sum(of.get(relation.operator, dim) for relation in config.model.relations)


def estimate(
    config: TwhinConfig,
    rows: Mapping[str, tuple[int, str]],
    world_size: int,
    num_edges: int | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Estimate a run.

    Args:
        config: Everything but the tables' sizes.
        rows: Table to its number of rows, and where that is known from (`table_rows`).
        world_size: Ranks.
        num_edges: Training edges; None where they are not known.
        rates: What a rank does a second; with them the time of a step is estimated too.

    Raises:
        UserError: Ranks exchange vectors over a link whose rate is not among `rates`, the tables do not fit into
            `launch.hbm_gib`, or several ranks cannot train with a table's optimizer.
    """
    tables = [_table(table, *rows[table.name]) for table in config.model.embeddings.tables]
    rows_of = _rows_of_ranks(config, tables, world_size)
    per_row = {t.name: (t.weights + t.optimizer) / t.rows for t in tables}
    step = step_of(config, {t.name: t.rows for t in tables})
    epoch_edges = _edges(config, num_edges or 0, world_size)
    ranks = [
        RankPlan(
            rank=rank,
            rows=shard,
            tables=round(sum(per_row[name] * n for name, n in shard.items())),
            step=step.bytes(config.model.embedding_dim),
            edges=epoch_edges,
            process=PROCESS_BYTES,
        )
        for rank, shard in enumerate(rows_of)
    ]
    dim = config.model.embedding_dim
    elsewhere = (world_size - 1) / world_size
    shared = _shares_memory(config, world_size, rates)
    # Row-wise, all-to-all: an id of 8 bytes goes out, a float32 vector comes back, and its gradient goes out again.
    sent = 0 if shared else step.looked_up * (8 + 2 * dim * 4) * elsewhere
    # A ring all-reduce of the operators' gradients sends each element twice.
    sent += 2 * operator_parameters(config) * 4 * elsewhere
    steps = work = None
    if num_edges is not None:
        per_epoch = -(-num_edges // (step.edges * world_size))
        steps = min(config.training.num_train_steps, per_epoch * config.training.num_epochs)
    ranks_per_node = min(world_size, config.launch.nproc_per_node) if config.launch.nnodes > 1 else world_size
    if rates is not None:
        by_chunk = rates.by_chunk and chunks_apart(config)
        work = _work(config, step, sent, world_size, ranks_per_node, shared=shared, by_chunk=by_chunk)
    return Plan(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        sharding=config.launch.sharding if world_size > 1 else "none (one rank)",
        tables=tables,
        ranks=ranks,
        edges_per_step=step.edges * world_size,
        steps=steps,
        sent_per_step=round(sent),
        checkpoint=sum(t.weights + t.optimizer for t in tables),
        checkpoints=None
        if config.training.checkpoint_max_to_keep is None
        else config.training.checkpoint_max_to_keep + 1,
        scoring=2 * config.evaluation.block_size * max(t.rows for t in tables) * 4,
        time=None if work is None or rates is None else step_time(work, rates),
    )


def _shares_memory(config: TwhinConfig, world_size: int, rates: Rates | None) -> bool:
    """Tell whether ranks look rows up in each other's memory (shared_tables)."""
    cpu = config.launch.device == "cpu" or (rates is not None and rates.shared_memory)
    compiled = all(
        table.data_type == "fp32" and table.optimizer.name in ("rowwise_adagrad", "adagrad")
        for table in config.model.embeddings.tables
    )
    return cpu and compiled and config.launch.nnodes == 1 and world_size > 1


def chunks_apart(config: TwhinConfig) -> bool:
    """Tell whether a CPU's losses are taken chunk by chunk (`chunk_losses`): a sum of exponentials over products."""
    return (
        config.loss.name in ("softmax", "bsl")
        and config.model.comparator in ("dot", "cosine")
        and config.train_data.global_negatives != "all"
        and not config.runtime.enable_amp
    )


def _work(
    config: TwhinConfig,
    step: Step,
    sent: float,
    world_size: int,
    ranks_per_node: int,
    *,
    shared: bool,
    by_chunk: bool,
) -> Work:
    """Return what a rank does in a step: `sent` bytes go to ranks of its node and others alike."""
    dim = config.model.embedding_dim
    # A product forward and two backward, of two operations an element each; and an operator that is a matrix.
    flop = 3 * 2 * dim * step.scores
    if any(relation.operator in ("linear", "affine") for relation in config.model.relations):
        flop += 3 * 2 * dim * dim * step.edges
    # One process, or ranks that share memory, use rows where they lie: none is looked up first, nor its gradient handed
    # back.
    in_place = world_size == 1 or shared
    copies = VECTOR_COPIES - LOOKUP_COPIES if in_place else VECTOR_COPIES + EXCHANGE_COPIES
    copies -= CHUNK_COPIES * by_chunk
    exchanges = SHARED_EXCHANGES if shared else EXCHANGES
    beyond = sent * (world_size - ranks_per_node) / max(world_size - 1, 1)
    return Work(
        flop=flop,
        # What is copied is read and written.
        passed=2 * 4 * (copies * step.places * dim + (0 if by_chunk else SCORE_COPIES * step.scores)),
        row_bytes=step.looked_up * dim * 4,
        place_bytes=step.places * dim * 4,
        within=sent - beyond,
        beyond=beyond,
        exchanges=exchanges if world_size > 1 else 0,
        operations=OPERATIONS,
    )


def table_rows(
    config: TwhinConfig, store: Store, snapshot: str | None, counts: Mapping[str, int]
) -> dict[str, tuple[int, str]]:
    """Return each table's rows and where the number is from: `counts`, else `num_embeddings`, else its vocabulary.

    Raises:
        UserError: `counts` names no table, or a table's size is known from nowhere.
    """
    rows: dict[str, tuple[int, str]] = {}
    for name, count in counts.items():
        if name not in config.model.table_names:
            raise UserError(f"--rows {name}={count}: {unknown('table', name, config.model.table_names)}")
        rows[name] = (count, "--rows")
    missing = []
    for table in config.model.embeddings.tables:
        asset = f"vocabulary/{table.name}"
        if table.name in rows:
            continue
        if table.num_embeddings is not None:
            rows[table.name] = (table.num_embeddings, "num_embeddings")
        elif snapshot is not None and store.exists(asset, snapshot):
            rows[table.name] = (store.manifest(asset, snapshot).rows, f"vocabulary {snapshot}")
        else:
            missing.append(table.name)
    if missing:
        flags = " ".join(f"--rows {name}=100000" for name in missing)
        raise UserError(
            f"no vocabulary and no num_embeddings for {', '.join(missing)}: make the vocabulary with "
            f"`twhin ingest` and `twhin vocabulary`, or give numbers, such as {flags}"
        )
    return rows


def training_edges(store: Store, snapshot: str | None) -> int | None:
    """Return how many edges a snapshot trains on, as far as the store knows: its positives, else its raw edges."""
    for asset in ("training_set/positives", "raw_edges") if snapshot is not None else ():
        if store.exists(asset, str(snapshot)):
            return store.manifest(asset, str(snapshot)).rows
    return None


def _table(table: TableConfig, rows: int, origin: str) -> TablePlan:
    elements = rows * table.embedding_dim
    # fbgemm keeps optimizer state in float32 whatever the weights' type.
    state = {
        "sgd": 0,
        "rowwise_adagrad": 4 * rows,
        "adagrad": 4 * elements,
        "adam": 8 * elements,
        "rmsprop": 4 * elements + 4 * rows,
    }[table.optimizer.name]
    return TablePlan(table.name, rows, origin, elements * ELEMENT_BYTES[table.data_type], state)


def _rows_of_ranks(config: TwhinConfig, tables: list[TablePlan], world_size: int) -> list[dict[str, int]]:
    """Return each rank's rows of each table, as torchrec's planner distributes them in training."""
    rows = {table.name: table.rows for table in tables}
    if world_size == 1:
        return [rows]
    from twhin_pipeline.sharding.planner import rows_of_ranks  # loads torch and torchrec

    return rows_of_ranks(config, rows, world_size)


def step_of(config: TwhinConfig, rows: Mapping[str, int]) -> Step:
    """Count what one rank does in one step, with tables of so many `rows`."""
    data = config.train_data
    chunks = max(1, data.per_replica_batch_size // config.negatives.chunk_size)
    edges = chunks * config.negatives.chunk_size
    corrupted = _corrupted_tables(config)
    if data.global_negatives == "all":
        # All rows of the types of which candidates are, or a step's sample; queries are scored with them by the block.
        drawn = {name: min(rows[name], data.sampled_per_step or rows[name]) for name in rows}
        pool = sum(drawn[name] for name in set().union(*corrupted.values()))
        scores = sum(edges * max(drawn[name] for name in names) for names in corrupted.values())
        held = max(BLOCK_BYTES // 4, max(drawn.values()))
    else:
        pool = chunks * data.global_negatives * len(corrupted)
        window = min(data.in_batch_negatives, config.negatives.chunk_size)
        # Edges that keep the same entity share a row of scores; here each has its own.
        scores = held = len(corrupted) * edges * (window + data.global_negatives)
    places = 2 * edges + pool
    return Step(
        edges=edges,
        places=places,
        looked_up=min(places, sum(rows.values())),
        scores=scores,
        scores_held=held,
        # A batch read ahead holds an index of 8 bytes a place, its unique ids, and a weight an edge.
        ahead=config.launch.prefetch_batches * (16 * places + 4 * edges),
    )


def _corrupted_tables(config: TwhinConfig) -> dict[str, set[str]]:
    """Return the sides that some relation corrupts, and the tables of the candidates of each such side."""
    tables: dict[str, set[str]] = {}
    for relation, sides in zip(config.model.relations, config.corrupted_sides.values(), strict=True):
        for side in sides:
            tables.setdefault(side, set()).add(getattr(relation, side))
    return tables


def _edges(config: TwhinConfig, num_edges: int, world_size: int) -> int:
    """Return the bytes of all positives and of this rank's share of an epoch's pools, or of what masks stand for."""
    sides, pool = len(_corrupted_tables(config)), config.train_data.global_negatives
    if pool == "all":
        masked = 2 * TRUE_EDGE_BYTES if config.negatives.mask == "known" else 0
        return num_edges * (POSITIVE_BYTES + masked)
    chunks = -(-num_edges // config.negatives.chunk_size)
    window = min(config.train_data.in_batch_negatives, config.negatives.chunk_size)
    log_q = 4 * (pool + window) if config.loss.log_q else 0
    return num_edges * POSITIVE_BYTES + chunks * sides * (pool * 8 + log_q) // world_size


def parse_rows(flags: list[str]) -> dict[str, int]:
    """Read `table=number` pairs. Raises UserError where one is not of that form."""
    rows = {}
    for text in flags:
        name, _, number = text.partition("=")
        if not number.replace("_", "").isdigit() or int(number) < 1:
            raise UserError(f"--rows {text!r} must look like package=70000")
        rows[name] = int(number)
    return rows
