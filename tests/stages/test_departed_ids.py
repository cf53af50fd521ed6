"""Three snapshots: an id that has departed is drawn by nothing, then is evicted, and comes back as a new one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from edge_files import SNAPSHOT, make_config, pass_checks, store_at, write

from twhin_pipeline.checks import checks
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.evaluation import ranking
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.training import train
from twhin_pipeline.training.dataset import EdgesDataset
from twhin_pipeline.training.reporting import SilentReporter
from twhin_pipeline.training_set import negatives, positives
from twhin_pipeline.training_set.step_sample import StepSampler
from twhin_pipeline.vectors.opening import load_model

DAYS = ("2025-01-01", "2025-01-02", "2025-01-03", "2025-01-04")
AWAY = 12
"""Of 40 users and 30 items, the first so many are away on the second and third day, and half of them on the fourth."""


def edges_of(day: int) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(day)
    least = (0, AWAY, AWAY, AWAY // 2)[day]
    users, items = rng.integers(least, 40, 500), rng.integers(least, 30, 500)
    others = rng.integers(least, 40, 500)
    edges = {(f"u{a:02d}", "fav", f"i{b:02d}") for a, b in zip(users, items, strict=True)}
    edges |= {(f"u{a:02d}", "follows", f"u{b:02d}") for a, b in zip(users, others, strict=True)}
    # So that everyone has an edge.
    edges |= {(f"u{a:02d}", "fav", f"i{max(least, a % 30):02d}") for a in range(least, 40)}
    return sorted(edges)


def sampled(folder: Path, days: int, **sections: Any) -> tuple[TwhinConfig, Store]:
    """Make the tables of some days, up to the training set of the last one, and run their checks."""
    store = store_at(folder)
    for day in range(len(DAYS)):
        write(folder / f"{DAYS[day]}.parquet", edges_of(day))
    config = make_config(
        f"{folder}/{{snapshot}}.parquet",
        **{"vocabulary": {"keep_departed": 1}, "negatives": {"chunk_size": 40}} | sections,
    )
    for day in range(days):
        raw_edges.ingest(config, store, DAYS[day])
        vocabulary.build(config, store, DAYS[day])
        pass_checks(store, DAYS[day])
    positives.build_positives(config, store, DAYS[days - 1])
    negatives.build(config, store, DAYS[days - 1])
    return config, store


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("log_q", [False, True])
def test_pools_have_no_departed_id_and_the_checks_say_that_they_are_drawn_as_asked(
    tmp_path: Path, share: float, log_q: bool
) -> None:
    config, store = sampled(tmp_path, 2, negatives={"degree_share": share, "chunk_size": 40}, loss={"log_q": log_q})
    at = DAYS[1]
    of_type = {name: present_rows(store, at, name) for name in config.model.table_names}
    assert {name: len(rows) for name, rows in of_type.items() if rows is not None} == {"user": 28, "item": 18}
    chunks = store.read("training_set/positives", at, ["chunk", "rel"])
    relation = dict(zip(chunks["chunk"].to_pylist(), chunks["rel"].to_pylist(), strict=True))
    for row in store.read("training_set/negatives", at).to_pylist():
        one = config.model.relations[relation[row["chunk"]]]
        rows = of_type[one.rhs if row["side"] else one.lhs]
        assert rows is not None and np.isin(row["row"], rows).all()
    tables = ["training_set/negatives", "held_out/validation_negatives"]
    names = ["negatives_typed", "negatives_distributed", "negatives_log_q", "negatives_complete", "negatives_masked"]
    found = [
        (check.name, result.passed) for table in tables for check, result in checks.results(config, store, at, table)
    ]
    assert {name for name, passed in found if passed} >= set(names)
    assert all(passed for _, passed in found)


def test_a_pool_with_a_departed_id_fails_its_check(tmp_path: Path) -> None:
    config, store = sampled(tmp_path, 2)
    table = store.read("training_set/negatives", DAYS[1])
    departed = np.setdiff1d(np.arange(30), present_rows(store, DAYS[1], "item"))
    rows = [[int(departed[0]), *row[1:]] for row in table["row"].to_pylist()]
    with store.replace("training_set/negatives", DAYS[1], config_hash="test") as draft:
        draft.write(table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), [rows]))
        draft.details = store.manifest("training_set/negatives", DAYS[1]).details
    passed = {c.name: r.passed for c, r in checks.results(config, store, DAYS[1], "training_set/negatives")}
    assert not passed["negatives_typed"]


@pytest.mark.parametrize("per_step", [pytest.param(None, marks=pytest.mark.long), 9])
def test_all_candidates_are_all_but_departed_ids(tmp_path: Path, per_step: int | None) -> None:
    data = {"global_negatives": "all", "in_batch_negatives": 0, "sampled_per_step": per_step}
    config, store = sampled(tmp_path, 2, train_data=data, loss={"log_q": True})
    drawn: dict[str, set[int]] = {"user": set(), "item": set()}
    masked = 0
    for batch in EdgesDataset(config, store, DAYS[1]):
        for table, places in batch.sample.items():
            drawn[table] |= set(batch.ids[table][places].tolist())
            log_q = batch.sample_log_q[table]
            assert per_step is not None or not log_q.any(), "each is surely there"
        for side in batch.sides:
            for chunk, query, candidate in getattr(batch, f"{side}_mask").tolist():
                relation = config.model.relations[int(batch.relation[chunk])]
                table = getattr(relation, side)
                kept = {"lhs": relation.rhs, "rhs": relation.lhs}[side]
                # Indices count over the tables' rows, one table after the other.
                offset = 0 if kept == "user" else len(batch.ids["user"])
                other = int(batch.ids[kept][int(getattr(batch, f"{side}_query_index")[chunk, query]) - offset])
                row = int(batch.ids[table][batch.sample[table][candidate]])
                ends = (row, other) if side == "lhs" else (other, row)
                assert (relation.name, *ends) in true_edges(config, store)
                masked += 1
    assert masked > 100
    for table, rows in drawn.items():
        expected = present_rows(store, DAYS[1], table)
        assert expected is not None and rows <= set(expected.tolist())
        assert per_step is not None or len(rows) == len(expected)


def true_edges(config: TwhinConfig, store: Store) -> set[tuple[str, int, int]]:
    table = store.read("training_set/positives", DAYS[1]).to_pydict()
    names = [config.model.relation_names[rel] for rel in table["rel"]]
    return set(zip(names, table["lhs"], table["rhs"], strict=True))


def test_a_graph_without_departed_ids_is_drawn_as_before() -> None:
    """That every id is present, and that nothing is said of it, are the same bits."""
    cumulative, every = np.cumsum(np.random.default_rng(0).random(50)), np.arange(50)
    pools = np.empty((2, 33), np.int64)
    for pool, present in zip(pools, (every[:0], every), strict=True):
        sampling_kernels.draw(np.uint64(3), 1, 2, 4, 50, present, 7, cumulative, pool)
    assert pools[0].tolist() == pools[1].tolist()
    degrees = [every, every[:8]]
    plain, told = StepSampler(9, 0.5, 0.75, 1, degrees), StepSampler(9, 0.5, 0.75, 1, degrees, [every, every[:8]])
    for step in range(5):
        a, b = plain.draw(0, step), told.draw(0, step)
        assert a.rows.tolist() == b.rows.tolist() and a.log_q.tolist() == b.log_q.tolist()
    one, two = (ranking.CandidateSet.sample(50, 12, np.random.default_rng(5), present) for present in (None, every))
    assert one.rows is not None and two.rows is not None and one.rows.tolist() == two.rows.tolist()


@dataclass(frozen=True)
class Trained:
    """A store of four days, each trained from the day before; and the candidates that each evaluation ranked."""

    store: Store
    candidates: dict[str, list[ranking.CandidateSet]]
    said: dict[str, list[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("days")
    store = store_at(folder)
    config = make_config(f"{folder}/{{snapshot}}.parquet", vocabulary={"keep_departed": 1})
    config_path = str(folder / "config.yaml")
    Path(config_path).write_text(config.to_yaml())
    candidates: dict[str, list[ranking.CandidateSet]] = {}
    said: dict[str, list[str]] = {}
    for day, edges in enumerate(map(edges_of, range(len(DAYS)))):
        write(folder / f"{DAYS[day]}.parquet", edges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        for day, snapshot in enumerate(DAYS):
            said[snapshot] = []

            class Reporter(SilentReporter):
                def milestone(self, line: str, lines: list[str] = said[snapshot]) -> None:
                    lines.append(line)

            patch.setattr("twhin_pipeline.training.train.make_reporter", lambda rank, reporter=Reporter: reporter())
            original, ranked = ranking.rank_edges, candidates.setdefault(snapshot, [])

            def spied(*given: Any, original: Any = original, ranked: Any = ranked) -> Any:
                ranked.append(given[4])
                return original(*given)

            overrides = [
                "training.num_epochs=2", "launch.nproc_per_node=1", "launch.device=cpu", "training.refit=false",
                "training.selection_metric=filtered_mrr", "recipe=none",
                *([f"training.initial_checkpoint_dir={store.root}"] if day else []),
            ]  # fmt: skip
            run = Run(
                load_config(config_path, overrides), config_path, overrides, store, snapshot,
                lambda run: train.run(run.config, run.store, run.snapshot),
            )  # fmt: skip
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr("twhin_pipeline.evaluation.held_out.rank_edges", spied)
                for stage in STAGES.values():
                    if stage.name not in ("refit",):
                        run_stage(run, stage, lambda line: None)
        yield Trained(store, candidates, said)


def test_no_evaluation_ranks_a_departed_id(trained: Trained) -> None:
    assert all(one.rows is None for one in trained.candidates[DAYS[0]]), "all are there on the first day"
    present = {
        len(rows): rows for name in ("user", "item") if (rows := present_rows(trained.store, DAYS[1], name)) is not None
    }
    assert trained.candidates[DAYS[1]]
    for one in trained.candidates[DAYS[1]]:
        assert one.rows is not None and one.rows.tolist() == present[one.size].tolist()


def test_a_departed_id_keeps_its_vector_then_has_none_and_returns_as_a_new_one(trained: Trained) -> None:
    first, second, third, fourth = (load_model(trained.store.root, snapshot) for snapshot in DAYS)
    departed, back = "u03", "u08"
    np.testing.assert_array_equal(first.get_user_embedding(departed), second.get_user_embedding(departed))
    assert not third.has("user", departed) and third.has("user", "u20")
    assert fourth.has("user", back) and not fourth.has("user", departed)
    ids = trained.store.read("vocabulary/user", DAYS[3], ["id", "row"]).to_pydict()
    rows = dict(zip(ids["id"], ids["row"], strict=True))
    first_rows = trained.store.read("vocabulary/user", DAYS[0], ["id", "row"]).to_pydict()
    assert rows == dict(zip(first_rows["id"], first_rows["row"], strict=True))
    assert "6 ids of user are new: 6 start from known neighbors, 0 from the type's mean" in trained.said[DAYS[3]]
    assert trained.store.manifest("embeddings/user", DAYS[2]).rows == 40 - AWAY


def test_neighbors_and_recommendations_have_no_departed_id(trained: Trained) -> None:
    model = load_model(trained.store.root, DAYS[1])
    away = {f"{kind}{number:02d}" for kind in "ui" for number in range(AWAY)}
    for found in (
        model.neighbors("user", "u20", 100),
        model.candidates("fav", "u20", 100),
        model.recommend("fav", "u20", 100),
    ):
        assert found and not {id for id, _ in found} & away
    assert {id for id, _ in model.candidates("fav", "u20", 100, untrained=True)} & away


def test_the_command_compacts_a_snapshot_and_says_what_it_left_out(tmp_path: Path, capsys: Any) -> None:
    config, store = sampled(tmp_path, 3)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    given = ["--config", str(tmp_path / "c.yaml"), "--home", store.root, "--snapshot", DAYS[3]]
    assert run_arguments(["ingest", *given]) == 0
    assert run_arguments(["compact", *given]) == 0
    shown = capsys.readouterr().out
    assert "vocabulary/user: 34 rows, 6 rows of evicted ids left out" in shown
    assert "vocabulary/item: 24 rows, 6 rows of evicted ids left out" in shown
    assert store.manifest("vocabulary/user", DAYS[3]).details["compacted"] == DAYS[3] != SNAPSHOT
    assert run_arguments(["sample", *given]) == 0
