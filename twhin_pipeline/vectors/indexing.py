"""The tables `index/<entity>`: an index of each entity type that a relation leads to, and how well it finds.

Their rows are figures, one for each relation and k; FAISS's files are beside them. Recall is measured on heads that
have the relation in training, against a search that compares every vector. Where the comparator is not the cosine,
neighbors have an index of their own, whose rows have no relation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch

from twhin_pipeline import extras
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.comparators import COMPARATORS, Comparator, Cosine
from twhin_pipeline.model.relation_scores import RelationScores, to_tensor
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import Manifest, Store, database
from twhin_pipeline.store.array_cache import cached
from twhin_pipeline.vectors import index_choice, vector_index
from twhin_pipeline.vectors.entity_table import BATCH_ROWS, EntityTable
from twhin_pipeline.vectors.index_choice import LEAST_FOR_PQ, Kind, indexable, kind_for
from twhin_pipeline.vectors.model_files import parameters_of
from twhin_pipeline.vectors.retrieval import ExactSearch
from twhin_pipeline.vectors.searchers import Wanted
from twhin_pipeline.vectors.vector_index import Effort, VectorIndex
from twhin_pipeline.words import INDEX

FILE, NEIGHBORS, COPY = "_index.faiss", "_neighbors.faiss", "_searched"
"""FAISS's files of a version, and the folder of their local copies where the store is remote."""
POSITIVES, RELATIONS = "training_set/positives", "embeddings/relations"
TIMED = 100
"""Queries that are timed, one by one."""
SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("k", pa.int32()),
        ("recall", pa.float64()),
        ("wanted_recall", pa.float64()),
        ("queries", pa.int32()),
        ("latency_ms", pa.float64()),
        ("exact_ms", pa.float64()),
        ("kind", pa.string()),
        ("parameters", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("build_s", pa.float64()),
    ]
)


def build(config: TwhinConfig, store: Store, snapshot: str, settings: Mapping[str, Any]) -> dict[str, Manifest]:
    """Write `index/<entity>` of every type of `config.indexed_types`; without rows where it needs none.

    Args:
        config: The configuration, relations resolved.
        store: Where the tables are.
        snapshot: Which snapshot.
        settings: The fields that the tables depend on, for their manifests.

    Returns:
        The manifests by table name.

    Raises:
        UserError: A table is missing, or the extra `index` is.
    """
    extras.need("faiss", "an index")
    relations = store.manifest(RELATIONS, snapshot)
    model = TwhinModelConfig.model_validate(relations.details["model"])
    scorer = _scorer(store, relations, model)
    result = {}
    for entity in config.indexed_types:
        manifest = store.manifest(f"embeddings/{entity}", snapshot)
        parents = store.versions(snapshot, [POSITIVES, RELATIONS, f"embeddings/{entity}"])
        with store.replace(
            f"{INDEX}/{entity}", snapshot, config_hash=config.hash(), parents=parents, settings=dict(settings)
        ) as draft:
            kind = kind_for(config, indexable(manifest))
            if kind == "none":
                draft.write(SCHEMA.empty_table())
                draft.details = {"kind": "none"}
            else:
                with draft.local_file(FILE) as path:
                    for chosen in _tried(config, kind, indexable(manifest)):
                        made = _Making(config, store, snapshot, model, scorer, entity, chosen)
                        figures, draft.details = made.write(path)
                        least = draft.details["least_recall"]
                        if least is None or least >= config.indexes.recall:
                            break
                if index_choice.neighbors_apart(model, made.kind, indexable(manifest)):
                    found = replace(made, kind="ivf_pq").neighbors()
                    if found is not None:  # else all are compared
                        with draft.local_file(NEIGHBORS) as path:
                            found[0].save(path)
                            size = {"bytes": Path(path).stat().st_size}
                        figures = pa.concat_tables(
                            [figures, pa.Table.from_pylist([one | size for one in found[1]], SCHEMA)]
                        )
                        draft.details |= {"neighbors": size | {"efforts": _efforts(found[0])}}
                draft.write(figures)
        result[f"{INDEX}/{entity}"] = store.manifest(f"{INDEX}/{entity}", snapshot)
    return result


def _tried(config: TwhinConfig, kind: Kind, rows: int) -> list[Kind]:
    """Return which kinds are built, until one reaches the wanted recall.

    A graph of inner products may leave short vectors out of reach, however broadly it is searched (Morozov and Babenko,
    2018); lists do not, and where there are too few vectors for these, comparing all takes no longer.
    """
    if kind == "hnsw" and rows < LEAST_FOR_PQ:
        return ["hnsw", "flat"]
    return ["hnsw", "ivf_pq"] if kind == "hnsw" and config.indexes.kind == "auto" else [kind]


def _scorer(store: Store, relations: Manifest, model: TwhinModelConfig) -> Scorer:
    rows: dict[str, torch.Tensor] = {}
    for path in store.files_of(relations):
        with store.parquet(path) as file:
            rows |= parameters_of(file.read(columns=["relation", "embedding"]))
    return Scorer.from_rows(model, rows).eval()


@dataclass(frozen=True)
class _Making:
    """One type's index in the making."""

    config: TwhinConfig
    store: Store
    snapshot: str
    model: TwhinModelConfig
    scorer: Scorer
    entity: str
    kind: Kind

    def write(self, path: str) -> tuple[pa.Table, dict[str, Any]]:
        """Build the index, choose how hard to search, write FAISS's file; return the figures and the details."""
        chosen, table, comparator = self.config.indexes, self._table(self.entity), self.scorer.comparator
        searcher, build_s = self._built(table, comparator)
        searcher.save(path)
        exact = ExactSearch(comparator, table.vectors, table.trained)
        queries, groups = self._queries()
        ks = chosen.recall_at
        best = exact.search(queries, min(ks[-1], len(searcher)))[1]
        if len(queries):
            searcher.efforts = vector_index.tuned(searcher, queries, best, groups, ks, chosen.recall)
        else:  # nobody can ask, as no head of these relations was trained
            searcher.efforts = {k: vector_index.least_effort(searcher, k) for k in ks}
        size = Path(path).stat().st_size
        shared = {"kind": self.kind, "rows": len(searcher), "bytes": size, "build_s": build_s}
        searcher.threads = 1
        exact_ms = _milliseconds(partial(exact.search, k=ks[0]), queries[:: max(1, len(queries) // 5)])
        figures = []
        for number in np.unique(groups).tolist():
            own = np.flatnonzero(groups == number)
            for k in ks:
                scores = searcher.search(queries[own], k)[1]
                figures.append(
                    {
                        "relation": self.model.relation_names[number],
                        "k": k,
                        "recall": vector_index.recall(scores, best[own], k),
                        "wanted_recall": chosen.recall,
                        "queries": len(own),
                        "latency_ms": _milliseconds(partial(searcher.search, k=k), queries[own]),
                        "exact_ms": exact_ms,
                        "parameters": str(searcher.effort(k)),
                        **shared,
                    }
                )
        least = min((one["recall"] for one in figures), default=None)
        details = {**shared, "least_recall": least, "efforts": _efforts(searcher)}
        return pa.Table.from_pylist(figures, schema=SCHEMA), details

    def neighbors(self) -> tuple[VectorIndex, list[dict[str, Any]]] | None:
        """Build the index that finds neighbors by the cosine; return it with its figures, but for its size.

        None where it does not find the wanted share. Recall is that of neighbors drawn by the seed.
        """
        chosen, table, comparator = self.config.indexes, self._table(self.entity), Cosine()
        searcher, build_s = self._built(table, comparator)
        rows = np.arange(len(table)) if searcher.rows is None else searcher.rows
        drawn = np.random.default_rng(chosen.seed).permutation(rows)[: chosen.queries]
        queries = _prepared(comparator, table.vectors[np.sort(drawn)])
        exact = ExactSearch(comparator, table.vectors, table.trained)
        best = exact.search(queries, min(chosen.recall_at[-1] + 1, len(searcher)))[1]
        figures, exact_ms = [], _milliseconds(partial(exact.search, k=chosen.recall_at[0]), queries[:5])
        for k in chosen.recall_at:
            # Each is its own nearest one, so neighbors are the others of k + 1.
            wanted = (k * chosen.recall + 1) / (k + 1)
            group = np.zeros(len(queries), np.int64)
            searcher.threads = database.threads(self.config)
            searcher.efforts |= vector_index.tuned(searcher, queries, best, group, [k + 1], wanted)
            searcher.threads = 1
            with_itself = vector_index.recall(searcher.search(queries, k + 1)[1], best, k + 1)
            if with_itself < wanted:
                return None
            figures.append(
                {
                    "relation": None,
                    "k": k,
                    "recall": (with_itself * (k + 1) - 1) / k,
                    "wanted_recall": chosen.recall,
                    "queries": len(queries),
                    "latency_ms": _milliseconds(partial(searcher.search, k=k + 1), queries),
                    "exact_ms": exact_ms,
                    "kind": self.kind,
                    "parameters": str(searcher.effort(k + 1)),
                    "rows": len(searcher),
                    "build_s": build_s,
                }
            )
        return searcher, figures

    def _built(self, table: EntityTable, comparator: Comparator) -> tuple[VectorIndex, float]:
        """Return an index of the table's trained rows, for no k yet, and the seconds that building it took."""
        rows, threads = trained_rows(table), database.threads(self.config)
        started = time.perf_counter()
        index = vector_index.build(
            self.kind,
            _blocks(table, rows, comparator),
            self._sample(table, rows, comparator),
            len(table) if rows is None else len(rows),
            comparator=comparator,
            seed=self.config.indexes.seed,
            threads=threads,
        )
        build_s = time.perf_counter() - started
        return VectorIndex(index, self.kind, comparator, table.vectors, {}, rows, threads), build_s

    def _table(self, entity: str) -> EntityTable:
        return EntityTable.open(self.store, self.store.manifest(f"embeddings/{entity}", self.snapshot))

    def _sample(self, table: EntityTable, rows: np.ndarray | None, comparator: Comparator) -> np.ndarray:
        """Return vectors to learn codes from, drawn by the seed, prepared."""
        count = len(table) if rows is None else len(rows)
        wanted = vector_index.learned_from(count) if self.kind == "ivf_pq" else 0
        drawn = np.sort(np.random.default_rng(self.config.indexes.seed).permutation(count)[:wanted])
        return _prepared(comparator, table.vectors[drawn if rows is None else rows[drawn]])

    def _queries(self) -> tuple[np.ndarray, np.ndarray]:
        """Return prepared queries float32 `[Q, D]` of relations that lead to the type, and each one's relation."""
        numbers = [number for number, one in enumerate(self.model.relations) if one.rhs == self.entity]
        each = max(self.config.indexes.queries // len(numbers), 10)
        positives = database.parquet(self.store.files(POSITIVES, self.snapshot))
        with database.connect(self.config, self.store) as con:
            drawn = con.execute(
                f"SELECT rel, lhs FROM (SELECT DISTINCT rel, lhs FROM {positives} WHERE list_contains(?, rel)) "
                "QUALIFY row_number() OVER (PARTITION BY rel ORDER BY hash(lhs + ?), lhs) <= ? ORDER BY rel, lhs",
                [numbers, self.config.indexes.seed << 32, each],
            ).fetchnumpy()
        groups = drawn["rel"].astype(np.int64)
        queries = np.empty((len(groups), self.model.embedding_dim), np.float32)
        for number in np.unique(groups).tolist():
            heads = self._table(entity := self.model.relations[number].lhs)
            own = groups == number
            rows = self._places(entity, drawn["lhs"][own])
            scores = RelationScores(self.scorer, number, to_tensor(heads.vectors), to_tensor(heads.vectors))
            with torch.inference_mode():
                queries[own] = scores.encode_queries("rhs", rows).numpy()
        return queries, groups

    def _places(self, entity: str, rows: np.ndarray) -> np.ndarray:
        """Return where rows of a vocabulary are in its embeddings table, which lacks those that were evicted."""
        manifest = self.store.manifest(f"embeddings/{entity}", self.snapshot)
        if not manifest.details.get("evicted"):
            return rows.astype(np.int64)
        kept = self.store.read(manifest.asset, self.snapshot, ["row"])["row"].to_numpy()
        return np.searchsorted(kept, rows)


def _efforts(searcher: VectorIndex) -> dict[str, Any]:
    return {str(k): asdict(effort) for k, effort in searcher.efforts.items()}


def trained_rows(table: EntityTable) -> np.ndarray | None:
    """Return the rows that an index is made of, int64 `[N]`: those with a training edge. None: all of them."""
    return None if table.trained is None or table.trained.all() else np.flatnonzero(table.trained)


def _prepared(comparator: Comparator, vectors: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return comparator.prepare(to_tensor(vectors)).numpy()


def _blocks(table: EntityTable, rows: np.ndarray | None, comparator: Comparator) -> Iterator[np.ndarray]:
    """Yield the vectors of rows, prepared, block by block."""
    size = max(1, BATCH_ROWS // 4)
    for start in range(0, len(table) if rows is None else len(rows), size):
        part = slice(start, start + size)
        yield _prepared(comparator, table.vectors[part if rows is None else rows[part]])


def _milliseconds(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    """Return the median time of a search of one query."""
    times = []
    for query in queries[:TIMED]:
        started = time.perf_counter()
        search(query[np.newaxis])
        times.append(time.perf_counter() - started)
    return float(np.median(times) * 1e3) if times else float("nan")


def open_index(
    store: Store, manifest: Manifest, table: EntityTable, model: TwhinModelConfig, wanted: Wanted = "tails"
) -> VectorIndex | None:
    """Open the index that finds an entity type as tails or as neighbors; None where it has none for that.

    Raises:
        UserError: The extra `index` is missing, or the file is damaged.
    """
    details, kind, name = manifest.details, manifest.details["kind"], FILE
    if kind == "none":
        return None
    comparator = COMPARATORS[model.comparator](model.temperature)
    if wanted == "neighbors":
        comparator = Cosine()
        if model.comparator != "cosine":
            if "neighbors" not in details:
                return None
            details, kind, name = details["neighbors"], "ivf_pq", NEIGHBORS
    extras.need("faiss", "search by an index")
    store.files_of(manifest)  # refuses a file of another size
    folder = f"{store.root}/{manifest.asset}/{manifest.snapshot}/{manifest.version}"
    path = Path(folder) / name
    if not store.is_local:
        names = [FILE, *([NEIGHBORS] if "neighbors" in manifest.details else [])]
        path = cached(store, manifest, lambda draft: _fetch(store, folder, names, draft), COPY) / name
    efforts = {int(k): Effort(**effort) for k, effort in details["efforts"].items()}
    return VectorIndex.open(path, kind, comparator, table.vectors, efforts, trained_rows(table))


def _fetch(store: Store, place: str, names: list[str], folder: Path) -> None:
    fs: fsspec.AbstractFileSystem = store.fs
    for name in names:
        fs.get_file(fs._strip_protocol(f"{place}/{name}"), str(folder / name))
