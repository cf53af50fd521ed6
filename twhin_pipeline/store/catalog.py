"""Every table of the store as a DuckDB view, for people and for checks."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from twhin_pipeline.store import database
from twhin_pipeline.store.database import literal, name

if TYPE_CHECKING:
    from twhin_pipeline.store import Manifest, Store

CATALOG = "catalog.duckdb"
DEAD_AFTER_S = 3600.0


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
        for found in store.snapshots(asset):
            if snapshot in (None, found):
                manifests.append(store.manifest(asset, found))
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
    if store.is_local:  # what a process left that was killed here
        for left in Path(store.root).glob("twhin-catalog-*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > DEAD_AFTER_S:
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="twhin-catalog-", dir=_near(store)) as folder:
        path = os.path.join(folder, CATALOG)
        con = duckdb.connect(path)
        try:
            views(con, store)
        finally:
            con.close()
        if store.is_local:
            os.replace(path, target)
        else:
            store.fs.put_file(path, target)
    return target


def _near(store: Store) -> str | None:
    """A folder on the store's own disk, where it has one, so that replacing is one step."""
    if not store.is_local:
        return None
    Path(store.root).mkdir(parents=True, exist_ok=True)
    return store.root


def _files(store: Store, manifest: Manifest) -> dict[str, list[str]]:
    """Return a manifest's Parquet files by view."""
    view = manifest.asset.replace("/", "_")
    found: dict[str, list[str]] = {}
    for part, file in store.part_files(manifest).items():
        # A part in a folder has several files, such as those of the state of an optimizer.
        folder, _, last = part.rpartition("/")
        found.setdefault("_".join([view, *(folder or last).split("/")]), []).append(file)
    base = store.path(manifest.asset, manifest.snapshot, manifest.version) + "/"
    for file in store.files_of(manifest):
        # A model has a folder of vectors for each entity type.
        folder = file.removeprefix(base).rpartition("/")[0]
        found.setdefault("_".join([view, *folder.split("/")]) if folder else view, []).append(file)
    return found


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
