"""What every stage's asset has in common: its specs, its errors, and the metadata of a table.

What belongs here: adapters between `twhin_pipeline` and Dagster that several assets use. What does not: anything about
one stage (its own module), or about what is in a table (`twhin_pipeline`).
https://docs.dagster.io/guides/build/assets/metadata-and-tags
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig, configuration_file, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from . import provenance

OWNERS = ["team:twhin"]
PREVIEW_ROWS = 8
TABLE_ROWS = 50
"""Rows of a Markdown table on a page; a knowledge graph has hundreds of relations."""
POOL = "twhin"


def spec(
    table: str,
    *,
    group: str,
    description: str,
    code: str,
    deps: Iterable[str] = (),
    kinds: Iterable[str] = (),
) -> dg.AssetSpec:
    """Return the spec of a table of the store."""
    return dg.AssetSpec(
        provenance.key(table),
        deps=[provenance.key(dep) for dep in deps],
        group_name=group,
        description=description,
        kinds={"parquet", *kinds},
        owners=OWNERS,
        code_version=provenance.code(code),
    )


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn a user's mistake into a failure of the step that shows its one message and is not tried again."""
    try:
        yield
    except UserError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


@contextmanager
def opened(
    context: dg.AssetExecutionContext,
    configuration: ConfigurationResource,
    store: StoreResource,
    upstream: Iterable[str],
) -> Iterator[tuple[TwhinConfig, Store, str]]:
    """Yield configuration, store and snapshot of a step, once its upstream tables are known to fit each other.

    A step with something upstream gets the relations found in the source; the first one has yet to find them.
    """
    with mistakes():
        snapshot = context.partition_key
        config, tables = configuration.load(), store.open()
        above = list(upstream)
        tables.refuse_stale(snapshot, above)
        if above:
            config = relations.resolve(config, tables, snapshot)
        context.log.info(
            f"snapshot {snapshot}, store {tables.root}, configuration {configuration.file} {config.hash()}"
        )
        yield config, tables, snapshot
        configuration_file.remember(tables, configuration.file)


def table_metadata(store: Store, manifest: Manifest, *, preview: bool = True) -> dict[str, Any]:
    """Return what every table shows: rows, size, columns, where it is, what it was made from, and its first rows."""
    metadata: dict[str, Any] = {
        "dagster/row_count": manifest.rows,
        "size_mib": round(manifest.bytes / 2**20, 3),
        "num_files": len(manifest.files),
        "dagster/column_schema": dg.TableSchema([dg.TableColumn(name, kind) for name, kind in manifest.schema.items()]),
        "path": dg.MetadataValue.path(store.path(manifest.asset, manifest.snapshot, manifest.version)),
        "dagster/uri": store.path(manifest.asset, manifest.snapshot),
        "config_hash": manifest.config_hash,
        "store_version": manifest.version,
    }
    if manifest.parents:
        metadata["parents"] = dg.MetadataValue.json(manifest.parents)
    if preview and manifest.rows:
        metadata["preview"] = preview_of(store, manifest)
    return metadata


def preview_of(store: Store, manifest: Manifest) -> dg.MetadataValue:
    """Return a table's first rows, as Markdown."""
    from twhin_pipeline.checks.checks import rows_as_markdown

    head = store.dataset(manifest.asset, manifest.snapshot).head(PREVIEW_ROWS)
    return dg.MetadataValue.md(rows_as_markdown(head, PREVIEW_ROWS))


def counts(details: Mapping[str, Any], *, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a stage counted as metadata: numbers for the page's charts, nested counts as Markdown tables."""
    out: dict[str, Any] = {}
    for name, value in details.items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, Mapping):
            plain = all(isinstance(v, (int, float, str)) for v in value.values())
            if value and plain:
                largest = value if len(value) <= TABLE_ROWS else sorted(value, key=lambda key: _size(value[key]))
                out[name] = table({name: list(largest), "count": [value[key] for key in largest]})
            elif value:
                out[name] = dg.MetadataValue.json(value)
        elif isinstance(value, (bool, int, float)):
            out[name] = value
        elif isinstance(value, str):
            out[name] = dg.MetadataValue.md(f"```\n{value}\n```") if "\n" in value else value
        else:
            out[name] = dg.MetadataValue.json(value)
    return out


def _size(value: float | str) -> float:
    """Sort numbers by size, the largest first, and then texts."""
    return 1.0 if isinstance(value, str) else -float(value)


def table(columns: Mapping[str, list[Any]]) -> dg.MetadataValue:
    """Return columns as a Markdown table: the first rows, and how many more there are."""
    import pyarrow as pa

    from twhin_pipeline.checks.checks import rows_as_markdown

    arrays = {
        name: pa.array([str(v) if isinstance(v, bool) else v for v in values]) for name, values in columns.items()
    }
    return dg.MetadataValue.md(rows_as_markdown(pa.table(arrays), TABLE_ROWS, width=400))


def picture(png: bytes, title: str) -> dg.MetadataValue:
    """Return a PNG as metadata that Dagster's page draws."""
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})")
