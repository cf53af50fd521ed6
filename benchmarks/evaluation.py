"""Times the ranking of a published graph's test edges beside PyKEEN's, and the retrieval of a published catalogue.

    python benchmarks/evaluation.py [--data FOLDER] [--repeats 3] [--json figures.json]

FB15k-237: filtered ranks of all test edges against all entities, both sides, dimension 256, of one random DistMult
model that both are given. Ours is timed from the edges in Parquet to the metrics, as `twhin evaluate` computes them;
of PyKEEN only its evaluator's call is, at the fastest of some batch sizes, and with scores by a matrix product, which
its own DistMult lacks (`--own-distmult` takes that one). Vectors are normal ones rounded to eighths, so every score is
exact in float32, whatever the order of its sum: ties are real ones, and the metrics must agree.
Gowalla: Recall@20 of all test users, dimension 64, ours alone.

PyKEEN gets an environment of its own below `--home` (made on the first call, from PyPI). A repeat times one after the
other; the ratio is taken within a repeat, and the median over repeats is printed, of seconds and of CPU time, which
other work on the machine touches less. The data sets are not part of the project; `--data` names the folder that holds
them. Exit code 1: the metrics do not agree; 2: the data is not there. docs/performance.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.environments import peer_python

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.evaluation.held_out import HeldOut, Questions, read_edges, read_filters, read_retrieval
from twhin_pipeline.evaluation.rank_metrics import joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import database
from twhin_pipeline.words import SIDES

ROOT = Path(__file__).resolve().parent.parent
GRAPH, CATALOGUE = "fb15k-237", "gowalla"
SPLITS = ("train", "validation", "test")
AGREE = 1e-6
"""How far metrics may be apart, as a share."""


@dataclass(frozen=True)
class Graph:
    """A published graph with its entities numbered: Parquet files (`lhs`, `rel`, `rhs`) by split, and how many."""

    files: dict[str, str]
    relations: int
    heads: int
    tails: int
    edges: dict[str, int]

    @property
    def held_out(self) -> HeldOut:
        """Return the files as evaluation takes them."""
        train, validation, test = ([self.files[split]] if self.edges[split] else [] for split in SPLITS)
        return HeldOut("test", test, train, validation)


def number(source: Path, home: Path, *, types: int) -> Graph:
    """Write a published graph's edges with rows in the place of ids; of two entity `types`, each has its own rows."""
    home.mkdir(parents=True, exist_ok=True)
    with database.connect() as con:
        con.execute(f"CREATE VIEW edges AS SELECT * FROM {database.parquet([str(source)])}")
        both = "SELECT lhs AS id FROM edges UNION ALL SELECT rhs FROM edges"
        ids = {"lhs": both, "rhs": both} if types == 1 else {s: f"SELECT {s} AS id FROM edges" for s in SIDES}
        ids["rel"] = "SELECT rel AS id FROM edges"
        sizes = {}
        for name, query in ids.items():
            rows = f"SELECT id, row_number() OVER (ORDER BY id) - 1 AS row FROM (SELECT DISTINCT id FROM ({query}))"
            con.execute(f"CREATE TABLE {name}_rows AS {rows}")
            sizes[name] = con.sql(f"SELECT count(*) FROM {name}_rows").fetchall()[0][0]
        files, edges = {}, {}
        for split in SPLITS:
            files[split] = str(home / f"{split}.parquet")
            con.execute(
                f"COPY (SELECT l.row AS lhs, k.row::INTEGER AS rel, r.row AS rhs FROM edges e "
                f"JOIN lhs_rows l ON l.id = e.lhs JOIN rel_rows k ON k.id = e.rel JOIN rhs_rows r ON r.id = e.rhs "
                f"WHERE e.split = '{split}' ORDER BY ALL) TO {database.literal(files[split])} (FORMAT parquet)"
            )
            edges[split] = con.sql(f"SELECT count(*) FROM {database.parquet([files[split]])}").fetchall()[0][0]
    return Graph(files, sizes["rel"], sizes["lhs"], sizes["rhs"], edges)


def config_of(relations: int, operator: str, dim: int, threads: int) -> TwhinConfig:
    """Return the configuration of a model of one table on each side, compared by dot product."""
    listed = [{"name": f"r{n}", "lhs": "a", "rhs": "b", "operator": operator} for n in range(relations)]
    tables = [{"name": name, "embedding_dim": dim} for name in ("a", "b")]
    model = {"embeddings": {"tables": tables}, "relations": listed, "comparator": "dot"}
    return parse_config({"source": {"path": "edges.parquet"}, "model": model, "launch": {"data_threads": threads}})


def eighths(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw normal numbers, rounded to eighths, none beyond 4: the sum of 256 products of three is exact in float32."""
    return (np.round(rng.normal(size=shape) * 8).clip(-32, 32) / 8).astype(np.float32)


def rank(config: TwhinConfig, graph: Graph, vectors: torch.Tensor, scorer: Scorer) -> dict[str, Any]:
    """Rank the test edges on both sides, each relation by itself; return seconds and metrics."""
    started, cpu = time.perf_counter(), time.process_time()
    held_out, found = graph.held_out, []
    with database.connect(config) as con:
        edges = {n: one for n, one in enumerate(read_edges(con, held_out.test, graph.relations)) if len(one["lhs"])}
        candidates = CandidateSet(len(vectors))
        for side in SIDES:
            known = read_filters(con, held_out.known, side, edges)
            for n, one in edges.items():
                scores = RelationScores(scorer, n, vectors, vectors)
                asked = Questions.of(side, one, candidates, [known[n]])
                found.append(asked.rank(scores, config.evaluation.block_size)[1])
    metrics = rank_metrics("filtered", joined(found).ranks, [10])
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "metrics": {name.removeprefix("filtered_"): value for name, value in metrics.items()},
    }


def retrieve(config: TwhinConfig, graph: Graph, heads: torch.Tensor, tails: torch.Tensor) -> tuple[float, float]:
    """Rank all heads' test tails in the whole catalogue less what they have in training; return seconds and recall."""
    scorer = Scorer(config.model)
    started = time.perf_counter()
    held_out = graph.held_out
    with database.connect(config) as con:
        edges = dict(enumerate(read_edges(con, held_out.test, 1)))
        asked = read_retrieval(con, edges, {0: CandidateSet(graph.tails)}, held_out)[0]
    counts = asked.rank(RelationScores(scorer, 0, heads, tails), config.evaluation.block_size)[1]
    recall = retrieval_metrics(asked.queries, counts, [20])["recall@20"]
    return time.perf_counter() - started, recall


def peer(home: Path, python: Path, graph: Graph, given: dict[str, np.ndarray], work: dict[str, Any]) -> Any:
    """Rank the same edges by the same vectors with PyKEEN, as `work` says; return what it wrote."""
    arrays, result = home / "arrays.npz", home / "pykeen.json"
    with database.connect() as con:
        for split, file in graph.files.items():
            columns = con.execute("SELECT lhs, rel::BIGINT, rhs FROM read_parquet(?)", [[file]]).fetchnumpy()
            given[split] = np.stack(list(columns.values()), axis=1)
    np.savez(arrays, **given)
    told = home / "work.json"
    told.write_text(json.dumps({"arrays": str(arrays), "result": str(result), **work}))
    log = home / "pykeen.log"
    env = {**os.environ, "OMP_NUM_THREADS": str(work["threads"]), "PYSTOW_HOME": str(home / "pystow")}
    with log.open("w") as out:
        command = [str(python), str(ROOT / "benchmarks/peers/pykeen_evaluation.py"), str(told)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=home)
    if done.returncode:
        raise SystemExit(f"PyKEEN failed with {done.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")
    return json.loads(result.read_text())


def compare(options: argparse.Namespace, home: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rank FB15k-237's test edges with both; return each repeat's figures, and whether all metrics agree."""
    python = None if options.no_peer else peer_python(home, "PyKEEN")
    folder = home / GRAPH
    graph = number(options.data / GRAPH / "edges.parquet", folder, types=1)
    config = config_of(graph.relations, "diagonal", 256, options.threads)
    rng = np.random.default_rng(0)
    given = {"vectors": eighths(rng, graph.heads, 256), "rows": eighths(rng, graph.relations, 256)}
    rows = dict(zip(config.model.relation_names, torch.from_numpy(given["rows"]), strict=True))
    vectors, scorer = torch.from_numpy(given["vectors"]), Scorer.from_rows(config.model, rows)
    print(
        f"{GRAPH}: {graph.edges['test']:,} test edges against {graph.heads:,} entities, both sides, dimension 256, "
        f"{options.threads} threads"
    )
    repeats, agree = [], True
    work = {"threads": options.threads, "batch_sizes": options.batch_sizes, "own_distmult": options.own_distmult}
    rank(config, graph, vectors, scorer)  # loads the compiled loops, as PyKEEN's trial of batch sizes warms it up
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        ours = rank(config, graph, vectors, scorer)
        found: dict[str, Any] = {"load": load, "ours": ours}
        print(f"repeat {repeat + 1}, ours: {told(ours)} (load before: {load:.1f})", flush=True)
        if python is not None:
            load = os.getloadavg()[0]
            theirs = found["PyKEEN"] = peer(folder, python, graph, given, work)
            work["batch_sizes"] = [theirs["batch_size"]]
            print(
                f"repeat {repeat + 1}, PyKEEN: {told(theirs)}, {theirs['batch_size']} edges a batch (load before: "
                f"{load:.1f})",
                flush=True,
            )
            pairs = [(value, theirs["metrics"][name]) for name, value in ours["metrics"].items()]
            agree = agree and all(math.isclose(a, b, rel_tol=AGREE) for a, b in pairs)
        repeats.append(found)
    if python is not None:
        for what, name in (("seconds", "seconds"), ("seconds of CPU time", "cpu_seconds")):
            ratios = [one["PyKEEN"][name] / one["ours"][name] for one in repeats]
            listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{what}, PyKEEN's to ours: median {statistics.median(ratios):.2f} of {listed}")
        print(f"metrics: {'agree' if agree else 'DO NOT AGREE'} to {AGREE:g}")
    return repeats, agree


def told(ranked: dict[str, Any]) -> str:
    """Return one ranking's figures, for people."""
    listed = ", ".join(f"{name} {value:.9g}" for name, value in ranked["metrics"].items())
    return f"{ranked['seconds']:.2f} s ({ranked['cpu_seconds']:.2f} s of CPU time), {listed}"


def catalogue(options: argparse.Namespace, home: Path) -> list[dict[str, float]]:
    """Time Gowalla's retrieval; return each repeat's figures."""
    graph = number(options.data / CATALOGUE / "edges.parquet", home / CATALOGUE, types=2)
    config = config_of(1, "identity", 64, options.threads)
    generator = torch.Generator().manual_seed(0)
    heads, tails = (torch.randn(size, 64, generator=generator) for size in (graph.heads, graph.tails))
    print(
        f"{CATALOGUE}: {graph.edges['test']:,} test edges of {graph.heads:,} users, {graph.tails:,} places, dimension "
        f"64, {options.threads} threads"
    )
    repeats = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        cpu = time.process_time()
        seconds, recall = retrieve(config, graph, heads, tails)
        cpu = time.process_time() - cpu
        print(
            f"repeat {repeat + 1}: {seconds:.2f} s ({cpu:.2f} s of CPU time), recall@20 {recall:.6f} (load before: "
            f"{load:.1f})",
            flush=True,
        )
        repeats.append({"load": load, "seconds": seconds, "cpu_seconds": cpu, "recall@20": recall})
    print(f"seconds: median {statistics.median(one['seconds'] for one in repeats):.2f}")
    return repeats


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=2, help="of either")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="PyKEEN is tried with")
    parser.add_argument("--own-distmult", action="store_true", help="PyKEEN's own scores, some times slower")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "evaluation")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    missing = [name for name in (GRAPH, CATALOGUE) if not (options.data / name / "edges.parquet").is_file()]
    if missing:
        named = ", ".join(f"{name}/edges.parquet" for name in missing)
        print(
            f"evaluation: {options.data}: has no {named}; pass the folder of the data sets by --data", file=sys.stderr
        )
        return 2
    torch.set_num_threads(options.threads)
    home = options.home.resolve()
    ranked, agree = compare(options, home)
    retrieved = catalogue(options, home)
    if options.json:
        given = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": given, GRAPH: ranked, CATALOGUE: retrieved}))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
