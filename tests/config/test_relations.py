"""Relations found in the source: which there are, in which order, and that everything after ingest takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from edge_files import SNAPSHOT, make_config, rows_of, store_at, triples, write

from twhin_pipeline import pipeline
from twhin_pipeline.config import TwhinConfig, parse_config, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import Store
from twhin_pipeline.training import warm_start
from twhin_pipeline.training_set import positives

EVERY_OTHER = {"name": "*", "lhs": "user", "rhs": "user", "operator": "complex_diagonal", "weight": 0.5}
FAV = {"name": "fav", "lhs": "user", "rhs": "item"}
# What SQL, Markdown, pictures, paths and MLflow could each trip over.
ODD = [
    "/location/country/form_of_government",
    "it's",
    'say "so"',
    "a|b",
    "$x$ 50%",
    "ünï 関係",
    "../..",
    " padded ",
    "--",
]
ROWS = [("a", "follows", "b"), ("a", "fav", "x"), ("b", "fav", "x"), ("b", "admires", "a"), ("c", "admires", "a")]


def config_of(path: Path | None, listed: list[dict[str, Any]] | None = None, **sections: Any) -> TwhinConfig:
    """Return a configuration of users and items with `listed` relations (default: fav) and one for every other."""
    return make_config(path, model={"relations": [EVERY_OTHER, *([FAV] if listed is None else listed)]}, **sections)


def write_graph(path: Path, names: list[str], edges_each: int = 6) -> Path:
    """Write a graph of one entity type in which each relation has edges."""
    rows = [(f"u{i}", name, f"u{i + 1 + j}") for j, name in enumerate(names) for i in range(edges_each)]
    return write(path, rows)


def kg_config(path: Path, **sections: Any) -> TwhinConfig:
    """Return a configuration of one entity type, all of whose relations are found."""
    model = {
        "embeddings": {"tables": [{"name": "user", "embedding_dim": 4}]},
        "relations": [EVERY_OTHER],
    }
    return make_config(path, model=model, **sections)


def test_listed_relations_come_first_and_found_ones_follow_sorted_as_the_star_says(tmp_path):
    resolved = relations.with_found(config_of(tmp_path / "e.parquet"), ["zoo", "fav", "B", "a"])
    assert resolved.model.relation_names == ["fav", "B", "a", "zoo"]
    fav, found = resolved.model.relations[0], resolved.model.relations[2]
    assert (fav.rhs, fav.operator, fav.weight) == ("item", "translation", 1.0)
    assert (found.rhs, found.operator, found.weight) == ("user", "complex_diagonal", 0.5)
    assert resolved.model.every_other is None


def test_the_order_depends_on_the_names_and_not_on_the_order_in_which_they_were_met(tmp_path):
    config = config_of(tmp_path / "e.parquet")
    assert relations.with_found(config, ["b", "a", "c"]) == relations.with_found(config, ["c", "b", "a", "fav"])


def test_a_configuration_without_a_star_is_itself_and_needs_no_table(tmp_path):
    config = make_config(tmp_path / "e.parquet")
    assert relations.resolve(config, store_at(tmp_path), SNAPSHOT) is config


def test_a_resolved_configuration_is_the_one_that_lists_the_same_relations(tmp_path):
    """The hash names what is learned: checkpoints and tables of listed and of found relations are the same."""
    found = [{**EVERY_OTHER, "name": name} for name in ("a", "b")]
    listed = make_config(tmp_path / "e.parquet", model={"relations": [FAV, *found]})
    resolved = relations.with_found(config_of(tmp_path / "e.parquet"), ["b", "a"])
    assert resolved == listed and resolved.hash() == listed.hash()
    assert relations.with_found(config_of(tmp_path / "e.parquet"), ["b"]).hash() != listed.hash()


def test_ingest_finds_the_relations_and_the_later_stages_take_them_from_its_table(tmp_path):
    config, store = config_of(write(tmp_path / "e.parquet", ROWS)), store_at(tmp_path)
    with pytest.raises(UserError, match="twhin ingest"):
        relations.resolve(config, store, SNAPSHOT)
    manifest = raw_edges.ingest(config, store, SNAPSHOT)
    assert triples(store) == set(ROWS)
    assert manifest.details["relations"] == ["fav", "admires", "follows"]
    assert manifest.details["edges_per_relation"] == {"fav": 2, "admires": 2, "follows": 1}
    assert [row["rel"] for row in rows_of(store, "raw_edges")] == ["fav", "fav", "admires", "admires", "follows"]
    resolved = relations.resolve(config, store, SNAPSHOT)
    assert resolved.model.relation_names == ["fav", "admires", "follows"]
    assert manifest.config_hash == resolved.hash() == store.manifest("raw_edges_rejected", SNAPSHOT).config_hash


def test_without_a_star_the_manifest_lists_the_relations_and_others_are_rejected(tmp_path):
    config, store = make_config(write(tmp_path / "e.parquet", ROWS)), store_at(tmp_path)
    manifest = raw_edges.ingest(config, store, SNAPSHOT)
    assert manifest.details["relations"] == ["follows", "fav", "reply"]
    assert manifest.details["rejected_by_reason"] == {"unknown relation": 2}


def test_names_that_cannot_be_a_relation_are_rejected_rows(tmp_path):
    rows = [*ROWS, *(("a", name, "b") for name in ("", "  ", "all", "*", "two\nlines", "bell\a", None))]
    store = store_at(tmp_path)
    manifest = raw_edges.ingest(config_of(write(tmp_path / "e.parquet", rows)), store, SNAPSHOT)
    assert manifest.details["relations"] == ["fav", "admires", "follows"]
    assert manifest.details["rejected_by_reason"] == {"bad relation name": 6, "null": 1}
    assert [row["row"] for row in rows_of(store, "raw_edges_rejected")] == [6, 7, 8, 9, 10, 11, 12]


def test_a_name_without_an_edge_is_no_relation_and_its_rows_keep_their_reason(tmp_path):
    """An operator that no edge trains would only stand in every table; and 'outside window' is not 'bad name'."""
    rows = [("a", "fav", "x", 0.0), ("a", "new", "b", 1.0), ("a", "lost", "", 1.0), ("a", "old", "b", -1e8)]
    named = write(tmp_path / "e.parquet", [(*row[:3], 1735689600 + row[3]) for row in rows], ("lhs", "rel", "rhs", "t"))
    config = config_of(named, source={"columns": {"time": "t"}, "window": "7d"})
    store = store_at(tmp_path)
    manifest = raw_edges.ingest(config, store, SNAPSHOT)
    assert manifest.details["relations"] == ["fav", "new"] == list(manifest.details["edges_per_relation"])
    assert manifest.details["outside_window"] == 1
    assert manifest.details["rejected_by_reason"] == {"empty id": 1}
    assert [row["rel"] for row in rows_of(store, "raw_edges_rejected")] == ["lost"]


def test_relations_of_numbers_and_of_several_files_are_found(tmp_path):
    write(tmp_path / "e-1.parquet", [("a", 7, "b")])
    write(tmp_path / "e-2.parquet", [("a", 10, "b"), ("b", 7, "a")])
    (tmp_path / "e.csv").write_text("lhs,rel,rhs\na,7,b\na,10,b\n")
    for path in ("e-*.parquet", "e.csv"):
        store = store_at(tmp_path / "store" / path.replace("*", "x"))
        manifest = raw_edges.ingest(config_of(tmp_path / path), store, SNAPSHOT)
        assert manifest.details["relations"] == ["fav", "10", "7"]


def test_a_column_of_ids_taken_for_relations_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_edges, "MOST_RELATIONS", 2)
    with pytest.raises(UserError, match=r"source\.path: column 'rel' has more than 2 .*set source\.columns\.rel"):
        raw_edges.ingest(config_of(write(tmp_path / "e.parquet", ROWS)), store_at(tmp_path), SNAPSHOT)


def test_a_source_in_which_no_relation_is_found_says_so(tmp_path):
    config = kg_config(write(tmp_path / "e.parquet", [("a", "", "b")]))
    with pytest.raises(UserError, match=r"model\.relations: none is listed, and none is found"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)
    config = kg_config(write(tmp_path / "f.parquet", [("", "likes", "b")]))
    with pytest.raises(UserError, match=r"no edge for snapshot .*empty id in column 'lhs' 1"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)


def test_held_out_relations_are_looked_up_once_they_are_known(tmp_path):
    path, store = write(tmp_path / "e.parquet", ROWS), store_at(tmp_path)
    raw_edges.ingest(config_of(path, split={"relations": ["admires"]}), store, SNAPSHOT)
    wrong = config_of(path, split={"relations": ["admire"]})
    for unknown in (
        lambda: relations.resolve(wrong, store, SNAPSHOT),
        lambda: raw_edges.ingest(wrong, store, SNAPSHOT),
    ):
        with pytest.raises(UserError, match=r"split\.relations: unknown relation 'admire'; did you mean 'admires'"):
            unknown()


def test_every_stage_and_check_up_to_the_positives_bears_any_name(tmp_path):
    config = kg_config(write_graph(tmp_path / "e.parquet", ODD), split={"validation": 0.1, "test": 0.1})
    run = pipeline.Run(config, "unused", [], store_at(tmp_path), SNAPSHOT)
    for name in ("ingest", "vocabulary"):
        pipeline.run_stage(run, pipeline.STAGES[name], lambda _: None)
    resolved = relations.resolve(config, run.store, SNAPSHOT)
    made = positives.build_positives(resolved, run.store, SNAPSHOT)
    assert resolved.model.relation_names == sorted(ODD)
    counted = [manifest.details["edges_per_relation"] for manifest in made.values()]
    assert {name: sum(part[name] for part in counted) for name in sorted(ODD)} == dict.fromkeys(sorted(ODD), 6)


def test_only_ingest_gets_the_star_and_every_later_stage_the_relations(tmp_path):
    seen = {}
    run = pipeline.Run(kg_config(write_graph(tmp_path / "e.parquet", ["b", "a"])), "", [], store_at(tmp_path), SNAPSHOT)

    def look(name: str) -> Any:
        def function(given: pipeline.Run) -> None:
            seen[name] = given.config.model.relation_names

        return function

    pipeline.run_stage(run, pipeline.STAGES["ingest"], lambda _: None)
    for stage in pipeline.STAGES.values():
        pipeline.run_stage(run, pipeline.Stage(stage.name, "", look(stage.name), (), stage.reads), lambda _: None)
    assert seen.pop("ingest") == ["*"]
    assert list(seen.values()) == [["a", "b"]] * (len(pipeline.STAGES) - 1)


def test_a_table_made_before_relations_were_found_asks_for_a_new_ingest(tmp_path):
    store = store_at(tmp_path)
    with store.replace("raw_edges", SNAPSHOT, config_hash="0") as draft:
        draft.write(pa.table({"lhs": ["a"]}))
    with pytest.raises(UserError, match=f"twhin ingest --snapshot {SNAPSHOT}"):
        relations.resolve(config_of(tmp_path / "e.parquet"), store, SNAPSHOT)


class Earlier:
    """A trained model of some relations, as warm starts read it."""

    def __init__(self, config: TwhinConfig, rows: dict[str, torch.Tensor]) -> None:
        self.config, self.rows = config.model, rows

    def relation_rows(self) -> dict[str, torch.Tensor]:
        return self.rows


def test_operators_of_an_earlier_snapshot_go_to_the_relation_of_the_same_name(tmp_path):
    """Between snapshots 'b' went and 'aa' came, so every found relation has another number."""
    before, after = (
        relations.with_found(config_of(tmp_path / "e.parquet"), names) for names in (["a", "b", "c"], ["a", "aa", "c"])
    )
    scorer = Scorer(after.model)
    fresh = {name: row.clone() for name, row in scorer.state_rows().items()}
    rows = {
        name: torch.full_like(row, 2.0 + i) for i, (name, row) in enumerate(Scorer(before.model).state_rows().items())
    }
    told: list[str] = []
    warm_start._load_operators(scorer, after, Earlier(before, rows), told.append)  # type: ignore[arg-type]
    found = scorer.state_rows()
    assert all(torch.equal(found[name], rows[name]) for name in ("fav", "a", "c"))
    assert torch.equal(found["aa"], fresh["aa"])
    assert told == ["3 of 4 relations start from training.initial_checkpoint_dir"]


def test_a_checkpoint_of_relations_in_another_order_is_refused(tmp_path):
    before = relations.with_found(config_of(tmp_path / "e.parquet"), ["a", "b"])
    (tmp_path / "state.json").write_text(json.dumps({"config": before.model_dump(mode="json")}))
    warm_start._refuse_other_relations(str(tmp_path), before)
    with pytest.raises(UserError, match=r"initial_checkpoint_dir: .*give the store of the trained model"):
        warm_start._refuse_other_relations(str(tmp_path), relations.with_found(config_of(tmp_path), ["b", "c"]))


def test_an_entity_type_that_is_left_without_a_relation_is_told_before_training(tmp_path):
    """All relations are listed after all, so `*` finds nothing for its own entity type."""
    data = {
        "source": {"path": str(write(tmp_path / "e.parquet", [("a", "fav", "x")]))},
        "model": {
            "embeddings": {"tables": [{"name": name, "embedding_dim": 4} for name in ("user", "item", "place")]},
            "relations": [FAV, {"name": "*", "lhs": "user", "rhs": "place"}],
        },
    }
    with pytest.raises(UserError, match="table 'place' is on no side of any relation"):
        raw_edges.ingest(parse_config(data), Store(str(tmp_path / "home")), SNAPSHOT)
