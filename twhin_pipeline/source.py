"""Where edges come from: which files, of which format, for which snapshot. Imports nothing slow."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from twhin_pipeline.errors import UserError
from twhin_pipeline.sections.data import Columns, TwhinDataConfig

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

DATE = r"\d{4}-\d{2}-\d{2}"
ENDINGS = (".parquet", ".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst")


@dataclass(frozen=True)
class Input:
    """Files that are read alike: their format, how ids are meant, and which of their rows count.

    `field` is the configuration's field that names them, `split` the part of the data that they are (published
    `data_root`s), `offset` and `limit` count rows over the files in order.
    """

    field: str
    files: list[str]
    format: str
    delimiter: str
    indexed: bool
    columns: Columns
    split: str | None = None
    offset: int | None = None
    limit: int | None = None


def inputs(config: TwhinConfig, snapshot: str) -> list[Input]:
    """Return what has to be read for `snapshot`, the files in order of their names.

    Raises:
        UserError: There is no such file, a name's ending does not tell its format, or the snapshot is no date.
    """
    check_snapshot(snapshot)
    source = config.source
    if source is None:
        parts = (("train", config.train_data), ("validation", config.validation_data))
        return [_published(part, data) for part, data in parts if data.data_root is not None]
    files = list_files(source.path.replace("{snapshot}", snapshot))
    if not files:
        there = ", ".join(find_snapshots(config)) or "none"
        raise UserError(
            f"source.path: {source.path}: no file for snapshot {snapshot} (snapshots there: {there}; working "
            f"directory {os.getcwd()}); mend the path or choose another snapshot"
        )
    kind: str = source.format
    if kind == "auto":
        kinds = {_format(file, "source.path") for file in files}
        if len(kinds) > 1:
            raise UserError(f"source.path: {source.path}: has both Parquet and CSV files; narrow the pattern")
        kind = kinds.pop()
    delimiters = {source.delimiter or ("\t" if _is_tsv(file) else ",") for file in files}
    if kind == "csv" and len(delimiters) > 1:
        raise UserError(f"source.path: {source.path}: has both TSV and CSV files; narrow the pattern")
    delimiter = delimiters.pop()
    return [Input("source.path", files, kind, delimiter, source.ids == "indexed", source.columns)]


def _published(part: str, data: TwhinDataConfig) -> Input:
    field = "train_data.data_root" if part == "train" else "validation_data.data_root"
    assert data.data_root is not None
    files = list_files(data.data_root)
    if not files:
        raise UserError(
            f"{field}: {data.data_root}: no such file (working directory {os.getcwd()}); mend the path, or make "
            "files of this kind with `twhin generate --like`"
        )
    kinds = {_format(file, field) for file in files}
    if kinds != {"parquet"}:
        raise UserError(f"{field}: {data.data_root}: must be Parquet; for CSV use the section `source`")
    return Input(field, files, "parquet", ",", True, Columns(), part, data.offset, data.limit)


def find_snapshots(config: TwhinConfig) -> list[str]:
    """List the snapshots there are edges for, oldest first.

    A path without `{snapshot}` has one, the day of its newest file (UTC).

    Raises:
        UserError: The listing fails, with what to mend.
    """
    if config.source is None:
        roots = [r for r in (config.train_data.data_root, config.validation_data.data_root) if r is not None]
        return _modified(file for root in roots for file in list_files(root))
    if config.source.snapshots is not None:
        return sorted(set(config.source.snapshots))
    path = config.source.path
    if "{snapshot}" not in path:
        return _modified(list_files(path))
    # A date's own shape keeps `{snapshot}` from matching a folder or file that is none.
    pattern = re.compile(_as_regex(_plain(path)) + "$")
    found = (pattern.search(_plain(file)) for file in list_files(path.replace("{snapshot}", "????-??-??")))
    return sorted({match["snapshot"] for match in found if match and _is_date(match["snapshot"])})


def list_files(path: str) -> list[str]:
    """Return the files that a path, glob or URL names, in order of name; URLs keep their protocol.

    Raises:
        UserError: It is a folder, or the URL cannot be listed.
    """
    if "://" not in path:
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; name its files, such as {path.rstrip('/')}/*.parquet")
        return sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    import fsspec  # only here: listing a local path should cost nothing

    try:
        fs, inner = fsspec.core.url_to_fs(path)
        if any(sign in inner for sign in "*?["):
            return sorted(str(fs.unstrip_protocol(file)) for file in fs.glob(inner))
        return [path] if fs.exists(inner) else []
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be listed: {' '.join(str(error).split())}; mend the URL or install what it needs"
        ) from error


def check_snapshot(snapshot: str) -> date:
    """Return the snapshot's day. Raises UserError where it is not a date, YYYY-MM-DD."""
    if not _is_date(snapshot):
        raise UserError(f"snapshot {snapshot!r} must be a date, YYYY-MM-DD")
    return date.fromisoformat(snapshot)


def _is_date(text: str) -> bool:
    try:
        return bool(re.fullmatch(DATE, text)) and bool(date.fromisoformat(text))
    except ValueError:
        return False


def _is_tsv(file: str) -> bool:
    return _name(file).endswith((".tsv", ".tsv.gz", ".tsv.zst"))


def _name(file: str) -> str:
    return file.lower().partition("?")[0] if "://" in file else file.lower()


def _format(file: str, field: str) -> str:
    lowered = _name(file)
    if not lowered.endswith(ENDINGS):
        known = ", ".join(ENDINGS)
        raise UserError(f"{field}: {file}: the ending tells no format (known: {known}); rename it or set source.format")
    return "parquet" if lowered.endswith(".parquet") else "csv"


def _modified(files: Iterable[str]) -> list[str]:
    """The day of the newest file (UTC), or nothing where there is none."""
    times = []
    for file in files:
        if "://" not in file:
            times.append(datetime.fromtimestamp(os.path.getmtime(file), UTC))
            continue
        import fsspec

        fs, inner = fsspec.core.url_to_fs(file)
        try:
            times.append(_aware(fs.modified(inner)))
        except (NotImplementedError, OSError):
            times.append(datetime.now(UTC))  # a server that tells no date: as of today
    return [f"{max(times):%Y-%m-%d}"] if times else []


def _aware(value: Any) -> datetime:
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _plain(path: str) -> str:
    return path.partition("://")[2].lstrip("/") if "://" in path else os.path.normpath(path)


def _as_regex(path: str) -> str:
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\{snapshot\}|\*\*/|\*\*|\*|\?|\[[^]]*\])", path)
    regex, seen = "", False
    for part in parts:
        if part == "{snapshot}":
            regex += "(?P=snapshot)" if seen else f"(?P<snapshot>{DATE})"
            seen = True
        elif part.startswith("[") and part.endswith("]"):
            regex += part
        else:
            regex += signs.get(part) or re.escape(part)
    return regex
