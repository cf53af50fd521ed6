"""DuckDB connections: bounded memory, spilling to disk, and able to read the store and any fsspec URL."""

from __future__ import annotations

import os
import re
import shutil
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from twhin_pipeline import errors, interrupts, remote, scratch
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store


def connect(config: TwhinConfig | None = None, store: Store | None = None) -> duckdb.DuckDBPyConnection:
    """Open an in-memory database that spills to the temporary folder (`TMPDIR`) beyond `launch.duckdb_memory_limit`.

    Times are read as UTC. With a remote `store`, its files can be read by their URLs.

    Raises:
        UserError: The memory limit is not one that DuckDB understands.
    """
    con = duckdb.connect(":memory:")
    interrupts.register(con)
    # DuckDB makes the folder when something spills, and empties it, but leaves it there.
    spill = Path(scratch.root()) / f"spill-{uuid.uuid4().hex}"
    weakref.finalize(con, shutil.rmtree, spill, ignore_errors=True)
    con.execute(f"SET temp_directory = {literal(str(spill))}")
    con.execute("SET TimeZone = 'UTC'")
    con.execute("SET enable_progress_bar = false")
    con.execute("SET autoinstall_known_extensions = false")
    with suppress(duckdb.CatalogException):  # a version that has no such setting
        # Where DuckDB 2.0.0 collects an operator's small results, a dictionary that changes among them is an error
        # ("global dictionary column … changed identity"). Not collecting them takes no more time.
        con.execute("SET debug_enable_caching_operators = false")
    if config is not None:
        limit = config.launch.duckdb_memory_limit
        try:
            con.execute(f"SET memory_limit = {literal(limit)}")
        except duckdb.Error as error:
            raise UserError(f"launch.duckdb_memory_limit: {limit!r} is not a size; write one such as 4GB") from error
        if config.launch.data_threads is not None:
            con.execute(f"SET threads = {config.launch.data_threads}")
    if store is not None and not store.is_local:
        con.register_filesystem(_of_versions(store.fs))
    return con


@cache
def _of_versions(fs: Any) -> Any:
    """Return a store's file system as one that asks only once what a file is: those of versions never change.

    For each read of a file DuckDB asks five times for its size and age, which of S3 are requests that it waits for.
    """
    if "s3" not in fs.protocol:
        return fs
    from fsspec.asyn import sync

    made = type(fs)(**fs.storage_options, skip_instance_cache=True)
    look, known = made._info, dict[str, Any]()

    async def info(path: str, *arguments: Any, **options: Any) -> Any:
        path = made._strip_protocol(path)
        if path not in known:
            known[path] = await look(path, *arguments, **options)
        return known[path]

    made._info = info
    made.info = lambda path, *arguments, **options: sync(made.loop, info, path, *arguments, **options)
    return made


def threads(config: TwhinConfig) -> int:
    """Return how many threads work on the data: `launch.data_threads`, else the machine's."""
    return config.launch.data_threads or os.cpu_count() or 1


def register(con: duckdb.DuckDBPyConnection, url: str) -> None:
    """Let `con` read what `url`'s fsspec filesystem holds. A local path needs nothing."""
    fs, _ = remote.filesystem(url)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & {"file", "local"} or any(con.filesystem_is_registered(protocol) for protocol in protocols):
        return
    con.register_filesystem(fs)


_OURS = ("Binder Error", "Catalog Error", "Parser Error", "INTERNAL Error", "Not implemented Error")
"""Kinds of errors in the SQL that is written here: no user can mend one."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors of DuckDB, and of memory, that a user can mend into a UserError that begins with `what`.

    A query that ctrl-c ended raises KeyboardInterrupt.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"{what}: out of memory ({_first_line(error)}); what a graph's ids and entities take does not fit here, so "
            "use a machine with more memory"
        ) from error
    except (duckdb.Error, OSError) as error:
        kind = _kind(error)
        if kind.upper() == "INTERRUPT ERROR":
            raise KeyboardInterrupt from error
        if errors.out_of_handles(error):
            raise UserError(errors.no_handles(what)) from error
        if kind == "Out of Memory Error":
            raise UserError(
                f"{what}: out of memory ({_first_line(error)}); raise launch.duckdb_memory_limit, lower "
                "launch.data_threads, or point TMPDIR at a larger disk"
            ) from error
        if (isinstance(error, duckdb.Error) or kind) and kind not in _OURS:
            raise UserError(f"{what}: cannot be read ({_first_line(error)}); {_remedy(str(error))}") from error
        raise


def _remedy(text: str) -> str:
    """Return what to do about a file that DuckDB cannot read."""
    if "magic bytes" in text or "too small to be a Parquet file" in text:
        return "it is no Parquet file, or the end of one is missing: copy or write it anew, or correct the path"
    if "No space left" in text or "disk" in text.lower():
        return "free some space, or point TMPDIR at a larger disk"
    if "No such file" in text or "No files found" in text or "does not exist" in text:
        return "it was removed meanwhile, or its path is wrong: put it back, or correct the path"
    if "Permission denied" in text:
        return "give yourself the right to read it"
    return "it is damaged, or of another format than its name says: write it anew, or correct the path or the format"


def _kind(error: Exception) -> str:
    """Return what DuckDB calls an error, such as `IO Error`; empty where it is no error of DuckDB's.

    Its messages begin so. One that is met while Arrow reads a result from it comes as Arrow's own OSError, with the
    message alone.
    """
    match = re.match(r"([A-Za-z ]+ Error): ", str(error))
    return match[1] if match else ""


def literal(value: str) -> str:
    """Quote a string for SQL."""
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    """Quote an identifier for SQL."""
    return '"' + value.replace('"', '""') + '"'


def parquet(files: Sequence[str], options: str = "") -> str:
    """Return the SQL that scans Parquet `files` in their order; `options` are `read_parquet`'s."""
    listed = ", ".join(literal(file) for file in files)
    return f"read_parquet([{listed}]{', ' + options if options else ''})"


def scan(store: Store, asset: str, snapshot: str) -> str:
    """Return the SQL that scans a table of the store. Raises UserError where the table is not there."""
    return parquet(store.files(asset, snapshot))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
