"""`twhin recommend` and `twhin neighbors` for many ids: files that appear when they are whole, tables, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import small_store
from small_store import SNAPSHOT, Small

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.vectors.retrieval import best_rows

USERS = small_store.ids("user")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    made = small_store.make(tmp_path_factory.mktemp("answers"), config=small_store.config())
    export(made.config, made.store, SNAPSHOT)
    edges = pa.table({"lhs": ["u01", "u02"], "rel": ["likes"] * 2, "rhs": ["10", "20"]})
    with made.store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft:
        draft.write(edges)
    return made


@pytest.fixture
def model(small) -> TwhinEmbeddings:
    return load_model(small.store.root)


def run(small: Small, *arguments: str) -> int:
    return run_arguments([*arguments, "--home", small.store.root])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_all_heads_are_written_as_the_api_gives_them(small, model, tmp_path, capsys, ending):
    path = tmp_path / "new" / f"out.{ending}"
    assert run(small, "recommend", "--all", "-r", "likes", "-k", "4", "-o", str(path)) == 0
    written = pq.read_table(path) if ending == "parquet" else csv.read_csv(path)
    expected = model.recommend("likes", k=4).read_all()
    assert written.to_pydict() == (expected.to_pydict() | {"score": pytest.approx(expected["score"].to_pylist())})
    captured = capsys.readouterr()
    assert captured.out.strip() == str(path) and captured.err == f"twhin: {len(expected):,} rows\n"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_where_a_relation_is_calibrated_the_command_shows_probabilities(tmp_path, capsys):
    small = small_store.make(tmp_path, config=small_store.config())
    evaluate(small.config, small.store, SNAPSHOT)
    export(small.config, small.store, SNAPSHOT)
    model = load_model(small.store.root)
    chances = model.predict_relation("u01", [tail for tail, _ in model.candidates("likes", "u01", 3)], "likes")

    def told(*arguments: str) -> str:
        assert run(small, "recommend", *arguments, "-r", "likes", "-k", "3") == 0
        return capsys.readouterr().out

    found = json.loads(told("u01", "--json"))["tails"]
    assert [one["probability"] for one in found] == pytest.approx(chances, rel=1e-4)
    many = json.loads(told("u01", "u02", "--json"))["answers"]
    assert [one["probability"] for one in many[0]["tails"]] == pytest.approx(chances, rel=1e-4)
    for lines in (told("u01").splitlines(), told("u01", "u02").splitlines()):
        assert lines[0].split()[-2:] == ["score", "probability"] and lines[1].endswith(f"{chances[0]:.4f}")


def test_a_run_that_breaks_off_leaves_the_file_as_it_was(small, tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    path.write_text("before")
    monkeypatch.setattr("twhin_pipeline.vectors.answers.ROWS_AT_ONCE", 70)  # 7 heads of 10 answers
    calls = []

    def broken(searcher, queries, k, left_out=None):
        calls.append(len(queries))
        if len(calls) == 3:
            raise MemoryError("no more")
        return best_rows(searcher, queries, k, left_out)

    monkeypatch.setattr("twhin_pipeline.vectors.retrieval.best_rows", broken)
    with pytest.raises(MemoryError, match="no more"):
        run(small, "recommend", "--all", "-r", "likes", "-o", str(path))
    assert calls == [7, 7, 7]
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_several_ids_are_a_table_or_json_with_each_ones_answers(small, model, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("u01\nnobody\nu02\n")
    some = ["--ids", str(tmp_path / "ids.txt"), "--skip-unknown"]
    for arguments in (["u01", "u02"], some):
        assert run(small, "recommend", *arguments, "-r", "likes", "-k", "3", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["snapshot"], told["relation"]) == (SNAPSHOT, "likes")
        for one, answer in zip(("u01", "u02"), told["answers"], strict=True):
            expected = model.recommend("likes", one, 3)
            assert answer["id"] == one and [tail["id"] for tail in answer["tails"]] == [tail for tail, _ in expected]
    assert run(small, "neighbors", "user", "u01", "u02", "-k", "2") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["id", "neighbor", "rank", "similarity"]
    nearest = [(one, name, str(rank)) for one in ("u01", "u02") for rank, (name, _) in enumerate(model.neighbors("user", one, 2), 1)]  # fmt: skip # noqa: E501
    assert [tuple(line[:3]) for line in lines[1:]] == nearest


def test_neighbors_of_all_are_written_to_a_file(small, model, tmp_path):
    path = tmp_path / "near.parquet"
    assert run(small, "neighbors", "item", "--all", "-k", "3", "-o", str(path)) == 0
    assert pq.read_table(path).equals(model.neighbors("item", k=3).read_all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give ids, or --ids FILE, or --all"),
        (["u01", "--all"], "give ids, or --ids FILE, or --all"),
        (["--all"], "--all needs --output FILE, such as -o all.parquet"),
        (["--all", "-o", "OUT/out.txt"], "out.txt: is neither .parquet nor .csv; name one of these"),
        (["--all", "-o", "OUT/file/out.csv"], "cannot be written"),
        (["--ids", "OUT/none.txt"], "none.txt: cannot be read"),
        (["u01", "u100"], "no user has the id 'u100'; nearest: 'u10'"),
    ],
)
def test_what_cannot_be_answered_is_one_line_with_its_remedy(small, tmp_path: Path, capsys, arguments, message):
    (tmp_path / "file").write_text("in the way")
    told = [one.replace("OUT", str(tmp_path)) for one in arguments]
    for command in (["recommend", "-r", "likes"], ["neighbors", "user"]):
        assert run(small, *command, *told) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_of_all_heads_the_relation_is_needed_where_there_are_several(small, tmp_path, capsys):
    assert run(small, "recommend", "--all", "-o", str(tmp_path / "out.csv")) == 2
    assert "several relations; say which one: likes, follows, rates" in capsys.readouterr().err
