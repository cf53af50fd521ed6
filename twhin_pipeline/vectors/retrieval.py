"""The best rows of a table for many queries at once.

A *searcher* has the vectors of one entity type, and returns the k best rows for each of many prepared queries. This one
is exact: blocked matrix products by torch, on as many threads as `torch.get_num_threads()` says. An index that finds
most of them faster has the same method `search`, and `best_rows` takes it with the exact one (`IndexSearch`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from twhin_pipeline.model.comparators import Comparator
from twhin_pipeline.model.relation_scores import to_tensor
from twhin_pipeline.vectors.row_pairs import RowPairs

QUERIES = 128
"""Queries that are compared at a time."""
TILE_ROWS = 4096
"""Rows that are compared at a time, more with fewer queries: 2 MiB of scores, which stay in a core's cache until they
have been looked at."""
KEPT_ROWS = 32_768
"""Rows whose scores are kept until their best are taken, 16 MiB: a multiple of TILE_ROWS."""
GROUP = 32
"""Scores that a group has, of which the highest is looked at first."""
Found = tuple[torch.Tensor, torch.Tensor]
"""Scores and rows, `[Q, n]` each, best first."""


class Searcher(Protocol):
    """Finds the rows that score highest."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best rows for each query, best first.

        Args:
            queries: Prepared ones, float32 `[Q, D]`.
            k: How many, above 0.

        Returns:
            Rows, int64 `[Q, k]`, -1 where there are fewer; and their scores, float32 `[Q, k]`.
        """


@dataclass(frozen=True)
class IndexSearch:
    """An index, and the exact search of the same rows for what the index cannot answer (`best_rows`)."""

    index: Searcher
    exact: ExactSearch
    most: int
    """Rows that the index is asked for at most: beyond it, comparing all of them is about as fast."""


class ExactSearch:
    """Compares every query with every row.

    Memory does not grow with the table: rows are prepared and compared a tile at a time, and of each tile only the k
    best of a query are kept. It takes about 30 MiB, and 12 bytes times k for each query of one call.
    """

    def __init__(self, comparator: Comparator, vectors: np.ndarray, allowed: np.ndarray | None = None) -> None:
        """Take what is compared.

        Args:
            comparator: How.
            vectors: The rows, not prepared, float32 `[N, D]`; may be mapped from a file.
            allowed: The rows that may be returned, bool `[N]`; None: all.
        """
        self.comparator, self.vectors = comparator, to_tensor(vectors)
        self.barred = np.zeros(0, np.int64) if allowed is None else np.flatnonzero(~allowed)

    def without(self, rows: np.ndarray) -> ExactSearch:
        """Return a search of the same vectors that does not return `rows` int64 `[n]` either."""
        result = copy.copy(self)
        result.barred = np.union1d(self.barred, rows)
        return result

    def search(self, queries: np.ndarray, k: int, left_out: RowPairs | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best rows for each query, best first; equal scores in the order of rows.

        Args:
            queries: As in `Searcher.search`.
            k: As in `Searcher.search`.
            left_out: Rows that are not to be returned for a query.

        Returns:
            As `Searcher.search`; where there are fewer rows, scores are minus infinity.
        """
        rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        if not len(self.vectors):
            return rows, scores
        threads, of_queries = torch.get_num_threads(), to_tensor(queries)
        blocks = range(0, len(queries), QUERIES)
        # Few queries are compared with parts of the table at a time, many with all of it.
        parts = _parts(len(self.vectors), 1 if len(blocks) >= threads else threads)

        def search(start: int, part: range) -> Found:
            pairs = None if left_out is None else left_out.of(start, start + QUERIES).by_row()
            return self._block(of_queries[start : start + QUERIES], k, pairs, part)

        for start, found in zip(blocks, _each(search, [(b, parts) for b in blocks], threads), strict=True):
            best, place = _merged(found, k)
            rows[start : start + QUERIES, : best.shape[1]] = place
            scores[start : start + QUERIES, : best.shape[1]] = best
        rows[scores == -np.inf] = -1
        return rows, scores

    @torch.inference_mode()
    def _block(self, queries: torch.Tensor, k: int, left_out: RowPairs | None, part: range) -> Found:
        """Search a part of the rows for Q queries, `[Q, D]`: scores and rows `[Q, min(k, n)]`.

        `left_out` is in the order of rows.
        """
        found: list[Found] = []
        width = min(TILE_ROWS * max(1, QUERIES // len(queries)), KEPT_ROWS)
        kept = torch.empty(len(queries), min(len(part) + GROUP, KEPT_ROWS))
        for start in range(part.start, part.stop, KEPT_ROWS):
            end = min(start + KEPT_ROWS, part.stop)
            groups = _Groups(kept)
            for first in range(start, end, width):
                groups.add(self._tile(queries, first, min(first + width, end), left_out))
            best, columns = groups.best(k)
            found = [_merged([*found, (best, columns + start)], k)]
        return found[0]

    def _tile(self, queries: torch.Tensor, first: int, last: int, left_out: RowPairs | None) -> torch.Tensor:
        """Return the scores of the rows from `first` to before `last`; minus infinity where one may not be returned."""
        vectors = self.comparator.prepare(self.vectors[first:last])
        scores = self.comparator.compare(queries, vectors)
        begin, end = np.searchsorted(self.barred, (first, last))
        if end > begin:
            scores.index_fill_(1, torch.from_numpy(self.barred[begin:end] - first), -torch.inf)
        if left_out is not None:
            begin, end = np.searchsorted(left_out.rows, (first, last))
            scores.numpy()[left_out.queries[begin:end], left_out.rows[begin:end] - first] = -np.inf
        return scores


def _parts(size: int, count: int) -> list[range]:
    """Divide rows into at most `count` parts."""
    length = max(-(-size // count), KEPT_ROWS)
    return [range(start, min(start + length, size)) for start in range(0, size, length)]


def _each(
    search: Callable[[int, range], Found],
    tasks: list[tuple[int, list[range]]],
    threads: int,
) -> Iterator[list[Found]]:
    """Yield what `search` returns for the parts of each task, in order, made in threads.

    Operations are small, so each thread does its own alone: torch's threads would wait for one another at each.
    """
    if threads == 1 or sum(len(parts) for _, parts in tasks) < 2:
        yield from ([search(start, part) for part in parts] for start, parts in tasks)
        return
    with ThreadPoolExecutor(threads, "search", torch.set_num_threads, (1,)) as pool:
        try:
            waiting = [[pool.submit(search, start, part) for part in parts] for start, parts in tasks]
            yield from ([one.result() for one in parts] for parts in waiting)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a thread's own number is that of all threads to come


def _merged(found: list[Found], k: int) -> Found:
    """Return the k best of scores and rows `[Q, n]` that were found in parts of the table, in the order of rows."""
    if len(found) == 1:
        return found[0]
    # Stable: equal scores stay in the order of rows.
    scores, order = torch.cat([scores for scores, _ in found], 1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], torch.cat([rows for _, rows in found], 1).gather(1, order)[:, :k]


class _Groups:
    """Scores of consecutive columns, `[Q, N]`, and the highest of each group of GROUP of them.

    The k highest scores are in the k groups with the highest maxima. So one pass over the scores, while they are in the
    cache, and a choice among a few hundred for each query find them.
    """

    def __init__(self, kept: torch.Tensor) -> None:
        """Take memory for the scores, `[Q, N + GROUP]` or a multiple of TILE_ROWS."""
        self.kept, self.columns = kept, 0
        self.maxima: list[torch.Tensor] = []
        self.first: list[torch.Tensor] = []
        self.step: list[torch.Tensor] = []

    def add(self, scores: torch.Tensor) -> None:
        """Add the scores of the next columns, `[Q, n]`; only the last n may be no multiple of GROUP."""
        start, count = self.columns, scores.shape[1]
        groups = -(-count // GROUP)
        self.kept[:, start : start + count] = scores
        if count < groups * GROUP:
            self.kept[:, start + count : start + groups * GROUP] = -torch.inf
            scores = self.kept[:, start : start + groups * GROUP]
        # Columns j, j + groups, j + 2 * groups … are a group: maxima are then taken of whole vectors.
        self.maxima.append(scores.unflatten(1, (GROUP, groups)).amax(1))
        self.first.append(torch.arange(start, start + groups))
        self.step.append(torch.full((groups,), groups))
        self.columns += count

    def best(self, k: int) -> Found:
        """Return the k highest scores and their columns, `[Q, min(k, N)]` each, in the order of score and column."""
        maxima = torch.cat(self.maxima, 1)
        if k * 4 > maxima.shape[1]:
            return highest(self.kept[:, : self.columns], k)
        high, chosen = maxima.topk(k, dim=1, sorted=False)
        first, step = torch.cat(self.first)[chosen], torch.cat(self.step)[chosen]
        columns = (first.unsqueeze(1) + step.unsqueeze(1) * torch.arange(GROUP).unsqueeze(1)).flatten(1)
        inside = self.kept.gather(1, columns)
        values, place = inside.topk(k, dim=1)
        lowest = values[:, -1:]
        # Where more scores than k are as high as the lowest, which of them topk returns is not defined.
        tied = (inside >= lowest).sum(1) > k
        tied |= (maxima >= lowest).sum(1) > (high >= lowest).sum(1)
        tied &= lowest[:, 0] > -torch.inf
        columns = columns.gather(1, place).sort(1)[0]
        values, order = self.kept.gather(1, columns).sort(dim=1, descending=True, stable=True)
        columns = columns.gather(1, order)
        if tied.any():
            values[tied], columns[tied] = highest(self.kept[tied, : self.columns], k)
        return values, columns


def highest(scores: torch.Tensor, k: int) -> Found:
    """Return the k highest of each row of `scores [Q, N]` and their columns, `[Q, min(k, N)]` each.

    The highest is first, and equal ones are in the order of columns: a stable sort of all.
    """
    values, columns = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


def best_rows(
    searcher: ExactSearch | IndexSearch, queries: np.ndarray, k: int, left_out: RowPairs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best rows for each query that are not left out, as `Searcher.search` returns them.

    An index cannot leave rows out, so it is asked for as many more as a query has left out: queries with up to 1, 3, 7
    … such rows are asked together. Where it finds fewer than k, or would be asked for too many, every row is compared.
    """
    if isinstance(searcher, ExactSearch):
        return searcher.search(queries, k, left_out)
    pairs = RowPairs.joined(()) if left_out is None else left_out
    rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    size = np.ceil(np.log2(np.bincount(pairs.queries, minlength=len(queries)) + 1)).astype(np.int64)
    for bits in np.unique(size).tolist():
        asked = k + (1 << bits) - 1
        if asked > searcher.most:
            continue
        chosen = np.flatnonzero(size == bits)
        found, values = searcher.index.search(queries[chosen], asked)
        if not bits:
            rows[chosen], scores[chosen] = found, values
            continue
        kept = (found >= 0) & ~pairs.contain(chosen, found)
        place = np.cumsum(kept, 1) - 1
        query, column = np.nonzero(kept & (place < k))
        target = chosen[query], place[query, column]
        rows[target], scores[target] = found[query, column], values[query, column]
    short = np.flatnonzero(rows[:, -1] < 0)
    if len(short):
        rows[short], scores[short] = searcher.exact.search(queries[short], k, pairs.among(short))
    return rows, scores
