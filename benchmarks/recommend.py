"""Times recommendations for all heads by exact search, beside FAISS's exact search used directly.

    python benchmarks/recommend.py --store STORE --relation visits [-k 20] [--threads 2] [--repeats 3]
    python benchmarks/recommend.py --rows 10000000 [--dim 32] [--heads 100]

The first opens a trained store, recommends to every head that has training edges, without what it has, and reads the
answers as Arrow batches with ids. FAISS (IndexFlat) gets the same prepared vectors in memory and returns rows; it
leaves nothing out. Each runs in a process of its own, in turns; the median counts.

The second writes one entity type of random vectors, opens it in a fresh process, and recommends to some heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil
from reading import id_of, write

MIB = 1 << 20
COLUMNS = ("import_s", "open_s", "all_s", "cpu_s", "users_s", "faiss_s", "faiss_cpu_s", "ratio", "memory_mib", "load")


def own_mib(process: psutil.Process) -> float:
    """Return this process's memory without pages of mapped files, which are the system's to take back."""
    info = process.memory_info()
    return (info.rss - info.shared) / MIB


def everyone(store: str, relation: str | None, k: int, threads: int) -> dict[str, Any]:
    """Open a model and recommend to all heads."""
    started = time.perf_counter()
    import torch

    from twhin_pipeline.vectors import scoring  # noqa: F401 - so that importing it is not counted below
    from twhin_pipeline.vectors.opening import load_model

    torch.set_num_threads(threads)
    process = psutil.Process()
    before, cpu, imported = own_mib(process), sum(process.cpu_times()[:2]), time.perf_counter()
    model = load_model(store)
    opened = time.perf_counter()
    rows, heads = 0, set()
    answers = model.recommend(relation, k=k)
    for batch in answers:
        rows += len(batch)
        heads.update(batch.column("lhs").unique().to_pylist())
    done = time.perf_counter()
    return {
        "import_s": imported - started,
        "open_s": opened - imported,
        "all_s": done - imported,
        "heads": len(heads),
        "rows": rows,
        "memory_mib": own_mib(process) - before,
        "cpu_s": sum(process.cpu_times()[:2]) - cpu,
        "load": psutil.getloadavg()[0],
    }


def faiss_flat(store: str, relation: str | None, k: int, threads: int) -> dict[str, Any]:
    """Search the same prepared vectors by FAISS."""
    import faiss
    import numpy as np
    import torch

    from twhin_pipeline.vectors.opening import load_model

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    model = load_model(store)
    number, left, right = model._relation(relation)
    heads, tails = model.tables[left], model.tables[right]
    queries = model._scores.queries(number, np.array(heads.vectors[np.flatnonzero(heads.trained)]))
    comparator = model._scores.scorer.comparator
    prepared = comparator.prepare(torch.from_numpy(np.array(tails.vectors))).numpy()
    distance = model.config.comparator in ("l2", "squared_l2")
    process = psutil.Process()
    cpu, started = sum(process.cpu_times()[:2]), time.perf_counter()
    index = (faiss.IndexFlatL2 if distance else faiss.IndexFlatIP)(prepared.shape[1])
    index.add(prepared)
    index.search(queries, k)
    used = sum(process.cpu_times()[:2]) - cpu
    return {"faiss_s": time.perf_counter() - started, "faiss_cpu_s": used, "faiss": faiss.__version__}


def large(store: str, rows: int, heads: int, k: int, threads: int) -> dict[str, Any]:
    """Open a large model and recommend to some heads; nothing is known about them."""
    import warnings

    import torch

    from twhin_pipeline.vectors.opening import load_model

    warnings.simplefilter("ignore")  # that there are no edges
    torch.set_num_threads(threads)
    process = psutil.Process()
    before, started = own_mib(process), time.perf_counter()
    model = load_model(store)
    found: dict[str, Any] = {"open_s": time.perf_counter() - started, "open_mib": own_mib(process) - before}
    ids = [id_of(row * 7919 % rows, "string") for row in range(heads)]
    model.recommend("follows", ids[0], k)  # reads the files and what torch needs
    for name, asked in (("one_s", ids[0]), (f"{heads}_s", ids)):
        started = time.perf_counter()
        answer = model.recommend("follows", asked, k)
        if not isinstance(answer, list):
            assert answer.read_all().num_rows == heads * k
        found[name] = time.perf_counter() - started
    return found | {"memory_mib": own_mib(process) - before, "peak_rss_mib": _peak_mib()}


def _peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(what: str, *arguments: str) -> dict[str, Any]:
    """Run one of these functions in a process of its own."""
    command = [sys.executable, __file__, "--child", what, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a trained store")
    parser.add_argument("--relation")
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="generate a model of so many rows instead")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--heads", type=int, default=100)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "large":
        print(json.dumps(large(options.store, options.rows, options.heads, options.k, options.threads)))
    elif options.child:
        function = {"everyone": everyone, "faiss": faiss_flat}[options.child]
        print(json.dumps(function(options.store, options.relation, options.k, options.threads)))
    elif options.rows:
        with tempfile.TemporaryDirectory(prefix="twhin-recommend-") as root:
            figures: dict[str, Any] = write(root, options.rows, options.dim, "string")
            arguments = ["--store", root, "--rows", str(options.rows), "--heads", str(options.heads)]
            figures |= child("large", *arguments, "-k", str(options.k), "--threads", str(options.threads))
        for name, value in figures.items():
            print(f"{name:<14}{value:>12,.3f}")
    else:
        arguments = ["--store", options.store, "-k", str(options.k), "--threads", str(options.threads)]
        arguments += ["--relation", options.relation] if options.relation else []
        runs = [child("everyone", *arguments) | child("faiss", *arguments) for _ in range(options.repeats)]
        print("".join(f"{name:>12}" for name in COLUMNS))
        for run in runs:
            run["users_s"], run["ratio"] = run["heads"] / run["all_s"], run["all_s"] / run["faiss_s"]
            print("".join(f"{run[name]:>12,.2f}" for name in COLUMNS))
        every, faiss = (statistics.median(run[name] for run in runs) for name in ("all_s", "faiss_s"))
        print(
            f"{runs[0]['heads']:,} heads, {runs[0]['rows']:,} rows: median {every:.2f} s with opening, "
            f"FAISS {runs[0]['faiss']} {faiss:.2f} s, ratio {every / faiss:.2f}"
        )


if __name__ == "__main__":
    main()
