"""Every table of the store as a DuckDB view, for people and for checks."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from twhin_pipeline import scratch
from twhin_pipeline.store import database
from twhin_pipeline.store.database import literal, name

if TYPE_CHECKING:
    from twhin_pipeline.store import Manifest, Store

CATALOG = "catalog.duckdb"
ROOT = "store_root"
"""The catalog's table that says where the store was."""


def views(con: duckdb.DuckDBPyConnection, store: Store, snapshot: str | None = None) -> list[str]:
    """Create a view of each table (`vocabulary/user` → `vocabulary_user`), and return the views' names.

    Without `snapshot` a view has all snapshots and their dates in its first column, `snapshot`; with it, that one only
    and no such column. A model's files become `twhin_model_relations`, `twhin_model_losses`, `twhin_model_metrics` and
    `twhin_model_tables_<table>`. The view `tables` lists what there is: asset, snapshot, rows, bytes, created.
    """
    if not store.is_local:
        database.register(con, store.root)
    manifests = []
    for asset in store.assets():
        for result in store.snapshots(asset):
            if snapshot in (None, result):
                manifests.append(store.manifest(asset, result))
    parts: dict[str, list[str]] = {}
    for manifest in manifests:
        for view, files in _files(store, manifest).items():
            first = "" if snapshot is not None else f"{literal(manifest.snapshot)} AS snapshot, "
            parts.setdefault(view, []).append(f"SELECT {first}* FROM {database.parquet(files)}")
    for view, queries in parts.items():
        # By name: a later snapshot may have a column (time, split) that an earlier one lacks.
        con.execute(f"CREATE OR REPLACE VIEW {name(view)} AS {' UNION ALL BY NAME '.join(queries)}")
    con.execute(f"CREATE OR REPLACE VIEW tables AS {_tables(manifests)}")
    return sorted([*parts, "tables"])


def refresh(store: Store) -> str:
    """Write `<root>/catalog.duckdb` anew, with a view of each table, and return its path or URL.

    It is replaced as a whole, so a reader that has the old one open is not disturbed.
    """
    target = store.path(CATALOG)
    # Not beside the target: of a path with `?` DuckDB makes a wrong name for its log of writes.
    with scratch.folder("catalog") as folder:
        path = os.path.join(folder, CATALOG)
        con = duckdb.connect(path)
        try:
            views(con, store)
            con.execute(f"CREATE TABLE {ROOT} AS SELECT {literal(store.root)} AS root")
        finally:
            con.close()
        if store.is_local:
            Path(store.root).mkdir(parents=True, exist_ok=True)
            draft = f"{target}.{uuid.uuid4().hex[:8]}"
            try:
                shutil.copyfile(path, draft)
                os.replace(draft, target)
            finally:
                Path(draft).unlink(missing_ok=True)
        else:
            store.fs.put_file(path, target)
    return target


def follow(store: Store) -> bool:
    """Write the catalog anew where it was written for a store at another place; tell whether it was.

    Its views name files by their full paths, so those of a store that has been moved find nothing.
    """
    target = store.path(CATALOG)
    if not store.is_local or not os.path.exists(target):
        return False
    try:
        with duckdb.connect(target, read_only=True) as con:
            row = con.execute(f"SELECT root FROM {ROOT}").fetchone()
    except duckdb.Error:  # of an earlier version, or open for writing
        return False
    if row is None or row[0] == store.root or not os.access(store.root, os.W_OK):
        return False
    refresh(store)
    return True


def _files(store: Store, manifest: Manifest) -> dict[str, list[str]]:
    """Return a manifest's Parquet files by view."""
    view = manifest.asset.replace("/", "_")
    result: dict[str, list[str]] = {}
    for part, file in store.part_files(manifest).items():
        # A part in a folder has several files, such as those of the state of an optimizer.
        folder, _, last = part.rpartition("/")
        result.setdefault("_".join([view, *(folder or last).split("/")]), []).append(file)
    base = store.path(manifest.asset, manifest.snapshot, manifest.version) + "/"
    for file in store.files_of(manifest):
        # A model has a folder of vectors for each entity type.
        folder = file.removeprefix(base).rpartition("/")[0]
        result.setdefault("_".join([view, *folder.split("/")]) if folder else view, []).append(file)
    return result


def _tables(manifests: list[Manifest]) -> str:
    columns = "asset, snapshot, rows, bytes, created"
    if not manifests:
        return f"SELECT * FROM (VALUES ('', '', 0::BIGINT, 0::BIGINT, now())) AS t({columns}) WHERE false"
    rows = ", ".join(
        f"({literal(m.asset)}, {literal(m.snapshot)}, {m.rows}::BIGINT, {m.bytes}::BIGINT, "
        f"{literal(m.created)}::TIMESTAMPTZ)"
        for m in manifests
    )
    return f"SELECT * FROM (VALUES {rows}) AS t({columns})"
