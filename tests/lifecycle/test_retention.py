"""What retention removes, and that whatever stays opens, is evaluated, rolled back to and mapped into."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import days
import numpy as np
import pytest
from days import CONFIG, NOW

from twhin_pipeline import load_model, tracking
from twhin_pipeline.checks import checks
from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.lifecycle import nights, promotion, removal, retention
from twhin_pipeline.lifecycle.decisions import decisions
from twhin_pipeline.lifecycle.removal import Outcome
from twhin_pipeline.store import Store, Verdict, locks, releases, removals
from twhin_pipeline.store.draft import unfinished
from twhin_pipeline.vectors.model_files import locate

LEAST = {"releases": 1, "snapshots": 1}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store(str(tmp_path / "home"))


@pytest.fixture(params=["local", "remote"])
def either(request: pytest.FixtureRequest, store: Store) -> Store:
    return store if request.param == "local" else Store(f"memory://{uuid.uuid4().hex}")


def prune(store: Store, now: datetime = NOW, **policy: Any) -> Outcome:
    return removal.carry_out(store, retention.plan(store, RetentionConfig(**policy), now=now), "me")


def versions(store: Store) -> set[tuple[str, str, str]]:
    return {(asset, at, one) for asset, at in store.tables() for one in store.versions_of(asset, at)}


def sound(store: Store, names: list[str] | None = None) -> None:
    """Assert that every release with its tables can be made current, opens, and is evaluated; then go back."""
    moves = releases.history(store)
    for name in names if names is not None else releases.names(store):
        release = releases.read(store, name)
        for asset, version in release.tables.items():
            store.verify(store.manifest(asset, release.snapshot, version))
        releases.promote(store, name, "me", "test")
        model = load_model(store.root)
        assert model.snapshot == release.snapshot and len(model.get_embedding("user", "u00")) == days.DIM
        assert model.recommend("likes", "u00", 3) and np.isfinite(model.predict_relation("u00", 0, "likes"))
        store.refuse_stale(release.snapshot, ["embeddings/user", "evaluation"])
    if moves:
        releases.promote(store, moves[-1].release, "me", "test")


def evaluated(store: Store, snapshot: str) -> dict[str, Any]:
    return evaluate(CONFIG, store, snapshot).details


@pytest.mark.parametrize(
    "policy", [LEAST, {"releases": 2}, {"releases": 3, "snapshots": 1}, {"releases": 1, "snapshots": 4}]
)
def test_every_release_that_stays_opens_and_is_evaluated_and_the_others_are_gone(either: Store, policy: Any) -> None:
    made = [days.make(either, day) for day in range(6)]
    done = prune(either, **policy)
    assert done.bytes > 0 and not done.notes
    whole = [one.name for one in made[-max(policy["releases"], 2) :]]
    if policy["releases"] >= policy.get("snapshots", 3):
        assert versions_of(either) == set(whole)
    sound(either, whole)
    for name in whole:
        assert evaluated(either, releases.read(either, name).snapshot)["ancestors_unknown"] == 0
    assert releases.names(either) == whole


def test_a_plan_changes_nothing_and_a_second_removal_finds_nothing(store: Store) -> None:
    for day in range(4):
        days.make(store, day)
    before = versions(store)
    plan = retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    assert plan.goes and versions(store) == before and len(releases.names(store)) == 4
    removal.carry_out(store, plan, "me")
    again = retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    assert not again.goes and {one.key for one in again.stays if one.kind == "version"} == {
        retention.Key(*one) for one in versions(store)
    }


def test_the_current_release_and_the_one_before_it_stay_however_old_they_are_so_that_a_rollback_works(
    store: Store,
) -> None:
    made = [days.make(store, day) for day in range(6)]
    promotion.promote(store, made[1].name, "me", "the newer ones are worse")
    assert promotion.before_current(store) == made[5].name
    promotion.promote(store, made[2].name, "me", "better")
    prune(store, **LEAST)
    assert releases.current(store) == made[2]
    assert set(releases.names(store)) >= {made[1].name, made[2].name, made[5].name} and made[3].name not in versions_of(
        store
    )
    promotion.promote(store, promotion.before_current(store), "me", "rollback")
    assert releases.current(store) == made[1] and load_model(store.root).snapshot == made[1].snapshot


def versions_of(store: Store) -> set[str]:
    """Return the releases whose vectors are there."""
    found = set()
    for name in releases.names(store):
        release = releases.read(store, name)
        if release.tables["embeddings/user"] in store.versions_of("embeddings/user", release.snapshot):
            found.add(name)
    return found


@pytest.mark.parametrize("table", ["held_out/test", "evaluation", "vocabulary/user"])
def test_tables_that_stay_are_checked_where_the_vocabulary_before_them_is_gone(store: Store, table: str) -> None:
    made = [days.make(store, day) for day in range(4)]
    prune(store, releases=1, snapshots=1)
    first, second = made[1].snapshot, made[2].snapshot
    assert not store.versions_of("vocabulary/user", first) and store.versions_of("vocabulary/user", second)
    assert list(checks.results(CONFIG, store, second, table))


def test_a_pinned_release_stays_with_the_maps_to_it_until_it_is_unpinned(store: Store) -> None:
    made = [days.make(store, day) for day in range(6)]
    ids = [f"u{n:02d}" for n in range(5)]
    wanted = load_model(store.root, compatible_with=made[1].name).get_embedding("user", ids)
    releases.pin(store, made[1].name, "me", "the ranking service was trained on it")
    prune(store, releases=2, snapshots=1)
    assert versions_of(store) == {made[1].name, made[4].name, made[5].name}
    # Of those in between only the maps are left.
    assert releases.names(store) == [one.name for one in made[1:]]
    for snapshot in (made[2].snapshot, made[3].snapshot):
        assert {asset for asset, at in store.tables() if at == snapshot and store.versions_of(asset, at)} <= {
            "published", "seen_edges"
        }  # fmt: skip
    np.testing.assert_array_equal(
        load_model(store.root, compatible_with=made[1].name).get_embedding("user", ids), wanted
    )
    sound(store, sorted(versions_of(store)))
    with pytest.raises(UserError, match="was removed by `twhin prune`"):
        releases.promote(store, made[2].name, "me", "gone")
    with pytest.raises(UserError, match="unknown pinned release"):
        releases.unpin(store, made[2].name)
    releases.unpin(store, made[1].name)
    prune(store, releases=2, snapshots=1)
    assert releases.names(store) == [one.name for one in made[4:]]


def test_why_a_release_was_promoted_stays_as_long_as_it_does(store: Store) -> None:
    made = [days.make(store, day) for day in range(5)]
    for release in made:
        with store.replace("promotion", release.snapshot, config_hash="c") as draft:
            draft.details = {"release": release.name, "decision": "promoted", "reason": "better"}
    releases.pin(store, made[0].name, "me", "test")
    prune(store, releases=2, snapshots=1)
    # Of the ones in between only the maps are left.
    assert set(decisions(store)) == {one.name for one in made}
    assert len(versions_of(store)) == 3
    releases.unpin(store, made[0].name)
    prune(store, releases=2, snapshots=1)
    assert set(decisions(store)) == {one.name for one in made[3:]}


def test_what_was_decided_about_a_release_is_kept_when_its_table_goes(store: Store) -> None:
    made = [days.make(store, day, publish=False) for day in range(4)]
    for release in made:
        with store.replace("promotion", release.snapshot, config_hash="c") as draft:
            draft.details = {"release": release.name, "decision": "held", "reason": "worse"}
    prune(store, **LEAST)
    assert not store.exists("promotion", made[0].snapshot)
    night, *_ = nights.look(CONFIG, store, [made[0].snapshot])
    assert (night.status, night.reason) == ("published", "held by a gate: worse")


def test_a_snapshot_whose_tables_have_gone_counts_as_published_and_does_not_run_again(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    prune(store, **LEAST)
    night, *_ = nights.look(CONFIG, store, [made[0].snapshot])
    assert not store.exists("published", made[0].snapshot) and night.status == "published"


def test_the_newest_release_of_each_week_stays(store: Store) -> None:
    made = []
    for day in range(5):
        release = days.make(store, day, publish=day == 4)
        release = replace(release, created=str(datetime(2025, 1, 6, tzinfo=UTC) + timedelta(days=5 * day)))
        store.write_text(["releases", f"{release.name}.json"], json.dumps(vars(release)))
        made.append(release)
    # They are of 6, 11, 16, 21 and 26 January: of weeks 2, 2, 3, 4 and 4.
    prune(store, releases=1, weekly_releases=2, snapshots=1)
    assert releases.names(store) == [made[2].name, made[4].name]


def test_what_was_current_or_newest_until_lately_stays_for_a_time_of_grace(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    soon = datetime.now(UTC) + timedelta(hours=23)
    assert not retention.plan(store, RetentionConfig(**LEAST), now=soon).goes
    late = datetime.now(UTC) + timedelta(hours=25)
    promotion.promote(store, made[0].name, "me", "back")
    moves = json.loads(store.read_text(["releases", "current.json"]))
    for move in moves["history"]:  # each was current for a day; the last two until three hours ago and now
        move["at"] = str(late - timedelta(days=9))
    moves["history"] += [
        {"release": made[3].name, "at": str(late - timedelta(days=8)), "by": "me", "reason": "x"},
        {"release": made[2].name, "at": str(late - timedelta(hours=9)), "by": "me", "reason": "x"},
        {"release": made[3].name, "at": str(late - timedelta(hours=3)), "by": "me", "reason": "x"},
    ]
    store.write_text(["releases", "current.json"], json.dumps(moves))
    plan = retention.plan(store, RetentionConfig(**LEAST), now=late)
    assert {one.name for one in plan.goes if one.kind == "release"} == {made[0].name, made[1].name}


def test_a_chain_of_thirty_days_takes_no_more_room_than_one_of_ten(store: Store) -> None:
    sizes = []
    for day in range(30):
        days.make(store, day, edges=120)
        prune(store, releases=3, snapshots=2)
        sizes.append(
            sum(
                one.stat().st_size
                for one in Path(store.root).rglob("*")
                if one.is_file() and "retention" not in one.parts
            )
        )
        assert len(versions_of(store)) <= 3
    assert max(sizes[10:]) < 1.35 * sizes[10]
    assert len(list(Path(store.root, "twhin_model").iterdir())) <= 4
    assert len([at for asset, at in store.tables() if asset == "seen_edges" and store.versions_of(asset, at)]) <= 2
    # Vocabularies were handed on, and every model's ancestors are known.
    details = evaluated(store, days.name(29))
    assert details["ancestors"] == 29 and details["ancestors_unknown"] == 0
    load_model(store.root, compatible_with=releases.names(store)[0])


def test_edges_of_removed_training_sets_are_left_out_as_if_they_were_there(store: Store, tmp_path: Path) -> None:
    whole = Store(str(tmp_path / "whole"))
    for day in range(5):
        days.make(store, day)
        days.make(whole, day)
        prune(store, **LEAST)
    mine, theirs = evaluated(store, days.name(4)), evaluated(whole, days.name(4))
    assert mine["edges_left_out"] == theirs["edges_left_out"] > 0 and mine["ancestors"] == theirs["ancestors"] == 4
    assert mine["edges_left_out_per_relation"] == theirs["edges_left_out_per_relation"]
    assert not mine["ancestors_unknown"]
    assert not store.versions_of("training_set/positives", days.name(1))


def test_edges_that_no_model_was_trained_on_for_long_are_forgotten_and_the_evaluation_says_so(store: Store) -> None:
    for day in range(5):
        days.make(store, day)
        prune(store, **LEAST, seen_edges_days=1)
    details = evaluated(store, days.name(4))
    assert details["ancestors"] == 4 and not details["ancestors_unknown"]
    assert any("are forgotten" in note for note in details["notes"])


@pytest.mark.parametrize("broken", [0, 1, 2, 3, 9, 24, 41])
def test_a_crash_in_the_middle_leaves_a_store_that_opens_and_the_next_removal_ends_it(
    either: Store, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Files are removed by `fs.rm`, which fails after so many calls."""
    made = [days.make(either, day) for day in range(4)]
    calls = 0
    original = either.fs.rm

    def rm(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > broken:
            raise OSError("the machine went down")
        original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(either.fs), "rm", lambda self, *args, **kwargs: rm(*args, **kwargs))
        with pytest.raises(OSError, match="went down"):
            prune(either, **LEAST)
    assert removals.records(either)[0]["status"] == "broke off"
    # What is visible is whole, and nothing visible was made from what has gone.
    for asset, at, version in versions(either):
        manifest = either.manifest(asset, at, version)
        either.verify(manifest)
        assert all(either.manifest(name, at, one) for name, one in manifest.parents.items() if "@" not in name)
    sound(either, [one.name for one in made[-2:]])
    assert evaluated(either, days.name(3))["ancestors_unknown"] == 0
    prune(either, **LEAST)
    assert versions_of(either) == {made[2].name, made[3].name}
    assert not [name for asset, at in either.tables() for name in either.drafts(asset, at)]


def test_a_reader_that_has_the_release_open_reads_on_while_it_goes(store: Store) -> None:
    first = days.make(store, 0)
    model, manifest = load_model(store.root), store.manifest("raw_edges", first.snapshot)
    ids = [f"u{n:02d}" for n in range(20)]
    vectors = model.get_embedding("user", ids)
    for day in range(1, 5):
        days.make(store, day)
    prune(store, **LEAST)
    assert first.name not in releases.names(store)
    np.testing.assert_array_equal(model.get_embedding("user", ids), vectors)
    assert model.neighbors("user", "u01")
    with pytest.raises(UserError, match=r"was removed by `twhin prune`.*open the current release"):
        model.recommend("likes", "u01")
    with pytest.raises(UserError, match=r"after this reader had opened it; open the current release"):
        store.files_of(manifest)


def test_readers_of_the_current_release_never_fail_while_others_go(store: Store) -> None:
    for day in range(3):
        days.make(store, day)
    ended, failures, opened = threading.Event(), [], []

    def read() -> None:
        while not ended.is_set():
            try:
                opened.append(load_model(store.root).get_embedding("user", "u00"))
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for day in range(3, 7):
            days.make(store, day)
            prune(store, **LEAST)
    finally:
        ended.set()
        reader.join()
    assert not failures and opened


def test_a_snapshot_in_which_something_is_written_is_left_alone(either: Store) -> None:
    made = [days.make(either, day) for day in range(4)]
    at = made[0].snapshot
    began, ended = threading.Event(), threading.Event()
    plan = retention.plan(either, RetentionConfig(**LEAST), now=NOW)
    assert {one.snapshot for one in plan.goes} == {made[0].snapshot, made[1].snapshot}

    def write() -> None:
        # Another process: what this one holds is no hindrance to itself.
        locked = locks._lease if not either.is_local else locks._file_lock
        first = (either.fs,) if not either.is_local else ()
        with locked(*first, either.path("evaluation", at), "evaluation", 1.0):  # type: ignore[operator]
            began.set()
            ended.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    began.wait(60)
    try:
        done = removal.carry_out(either, plan, "me")
        assert [note for note in done.notes if "is being written by process" in note]
        assert {one.snapshot for one in done.removed if one.kind == "version"} == {made[1].snapshot}
        again = retention.plan(either, RetentionConfig(**LEAST), now=NOW)
        assert at not in {one.snapshot for one in again.goes if one.kind == "version"}
    finally:
        ended.set()
        writer.join()
    prune(either, **LEAST)
    assert not [one for one in versions(either) if one[1] == at and one[0] != "seen_edges"]


def test_a_table_that_is_made_after_the_plan_keeps_its_snapshot(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    plan = retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    evaluate(CONFIG, store, made[0].snapshot)
    done = removal.carry_out(store, plan, "me")
    assert any("was made meanwhile" in note for note in done.notes)
    assert store.exists("twhin_model", made[0].snapshot) and not store.exists("twhin_model", made[1].snapshot)


def test_a_release_that_becomes_current_after_the_plan_ends_it(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    plan = retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    promotion.promote(store, made[0].name, "me", "back")
    with pytest.raises(UserError, match="have changed meanwhile"):
        removal.carry_out(store, plan, "me")
    sound(store, [made[0].name])


def test_refused_versions_and_unfinished_ones_of_dead_writers_go_after_a_while(store: Store) -> None:
    release = days.make(store, 0)
    at = release.snapshot
    evaluate(CONFIG, store, at)
    refused = store.manifest("evaluation", at)
    store.judge(refused, Verdict("failed", str(datetime.now(UTC)), [{"name": "x", "blocking": True, "passed": False}]))
    draft = store.begin("evaluation", at)
    (Path(draft.location) / "part-00000.parquet").write_bytes(b"half")
    unfinished.discard(draft.location)
    held = retention.plan(store, RetentionConfig(), now=datetime.now(UTC) + timedelta(days=6))
    assert [one.kind for one in held.goes] == ["draft"]
    draft.held.close()
    done = prune(store, now=datetime.now(UTC) + timedelta(days=8))
    assert {(one.kind, one.name) for one in done.removed} == {("version", refused.version), ("draft", draft.version)}
    sound(store)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_checkpoints_of_finished_trainings_go_and_interrupted_ones_after_a_while(
    store: Store, tmp_path: Path, elsewhere: bool
) -> None:
    days.make(store, 0)
    at = days.name(0)
    base = tmp_path / "saved" / at if elsewhere else Path(store.path("twhin_model", at, "checkpoints"))
    before = (NOW - timedelta(days=3)).timestamp()
    finished, interrupted, running = (base / (letter * 12) for letter in "abc")
    for folder in (finished, interrupted, running):
        (folder / "step-00000010").mkdir(parents=True)
        (folder / "step-00000010" / "data").write_bytes(b"x" * 1_000)
        (folder / "lock").touch()
        for path in folder.rglob("*"):
            os.utime(path, (before, before))
    (finished / "finished.json").write_text("{}")
    os.utime(finished / "finished.json", (before, before))

    where = str(tmp_path / "saved") if elsewhere else None
    with (running / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for now, left in ((NOW, {interrupted, running}), (NOW + timedelta(days=9), {running})):
            plan = retention.plan(store, RetentionConfig(), save_dir=where, now=now)
            removal.carry_out(store, plan, "me")
            assert set(base.iterdir()) == left


def test_an_interrupted_training_keeps_the_tables_that_it_would_go_on_with(store: Store) -> None:
    for day in range(4):
        days.make(store, day)
    at = days.name(0)
    folder = Path(store.path("twhin_model", at, "checkpoints", "a" * 12, "step-00000010"))
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"x")
    os.utime(folder / "data", (NOW.timestamp(),) * 2)
    prune(store, **LEAST)
    assert store.exists("training_set/positives", at) and store.exists("vocabulary/user", at)
    assert not store.exists("training_set/positives", days.name(1))


def test_what_trainings_printed_goes_after_a_while(store: Store) -> None:
    days.make(store, 0)
    for at, age in ((days.name(0), 9), (days.name(1), 1)):
        log = Path(store.path("logs", "train", at, "run", "stderr.log"))
        log.parent.mkdir(parents=True)
        log.write_text("step 1")
        os.utime(log, ((NOW - timedelta(days=age)).timestamp(),) * 2)
    prune(store)
    assert store.children("logs/train") == [days.name(1)]


def test_a_warm_start_passes_over_a_release_of_which_only_the_maps_are_left(store: Store) -> None:
    made = [days.make(store, day) for day in range(6)]
    releases.pin(store, made[0].name, "me", "test")
    prune(store, **LEAST)
    assert made[2].name in releases.names(store) and made[2].name not in versions_of(store)
    opened, at = locate(store.root, before=made[3].snapshot)
    assert at == made[0].snapshot and opened.manifest("twhin_model", at).version == made[0].tables["twhin_model"]


def test_a_warm_start_passes_over_releases_that_were_current_once_and_have_gone(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    prune(store, **LEAST)
    assert made[0].name in {move.release for move in releases.history(store)} - set(releases.names(store))
    opened, at = locate(store.root, before=days.name(9))
    assert at == made[3].snapshot and opened.exists("twhin_model", at)
    with pytest.raises(UserError, match="no twhin_model there"):
        locate(store.root, before=made[2].snapshot)


def test_two_removals_at_once_are_refused(store: Store) -> None:
    days.make(store, 0)
    plan = retention.plan(store, RetentionConfig(), now=NOW)
    began, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with locks._file_lock(store.path("retention", "prune"), "x", 1.0):
            began.set()
            ended.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    began.wait(60)
    try:
        with pytest.raises(UserError, match="another process removes by policy now"):
            removal.carry_out(store, plan, "me")
    finally:
        ended.set()
        other.join()


def test_copies_on_this_machine_of_remote_tables_go_with_them(store: Store, tmp_path: Path) -> None:
    remote = Store(f"memory://{uuid.uuid4().hex}")
    for day in range(3):
        days.make(remote, day)
        load_model(remote.root).get_embedding("user", "u00")
    stale = tmp_path / "cache" / "twhin"
    copied = sorted(stale.rglob("vectors.npy"))
    assert copied
    for day in range(3, 5):
        days.make(remote, day)
    done = prune(remote, **LEAST)
    assert [one for one in done.removed if one.kind == "copy"] and not [one for one in copied if one.exists()]


def test_what_an_alias_in_the_registry_names_stays_and_an_mlflow_that_is_away_ends_the_plan(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [days.make(store, day) for day in range(4)]
    version = made[0].tables["twhin_model"]
    named = {"snapshot": made[0].snapshot, "version": version, "view": None, "store": store.root}
    monkeypatch.setattr(tracking, "aliased", lambda store: {"models:/twhin@ranking": named})
    plan = retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    removal.carry_out(store, plan, "me")
    assert version in store.versions_of("twhin_model", made[0].snapshot)
    assert store.exists("embeddings/user", made[0].snapshot) and not store.exists("embeddings/user", made[1].snapshot)

    def away(store: Store) -> None:
        raise tracking.server.Away("no answer")

    monkeypatch.setattr(tracking, "aliased", away)
    with pytest.raises(UserError, match=r"which models must stay .no answer.*--without-registry"):
        retention.plan(store, RetentionConfig(**LEAST), now=NOW)
    plan = retention.plan(store, RetentionConfig(**LEAST), now=NOW, registry=False)
    removal.carry_out(store, plan, "me")
    assert "--without-registry" in removals.records(store)[0]["notes"][0]
    assert not store.exists("embeddings/user", made[0].snapshot)


def test_registered_models_whose_tables_go_are_tagged_and_an_mlflow_that_is_away_then_is_a_note(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [days.make(store, day, uri=f"models:/twhin/{day}") for day in range(5)]
    releases.pin(store, made[0].name, "me", "test")
    tagged: list[str] = []

    def tag(store: Store, uris: list[str], when: str) -> None:
        tagged.extend(uris)
        raise tracking.server.Away("no answer")

    monkeypatch.setattr(tracking, "note_removed", tag)
    done = prune(store, **LEAST)
    assert tagged == ["models:/twhin/1", "models:/twhin/2"] and versions_of(store) == {
        made[0].name, made[3].name, made[4].name
    }  # fmt: skip
    assert done.notes == ["MLflow was not told which registered models have gone: no answer"]
    assert removals.records(store)[0]["status"] == "ended"


def test_every_removal_is_on_record_and_says_so_to_who_looks_for_what_has_gone(store: Store) -> None:
    made = [days.make(store, day) for day in range(4)]
    done = prune(store, **LEAST)
    [record] = removals.records(store)
    assert (record["status"], record["by"], record["bytes"]) == ("ended", "me", done.bytes)
    assert record["policy"]["releases"] == 1 and len(record["removed"]) == len(done.removed)
    with pytest.raises(UserError, match="unknown release"):
        releases.read(store, made[0].name)
    assert removals.removed(store, made[0].name) == record["at"]
    with pytest.raises(UserError, match=f"removed by `twhin prune` .{record['at'][:10]}"):
        store.manifest("twhin_model", made[0].snapshot, made[0].tables["twhin_model"])


def test_the_next_days_vocabulary_grows_from_what_stays(store: Store) -> None:
    days.make(store, 0)
    at = days.name(0)
    first = store.read("vocabulary/user", at)
    for day in range(1, 4):  # later ones are refused
        days.make(store, day, publish=False)
        for entity in days.NUM:
            store.judge(
                store.manifest(f"vocabulary/{entity}", days.name(day)), Verdict("failed", "2025-01-01T00:00:00")
            )
    prune(store, **LEAST)
    found = store.latest_before("vocabulary/user", days.name(9))
    assert found is not None and found.snapshot == at and store.read("vocabulary/user", at).equals(first)
