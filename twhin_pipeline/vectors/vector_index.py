"""Approximate search in one entity type's vectors, by FAISS (Douze et al., 2024, "The Faiss library").

What `search` returns are the model's scores: where an index has compressed vectors, it finds some times as many rows as
are wanted, and the comparator scores these from the table. The index is over prepared vectors (`Scorer.candidates`). As
tails, these do not depend on the relation, so one index serves every relation that leads to the type; the relation's
operator is applied to the query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from twhin_pipeline.model.comparators import Comparator, Cosine, Dot
from twhin_pipeline.vectors.index_choice import LINKS, Kind

if TYPE_CHECKING:
    import faiss

BUILD_BREADTH = 64
"""How many nodes HNSW looks at to find a node's neighbours (efConstruction)."""
CODE_ELEMENTS = 4
"""Elements of a vector that become one byte of its code (product quantization; Jégou et al., 2011)."""
CODE_ROWS, CODE_ROUNDS = 16_384, 10
"""Vectors that codebooks are learned from, and rounds of k-means."""
ROTATIONS = 4
"""Rounds in which the rotation before the quantizer is learned (OPQ; Ge et al., 2013). FAISS's 50 take minutes."""
LIST_ROWS = 64
"""Vectors that each list's centre is learned from."""
BREADTHS = tuple(dict.fromkeys(round(8 * 2 ** (step / 2)) for step in range(19)))
"""How broadly a search may look, from 8 to 4,096: efSearch of HNSW, nprobe of an inverted file."""
REFINED = (4, 16, 64)
"""How many times as many rows as wanted are scored exactly, where the index has compressed vectors."""
LEAST_GAIN = 0.001
"""Where a broader search of compressed vectors finds no more than this, more rows are scored."""


@dataclass(frozen=True)
class Effort:
    """How hard a search looks."""

    breadth: int = 0
    """efSearch of HNSW, nprobe of an inverted file; a flat index has none."""
    refined: int = 1
    """How many times as many rows as wanted are scored."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items() if value > (name == "refined"))


class VectorIndex:
    """A searcher (`retrieval.Searcher`): an index of N of a table's vectors, and the table, to score its rows.

    For each of some k it has the effort that reaches the wanted recall.
    """

    def __init__(
        self,
        index: faiss.Index,
        kind: Kind,
        comparator: Comparator,
        vectors: np.ndarray,
        efforts: Mapping[int, Effort],
        rows: np.ndarray | None = None,
        threads: int | None = None,
    ) -> None:
        """Take a FAISS index.

        Args:
            index: Over prepared vectors.
            kind: What it is.
            comparator: How queries and rows are compared.
            vectors: The table's, not prepared, float32 `[M, D]`; may be mapped from a file.
            efforts: By k, in ascending order, how hard to look; may be empty where each call of `search` says it.
            rows: The table's row of each of the index's vectors, int64 `[N]`; None: they are the same.
            threads: That share the queries of a call; None: as many as `torch.get_num_threads()` says.
        """
        # A plain array over the same memory: to take rows of `np.memmap` costs many times as much.
        self.index, self.kind, self.comparator, self.vectors = index, kind, comparator, np.asarray(vectors)
        self.efforts, self.rows, self.threads = dict(efforts), rows, threads
        self.count = int(index.ntotal) if index is not None else 0
        # What a search of one query would spend a tenth of its time on: FAISS's parameters by k, and torch where an
        # array of NumPy will do, as it does for products.
        self._ready: dict[int, tuple[Effort, Any]] = {}
        self._by_numpy: Any = comparator.logits if isinstance(comparator, Dot) else None

    @classmethod
    def open(
        cls,
        path: Path,
        kind: Kind,
        comparator: Comparator,
        vectors: np.ndarray,
        efforts: Mapping[int, Effort],
        rows: np.ndarray | None = None,
        threads: int | None = None,
    ) -> VectorIndex:
        """Open what `save` wrote; the other arguments are those of the constructor.

        It is mapped into memory: processes share it, and pages are read when they are needed.
        """
        import faiss

        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        return cls(index, kind, comparator, vectors, efforts, rows, threads)

    def save(self, path: str) -> None:
        """Write FAISS's index."""
        import faiss

        faiss.write_index(self.index, path)

    most = BREADTHS[-1]
    """For more rows than this a search of all rows is about as fast."""

    def __len__(self) -> int:
        return self.count

    def effort(self, k: int) -> Effort:
        """Return how hard to look for k rows: as for the next larger k that was measured, beyond it in proportion."""
        for measured, effort in self.efforts.items():
            if k <= measured:
                return effort
        return Effort(math.ceil(effort.breadth * k / measured), effort.refined)

    def search(self, queries: np.ndarray, k: int, effort: Effort | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the best rows that the index finds, best first.

        Args:
            queries: float32 `[Q, D]`, prepared.
            k: How many.
            effort: How hard to look; None: as `self.effort` says.

        Returns:
            Rows int64 `[Q, k]` and the scorer's scores float32 `[Q, k]`; where fewer were found, -1 and minus infinity.
        """
        import faiss

        if effort is not None:
            parameters = self._searching(effort)
        else:
            if k not in self._ready:
                self._ready[k] = (self.effort(k), self._searching(self.effort(k)))
            effort, parameters = self._ready[k]
        faiss.omp_set_num_threads(self.threads or torch.get_num_threads())  # of calls by this thread
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = min(k * effort.refined, self.count)
        if not wanted or not len(queries):
            return ranked(np.full((len(queries), 1), -1), np.full((len(queries), 1), -np.inf, np.float32), k)
        values, found = self.index.search(queries, wanted, params=parameters)
        missing = found < 0
        rows = found if self.rows is None else np.where(missing, -1, self.rows[found])
        if self.kind == "ivf_pq":
            return ranked(rows, self._scores(queries, rows), k)
        scores = self._by_numpy(values) if self._by_numpy else self._logits(values)
        scores[missing] = -np.inf
        return (rows, scores) if wanted == k else ranked(rows, scores, k)

    def _logits(self, values: np.ndarray) -> np.ndarray:
        return self.comparator.logits(torch.from_numpy(values)).numpy()

    def _scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the scores float32 `[Q, n]` of rows `[Q, n]`; minus infinity where they are below 0.

        FAISS's loops read each row where it is, so none is copied. Lengths are distances from the origin.
        """
        import faiss

        loops: Any = faiss  # its types lack them
        rows = np.ascontiguousarray(rows, np.int64)

        def each(measure: Any, against: np.ndarray) -> np.ndarray:
            out = np.empty(rows.shape, np.float32)
            measure(*map(loops.swig_ptr, (out, against, self.vectors, rows)), self.vectors.shape[1], *rows.shape)
            return out

        by_product = isinstance(self.comparator, Dot)
        values = each(loops.fvec_inner_products_by_idx if by_product else loops.fvec_L2sqr_by_idx, queries)
        if isinstance(self.comparator, Cosine):
            squares = each(loops.fvec_L2sqr_by_idx, np.zeros_like(queries))
            with np.errstate(invalid="ignore"):  # of rows below 0
                values /= np.maximum(np.sqrt(squares), np.float32(1e-8))
            values[rows < 0] = -np.inf
        return self._by_numpy(values) if self._by_numpy else self._logits(values)

    def _searching(self, effort: Effort) -> Any:
        """Return FAISS's parameters of a search."""
        import faiss

        made: Any = None
        if self.kind == "hnsw":
            made = faiss.SearchParametersHNSW(efSearch=effort.breadth)  # type: ignore[attr-defined]
        elif self.kind == "ivf_pq":
            lists = faiss.SearchParametersIVF(nprobe=effort.breadth)  # type: ignore[call-arg]
            made = faiss.SearchParametersPreTransform(index_params=lists)  # type: ignore[call-arg]
        return made


def ranked(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of rows int64 `[Q, n]` and scores float32 `[Q, n]`, both `[Q, k]`, best first.

    Where n is below k, -1 and minus infinity follow.
    """
    if rows.shape[1] < k:
        missing = ((0, 0), (0, k - rows.shape[1]))
        rows = np.pad(rows, missing, constant_values=-1)
        scores = np.pad(scores, missing, constant_values=-np.inf)
    line = np.arange(len(rows))[:, np.newaxis]
    if rows.shape[1] > 4 * k:  # to sort all of them would take longer than to score them
        some = np.argpartition(scores, -k, axis=1)[:, -k:]
        rows, scores = rows[line, some], scores[line, some]
    best = np.lexsort((rows, -scores))[:, :k]
    return rows[line, best], scores[line, best]


def build(
    kind: Kind,
    blocks: Iterable[np.ndarray],
    sample: np.ndarray,
    count: int,
    *,
    comparator: Comparator,
    seed: int = 0,
    threads: int = 1,
) -> faiss.Index:
    """Build an index, block by block.

    With one thread the same vectors give the same index. With more, HNSW links nodes in the order in which threads
    come to them, and two indexes find different rows now and then.

    Args:
        kind: Which.
        blocks: The vectors, prepared, float32 `[n, D]`, together `[count, D]`.
        sample: Some of them, `[S, D]`, that codes are learned from; read for `ivf_pq`, which takes `LEAST_FOR_PQ`.
        count: How many vectors come.
        comparator: How they are compared.
        seed: Of what codes are learned from.
        threads: That build.
    """
    import faiss

    dim = sample.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT if isinstance(comparator, Dot) else faiss.METRIC_L2
    index: Any
    with _threads(threads):
        if kind == "ivf_pq":
            index = _trained(sample, count, dim, metric, seed)
        else:
            index = faiss.index_factory(dim, "Flat" if kind == "flat" else f"HNSW{LINKS},Flat", metric)
            if kind == "hnsw":
                index.hnsw.efConstruction = BUILD_BREADTH
        for block in blocks:
            index.add(np.ascontiguousarray(block, np.float32))
    return index


def lists_for(count: int) -> int:
    """Return in how many lists an inverted file of so many vectors has them: a power of 2 near twice the root."""
    return 2 ** max(round(math.log2(2 * math.sqrt(max(count, 1)))), 0)


def learned_from(count: int) -> int:
    """Return how many of so many vectors lists and codes are learned from."""
    return min(count, max(CODE_ROWS, LIST_ROWS * lists_for(count)))


def _trained(sample: np.ndarray, count: int, dim: int, metric: int, seed: int) -> faiss.Index:
    import faiss

    parts = dim // CODE_ELEMENTS  # "np": without FAISS's Hamming codes, which nothing here reads
    index: Any = faiss.index_factory(dim, f"OPQ{parts},IVF{lists_for(count)},PQ{parts}x8np", metric)
    rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    rotation.niter, rotation.niter_pq_0, rotation.niter_pq = ROTATIONS, CODE_ROUNDS, ROTATIONS
    rotation.max_train_points = CODE_ROWS
    lists: Any = faiss.downcast_index(index.index)
    lists.cp.max_points_per_centroid, lists.pq.cp.max_points_per_centroid = LIST_ROWS, CODE_ROWS // 256
    for learned in (lists.cp, lists.pq.cp):
        learned.seed, learned.niter = seed, CODE_ROUNDS
        learned.min_points_per_centroid = 1  # so that FAISS prints nothing about small samples
    index.train(np.ascontiguousarray(sample, np.float32))
    return index


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def recall(found: np.ndarray, best: np.ndarray, k: int) -> float:
    """Return recall@k of a search: the share of the k best that it found, as ann-benchmarks counts (Aumüller, 2018).

    A row counts where its score reaches that of the k-th best, so that of rows with equal scores any will do.

    Args:
        found: Scores of what was found, float32 `[Q, n]`.
        best: The best scores there are, in descending order, `[Q, m]`, m being k or, where there are fewer rows, all.
        k: How many count.
    """
    wanted = min(k, best.shape[1])
    least = best[:, wanted - 1 : wanted]
    hits = (found >= least - 1e-5 * np.abs(least)).sum(1)
    return float(np.minimum(hits, wanted).mean() / wanted)


def tuned(
    index: VectorIndex, queries: np.ndarray, best: np.ndarray, groups: np.ndarray, ks: Iterable[int], wanted: float
) -> dict[int, Effort]:
    """Return for each k the least effort by which recall@k of every group of queries is the wanted one, or the best.

    Args:
        index: The index.
        queries: float32 `[Q, D]`, prepared.
        best: The best scores there are, as of `recall`.
        groups: int64 `[Q]`: the group, such as a relation, of each query.
        ks: Which k, ascending.
        wanted: The recall.
    """
    result: dict[int, Effort] = {}
    of_group = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for k in ks:
        tried: list[tuple[float, Effort]] = [(-1.0, Effort())]
        for efforts in _efforts(index, k):
            before = -1.0
            for effort in efforts:
                scores = index.search(queries, k, effort)[1]
                tried.append((min(recall(scores[own], best[own], k) for own in of_group), effort))
                # What compressed vectors rank too low, more lists do not find.
                if tried[-1][0] >= wanted or (index.kind == "ivf_pq" and tried[-1][0] < before + LEAST_GAIN):
                    break
                before = tried[-1][0]
            if tried[-1][0] >= wanted:
                break
        result[k] = max(tried, key=lambda one: one[0])[1]
    return result


def least_effort(index: VectorIndex, k: int) -> Effort:
    """Return the least that `tuned` tries."""
    return _efforts(index, k)[0][0]


def _efforts(index: VectorIndex, k: int) -> list[list[Effort]]:
    """Return what to try: lists, each in ascending order of what it costs."""
    import faiss

    if index.kind == "flat":
        return [[Effort()]]
    if index.kind == "hnsw":  # FAISS looks at k at least
        return [[Effort(breadth) for breadth in BREADTHS if breadth >= min(k, BREADTHS[-1])]]
    lists = int(faiss.extract_index_ivf(index.index).nlist)
    breadths = [breadth for breadth in BREADTHS if breadth < lists] + [lists]
    return [[Effort(breadth, refined) for breadth in breadths] for refined in REFINED]
