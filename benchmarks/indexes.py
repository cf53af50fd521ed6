"""Times indexes and their searches on generated vectors, against FAISS used directly with the same parameters.

    python benchmarks/indexes.py [--rows 1000000] [--dim 64] [--kinds hnsw ivf_pq] [--comparator dot] [--json FILE]

Vectors are clusters of unequal lengths. Each index is built as the stage `index` does, its effort is chosen for the
wanted recall, and its file is opened anew. "Direct" is FAISS on the same file, read into memory; of compressed vectors
FAISS's `IndexRefine` scores the same number of rows from vectors in memory. Searches take turns, in one thread each.
Times are medians, of one query and of a batch: the CPU time of the thread, which other processes change little.
With `--folder` what was generated and built there before is taken again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from twhin_pipeline.model.comparators import COMPARATORS, Comparator, Dot
from twhin_pipeline.vectors import vector_index
from twhin_pipeline.vectors.retrieval import ExactSearch
from twhin_pipeline.vectors.vector_index import Effort, VectorIndex

BLOCK = 65_536
CLUSTERS = 2_000
KS = (10, 100)


def clusters(rows: int, dim: int, path: Path) -> np.ndarray:
    """Return vectors float32 `[rows, dim]`, mapped from a file, which is written where it is missing."""
    if path.exists():
        return np.load(path, mmap_mode="r")
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(CLUSTERS, dim)).astype(np.float32)
    result = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        noise = 0.7 * rng.normal(size=(size, dim)).astype(np.float32)
        lengths = np.exp(0.3 * rng.normal(size=(size, 1))).astype(np.float32) / dim**0.5
        result[start : start + size] = (centers[rng.integers(CLUSTERS, size=size)] + noise) * lengths
    result.flush()
    return np.load(path, mmap_mode="r")


def prepared(comparator: Comparator, vectors: np.ndarray) -> np.ndarray:
    """Return what the comparator compares."""
    with torch.inference_mode():
        return comparator.prepare(torch.tensor(vectors)).numpy()


def in_turn(searches: dict[str, Callable[[np.ndarray], object]], queries: list[np.ndarray]) -> dict[str, float]:
    """Return each search's median milliseconds for one of the arrays of queries; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for number, query in enumerate(queries):
        order = list(searches) if number % 2 else list(searches)[::-1]
        for name in order:
            started = time.thread_time()
            searches[name](query)
            times[name].append(time.thread_time() - started)
    return {name: float(np.median(values[len(values) // 10 :]) * 1e3) for name, values in times.items()}


def direct(index: Any, kind: str, effort: Effort, vectors: np.ndarray, metric: int) -> Callable[..., object]:
    """Return FAISS's own search with the same parameters: of queries `[Q, D]` and k."""
    if kind == "flat":
        return lambda query, k: index.search(query, k)
    if kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=effort.breadth)
        return lambda query, k: index.search(query, k, params=parameters)
    flat = faiss.IndexFlat(vectors.shape[1], metric)
    flat.add(vectors)
    refined = faiss.IndexRefine(index, flat)
    refined.referenced_objects = [index, flat]  # FAISS holds pointers alone
    inner = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=effort.breadth))
    parameters = faiss.IndexRefineSearchParameters(k_factor=effort.refined, base_index_params=inner)
    return lambda query, k: refined.search(query, k, params=parameters)


def measure(kind: Any, options: argparse.Namespace, vectors: np.ndarray, queries: np.ndarray, folder: Path) -> Any:
    """Build and search one kind of index; return the figures."""
    comparator = COMPARATORS[options.comparator](1.0)
    figures: dict[str, Any] = {"kind": kind, "build_s": None, "build_cpu_s": None}
    path = folder / f"{kind}-{options.comparator}.faiss"
    if not path.exists():
        rng = np.random.default_rng(1)
        sample = np.sort(rng.permutation(len(vectors))[: vector_index.learned_from(len(vectors))])
        started, worked = time.perf_counter(), time.process_time()
        blocks = (prepared(comparator, vectors[at : at + BLOCK]) for at in range(0, len(vectors), BLOCK))
        learned = prepared(comparator, vectors[sample])
        built = vector_index.build(kind, blocks, learned, len(vectors), comparator=comparator, threads=options.threads)
        figures |= {"build_s": time.perf_counter() - started, "build_cpu_s": time.process_time() - worked}
        VectorIndex(built, kind, comparator, vectors, {}).save(str(path))
        del built
    figures["size_mib"] = path.stat().st_size / 2**20
    started = time.perf_counter()
    index = VectorIndex.open(path, kind, comparator, vectors, {})
    figures["open_ms"] = (time.perf_counter() - started) * 1e3
    best = ExactSearch(comparator, vectors).search(queries, KS[-1])[1]
    index.efforts = vector_index.tuned(index, queries, best, np.zeros(len(queries), int), KS, options.recall)
    metric = faiss.METRIC_INNER_PRODUCT if isinstance(comparator, Dot) else faiss.METRIC_L2
    in_memory = faiss.read_index(str(path))
    faiss.omp_set_num_threads(1)
    for k in KS:
        effort = index.effort(k)
        search = direct(in_memory, kind, effort, prepared(comparator, vectors), metric)
        both = {
            "ours": lambda query, k=k: index.search(query, k),
            "direct": lambda query, k=k, search=search: search(query, k),
        }
        batches = [queries] * 4 if kind == "flat" else [queries] * 10
        single = [queries[i : i + 1] for i in range(len(queries))] * (1 if kind == "flat" else 4)
        figures[f"k={k}"] = {
            "effort": str(effort),
            "recall": vector_index.recall(index.search(queries, k)[1], best, k),
            "single_ms": in_turn(both, single),
            "batch_ms_per_query": {name: ms / len(queries) for name, ms in in_turn(both, batches).items()},
        }
        print(kind, k, json.dumps(figures[f"k={k}"]), flush=True)
    return figures


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=["hnsw", "ivf_pq"], choices=["flat", "hnsw", "ivf_pq"])
    parser.add_argument("--comparator", default="dot", choices=["dot", "cosine", "l2", "squared_l2"])
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2, help="Of building.")
    parser.add_argument("--folder", type=Path, help="Where files are kept; default: nowhere.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = clusters(options.rows + options.queries, options.dim, folder / "vectors.npy")
        comparator = COMPARATORS[options.comparator](1.0)
        queries = prepared(comparator, drawn[options.rows :])
        vectors = drawn[: options.rows]
        exact = ExactSearch(comparator, vectors)
        ms = in_turn({"exact": lambda query: exact.search(query, KS[0])}, [queries[i : i + 1] for i in range(10)])
        print(f"{options.rows:,} x {options.dim}, {options.comparator}; exact search {ms['exact']:.1f} ms a query")
        results.append({"kind": "exact", "rows": options.rows, "dim": options.dim, "single_ms": ms["exact"]})
        for kind in options.kinds:
            results.append(measure(kind, options, vectors, queries, folder))
    print("| index | build, CPU s | MiB | open ms | k | effort | recall | one query: ours / direct, ms | of a batch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one in results[1:]:
        for k in KS:
            row = one[f"k={k}"]
            single, batch = row["single_ms"], row["batch_ms_per_query"]
            built = f"{one['build_cpu_s']:.0f}" if one["build_cpu_s"] is not None else "as before"
            print(
                f"| {one['kind']} | {built} | {one['size_mib']:.0f} | {one['open_ms']:.0f} | {k} "
                f"| {row['effort']} | {row['recall']:.3f} | {single['ours']:.3f} / {single['direct']:.3f} "
                f"| {batch['ours']:.3f} / {batch['direct']:.3f} |"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
