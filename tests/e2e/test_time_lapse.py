"""Sixty days in a few minutes: a source gets a file a day, Dagster's sensor ticks, and consumers read what is current.

Two days are poisoned loudly (a relation is gone; a burst of spam), one quietly (the ids' case changes, so that half
of the entities look new). Each is held back, consumers keep the day before, and the day after goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twhin_pipeline import load_model
from twhin_pipeline._dagster.assets import execution
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.config import load_config
from twhin_pipeline.definitions import build_defs
from twhin_pipeline.lifecycle import nights, removal, retention
from twhin_pipeline.store import Store, releases
from twhin_pipeline.training import train
from twhin_pipeline.training.reporting import SilentReporter

START = date(2025, 1, 1)
COMMUNITIES = 4
USERS, ITEMS = 90, 60
WINDOW = 6
"""Days of the log in one day's file."""
PRUNED_EVERY = 5


class InProcessLauncher(LauncherResource):
    """Trains in the test's own process: starting torchrun sixty times would take most of the time."""

    def train(self, context: Any, config_path: str, overrides: Any, store: Store, snapshot: str, env: Any) -> Any:
        from twhin_pipeline.config import relations

        train.run(relations.resolve(load_config(config_path, overrides), store, snapshot), store, snapshot)


def day_name(day: int) -> str:
    return str(START + timedelta(days=day))


def events(day: int) -> set[tuple[str, str, str]]:
    """What happens on one day: users view and buy items of their community, and follow each other; both grow by one."""
    rng = np.random.default_rng([7, day])
    users, items = USERS + day, ITEMS + day
    found = set()
    for user in rng.choice(users, int(0.7 * users), replace=False).tolist():
        community = user % COMMUNITIES
        for _ in range(5):
            found.add((f"user_{user}", "views", f"item_{_near(rng, items, community)}"))
        found.add((f"user_{user}", "buys", f"item_{_near(rng, items, community)}"))
        found.add((f"user_{user}", "follows", f"user_{_near(rng, users, community)}"))
    return found


def _near(rng: np.random.Generator, size: int, community: int) -> int:
    """Draw a number of the community, as a rule."""
    if rng.random() < 0.1:
        return int(rng.integers(size))
    return community + COMMUNITIES * int(rng.integers((size - community - 1) // COMMUNITIES + 1))


@dataclass
class Life:
    """The source, the store and Dagster, and what consumers saw after each day."""

    folder: Path
    instance: dg.DagsterInstance
    seen: dict[str, str] = field(default_factory=dict)
    """By day the snapshot of the current release."""
    bytes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a day's run ended early."""

    def __post_init__(self) -> None:
        self.config_path = self.folder / "daily.yaml"
        source = {"path": f"{self.folder}/{{snapshot}}.parquet"}
        self.config_path.write_text(yaml.safe_dump(CONFIG | {"source": source}))
        self.store = Store(str(self.folder / "home"))
        self.definitions = build_defs(
            config_path=str(self.config_path),
            resource_overrides={
                "store": StoreResource(root=self.store.root),
                "launcher": InProcessLauncher(),
            },
        )

    def arrive(self, day: int, poison: str | None = None) -> None:
        """Write the day's file: the events of the last days, as an upstream job exports them."""
        rows = sorted(set().union(*(events(one) for one in range(max(0, day - WINDOW + 1), day + 1))))
        if poison == "relation gone":
            rows = [row for row in rows if row[1] != "buys"]
        elif poison == "spam":
            rng = np.random.default_rng(day)
            rows += [(f"bot_{rng.integers(40)}", "follows", f"user_{rng.integers(USERS)}") for _ in range(30_000)]
        elif poison == "case":
            rows = [tuple(_shouted(one) for one in row) for row in rows]  # type: ignore[misc]
        columns = {name: [row[place] for row in rows] for place, name in enumerate(("lhs", "rel", "rhs"))}
        pq.write_table(pa.table(columns), self.folder / f"{day_name(day)}.parquet")

    def tick(self) -> str | None:
        """Tick the sensor once and run what it asks for; return the snapshot."""
        sensor = self.definitions.resolve_sensor_def("new_snapshots")
        with dg.build_sensor_context(self.instance, definitions=self.definitions) as context:
            ticked: Any = sensor.evaluate_tick(context)
        if not ticked.run_requests:
            return None
        [request] = ticked.run_requests
        snapshot = str(request.tags["dagster/partition"])
        job = self.definitions.resolve_job_def("chain")
        done = job.execute_in_process(
            instance=self.instance, partition_key=snapshot, tags=dict(request.tags), raise_on_error=False
        )
        if not done.success:
            failed = [event for event in done.all_events if event.is_step_failure]
            self.reasons[snapshot] = "; ".join(execution.cause(event) for event in failed)
        return snapshot

    def live(self, days: range, poison: dict[int, str]) -> None:
        """Let days pass: a file arrives, the sensor ticks until nothing is due, a consumer looks."""
        for day in days:
            self.arrive(day, poison.get(day))
            for _ in range(4):
                if self.tick() is None:
                    break
            current = releases.current(self.store)
            self.seen[day_name(day)] = current.snapshot if current else ""
            if (day + 1) % PRUNED_EVERY == 0:
                policy = load_config(str(self.config_path)).retention
                removal.carry_out(self.store, retention.plan(self.store, policy, registry=False), "the test")
            files = [file for file in (self.folder / "home").rglob("*") if file.is_file()]
            self.bytes[day_name(day)] = sum(file.stat().st_size for file in files)


def _shouted(text: str) -> str:
    """Write half of the users in capital letters."""
    number = text.rpartition("_")[2]
    return text.upper() if text.startswith("user_") and int(number) % 2 else text


CONFIG: dict[str, Any] = {
    "recipe": "none",
    "model": {
        "embeddings": {
            "tables": [
                {"name": name, "embedding_dim": 8, "optimizer": {"adagrad": {"lr": 0.3}}} for name in ("user", "item")
            ]
        },
        "relations": [
            {"name": "views", "lhs": "user", "rhs": "item"},
            {"name": "buys", "lhs": "user", "rhs": "item"},
            {"name": "follows", "lhs": "user", "rhs": "user"},
        ],
    },
    "train_data": {"global_negatives": 30, "in_batch_negatives": 0, "per_replica_batch_size": 500},
    "validation_data": {"global_negatives": 30, "in_batch_negatives": 0},
    "training": {"num_epochs": 3, "refit": False, "initial_checkpoint_dir": "previous", "eval_every_n_epochs": 3},
    "evaluation": {"baselines": ["popularity"], "recall_at": []},
    "retention": {"snapshots": 2, "releases": 2, "grace_hours": 0, "failed_days": 0},
    "launch": {"nproc_per_node": 1, "device": "cpu", "threads_per_process": 1},
}


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    monkeypatch.setenv("TWHIN_NO_TRACKING", "1")
    monkeypatch.setattr("twhin_pipeline.training.train.make_reporter", lambda rank: SilentReporter())
    with dg.DagsterInstance.ephemeral() as instance:
        yield Life(tmp_path, instance)


def held(life: Life) -> dict[str, str]:
    """Return the days that a check held back, with the reason."""
    config = load_config(str(life.config_path))
    known = nights.look(config, life.store, sorted(life.seen))
    return {night.snapshot: night.reason for night in known if night.status == "held"}


def owners(store: Store) -> dict[tuple[str, int], str]:
    """Return whose a row is, by entity type and row, over all vocabularies that are there; fails where two own it."""
    result: dict[tuple[str, int], str] = {}
    for entity in ("user", "item"):
        for snapshot in store.snapshots(f"vocabulary/{entity}"):
            for row in store.read(f"vocabulary/{entity}", snapshot, ["id", "row"]).to_pylist():
                assert result.setdefault((entity, row["row"]), row["id"]) == row["id"]
    return result


def check_life(life: Life, poison: dict[int, str], checks: dict[str, str]) -> None:
    """What holds after any number of days."""
    found = held(life)
    poisoned = {day_name(day): kind for day, kind in poison.items()}
    wrong = {day: life.reasons.get(day, found.get(day)) for day in set(found) ^ set(poisoned)}
    assert not wrong, wrong
    for day, kind in poisoned.items():
        assert checks[kind] in found[day], (day, kind, found[day])
    config = load_config(str(life.config_path))
    decided = {night.snapshot: night.reason for night in nights.look(config, life.store, sorted(life.seen))}
    before = ""
    for day, current in life.seen.items():
        if day in poisoned:
            assert current == before, "consumers keep the day before"
        else:
            assert current == day or decided[day].startswith("held by a gate: "), (day, decided[day])
        before = current
    model = load_model(life.store.root)
    assert model.snapshot == before
    rows = owners(life.store)
    assert not any(owner.startswith(("USER", "bot_")) for owner in rows.values()), "the poison never got a row"
    assert len(model.neighbors("item", "item_1", 5)) == 5


CHECKS = {"relation gone": "edges_relations_kept", "spam": "edges_relations_grew", "case": "new_ids_alike"}


def test_a_week_with_three_bad_days_is_promoted_or_held_for_a_stated_reason(life: Life) -> None:
    poison = {2: "relation gone", 3: "spam", 5: "case"}
    life.live(range(7), poison)
    check_life(life, poison, CHECKS)
    assert list(life.seen.values()) == [day_name(day) for day in (0, 1, 1, 1, 4, 4, 6)]


@pytest.mark.long
@pytest.mark.timeout(3_000)
def test_sixty_days_are_promoted_or_held_and_the_store_stays_small(life: Life) -> None:
    poison = {20: "relation gone", 21: "spam", 40: "case"}
    life.live(range(60), poison)
    check_life(life, poison, CHECKS)
    promoted = sum(day == current for day, current in life.seen.items())
    assert promoted >= 55
    sizes = list(life.bytes.values())
    assert max(sizes[45:]) < 1.3 * max(sizes[15:30]), "disk use does not grow with the days"
    model = load_model(life.store.root)
    same = [
        int(str(near).split("_")[1]) % COMMUNITIES == item % COMMUNITIES
        for item in range(40)
        for near, _ in model.neighbors("item", f"item_{item}", 3)
    ]
    assert np.mean(same) > 2 / COMMUNITIES, "the vectors mean something"
