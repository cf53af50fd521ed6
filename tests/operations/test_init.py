"""`twhin init`: the minimal configuration of a file, guessed from its columns' names and contents."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import load_config
from twhin_pipeline.config.data import SnapshotDays
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import init_config, init_files
from twhin_pipeline.operations.init_columns import Column
from twhin_pipeline.operations.init_columns import guess as guess_columns
from twhin_pipeline.operations.shop import generate_shop


def refuse(question, options, default):
    raise AssertionError(f"asked: {question}")


def write(path: Path, header: str, *rows: str) -> str:
    """Write lines, header first, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def guessed(paths, folder, **options):
    """Return the guess, after a look at whether its text is its data."""
    guess = init_config.guess([str(p) for p in paths], f"{folder}/mine.yaml", **options)
    assert yaml.safe_load(guess.text) == guess.data
    return guess


def users(count: int) -> list[str]:
    return [f"ann{n:03d}" for n in range(count)]


# --- columns ---


def columns(text: str) -> list[Column]:
    """Make columns of `name:kind` or `name:kind:distinct`."""
    made = []
    for part in text.split():
        name, kind, *distinct = part.split(":")
        numbers = {"low": 1.0, "high": 5.0} if kind in ("integer", "float") else {}
        if kind == "seconds":
            kind, numbers = "integer", {"low": 1.5e9, "high": 1.6e9}
        if kind == "millis":
            kind, numbers = "integer", {"low": 1.5e12, "high": 1.6e12}
        values = ("train", "test") if "split" in name else ()
        made.append(Column(name, kind, int(distinct[0]) if distinct else 1000, values=values, **numbers))
    return made


@pytest.mark.parametrize(
    ("given", "ends", "entities", "others"),
    [
        ("lhs:text rel:text:3 rhs:text", ("lhs", "rhs"), (None, None), {"rel": "rel"}),
        ("dst:text src:text", ("src", "dst"), (None, None), {}),
        ("from:integer to:integer weight:float", ("from", "to"), (None, None), {"weight": "weight"}),
        ("subject:text predicate:text:900 object:text", ("subject", "object"), (None, None), {"rel": "predicate"}),
        ("follower:text followee:text since:time", ("follower", "followee"), (None, None), {"time": "since"}),
        ("source_id:integer target_id:integer", ("source_id", "target_id"), (None, None), {}),
        ("from_user_id:integer to_user_id:integer ts:seconds", ("from_user_id", "to_user_id"), ("user", "user"),
         {"time": "ts"}),
        ("user1:text user2:text", ("user1", "user2"), ("user", "user"), {}),
        ("node_a:text node_b:text", ("node_a", "node_b"), (None, None), {}),
        ("userId:integer movieId:integer rating:float timestamp:seconds", ("userId", "movieId"), ("user", "movie"),
         {"time": "timestamp", "unused": ("rating",)}),
        ("product_id:text event_time:time event_type:text:4 user_id:text price:float", ("user_id", "product_id"),
         ("user", "product"), {"rel": "event_type", "time": "event_time", "unused": ("price",)}),
        ("event_time:time event_type:text:4 product_id:integer category_id:integer brand:text user_id:integer "
         "user_session:text", ("user_id", "product_id"), ("user", "product"),
         {"rel": "event_type", "time": "event_time", "unused": ("category_id", "brand", "user_session")}),
        ("customer:text sku:text qty:integer created_at:time updated_at:time", ("customer", "sku"),
         ("customer", "product"), {"time": "created_at", "unused": ("qty", "updated_at")}),
        ("paper_id:text keyword_id:text split:text", ("paper_id", "keyword_id"), ("paper", "keyword"),
         {"split": "split"}),
        ("user_id:text friend:text", ("user_id", "friend"), ("user", None), {}),
        ("alpha:text beta:text", ("alpha", "beta"), ("alpha", "beta"), {}),
        ("reader:text book:text type:text:2 note:other", ("reader", "book"), ("reader", "book"),
         {"rel": "type", "unused": ("note",)}),
        ("user:text item:text type:text:3000", ("user", "item"), ("user", "item"), {"unused": ("type",)}),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_names_and_values(given, ends, entities, others):
    answers = []

    def accept(question, options, default):
        answers.append(question)
        return default

    roles = guess_columns("f.csv", columns(given), accept)
    assert (roles.lhs.column, roles.rhs.column) == ends
    assert (roles.lhs.entity, roles.rhs.entity) == entities
    found = {name: getattr(roles, name) for name in ("rel", "time", "weight", "split", "unused")}
    assert {name: value for name, value in found.items() if value} == others
    # Only what no name tells is asked.
    assert bool(answers) == ("type:text:2" in given)


def test_a_time_in_milliseconds_is_not_taken_for_seconds():
    roles = guess_columns("f.csv", columns("src:text dst:text ts:millis"), refuse)
    assert (roles.time, roles.time_unit) == ("ts", "ms")


def test_someone_who_is_asked_decides():
    def choose(question, options, default):
        assert default in options
        return {"left": "q", "right": "r"}["left" if "left" in question else "right"]

    roles = guess_columns("f.csv", columns("p:text q:text r:text s_id:text"), choose)
    assert (roles.lhs.column, roles.rhs.column) == ("q", "r")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("user_id:text price:float", r"f.csv: no two columns hold ids of entities \(columns left .*: user_id, price\)"),
        ("user_id:float item_id:text", "f.csv: column 'user_id' holds ids as floating-point numbers; cast it"),
    ],
)  # fmt: skip
def test_a_file_without_two_columns_of_ids_is_one_clear_error(given, message):
    with pytest.raises(UserError, match=message):
        guess_columns("f.csv", columns(given), refuse)


# --- files ---


@pytest.mark.parametrize(
    ("files", "asked", "expected"),
    [
        (["e.csv"], ["e.csv"], {"e.csv": ()}),
        (["e-2025-01-01.csv"], ["e-2025-01-01.csv"], {"e-{snapshot}.csv": ("2025-01-01",)}),
        (["e-2025-01-01.csv", "e-2025-02-01.csv"], ["*.csv"], {"e-{snapshot}.csv": ("2025-01-01", "2025-02-01")}),
        (["2025-01-01/e.csv", "2025-02-01/e.csv"], ["*/e.csv"], {"{snapshot}/e.csv": ("2025-01-01", "2025-02-01")}),
        (["2025-01-01/e.csv"], ["2025-01-01/e.csv"], {"2025-01-01/e.csv": ()}),
        (["e-2025-13-01.csv"], ["e-2025-13-01.csv"], {"e-2025-13-01.csv": ()}),
        (["part-0.csv", "part-1.csv"], ["part-0.csv", "part-1.csv"], {"part-*.csv": ()}),
        (["part-0.csv", "part-1.csv", "part-2.csv"], ["part-0.csv", "part-1.csv"],
         {"part-0.csv": (), "part-1.csv": ()}),
        (["a.csv", "b.csv"], ["a.csv", "b.csv"], {"a.csv": (), "b.csv": ()}),
        (["a.csv", "b.csv"], ["*.csv"], {"*.csv": ()}),
        (["2025-01-01/p0.csv", "2025-01-01/p1.csv", "2025-02-01/p0.csv", "2025-02-01/p1.csv"], ["*/*.csv"],
         {"{snapshot}/p*.csv": ("2025-01-01", "2025-02-01")}),
        (["e[1].csv"], ["e[1].csv"], {"e[[]1].csv": ()}),
    ],
)  # fmt: skip
def test_files_are_grouped_by_dates_and_numbers(files, asked, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in files:
        write(Path(file), "src,dst", "a,b")
    found = init_files.group(asked)
    assert {source.path: source.snapshots for source in found} == expected


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("follows.csv", "follows"),
        ("x/likes-{snapshot}.tsv.gz", "likes"),
        ("likes/part-*.parquet", "likes"),
        ("2025/*.csv", "edge"),
        ("s3://b/buys.parquet", "buys"),
    ],
)
def test_a_file_without_a_relation_column_names_the_relation(path, stem):
    assert init_files.Source(path, path).stem == stem


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("u_1\tlikes\ti_3\nu_2\tlikes\ti_1\n", "e.tsv"),
        ("12\t13\n13\t14\n", "e.tsv"),
        ("ann,bob\nbob,carl\nann,dora\n", "e.csv"),
    ],
)
def test_a_file_without_names_of_columns_is_an_error_whose_remedy_works(text, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(UserError, match="its first line does not name the columns") as caught:
        init_config.guess([name], "mine.yaml")
    remedy = str(caught.value).partition("such as: ")[2]
    subprocess.run(["bash", "-c", remedy], check=True)
    named = init_config.guess([f"named{Path(name).suffix}"], "mine.yaml")
    assert named.lines[0].startswith(f"named{Path(name).suffix}: {len(text.splitlines())} rows")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.csv", "user_id,item_id\n", "e.csv: has no rows"),
        ("e.csv", "user_id item_id\na b\n", "e.csv: its first line has one column"),
        ("e.csv", "", "e.csv: is empty"),
        ("e.csv", "user_id,USER_ID\na,b\n", "two columns are named 'user_id'"),
        ("e.csv", "user_id,item_id\n,b\na,\n", "no row has both user_id and item_id"),
        ("e.json", "{}", "e.json: its kind is not known"),
        ("e.parquet", "no parquet", "e.parquet: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(UserError, match=message):
        init_config.guess([name], "mine.yaml")


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"absent.csv: there is no such file"):
        init_config.guess([f"{tmp_path}/absent.csv"], "mine.yaml")


def test_another_delimiter_than_the_endings_is_found_and_written(tmp_path):
    path = write(tmp_path / "e.csv", "reader;book", "ann;dune", "bob;emma")
    assert guessed([path], tmp_path).data["source"]["delimiter"] == ";"


# --- whole guesses ---


def test_a_shops_log_and_follows_become_two_sources_of_one_graph(tmp_path):
    generate_shop(f"{tmp_path}/shop", users=200, products=50, communities=3, events_per_user=20.0)
    guess = guessed([tmp_path / "shop/events.csv", tmp_path / "shop/follows.csv"], tmp_path, min_share=0.005)
    assert guess.data == {
        "sources": [
            {
                "path": f"{tmp_path}/shop/events.csv",
                "columns": {"lhs": "user_id", "rel": "event_type", "rhs": "product_id", "time": "event_time"},
            },
            {
                "path": f"{tmp_path}/shop/follows.csv",
                "relation": "follows",
                "columns": {"lhs": "follower", "rhs": "followee"},
            },
        ],
        "model": {
            "embeddings": {"tables": [{"name": "user"}, {"name": "product"}]},
            "relations": [
                {"name": "view", "lhs": "user", "rhs": "product"},
                {"name": "cart", "lhs": "user", "rhs": "product"},
                {"name": "buy", "lhs": "user", "rhs": "product"},
                {"name": "follows", "lhs": "user", "rhs": "user"},
            ],
        },
        "split": {"strategy": "temporal", "validation": 0.05, "test": 0.1, "relations": ["view", "cart", "buy"]},
    }
    told = "\n".join(guess.lines)
    assert "left out for --min-share 0.005: impression" in told
    assert "type user: user_id of events.csv, follower and followee of follows.csv (100% of the ids are shared)" in told
    assert "in doubt" not in told


def test_rare_relations_stay_unless_told_and_are_pointed_out(tmp_path):
    generate_shop(f"{tmp_path}", users=200, products=50, communities=3, events_per_user=20.0)
    guess = guessed([tmp_path / "events.csv"], tmp_path)
    assert [relation["name"] for relation in guess.data["model"]["relations"]] == ["view", "cart", "buy", "impression"]
    assert "few rows have impression; --min-share 0.005 leaves out what is rarer" in "\n".join(guess.lines)
    with pytest.raises(UserError, match=r"--min-share 1.0 leaves out all relations"):
        guessed([tmp_path / "events.csv"], tmp_path, min_share=1.0)


def test_relations_that_are_left_out_do_not_fail_the_check_on_rejected_rows(tmp_path):
    rows = [f"ann{n},likes,x{n % 9}" for n in range(95)] + [f"ann{n},hates,x{n}" for n in range(5)]
    path = write(tmp_path / "e.csv", "user,rel,item", *rows)
    assert guessed([path], tmp_path, min_share=0.06).data["source"]["max_rejected_share"] == pytest.approx(0.06)
    assert "max_rejected_share" not in guessed([path], tmp_path).data["source"]


def test_ids_of_an_unnamed_type_belong_to_the_named_type_that_shares_them(tmp_path):
    events = write(tmp_path / "e.csv", "user_id,item_id", *(f"{name},thing{n}" for n, name in enumerate(users(40))))
    likes = write(tmp_path / "likes.csv", "src,dst", *(f"{name},{name}x" for name in users(30)))
    data = guessed([events, likes], tmp_path).data
    assert data["model"]["relations"][1] == {"name": "likes", "lhs": "user", "rhs": "dst"}


def test_numbers_that_two_types_have_in_common_by_chance_make_no_one_type_of_them(tmp_path):
    events = write(tmp_path / "e.csv", "user_id,item_id", *(f"{n},{n % 50}" for n in range(100)))
    follows = write(tmp_path / "follows.csv", "follower,followee", *(f"{n},{(n + 1) % 50}" for n in range(50)))
    guess = guessed([events, follows], tmp_path)
    assert guess.data["model"]["relations"] == [
        {"name": "e", "lhs": "user", "rhs": "item"},
        {"name": "follows", "lhs": "user", "rhs": "user"},  # people are likelier users than items
    ]
    assert "in doubt: Which entity type are the ids in follower and followee of follows.csv? Taken: user" in str(
        guess.lines
    )
    answers = {"Which entity type are the ids in follower and followee of follows.csv?": "a type of its own"}
    other = guessed([events, follows], tmp_path, choose=lambda q, o, d: answers.get(q, d))
    names = [table["name"] for table in other.data["model"]["embeddings"]["tables"]]
    assert names == ["user", "item", "user_2"]


def test_types_of_unnamed_columns_are_those_of_each_relation(tmp_path):
    """Package, maintainer and tag, as in the bundled graph."""
    rows = [f"pkg{n},depends,pkg{(n * 7) % 60}" for n in range(60)]
    rows += [f"pkg{n},maintained_by,mr{n % 5}x" for n in range(60)] + [f"pkg{n},tagged,t{n % 6}::y" for n in range(60)]
    path = write(tmp_path / "e.csv", "lhs,rel,rhs", *rows)
    relations = guessed([path], tmp_path, choose=refuse).data["model"]["relations"]
    assert [(r["name"], r["lhs"], r["rhs"]) for r in relations] == [
        ("depends", "entity", "entity"),
        ("maintained_by", "entity", "maintained_by_rhs"),
        ("tagged", "entity", "tagged_rhs"),
    ]


def test_types_of_unnamed_columns_are_named_as_their_ids_begin(tmp_path):
    rows = [f"user_{n},follows,user_{n + 1}" for n in range(30)] + [f"user_{n},fav,item_{n}" for n in range(30)]
    path = write(tmp_path / "e.csv", "lhs,rel,rhs", *rows)
    relations = guessed([path], tmp_path, choose=refuse).data["model"]["relations"]
    assert {(r["name"], r["lhs"], r["rhs"]) for r in relations} == {
        ("follows", "user", "user"),
        ("fav", "user", "item"),
    }


def test_many_relations_of_one_type_stand_under_the_star(tmp_path):
    rows = [f"e{n % 20}x,r{n % 31},e{(n * 3) % 20}x" for n in range(20 * 31)]
    path = write(tmp_path / "e.csv", "head,relation,tail", *rows)
    guess = guessed([path], tmp_path, choose=refuse)
    assert guess.data["model"] == {
        "embeddings": {"tables": [{"name": "entity"}]},
        "relations": [{"name": "*", "lhs": "entity", "rhs": "entity"}],
    }
    assert "each of the 31 relations" in guess.text


def test_two_numbered_columns_are_asked_about_once(tmp_path):
    rows = [f"{n},{'abc'[n % 3]},{(n * 7) % 50}" for n in range(50)]
    path = write(tmp_path / "e.csv", "lhs,rel,rhs", *rows)
    asked = []

    def choose(question, options, default):
        asked.append((question, default))
        return "no"

    guess = guessed([path], tmp_path, choose=choose)
    assert len(asked) == 1 and "Are they one entity type?" in asked[0][0] and asked[0][1] == "yes"
    pairs = {(relation["lhs"], relation["rhs"]) for relation in guess.data["model"]["relations"]}
    assert pairs == {("lhs", "rhs")}


def test_one_relation_of_two_pairs_of_types_is_an_error_and_names_of_files_are_made_different(tmp_path):
    one = write(tmp_path / "a.csv", "user,rel,item", "ann,likes,x", "bob,likes,y")
    other = write(tmp_path / "b.csv", "user,rel,page", "ann,likes,p", "bob,likes,q")
    with pytest.raises(UserError, match=r"relation 'likes' joins user and item in a.csv, and user and page in b.csv"):
        guessed([one, other], tmp_path)
    paths = [
        write(tmp_path / "x/likes.csv", "user,item", "ann,x", "bob,y"),
        write(tmp_path / "y/likes.csv", "user,page", "ann,p", "bob,q"),
    ]
    names = [relation["name"] for relation in guessed(paths, tmp_path).data["model"]["relations"]]
    assert names == ["likes", "likes_2"]


def test_the_split_goes_by_a_split_column_or_by_time_or_is_left_to_chance(tmp_path):
    given = write(tmp_path / "g.csv", "user,item,split", "ann,x,train", "bob,y,test")
    assert guessed([given], tmp_path).data["split"] == {"strategy": "given"}
    timed = write(tmp_path / "t.csv", "user,item,time", "ann,x,2025-01-01", "bob,y,2025-01-02")
    assert guessed([timed], tmp_path).data["split"] == {"strategy": "temporal", "validation": 0.05, "test": 0.1}
    plain = write(tmp_path / "p.csv", "user,item", "ann,x", "bob,y")
    assert "split" not in guessed([plain], tmp_path).data


def test_days_of_a_log_are_offered_as_snapshots_in_a_comment_that_loads(tmp_path):
    log = write(tmp_path / "log.csv", "user,item,time", "ann,x,2025-01-01", "bob,y,2025-01-02")
    text = guessed([log], tmp_path).text
    assert "  # snapshots: {from: 2024-12-31, every: 1d, to: 2025-01-02}" in text, "it ended, so no day since is one"
    (tmp_path / "log.yaml").write_text(text.replace("# snapshots", "snapshots"))
    source = load_config(str(tmp_path / "log.yaml")).source
    assert source is not None and isinstance(source.snapshots, SnapshotDays) and source.snapshots.every == "1d"
    now = datetime.now(UTC)
    for newest in (now, now + timedelta(days=900)):
        grows = write(tmp_path / "grows.csv", "user,item,time", "ann,x,2025-01-01", f"bob,y,{newest:%Y-%m-%d}")
        line = f"  # snapshots: {{from: {now - timedelta(days=1):%Y-%m-%d}, every: 1d}}"
        assert line in guessed([grows], tmp_path).text, "it begins with the last day that is over"
    for day in ("2025-01-01", "2025-01-02"):
        write(tmp_path / f"e-{day}.csv", "user,item,time", f"ann,x,{day}", "bob,y,2024-12-01")
    assert "# snapshots" not in guessed([str(tmp_path / "e-*.csv")], tmp_path).text
    assert "# snapshots" not in guessed([write(tmp_path / "f.csv", "user,item", "ann,x", "bob,y")], tmp_path).text


def test_a_date_in_a_name_is_a_snapshot_unless_the_times_say_otherwise(tmp_path):
    def file(day: str, *times: str) -> str:
        return write(tmp_path / f"e-{day}.csv", "user,item,time", *(f"ann,x{n},{t}" for n, t in enumerate(times)))

    whole = [file("2025-01-01", "2024-01-01"), file("2025-02-01", "2024-01-01", "2025-01-31")]
    assert guessed(whole, tmp_path).data["source"]["path"].endswith("/e-{snapshot}.csv")
    days = [file("2025-01-01", "2025-01-01"), file("2025-02-01", "2025-01-02", "2025-01-31")]
    guess = guessed(days, tmp_path)
    assert guess.data["source"]["path"].endswith("/e-*.csv")
    assert "each file has the rows of its days, so all are read" in "\n".join(guess.lines)
    since = file("2025-03-01", "2025-03-01", "2025-04-01")
    assert guessed([since], tmp_path).data["source"]["path"] == since


def test_parquet_is_described_like_text(tmp_path):
    table = {"user_id": [1, 2, 3], "item_id": [7, 8, 9], "at": pa.array([1, 2, 3], pa.timestamp("us", tz="UTC"))}
    pq.write_table(pa.table(table), tmp_path / "buys.parquet")
    data = guessed([tmp_path / "buys.parquet"], tmp_path).data
    assert data["source"]["columns"] == {"lhs": "user_id", "rhs": "item_id", "time": "at"}
    assert data["model"]["relations"] == [{"name": "buys", "lhs": "user", "rhs": "item"}]


def test_a_long_file_is_looked_at_in_part_and_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(init_files, "SAMPLE_ROWS", 50)
    path = write(tmp_path / "e.csv", "user,item", *(f"{name},x" for name in users(60)))
    assert guessed([path], tmp_path).lines[0].startswith("e.csv: of the first 50 rows; user (left), item (right)")


def test_values_that_yaml_would_misread_come_back_as_they_were(tmp_path):
    rows = ["ann,no,x", "bob,1e3,y", "carl,null,z", "dora,\"a: {b}, #c\",z"]  # fmt: skip
    path = write(tmp_path / "e.csv", "user,rel,item", *rows)
    names = [relation["name"] for relation in guessed([path], tmp_path).data["model"]["relations"]]
    assert sorted(names) == ["1e3", "a: {b}, #c", "no", "null"]


# --- the command ---


def command(*arguments: str, **options):
    return subprocess.run(
        [sys.executable, "-m", "twhin_pipeline.cli", "init", *arguments], capture_output=True, text=True, **options
    )


def test_the_command_writes_a_file_that_loads_and_names_the_next_command(tmp_path):
    write(tmp_path / "data/events.csv", "user,rel,item", "ann,likes,x", "bob,likes,y")
    done = command("data/events.csv", "-o", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "wrote mine.yaml; look through it, then: twhin run --config mine.yaml"
    config = load_config(str(tmp_path / "mine.yaml"))
    assert config.source.path == "data/events.csv" and config.model.table_names == ["user", "item"]


def test_a_file_is_never_replaced_without_force(tmp_path, capsys):
    path = write(tmp_path / "events.csv", "user,rel,item", "ann,likes,x", "bob,likes,y")
    out = tmp_path / "mine.yaml"
    out.write_text("precious: true\n")
    assert run_arguments(["init", path, "-o", str(out)]) == 2
    assert "mine.yaml: is there already; pass --force" in capsys.readouterr().err
    assert out.read_text() == "precious: true\n"
    assert run_arguments(["init", path, "-o", str(out), "--force"]) == 0
    assert load_config(str(out)).model.relation_names == ["likes"]


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path, capsys):
    path = write(tmp_path / "events.csv", "user,rel,item", "ann,likes,x", "bob,likes,y")
    assert run_arguments(["init", path, "-o", str(tmp_path / "absent" / "mine.yaml")]) == 2
    assert f"there is no folder {tmp_path}/absent; make it" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "types"), [([], 2), (["--yes"], 1)])
def test_a_terminal_is_asked_where_a_guess_is_doubtful_unless_told_yes(tmp_path, flags, types):
    import pty

    write(tmp_path / "e.csv", "lhs,rel,rhs", *(f"{n},likes,{(n * 3) % 40}" for n in range(40)))
    main, terminal = pty.openpty()
    os.write(main, b"no\n")  # waits in the terminal until it is asked for
    process = subprocess.Popen(
        [sys.executable, "-m", "twhin_pipeline.cli", "init", "e.csv", "-o", "mine.yaml", *flags],
        cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(terminal)
    assert process.wait(60) == 0, process.stderr.read()
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert ("Are they one entity type? (yes, no) [yes]" in shown) == (not flags)
    assert len(load_config(str(tmp_path / "mine.yaml")).model.table_names) == types
