"""Retrains Debian's package graph snapshot by snapshot, from random vectors and from the earlier model, and compares.

    python benchmarks/retraining.py [--epochs 12] [--fewer 3] [--pull 0.01] [--json figures.json]
    python benchmarks/retraining.py --nightly 1000000 [--epochs 10] [--fewer 10]

Every variant is a chain of its own in a store of its own, made by the stages of `twhin backfill`. The first snapshot is
the same cold training in all of them: it is made once, and its store copied. Both questions are the same for all
variants: the held-out edges that no earlier snapshot trained on, and the edges that are new in the next snapshot.
`--nightly` generates a graph and a second day of it with 1 % of the edges changed, and compares the time. Exit code 2:
what was asked for does not fit. docs/how-to/retrain-daily.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from quality import git_commit

from twhin_pipeline import pipeline, scratch
from twhin_pipeline.config import TwhinConfig, as_override, load_config, relations
from twhin_pipeline.config.training import PREVIOUS
from twhin_pipeline.embeddings import load_model
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.held_out import (
    Edges,
    HeldOut,
    Questions,
    read_edges,
    read_filters,
    read_retrieval,
    shares,
    some_heads,
    taken,
)
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet
from twhin_pipeline.graph import source
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.model.relation_scores import RelationScores, to_tensor
from twhin_pipeline.operations import generate
from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.training import launch
from twhin_pipeline.vectors.model_files import ModelTables
from twhin_pipeline.words import DRIFT, PROMOTION, SIDES

ROOT = Path(__file__).resolve().parent.parent
POSITIVES, VALIDATION, TEST = "training_set/positives", "held_out/validation", "held_out/test"
RECALL_AT = 20
WELL_KNOWN = "bash,python3,gcc,git,nginx,postgresql,vlc,gimp,firefox-esr,cmake"
DRIFT_SHOWN = ("cosine", "neighbors@10", "consumer_auc", "consumer_auc_new", "consumer_auc_mapped")
WARM = f"training.initial_checkpoint_dir={PREVIOUS}"
CHANGED = 100
"""One edge in so many is another one on the second day of `--nightly`."""
DAYS = ("2025-01-01", "2025-01-02")
# How each training runs: one rank, the model that is evaluated is the one that is published, however bad it is.
ALIKE = ("training.refit=false", "launch.nproc_per_node=1", "evaluation.floors={}")
Say = Callable[[str], None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Variant:
    """How the snapshots after the first one are trained."""

    name: str
    overrides: tuple[str, ...]

    @property
    def warm(self) -> bool:
        """Whether a training starts from the earlier model."""
        return WARM in self.overrides


@dataclass(frozen=True)
class Day:
    """One snapshot of one variant."""

    variant: str
    snapshot: str
    epochs: int
    """Of the configuration; `chosen_epoch` is the one that validation chose."""
    chosen_epoch: int
    started_from: str | None
    """The snapshot of the model that it started from."""
    stages: dict[str, float]
    """Seconds by stage, with its checks."""
    train_seconds: float
    """Of the training loop alone."""
    edges_per_second: float
    validation: float | None
    held_out: dict[str, float]
    """Of held-out edges that no earlier snapshot trained on: edges, mrr, recall; the same of those with a new id."""
    next_edges: dict[str, float]
    """Of edges that are new in the next snapshot, between ids trained in this one: edges, mrr."""
    drift: dict[str, dict[str, float]]
    """By entity type, the metrics of the table `drift`."""
    compared_with: str | None
    """The snapshot of the release that `drift` compares with."""
    decision: str
    reason: str

    @property
    def seconds(self) -> float:
        """Of the whole chain."""
        return sum(self.stages.values())


@dataclass
class Report:
    """Everything of one call, as `--json` writes it."""

    cores: int
    git_commit: str
    overrides: list[str]
    days: list[Day] = field(default_factory=list)
    neighbors: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By well-known id and snapshot: its nearest, of the shortest warm training without a pull."""


@dataclass(frozen=True)
class Chain:
    """The configuration and the snapshots that all variants share."""

    config_path: str
    overrides: tuple[str, ...]
    snapshots: tuple[str, ...]
    most_edges: int | None
    """Edges that are ranked at most, of each kind."""

    def configuration(self, more: Sequence[str] = ()) -> TwhinConfig:
        """Return the configuration with some more overrides."""
        return load_config(self.config_path, [*self.overrides, *more])

    def run(self, store: Store, snapshot: str, more: Sequence[str], say: Say) -> dict[str, float]:
        """Run the chain's stages for a snapshot and return the seconds of each, with its checks."""
        overrides = [*self.overrides, *more]
        this_run = pipeline.Run(self.configuration(more), self.config_path, overrides, store, snapshot)
        seconds = {}
        for name, stage in pipeline.STAGES.items():
            started = time.perf_counter()
            pipeline.run_stage(this_run, stage, say)
            seconds[name] = time.perf_counter() - started
        return seconds

    def day(self, store: Store, variant: Variant, snapshot: str, stages: dict[str, float]) -> Day:
        """Measure what `run` has made."""
        model = store.manifest("twhin_model", snapshot)
        drift, decided = store.manifest(DRIFT, snapshot), store.manifest(PROMOTION, snapshot)
        before = drift.details["compared_with"]
        moved: dict[str, dict[str, float]] = {}
        for row in store.read(DRIFT, snapshot).to_pylist():
            if row["kind"] == "entity":
                moved.setdefault(row["name"], {})[row["metric"]] = row["value"]
        started_from = model.details.get("started_from") or []
        with Asked(self, store, snapshot) as asked:
            held_out, next_edges = asked.held_out(), asked.of_next_snapshot()
        return Day(
            variant=variant.name, snapshot=snapshot, epochs=self.configuration(variant.overrides).training.num_epochs,
            chosen_epoch=model.details["chosen_epoch"],
            started_from=started_from[0]["snapshot"] if started_from else None, stages=stages,
            train_seconds=model.details["seconds"], edges_per_second=model.details["edges_per_second"],
            validation=model.details["best_validation"], held_out=held_out, next_edges=next_edges, drift=moved,
            compared_with=before and releases.read(store, before).snapshot, decision=decided.details["decision"],
            reason=decided.details["reason"],
        )  # fmt: skip


class Asked:
    """The same questions to each variant's model of a snapshot. A context: it reads the store by a connection.

    A vocabulary only appends, so an id has the same row in all snapshots of a store.
    """

    def __init__(self, chain: Chain, store: Store, snapshot: str) -> None:
        self.chain, self.store, self.snapshot = chain, store, snapshot
        self.config = relations.resolve(chain.configuration(), store, snapshot)
        tables = ModelTables.open(store, snapshot)
        scorer = tables.scorer()
        vectors = {
            name: to_tensor(tables.table(name)[: store.manifest(f"vocabulary/{name}", snapshot).rows])
            for name in tables.names
        }
        self.ends = [(one.lhs, one.rhs) for one in self.config.model.relations]
        self.scores = [RelationScores(scorer, n, vectors[a], vectors[b]) for n, (a, b) in enumerate(self.ends)]
        present = {name: present_rows(store, snapshot, name) for name in tables.names}
        self.candidates = {name: CandidateSet(len(vectors[name]), present[name]) for name in tables.names}
        self.trained = {name: self._trained(name, len(vectors[name])) for name in tables.names}

    def __enter__(self) -> Asked:
        self._folder = scratch.folder("retraining")
        self.folder = self._folder.__enter__()
        self.con: duckdb.DuckDBPyConnection = database.connect(self.config, self.store)
        return self

    def __exit__(self, *error: Any) -> None:
        self.con.close()
        self._folder.__exit__(*error)

    def _trained(self, entity: str, size: int) -> Array:
        table = self.store.read(f"embeddings/{entity}", self.snapshot, ["row", "trained_edges"])
        result = np.zeros(size, bool)
        result[table["row"].to_numpy()] = table["trained_edges"].to_numpy() > 0
        return result

    def _before(self) -> list[str]:
        """Return the training edges of the earlier snapshots."""
        earlier = [one for one in self.chain.snapshots if one < self.snapshot]
        return [file for one in earlier for file in self.store.files(POSITIVES, one)]

    def held_out(self) -> dict[str, float]:
        """Rank the held-out edges that no earlier snapshot trained on, and of these those with an id that is new."""
        held_out, before = HeldOut.open(self.store, self.snapshot), self._before()
        seen: dict[str, Array] = {name: np.zeros(len(rows), bool) for name, rows in self.trained.items()}
        if before:
            both = (
                f"SELECT DISTINCT t.rel, t.lhs, t.rhs FROM {database.parquet(held_out.test)} t "
                f"SEMI JOIN {database.parquet(before)} b USING (rel, lhs, rhs)"
            )
            held_out = held_out.without(self.con, self.con.sql(both).to_arrow_table(), self.folder)
            for number, one in enumerate(read_edges(self.con, before, len(self.ends))):
                for side, entity in zip(SIDES, self.ends[number], strict=True):
                    seen[entity][one[side]] = True
        found = self._some(read_edges(self.con, held_out.test, len(self.ends)))
        new = {
            number: ~(seen[self.ends[number][0]][one["lhs"]] & seen[self.ends[number][1]][one["rhs"]])
            for number, one in found.items()
        }
        ranks = self._reciprocal_ranks(found, held_out.known)
        result = self._mean(ranks)
        if before:
            result |= {f"new_{name}": value for name, value in self._mean(ranks, new).items()}
        return result | {"recall": self._recall(held_out)}

    def of_next_snapshot(self) -> dict[str, float]:
        """Rank the edges that are new in the next snapshot, between ids that this one's model was trained on."""
        later = next((one for one in self.chain.snapshots if one > self.snapshot), None)
        if later is None or not self.store.exists(TEST, later):
            return {}
        parts = (POSITIVES, VALIDATION, TEST)
        here, there = ([f for part in parts for f in self.store.files(part, at)] for at in (self.snapshot, later))
        everything = read_edges(self.con, there, len(self.ends))
        both = [
            taken(one, np.flatnonzero(self._known(a, one["lhs"]) & self._known(b, one["rhs"])))
            for one, (a, b) in zip(everything, self.ends, strict=True)
        ]
        file = f"{self.folder}/later.parquet"
        ends = {side: np.concatenate([one[side] for one in both]) for side in SIDES}
        rel = np.repeat(np.arange(len(both)), [len(one["lhs"]) for one in both])
        self.con.register("later_edges", pa.table([rel, *ends.values()], names=["rel", *ends]))
        added = f"{self.folder}/added.parquet"
        self.con.execute(f"COPY (SELECT * FROM later_edges) TO {database.literal(file)} (FORMAT parquet)")
        self.con.execute(
            f"COPY (SELECT DISTINCT l.rel, l.lhs, l.rhs FROM later_edges l ANTI JOIN {database.parquet(here)} h "
            f"USING (rel, lhs, rhs)) TO {database.literal(added)} (FORMAT parquet)"
        )
        found = self._some(read_edges(self.con, [added], len(self.ends)))
        return self._mean(self._reciprocal_ranks(found, [*here, file]))

    def _known(self, entity: str, rows: Array) -> Array:
        """Tell which rows the model was trained on: bool `[E]`. Rows behind its table are of the later snapshot."""
        trained = self.trained[entity]
        return trained[np.minimum(rows, len(trained) - 1)] & (rows < len(trained))

    def _some(self, edges: Sequence[Edges]) -> dict[int, Edges]:
        """Draw at most `most_edges`, the same for every variant, by relation; none of a relation without an edge."""
        counts = np.array([len(one["lhs"]) for one in edges], np.int64)
        limit = self.chain.most_edges
        wanted = counts if limit is None else shares(counts, limit)
        rng = np.random.default_rng(self.config.evaluation.seed)
        return {
            number: taken(one, np.sort(rng.choice(len(one["lhs"]), int(count), replace=False)))
            for number, (one, count) in enumerate(zip(edges, wanted, strict=True))
            if count
        }

    def _reciprocal_ranks(self, edges: Mapping[int, Edges], known: list[str]) -> dict[int, list[Array]]:
        """Return filtered reciprocal ranks by relation: float `[E]` for each side that the relation corrupts."""
        result: dict[int, list[Array]] = {number: [] for number in edges}
        for side in SIDES:
            filters = read_filters(self.con, known, side, edges)
            for number, one in edges.items():
                if side in self.config.corrupted_sides[self.config.model.relations[number].name]:
                    candidates = self.candidates[self.ends[number][SIDES.index(side)]]
                    questions = Questions.of(side, one, candidates, [filters[number]])
                    ranked = questions.rank(self.scores[number], self.config.evaluation.block_size)
                    result[number].append(1 / ranked[1].ranks)
        return result

    def _mean(self, ranks: Mapping[int, list[Array]], chosen: Mapping[int, Array] | None = None) -> dict[str, float]:
        """Return how many edges, and the mean of all their ranks."""
        kept = {n: [one if chosen is None else one[chosen[n]] for one in of_sides] for n, of_sides in ranks.items()}
        total = sum(len(of_sides[0]) for of_sides in kept.values())
        every = np.concatenate([one for of_sides in kept.values() for one in of_sides]) if total else np.zeros(0)
        return {"edges": float(total), "mrr": float(every.mean())} if total else {"edges": 0.0}

    def _recall(self, held_out: HeldOut) -> float:
        """Return the recall of heads' tails in the whole catalogue, as evaluation defines it."""
        edges = {n: one for n, one in enumerate(read_edges(self.con, held_out.test, len(self.ends))) if len(one["lhs"])}
        counts = np.array([len(one["lhs"]) for one in edges.values()], np.int64)
        limit = self.chain.most_edges
        limits = [None] * len(edges) if limit is None else shares(counts, limit).tolist()
        rng = np.random.default_rng(self.config.evaluation.seed)
        heads = {n: some_heads(one, most, rng) for (n, one), most in zip(edges.items(), limits, strict=True)}
        catalogue = {n: self.candidates[self.ends[n][1]] for n in heads}
        asked = read_retrieval(self.con, heads, catalogue, held_out)
        counted = [asked[n].rank(self.scores[n], self.config.evaluation.block_size)[1] for n in heads]
        query = distinct(one["lhs"] for one in heads.values())
        return retrieval_metrics(query, joined(counted), [RECALL_AT])[f"recall@{RECALL_AT}"]


def run_variants(chain: Chain, variants: Sequence[Variant], home: Path, report: Report, say: Say) -> None:
    """Train the first snapshot once, then every variant's others, and add the days to the report."""
    first, *others = chain.snapshots
    base = Variant("cold", ())
    stores = {variant: Store(str(home / f"variant-{number}")) for number, variant in enumerate(variants)}
    origin = Store(str(home / "first"))
    say(f"\nfirst snapshot {first}: store {origin.root}")
    seconds = {(base, first): chain.run(origin, first, (), say)}
    for store in stores.values():
        shutil.copytree(origin.root, store.root)
    for variant, store in stores.items():
        for snapshot in others:
            say(f"\n{variant.name}, snapshot {snapshot}: store {store.root}")
            seconds[variant, snapshot] = chain.run(store, snapshot, variant.overrides, say)
    say("\nthe same questions to every model")
    # The first model has the next snapshot's edges in any variant's store.
    report.days.append(chain.day(next(iter(stores.values())), base, first, seconds[base, first]))
    for variant, store in stores.items():
        report.days += [chain.day(store, variant, at, seconds[variant, at]) for at in others]


def debian_variants(config: TwhinConfig, fewer: int, pull: Sequence[float]) -> list[Variant]:
    """Return the ways to train the later snapshots. Raises UserError where the epochs cannot be so few."""
    epochs = config.training.num_epochs
    few = epochs // fewer
    if not few:
        raise UserError(f"--fewer {fewer}: leaves no epoch of {epochs}; pass a smaller number or more --epochs")
    words = {n: f"{n} epoch{'s' if n > 1 else ''}" for n in (epochs, few)}
    short = f"training.num_epochs={few}"
    return [
        Variant(f"cold, {words[epochs]}", ()),
        Variant(f"warm, {words[epochs]}", (WARM,)),
        Variant(f"cold, {words[few]}", (short,)),
        Variant(f"warm, {words[few]}", (WARM, short)),
        *(
            Variant(
                f"warm, {words[few]}, pull {weight:g}",
                (WARM, short, *(f"model.embeddings.tables.{name}.pull={weight}" for name in config.model.table_names)),
            )
            for weight in pull
        ),
    ]


def neighbors(store: Store, snapshots: Sequence[str], entity: str, names: Sequence[str], k: int) -> dict[str, Any]:
    """Return the nearest of some ids in each snapshot; nothing where a snapshot lacks the id."""
    models = {at: load_model(store.root, at) for at in snapshots}
    return {
        name: {
            at: [str(one) for one, _ in model.neighbors(entity, name, k)] if model.has(entity, name) else []
            for at, model in models.items()
        }
        for name in names
    }


def nightly(edges: int, folder: Path) -> Path:
    """Write a generated graph's two days, the second with some of the edges changed, and return its configuration."""
    users, items = max(edges // 20, 100), max(edges // 50, 100)
    path = folder / f"{DAYS[0]}.parquet"
    config = Path(generate.generate(str(path), users=users, items=items, edges=edges, snapshot=DAYS[0]))
    fresh = folder / "fresh" / "edges.parquet"
    more = max(edges // CHANGED, 1)
    generate.generate(str(fresh), users=users, items=items, edges=more, seed=1, snapshot=DAYS[1])
    before, after, others = (database.literal(str(one)) for one in (path, folder / f"{DAYS[1]}.parquet", fresh))
    with duckdb.connect() as con:
        con.execute(
            f"COPY (SELECT * FROM read_parquet({before}) WHERE hash(lhs, rel, rhs) % {CHANGED} <> 0 "
            f"UNION ALL SELECT * FROM read_parquet({others})) TO {after} (FORMAT parquet)"
        )
    return config


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(first: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [_row([*first, *numbers]), _row(["---"] * len(first) + ["---:"] * len(numbers))]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def quality_table(days: Sequence[Day]) -> str:
    """Return what the models rank well, as a Markdown table."""
    numbers = ("held-out MRR", f"Recall@{RECALL_AT}", "MRR, new ids", "MRR, edges of the next", "training s", "chain s")
    lines = _head(("variant", "snapshot"), numbers)
    for day in days:
        asked = day.held_out
        cells = [_number(asked.get(name)) for name in ("mrr", "recall", "new_mrr")]
        cells += [_number(day.next_edges.get("mrr")), f"{day.train_seconds:.0f}", f"{day.seconds:.0f}"]
        lines.append(_row([day.variant, day.snapshot, *cells]))
    return "\n".join(lines)


def drift_table(days: Sequence[Day]) -> str:
    """Return how far the vectors are from those of the release before, as a Markdown table."""
    lines = _head(("variant", "snapshot", "beside", "entity type"), DRIFT_SHOWN)
    for day in days:
        for entity, values in day.drift.items():
            cells = [_number(values.get(name)) for name in DRIFT_SHOWN]
            lines.append(_row([day.variant, day.snapshot, str(day.compared_with), entity, *cells]))
    return "\n".join(lines)


def stages_table(days: Sequence[Day]) -> str:
    """Return the seconds of each stage, as a Markdown table."""
    lines = _head(("variant", "snapshot"), [*pipeline.STAGES, "all"])
    for day in days:
        cells = [f"{day.stages[name]:.1f}" for name in pipeline.STAGES]
        lines.append(_row([day.variant, day.snapshot, *cells, f"{day.seconds:.1f}"]))
    return "\n".join(lines)


def neighbors_table(found: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Return the nearest through time, as a Markdown table."""
    snapshots = list(next(iter(found.values())))
    lines = _head(("id", *snapshots), ())
    lines += [_row([name, *(", ".join(by[at]) or "–" for at in snapshots)]) for name, by in found.items()]
    return "\n".join(lines)


def show(report: Report, say: Say) -> None:
    """Print the tables and how they came about."""
    say(f"\n{quality_table(report.days)}\n\n{drift_table(report.days)}\n\n{stages_table(report.days)}\n")
    if report.neighbors:
        say(f"{neighbors_table(report.neighbors)}\n")
    for day in report.days:
        start = f"from {day.started_from}" if day.started_from else "from random vectors"
        asked = day.held_out
        say(
            f"{day.variant}, {day.snapshot}: {start}, epoch {day.chosen_epoch} of {day.epochs} chosen, "
            f"{day.edges_per_second:,.0f} edges/s; {asked['edges']:,.0f} held-out edges ranked, "
            f"{asked.get('new_edges', 0):,.0f} with a new id, {day.next_edges.get('edges', 0):,.0f} of the next "
            f"snapshot; {day.decision}: {day.reason}"
        )
    say(f"{report.cores} cores, commit {report.git_commit or 'unknown'}")


def show_ratio(report: Report, say: Say) -> None:
    """Print how many times faster the warm day was than the cold one."""
    _, cold, warm = report.days
    say(
        f"cold {cold.seconds:.0f} s, warm {warm.seconds:.0f} s: {cold.seconds / warm.seconds:.1f} times; the training "
        f"alone {cold.train_seconds:.0f} s and {warm.train_seconds:.0f} s: "
        f"{cold.train_seconds / max(warm.train_seconds, 1e-9):.1f} times"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare daily retraining from random vectors and from earlier ones.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "debian.yaml")
    parser.add_argument("--epochs", type=int, help="of a cold training (default: 12; 10 with --nightly)")
    parser.add_argument("--fewer", type=int, help="a short training has the epochs divided by it (default: 3; 10)")
    parser.add_argument("--pull", type=float, nargs="*", default=[0.01], metavar="WEIGHT", help="of all tables")
    parser.add_argument("--variants", type=int, nargs="*", metavar="NUMBER", help="only these, from 0 (default: all)")
    parser.add_argument("--snapshots", nargs="*", metavar="DATE", help="default: all of the configuration's")
    parser.add_argument("--edges", type=int, default=10_000, help="rank at most so many of each kind; 0: all")
    parser.add_argument("--well-known", default=WELL_KNOWN, metavar="IDS", help="whose neighbors are shown")
    parser.add_argument("--nightly", type=int, metavar="EDGES", help="a generated graph in place of the configuration")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    parser.add_argument("--home", type=Path, help="an empty folder for the stores (default: in .twhin/retraining)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    home = (options.home or ROOT / ".twhin" / "retraining" / f"{datetime.now():%Y%m%dT%H%M%S}").resolve()
    report = Report(len(os.sched_getaffinity(0)), git_commit(), options.set)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if home.exists() and any(home.iterdir()):
            raise UserError(f"--home {home}: is not empty; a benchmark starts afresh: pass another folder")
        home.mkdir(parents=True, exist_ok=True)
        if options.nightly is not None:
            run_nightly(options, home, report, say)
        else:
            run_debian(options, home, report, say)
    except UserError as error:
        print(f"retraining: {error}", file=sys.stderr)
        return 2
    except launch.TrainingFailed as error:
        print(f"retraining: {error}", file=sys.stderr)
        return 1
    except launch.TrainingCancelled as error:
        print(f"retraining: {error}", file=sys.stderr)
        return 130
    show(report, say)
    if options.nightly is not None:
        show_ratio(report, say)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return 0


def run_debian(options: argparse.Namespace, home: Path, report: Report, say: Say) -> None:
    """Run the variants of the configuration's snapshots. Raises UserError where what was asked for does not fit."""
    path = str(options.config)
    overrides = (*ALIKE, f"training.num_epochs={options.epochs or 12}", *options.set)
    config = load_config(path, list(overrides))
    snapshots = tuple(options.snapshots or source.find_snapshots(config))
    if len(snapshots) < 2:
        raise UserError(f"{path}: has the snapshots {', '.join(snapshots) or 'none'}, but retraining needs two or more")
    variants = debian_variants(config, options.fewer or 3, options.pull)
    if options.variants is not None:
        if not all(0 <= number < len(variants) for number in options.variants):
            raise UserError(f"--variants: there are 0 to {len(variants) - 1}")
        variants = [variants[number] for number in options.variants]
    chain = Chain(path, overrides, snapshots, options.edges or None)
    run_variants(chain, variants, home, report, say)
    warm = [number for number, one in enumerate(variants) if one.warm]
    if warm:  # of the shortest training, which is what a day runs
        daily = min(warm, key=lambda number: chain.configuration(variants[number].overrides).training.num_epochs)
        store, entity = Store(str(home / f"variant-{daily}")), config.model.table_names[0]
        report.neighbors = neighbors(store, snapshots, entity, options.well_known.split(","), 3)


def run_nightly(options: argparse.Namespace, home: Path, report: Report, say: Say) -> None:
    """Run two days of a generated graph, the second cold and warm. Raises UserError for a number out of its range."""
    path = nightly(options.nightly, home / "edges")
    epochs, fewer = options.epochs or 10, options.fewer or 10
    files = str(path.parent / "{snapshot}.parquet")
    most = options.edges or None
    overrides = (
        *ALIKE, as_override("source", {"path": files, "snapshots": list(DAYS)}), f"training.num_epochs={epochs}",
        "training.num_train_steps=1000000000", as_override("evaluation.max_edges", most), *options.set,
    )  # fmt: skip
    cold, _, _, warm = debian_variants(load_config(str(path), list(overrides)), fewer, ())
    run_variants(Chain(str(path), overrides, DAYS, most), (cold, warm), home, report, say)


if __name__ == "__main__":
    sys.exit(main())
