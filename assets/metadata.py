"""Metadata: how tables, counts and pictures look on an asset's page.

Dagster draws entries in the order in which it gets them. It shows tables at once, and Markdown of fewer than 1,000
characters, such as a small SVG. Large pictures are files beside the table. Numbers become charts across runs.

What belongs here: adapters that several assets use. What does not: anything about one stage (its own module), or the
pictures themselves (`twhin_pipeline/views/`).
https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.views.columns import described

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = "_pictures"
"""The folder of pictures in a version's folder."""
PREVIEW_ROWS = 8
TABLE_ROWS = 20
"""Rows of a table on a page; a knowledge graph has hundreds of relations."""
DIGITS = 4
"""Significant digits of a measured number: more of them change from run to run."""


def of_table(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return what every table shows: rows, size, columns, its first rows, where it is and what it was made from."""
    meaning = described(manifest.asset)
    columns = [dg.TableColumn(name, kind, description=meaning.get(name)) for name, kind in manifest.schema.items()]
    shown: dict[str, Any] = {}
    if manifest.files:
        shown["dagster/row_count"] = manifest.rows
    if columns:
        shown["dagster/column_schema"] = dg.TableSchema(columns)
    if manifest.rows:
        shown["preview"] = preview(store, manifest)
    if manifest.parts:
        names = list(manifest.parts)
        shown["parts"] = table({
            "part": names, "rows": [manifest.parts[name]["rows"] for name in names],
            "columns": [", ".join(manifest.parts[name]["schema"]) for name in names],
        })  # fmt: skip
    if manifest.files:
        shown |= {"size_mib": rounded(manifest.bytes / 2**20), "num_files": len(manifest.files)}
    shown |= {
        "path": dg.MetadataValue.path(store.path(manifest.asset, manifest.snapshot, manifest.version)),
        "dagster/uri": store.path(manifest.asset, manifest.snapshot),
        "config_hash": manifest.config_hash,
        "store_version": manifest.version,
    }
    if manifest.parents:
        parents = manifest.parents
        shown["parents"] = table({"table": list(parents), "version": list(parents.values())}, most=len(parents))
    return shown


def preview(store: Store, manifest: Manifest) -> dg.MetadataValue:
    """Return a table's first rows."""
    import pyarrow.dataset as ds

    files = store.files_of(manifest)[:1]
    if store.is_local:
        dataset = ds.dataset(files, format="parquet")
    else:
        paths = [store.fs._strip_protocol(file) for file in files]
        dataset = ds.dataset(paths, format="parquet", filesystem=store.fs)
    return rows_of(dataset.head(PREVIEW_ROWS), PREVIEW_ROWS, width=60)


def counts(details: Mapping[str, Any], *, first: Iterable[str] = (), leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a stage counted as metadata: numbers for the page's charts, nested counts as tables.

    Args:
        details: The manifest's.
        first: Names that come before the others, those that are there.
        leave_out: Names that are shown elsewhere.
    """
    shown: dict[str, Any] = {}
    order = [name for name in first if name in details]
    for name in [*order, *(name for name in details if name not in order)]:
        value = details[name]
        if name in leave_out or value is None:
            continue
        if isinstance(value, Mapping):
            plain = all(isinstance(v, (int, float, str)) for v in value.values())
            if value and plain:
                largest = value if len(value) <= TABLE_ROWS else sorted(value, key=lambda key: _size(value[key]))
                shown[name] = table({name: list(largest), "count": [value[key] for key in largest]})
            elif value:
                shown[name] = dg.MetadataValue.json(value)
        elif isinstance(value, (bool, int)):
            shown[name] = value
        elif isinstance(value, float):
            shown[name] = rounded(value)
        elif isinstance(value, str):
            shown[name] = dg.MetadataValue.md(f"```\n{value}\n```") if "\n" in value else value
        elif value:
            shown[name] = dg.MetadataValue.json(value)
    return shown


def _size(value: float | str) -> float:
    """Sort numbers by size, the largest first, and then texts."""
    return 1.0 if isinstance(value, str) else -float(value)


def rounded(value: float, digits: int = DIGITS) -> float:
    """Return a measured number with as many significant digits as it is worth; whole parts are kept."""
    value = float(value)
    return float(round(value)) if abs(value) >= 10**digits else float(f"{value:.{digits}g}")


def table(columns: Mapping[str, list[Any]], most: int = TABLE_ROWS) -> dg.MetadataValue:
    """Return columns as a table: at most `most` rows, and a last one that says how many more there are."""
    import pyarrow as pa

    texts = {name: [_text(value) for value in values] for name, values in columns.items()}
    return rows_of(pa.table(texts), most, width=400)


def rows_of(rows: pa.Table, most: int, width: int = 80) -> dg.MetadataValue:
    """Return the first rows of an Arrow table; texts longer than `width` are cut."""
    from twhin_pipeline.checks.checks import cell

    records = [
        dg.TableRecord({name: cell(value, width) for name, value in row.items()})
        for row in rows.slice(0, most).to_pylist()
    ]
    if rows.num_rows > most:
        more = dict.fromkeys(rows.column_names, "") | {rows.column_names[0]: f"… and {rows.num_rows - most:,} more"}
        records.append(dg.TableRecord(more))
    schema = dg.TableSchema([dg.TableColumn(name, "string") for name in rows.column_names])
    return dg.MetadataValue.table(records, schema)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def picture(store: Store, manifest: Manifest, name: str, png: bytes) -> dg.MetadataValue:
    """Write a PNG beside a version's files, and return where it is.

    In an event it would be there for ever, read by whoever lists the events of its run; beside the version it goes when
    that goes.
    """
    place = store.path(manifest.asset, manifest.snapshot, manifest.version, PICTURES, f"{name}.png")
    store.write_bytes(place, png)
    return dg.MetadataValue.path(place)


def thumbnail(svg: str, title: str) -> dg.MetadataValue:
    """Return a small SVG, which Dagster draws on the page itself."""
    from urllib.parse import quote

    return dg.MetadataValue.md(f"![{title}](<data:image/svg+xml,{quote(svg, safe=' =:/,;.-+*!~')}>)")
