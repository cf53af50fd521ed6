"""Releases in PostgreSQL with pgvector: each in a schema of its own, behind views that one transaction switches.

    <schema>_<release>.<entity>         id, embedding: an entity type's trained vectors
    <schema>_<release>.wants_<relation> id, embedding: heads' vectors as the relation's operator makes them
    <schema>_<release>.relations        relation, lhs, rhs, operator, parameters
    <schema>_<release>.calibration      the release's table of that name, where it has one
    <schema>_<release>.release          one row: name, snapshot, created, figures
    <schema>.*                          views of all of these, of the release that is current

Rows go by COPY in binary form (https://www.postgresql.org/docs/current/sql-copy.html, pgvector's `vector_send`).
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline import extras
from twhin_pipeline.config.training import PostgresConfig
from twhin_pipeline.errors import UnavailableError, UserError, unknown
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.model_files import vectors_of
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.words import PUBLISHED, RELATIONS

if TYPE_CHECKING:
    import psycopg
    from psycopg.sql import Composed, Identifier

MOST_DIMENSIONS = {"fp32": 2_000, "fp16": 4_000}
"""What pgvector's indexes take."""
OPERATOR_CLASSES = {"dot": "ip", "cosine": "cosine", "l2": "l2", "squared_l2": "l2"}
"""pgvector's name of each comparator's distance."""
NAME_BYTES = 63
"""PostgreSQL cuts longer names."""
CALIBRATION = "calibration"
SWITCH_S, WAIT_MS = 30.0, 100
"""How long a switch is tried, and how long it waits for one view: all of them in less than `deadlock_timeout`."""
OTHERS = ("relations", CALIBRATION, "release")
"""Tables beside those of the entity types."""
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COLUMN_TYPES = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_integer, "bigint"),
    (pa.types.is_floating, "double precision"),
)


def settings_of(store: Store) -> PostgresConfig | None:
    """Return how releases are copied, as the configuration of the latest one said; None where they are not.

    Of the latest for all: a return to an older release has to move the views that the newer ones moved.
    """
    latest = releases.latest(store)
    version = None if latest is None else latest.tables.get(PUBLISHED)
    if latest is None or version is None:
        return None
    said = store.seen_as(None).manifest(PUBLISHED, latest.snapshot, version).details.get("postgres")
    return None if said is None else PostgresConfig.model_validate(said)


def copy(store: Store, release: Release, settings: PostgresConfig) -> bool:
    """Copy a release, in one transaction; one that is there already stays as it is.

    Args:
        store: Where it is.
        release: Which one.
        settings: Where to and how.

    Returns:
        Whether it was copied now.

    Raises:
        UnavailableError: The server cannot be reached.
        UserError: It lacks pgvector or a permission, or a name is longer than PostgreSQL's.
    """
    with _connected(settings) as connection, connection.transaction():
        return _copy(connection, store, release, settings)


def show(store: Store, release: Release, settings: PostgresConfig) -> None:
    """Let the views show a release, and drop those older than the latest `keep`. It is copied where it is not there.

    Readers see the release before until the transaction ends, and the new one afterwards. Arguments and errors are
    those of `copy`.

    Raises:
        UserError: Something else in the database depends on a view whose columns changed.
    """
    with _connected(settings) as connection:
        with connection.transaction():
            _copy(connection, store, release, settings)
        _switch(connection, release, settings)
        _drop_older(connection, release, settings)


def shown(settings: PostgresConfig) -> str | None:
    """Return the name of the release that the views show; None where there are none. Raises as `copy` does."""
    with _connected(settings) as connection:
        view = _sql("SELECT to_regclass({})", _literal(f"{settings.schema_name}.release"))
        if connection.execute(view).fetchone() == (None,):
            return None
        row = connection.execute(_sql("SELECT name FROM {}.release", _name(settings.schema_name))).fetchone()
        return None if row is None else str(row[0])


@contextmanager
def _connected(settings: PostgresConfig) -> Iterator[psycopg.Connection[Any]]:
    """Connect. Messages name the variable and never its value, which has a password."""
    extras.need("psycopg", "export.postgres", "postgres")
    import psycopg

    address = os.environ.get(settings.url_variable, "")
    try:
        psycopg.conninfo.conninfo_to_dict(address)
    except psycopg.ProgrammingError:
        raise UserError(
            f"{settings.url_variable} is no address of a PostgreSQL server; write it as "
            "postgresql://user:password@host:port/database"
        ) from None
    try:
        connection = psycopg.connect(address, connect_timeout=10, application_name="twhin-pipeline", autocommit=True)
    except psycopg.OperationalError as error:
        raise UnavailableError(
            f"PostgreSQL ({settings.url_variable}) cannot be reached: {_told(error)}; start it, or correct the variable"
        ) from error
    try:
        yield connection
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"PostgreSQL ({settings.url_variable}) refuses: {_told(error)}; grant the role CREATE on the database, and "
            "have an administrator run CREATE EXTENSION vector there"
        ) from error
    except (psycopg.errors.UndefinedFile, psycopg.errors.FeatureNotSupported) as error:
        raise UserError(
            f"PostgreSQL ({settings.url_variable}) has no pgvector: {_told(error)}; install its package on the server"
        ) from error
    except psycopg.errors.DependentObjectsStillExist as error:
        raise UserError(
            f"PostgreSQL ({settings.url_variable}): columns of a view in {settings.schema_name} change, and something "
            f"depends on it ({_told(error)}); drop that, run `twhin postgres`, and make it again"
        ) from error
    except psycopg.OperationalError as error:
        raise UnavailableError(
            f"PostgreSQL ({settings.url_variable}) broke off: {_told(error)}; nothing was changed; `twhin postgres` "
            "tries again"
        ) from error
    except psycopg.Error as error:
        raise UserError(
            f"PostgreSQL ({settings.url_variable}) cannot take the release: {_told(error)}; nothing was changed; mend "
            "that, and run `twhin postgres`"
        ) from error
    finally:
        connection.close()


def _told(error: Exception) -> str:
    return " ".join(str(error).split())


def _copy(connection: psycopg.Connection[Any], store: Store, release: Release, settings: PostgresConfig) -> bool:
    # Two publishers take turns; the lock ends with the transaction.
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [settings.schema_name])
    schema = _schema(settings, release.name)
    if connection.execute("SELECT FROM pg_namespace WHERE nspname = %s", [schema]).fetchone() is not None:
        return False
    model = load_model(f"{store.root}@{release.name}")
    _check_names(model, settings, release)
    if connection.execute("SELECT FROM pg_extension WHERE extname = 'vector'").fetchone() is None:
        connection.execute("CREATE EXTENSION vector")
    for name in (settings.schema_name, schema):
        connection.execute(_sql("CREATE SCHEMA IF NOT EXISTS {}", _name(name)))
    connection.execute(_sql("COMMENT ON SCHEMA {} IS {}", _name(schema), _literal(f"twhin release {release.name}")))
    for entity in model.entities:
        _copy_vectors(connection, model, settings, _name(schema, entity), entity, None)
    for relation in settings.relations:
        lhs = next(one.lhs for one in model.config.relations if one.name == relation)
        _copy_vectors(connection, model, settings, _name(schema, _wants(relation)), lhs, relation)
    opened = releases.opened(store, release)
    relations = opened.read(RELATIONS, release.snapshot)
    _copy_table(connection, _name(schema, "relations"), relations.rename_columns({"embedding": "parameters"}))
    if CALIBRATION in release.tables:
        _copy_table(connection, _name(schema, CALIBRATION), opened.read(CALIBRATION, release.snapshot))
    _copy_release(connection, _name(schema, "release"), release)
    return True


def _check_names(model: TwhinEmbeddings, settings: PostgresConfig, release: Release) -> None:
    for name in settings.relations:
        if name not in model.relations:
            raise UserError(
                f"export.postgres.relations: release {release.name}: {unknown('relation', name, model.relations)}"
            )
    for name in (*model.entities, *map(_wants, settings.relations)):
        if len(name.encode()) > NAME_BYTES:
            raise UserError(
                f"export.postgres: {name!r} is longer than a table's name in PostgreSQL ({NAME_BYTES} bytes)"
            )
    taken = [name for name in model.entities if name in OTHERS or name in map(_wants, settings.relations)]
    if taken:
        raise UserError(f"export.postgres: the entity type {taken[0]!r} has the name of another table; rename it")


def _wants(relation: str) -> str:
    return f"wants_{relation}"


def _copy_vectors(
    connection: psycopg.Connection[Any],
    model: TwhinEmbeddings,
    settings: PostgresConfig,
    table: Identifier,
    entity: str,
    relation: str | None,
) -> None:
    """Write an entity type's trained vectors, or what a relation makes of them, and the index."""
    schema = model.schema(entity)
    dim = schema.field("embedding").type.list_size
    kind = "halfvec" if settings.data_type == "fp16" else "vector"
    key = "bigint" if pa.types.is_integer(schema.field("id").type) else "text"
    connection.execute(_sql(f"CREATE TABLE {{}} (id {key} NOT NULL, embedding {kind}({dim}) NOT NULL)", table))
    cursor = connection.cursor()
    with cursor.copy(_sql("COPY {} FROM STDIN (FORMAT binary)", table)) as stream:
        stream.write(_HEADER)
        for batch in model.batches(entity):
            vectors = vectors_of(batch.column("embedding"))
            if relation is not None:
                vectors = model.queries(relation, vectors)
            stream.write(_rows(batch.column("id"), vectors, settings.data_type))
        stream.write(b"\xff\xff")
    connection.execute(_sql("ALTER TABLE {} ADD PRIMARY KEY (id)", table))
    if settings.index == "hnsw" and relation is None and dim <= MOST_DIMENSIONS[settings.data_type]:
        operators = f"{kind}_{OPERATOR_CLASSES[model.config.comparator]}_ops"
        connection.execute(_sql(f"CREATE INDEX ON {{}} USING hnsw (embedding {operators})", table))
    connection.execute(_sql("ANALYZE {}", table))


def _rows(ids: pa.Array, vectors: np.ndarray, data_type: str) -> bytes:
    """Return rows of an id and a vector `[n, D]` in the binary form of COPY: numbers are big-endian."""
    element = vectors.astype(">f2" if data_type == "fp16" else ">f4")
    dim, size = vectors.shape[1], 4 + element.itemsize * vectors.shape[1]
    field = size.to_bytes(4) + dim.to_bytes(2) + bytes(2)
    content, width = element.tobytes(), size - 4
    parts = [field + content[at : at + width] for at in range(0, len(content), width)]
    two = (2).to_bytes(2)
    if pa.types.is_integer(ids.type):
        head = two + (8).to_bytes(4)
        return b"".join(head + one.to_bytes(8, signed=True) + v for one, v in zip(ids.to_pylist(), parts, strict=True))
    texts = [one.encode() for one in ids.to_pylist()]
    return b"".join(two + len(one).to_bytes(4) + one + v for one, v in zip(texts, parts, strict=True))


def _copy_table(connection: psycopg.Connection[Any], target: Identifier, table: pa.Table) -> None:
    """Write a small table as it is."""
    columns = [_sql(f"{{}} {_column_type(field.type)}", _name(field.name)) for field in table.schema]
    connection.execute(_sql("CREATE TABLE {} ({})", target, _joined(columns)))
    with connection.cursor().copy(_sql("COPY {} FROM STDIN", target)) as stream:
        for row in table.to_pylist():
            stream.write_row(list(row.values()))


def _column_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"{_column_type(kind.value_type)}[]"
    return next((name for fits, name in _COLUMN_TYPES if fits(kind)), "text")


def _copy_release(connection: psycopg.Connection[Any], target: Identifier, release: Release) -> None:
    connection.execute(_sql("CREATE TABLE {} (name text, snapshot date, created timestamptz, figures jsonb)", target))
    said = asdict(release)
    values = [said["name"], said["snapshot"], said["created"], json.dumps(said["figures"])]
    connection.execute(_sql("INSERT INTO {} VALUES (%s, %s, %s, %s)", target), values)


def _switch(connection: psycopg.Connection[Any], release: Release, settings: PostgresConfig) -> None:
    """Let all views show a release at once.

    To replace a view takes a lock that waits for its readers, and readers may hold one view and want another. So we
    wait for a moment only, give all locks back and try again: PostgreSQL looks for a deadlock after a second
    (`deadlock_timeout`), and would break off a reader. Each try takes the views in another order: where readers all
    have the same one, half of the tries fit it.
    """
    import psycopg

    last = time.monotonic() + SWITCH_S
    while True:
        try:
            with connection.transaction():
                connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{WAIT_MS}ms"])
                _replace_views(connection, release, settings)
            return
        except psycopg.errors.LockNotAvailable as error:
            if time.monotonic() > last:
                raise UnavailableError(
                    f"PostgreSQL ({settings.url_variable}): the views in {settings.schema_name} are being read without "
                    f"a break for {SWITCH_S} s, so they show the release before; end long transactions "
                    "(pg_stat_activity) and run `twhin postgres`"
                ) from error
        time.sleep(random.uniform(0.01, 0.2))


def _replace_views(connection: psycopg.Connection[Any], release: Release, settings: PostgresConfig) -> None:
    import psycopg

    schema = _schema(settings, release.name)
    names = "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s"
    tables = [row[0] for row in connection.execute(f"{names} AND c.relkind = 'r' ORDER BY 1", [schema])]
    # Views that someone else made in this schema are not ours to drop.
    ours = (
        "SELECT DISTINCT view_name FROM information_schema.view_table_usage "
        "WHERE view_schema = %s AND starts_with(table_schema, %s) ORDER BY 1"
    )
    mine = [row[0] for row in connection.execute(ours, [settings.schema_name, f"{settings.schema_name}_"])]
    for name in random.sample(tables, len(tables)):
        view = _name(settings.schema_name, name)
        replace = _sql("CREATE OR REPLACE VIEW {} AS SELECT * FROM {}", view, _name(schema, name))
        try:
            with connection.transaction():  # a savepoint
                connection.execute(replace)
        except psycopg.errors.InvalidTableDefinition:  # another dimension: the columns' types differ
            connection.execute(_sql("DROP VIEW {}", view))
            connection.execute(replace)
    for name in mine:
        if name not in tables:
            connection.execute(_sql("DROP VIEW {}", _name(settings.schema_name, name)))


def _drop_older(connection: psycopg.Connection[Any], release: Release, settings: PostgresConfig) -> None:
    """Drop the oldest releases' schemas; one that is being read is left for the next time."""
    import psycopg

    prefix = f"{settings.schema_name}_"
    found = connection.execute(
        "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, %s) AND "
        "starts_with(obj_description(oid, 'pg_namespace'), 'twhin release ')",
        [prefix],
    ).fetchall()
    there = sorted(name for (name,) in found if releases.NAME.fullmatch(name.removeprefix(prefix)))
    shown = _schema(settings, release.name)
    kept = [*[name for name in there if name != shown][-(settings.keep - 1) :], shown] if settings.keep > 1 else [shown]
    for name in there:
        if name in kept:
            continue
        try:
            with connection.transaction():
                connection.execute("SET LOCAL lock_timeout = '3s'")
                connection.execute(_sql("DROP SCHEMA {} CASCADE", _name(name)))
        except psycopg.errors.LockNotAvailable:
            continue


def _schema(settings: PostgresConfig, release: str) -> str:
    return f"{settings.schema_name}_{release}"


def _sql(text: str, *parts: Any) -> Composed:
    from psycopg import sql

    return sql.SQL(text).format(*parts)


def _name(*parts: str) -> Identifier:
    from psycopg import sql

    return sql.Identifier(*parts)


def _literal(value: str) -> Any:
    from psycopg import sql

    return sql.Literal(value)


def _joined(parts: list[Any]) -> Any:
    from psycopg import sql

    return sql.SQL(", ").join(parts)
