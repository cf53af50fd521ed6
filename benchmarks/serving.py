"""Loads `twhin serve` on generated vectors with autocannon: latencies, requests a second, memory, changes of release.

    npm install autocannon                   # in a folder of its own
    python benchmarks/serving.py --autocannon FOLDER/node_modules/.bin/autocannon
        [--rows 1000000] [--dim 64] [--users 100000] [--workers 2] [--index auto] [--seconds 15] [--json FILE]

It writes two releases as the stages do: users with 10 edges each, and `--rows` items in clusters. For each endpoint the
highest rate is measured (8 connections, each with one request at a time), then latencies at half that rate. There
autocannon counts from the moment at which a request was due, not from that at which it could send it. At last the other
release is promoted under load, and then rolled back to: every response must be 200.

Service and autocannon run on the same machine, and share its cores.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import psutil
import pyarrow as pa
import torch

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.model_files import Writer, manifest_details

SNAPSHOTS = ("2025-01-01", "2025-01-02")
CLUSTERS, BLOCK, EDGES = 2_000, 65_536, 10
ASKED = 2_000
"""Different requests of each kind."""
MIB = 1 << 20


def config_of(dim: int, index: str) -> TwhinConfig:
    """Return the configuration: users buy items."""
    tables = [{"name": name, "embedding_dim": dim} for name in ("user", "item")]
    model = {"embeddings": {"tables": tables}, "relations": [{"name": "buy", "lhs": "user", "rhs": "item"}]}
    return parse_config({"source": {"path": "none.csv"}, "model": model, "indexes": {"kind": index}})


def clustered(rows: int, centers: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Return vectors around centres, of unequal lengths, float32 `[rows, D]`."""
    result = np.empty((rows, centers.shape[1]), np.float32)
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        noise = 0.7 * rng.normal(size=(size, centers.shape[1])).astype(np.float32)
        lengths = np.exp(0.3 * rng.normal(size=(size, 1))).astype(np.float32) / centers.shape[1] ** 0.5
        result[start : start + size] = (centers[rng.integers(CLUSTERS, size=size)] + noise) * lengths
    return torch.from_numpy(result)


def id_of(entity: str, row: int) -> str:
    """Return the id of a row."""
    return f"{entity}-{row * 2_654_435_761 % (1 << 40):x}"


def make_release(store: Store, snapshot: str, config: TwhinConfig, sizes: dict[str, int], seed: int) -> Release:
    """Write a snapshot's tables as the stages do, and a release of them that is not current."""
    from twhin_pipeline.vectors import indexing

    rng = np.random.default_rng(seed)
    ids = {entity: pa.array([id_of(entity, row) for row in range(size)]) for entity, size in sizes.items()}
    heads = np.repeat(np.arange(sizes["user"]), EDGES)
    tails = rng.integers(0, sizes["item"], len(heads))

    def write(asset: str, table: pa.Table, parents: dict[str, str]) -> None:
        with store.replace(asset, snapshot, config_hash="benchmark", parents=parents) as draft:
            draft.write(table)

    names = {"lhs": ids["user"].take(pa.array(heads)), "rhs": ids["item"].take(pa.array(tails))}
    edges = pa.table({"rel": pa.array(["buy"]).take(pa.array(np.zeros(len(heads), np.int64))), **names})
    write("raw_edges", edges.sort_by("lhs"), {})
    for entity, size in sizes.items():
        rows = {"id": ids[entity], "row": np.arange(size), "degree": np.ones(size, np.int64)}
        write(f"vocabulary/{entity}", pa.table(rows), store.versions(snapshot, ["raw_edges"]))
    vocabularies = store.versions(snapshot, [f"vocabulary/{entity}" for entity in sizes])
    # Each item has a training edge, so that all of them are recommended.
    lhs = np.concatenate([heads, rng.integers(0, sizes["user"], sizes["item"])])
    rhs = np.concatenate([tails, np.arange(sizes["item"])])
    zeros, ones = np.zeros(len(lhs), np.int32), np.ones(len(lhs), np.float32)
    columns = {"chunk": zeros, "lhs": lhs, "rhs": rhs, "rel": zeros, "weight": ones}
    write("training_set/positives", pa.table(columns), vocabularies)
    centers = rng.normal(size=(CLUSTERS, config.model.embedding_dim)).astype(np.float32)
    parents = vocabularies | store.versions(snapshot, ["training_set/positives"])
    with store.replace("twhin_model", snapshot, config_hash="benchmark", parents=parents) as draft:
        writer = Writer(draft, 0)
        for entity, size in sizes.items():
            writer.table(entity, [(0, clustered(size, centers, rng))])
        writer.relations(config.model, Scorer(config.model).state_rows())
        draft.details = manifest_details(config)
    export(config, store, snapshot)
    tables = store.versions(snapshot, [*(f"embeddings/{entity}" for entity in sizes), "embeddings/relations"])
    if config.indexes.kind != "none":
        started = time.perf_counter()
        made = indexing.build(config, store, snapshot, {})
        tables |= {name: manifest.version for name, manifest in made.items()}
        print(f"{snapshot}: index made in {time.perf_counter() - started:.0f} s", flush=True)
    return releases.make(store, snapshot, tables, {}, None)


class Service:
    """A running service."""

    def __init__(self, root: str, workers: int) -> None:
        command = [sys.executable, "-m", "twhin_pipeline.cli", "serve", "--home", root, "--port", "0"]
        command += ["--workers", str(workers), "--interval", "0.5", "--no-access-log"]
        self.log = tempfile.NamedTemporaryFile(prefix="twhin-serving-", suffix=".log")  # noqa: SIM115 - closed in `stop`
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        started = time.perf_counter()
        while self.lines().count("answering from") < workers:
            if self.process.poll() is not None:
                raise SystemExit(self.lines())
            time.sleep(0.1)
        self.ready_s = time.perf_counter() - started
        found = re.search(r"http://\S+", self.lines())
        assert found is not None
        self.url = found[0]

    def lines(self) -> str:
        """Return its log."""
        return Path(self.log.name).read_text()

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def memory(self) -> dict[str, float]:
        """Return memory of the workers together, MiB: resident pages, and with shared pages divided (PSS)."""
        children = [one for one in psutil.Process(self.process.pid).children() if "spawn_main" in str(one.cmdline())]
        infos = [one.memory_full_info() for one in children]
        return {
            "rss": sum(one.rss for one in infos) / MIB,
            "pss": sum(one.pss for one in infos) / MIB,
            "own": sum(one.uss for one in infos) / MIB,
        }

    def ready(self) -> dict[str, Any]:
        """Return what /readyz says."""
        with urllib.request.urlopen(f"{self.url}/readyz") as answer:
            result: dict[str, Any] = json.load(answer)
            return result


class Autocannon:
    """The load tool."""

    def __init__(self, program: str, folder: Path, connections: int) -> None:
        self.program, self.folder, self.connections = program, folder, connections

    def run(
        self, url: str, requests: list[dict[str, Any]], seconds: float, rate: float | None = None
    ) -> dict[str, Any]:
        """Send requests, in turn, as fast as they are answered or at a rate; return the tool's figures."""
        entries = [{"request": {**one, "url": url + one["url"], "headers": one.get("headers", [])}} for one in requests]
        file = self.folder / "requests.har"
        file.write_text(json.dumps({"log": {"entries": entries}}))
        command = [self.program, "--json", "--no-progress", "--har", str(file), "-c", str(self.connections)]
        command += ["-d", str(round(seconds)), *(["--overallRate", str(max(1, round(rate)))] if rate else []), url]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def questions(sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Return requests by kind."""
    rng = np.random.default_rng(5)
    users = [id_of("user", row) for row in rng.integers(0, sizes["user"], ASKED).tolist()]
    items = [id_of("item", row) for row in rng.integers(0, sizes["item"], ASKED).tolist()]

    def get(path: str, **asked: Any) -> dict[str, Any]:
        return {"method": "GET", "url": f"{path}?{urlencode(asked)}"}

    return {
        "recommend": [get("/recommend", id=user, relation="buy", k=10) for user in users],
        "neighbors": [get("/neighbors", entity="item", id=item, k=10) for item in items],
        "score": [get("/score", lhs=user, rhs=item, relation="buy") for user, item in zip(users, items, strict=True)],
        "embedding": [get("/embedding", entity="item", id=item) for item in items],
    }


def promote_under_load(
    service: Service, store: Store, made: list[Release], tool: Autocannon, asked: list[dict[str, Any]], rate: float
) -> dict[str, Any]:
    """Promote the second release under load, then roll back; return the tool's figures and how long changes took."""
    seconds, changes = 30.0, []

    def change() -> None:
        for release in (made[1], made[0]):
            time.sleep(seconds / 5)
            started = time.perf_counter()
            releases.promote(store, release.name, "benchmark", "load")
            while service.lines().rsplit(f"answering from release {release.name}, before", 1)[-1] == service.lines():
                time.sleep(0.1)
            changes.append(time.perf_counter() - started)

    thread = threading.Thread(target=change)
    thread.start()
    result = tool.run(service.url, asked, seconds, rate)
    thread.join()
    return {"result": result, "change_s": changes}


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return what is shown of the tool's figures."""
    latency = result["latency"]
    lost = result["non2xx"] + result["errors"] + result["timeouts"]
    return {
        "requests_s": result["requests"]["average"], "p50_ms": latency["p50"], "p90_ms": latency["p90"],
        "p99_ms": latency["p99"], "max_ms": latency["max"], "requests": result["requests"]["total"], "lost": lost,
    }  # fmt: skip


def show(name: str, values: dict[str, float]) -> None:
    """Print a line."""
    print(f"{name:<34}" + "".join(f"{key} {value:>9,.1f}  " for key, value in values.items()), flush=True)


def main() -> None:
    """Write, serve, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autocannon", default="autocannon", help="the program")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--index", default="auto", help="indexes.kind")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", help="keep the releases in this folder, and take those that are there")
    parser.add_argument("--json", help="write the figures here, too")
    options = parser.parse_args()
    sizes = {"user": options.users, "item": options.rows}
    with tempfile.TemporaryDirectory(prefix="twhin-serving-") as folder:
        store = Store(options.store or f"{folder}/home")
        config = config_of(options.dim, options.index)
        made = [releases.read(store, name) for name in releases.names(store)]
        if not made:
            made = [make_release(store, at, config, sizes, seed) for seed, at in enumerate(SNAPSHOTS)]
        releases.promote(store, made[0].name, "benchmark", "first")
        tool = Autocannon(options.autocannon, Path(folder), options.connections)
        found: dict[str, Any] = {"load_average": psutil.getloadavg()[0]}
        asked = questions(sizes)
        for workers in sorted({1, options.workers}):
            service = Service(store.root, workers)
            try:
                tool.run(service.url, [one for some in asked.values() for one in some], 5)
                found[f"memory_{workers}"] = service.memory() | {"ready_s": service.ready_s}
                show(f"{workers} worker(s), MiB", found[f"memory_{workers}"])
                if workers == options.workers:
                    measure(service, store, made, tool, asked, options, found)
            finally:
                service.stop()
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def measure(
    service: Service, store: Store, made: list[Release], tool: Autocannon, asked: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace, found: dict[str, Any],
) -> None:  # fmt: skip
    """Measure each endpoint, then the changes of release."""
    for kind, requests in asked.items():
        runs = []
        for _ in range(options.repeats):
            peak = figures(tool.run(service.url, requests, options.seconds))
            half = figures(tool.run(service.url, requests, options.seconds, peak["requests_s"] / 2))
            runs.append((peak, half, psutil.getloadavg()[0]))
            show(f"{kind}, as fast as answered", peak)
            show(f"{kind}, at half of that", half)
        found[kind] = runs
        middle = {key: statistics.median(half[key] for _, half, _ in runs) for key in ("p50_ms", "p99_ms")}
        show(
            f"{kind}, medians at half", middle | {"peak": statistics.median(peak["requests_s"] for peak, _, _ in runs)}
        )
    peak_rate = statistics.median(peak["requests_s"] for peak, _, _ in found["recommend"])
    changed = promote_under_load(service, store, made, tool, asked["recommend"], peak_rate / 2)
    found["changes"] = figures(changed["result"]) | {"change_s": max(changed["change_s"])}
    show("recommend, two changes of release", found["changes"])
    assert service.ready()["release"] == made[0].name
    assert found["changes"]["lost"] == 0, service.lines()


if __name__ == "__main__":
    main()
