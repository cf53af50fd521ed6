"""Where edges come from: which files, of which format, for which snapshot. Imports nothing slow."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from twhin_pipeline import remote
from twhin_pipeline.config.data import Columns, SnapshotDays, SourceConfig, TwhinDataConfig, duration
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

DATE = r"\d{4}-\d{2}-\d{2}"
ENDINGS = (".parquet", ".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst", ".sql")
TABLES = ("delta", "iceberg")
"""Formats whose path is that of a table, not of files."""
MOST_NAMED = 12
"""Snapshots that a message names at most, the newest."""
LARGEST_QUERY = 1 << 20
"""A larger file is no query, bytes."""


@dataclass(frozen=True)
class Input:
    """Files that are read alike: their format, and how the configuration describes them.

    `section` is the source's path in the configuration (`source`, `sources[1]`, `train_data`), `field` that of the
    field that names the files, `sql` the query of a source of SQL, `split` the part of the data that published
    `data_root`s are; `offset` and `limit` count rows over the files in order.
    """

    section: str
    field: str
    source: SourceConfig
    snapshot: str
    files: list[str]
    format: str
    delimiter: str = ","
    sql: str | None = None
    split: str | None = None
    offset: int | None = None
    limit: int | None = None

    @property
    def columns(self) -> Columns:
        """Names of the columns."""
        return self.source.columns

    @property
    def indexed(self) -> bool:
        """Whether ids are rows."""
        return self.source.ids == "indexed"


def inputs(config: TwhinConfig, snapshot: str) -> list[Input]:
    """Return what has to be read for `snapshot`, one for each source, the files in order of their names.

    Raises:
        UserError: There is no such file, a name's ending does not tell its format, or the snapshot is no date.
    """
    check_snapshot(snapshot)
    if not config.all_sources:
        parts = (("train", config.train_data), ("validation", config.validation_data))
        return [_published(part, data, snapshot) for part, data in parts if data.data_root is not None]
    return [_input(config, section, source, snapshot) for section, source in config.named_sources]


def _input(config: TwhinConfig, section: str, source: SourceConfig, snapshot: str) -> Input:
    if source.sql is not None:
        field = f"{section}.sql"
        query = source.sql.replace("{snapshot}", snapshot)
        return Input(section, field, source, snapshot, [field], "sql", sql=query)
    assert source.path is not None
    field, path = f"{section}.path", source.resolve(source.path).replace("{snapshot}", snapshot)
    files = list_files(path, tables=source.format in TABLES)
    if not files:
        found = find_snapshots(config)
        there = ", ".join(["…"] * (len(found) > MOST_NAMED) + found[-MOST_NAMED:]) or "none"
        raise UserError(
            f"{field}: {source.path}: no file for snapshot {snapshot}: there is no {path} (snapshots there: "
            f"{there}); correct the path or choose another snapshot"
        )
    kind: str = source.format
    if kind == "auto":
        kinds = {_format(file, field) for file in files}
        if len(kinds) > 1:
            named = {"parquet": "Parquet", "csv": "CSV", "sql": "SQL"}
            both = " and ".join(named[one] for one in sorted(kinds, key=list(named).index))
            raise UserError(f"{field}: {source.path}: has both {both} files; narrow the pattern")
        kind = kinds.pop()
    if kind == "sql":
        if len(files) > 1:
            raise UserError(f"{field}: {source.path}: has {len(files)} files of SQL; name one")
        query = _read_text(files[0], field).replace("{snapshot}", snapshot)
        return Input(section, field, source, snapshot, files, "sql", sql=query)
    delimiters = {source.delimiter or ("\t" if _is_tsv(file) else ",") for file in files}
    if kind == "csv" and len(delimiters) > 1:
        raise UserError(f"{field}: {source.path}: has both TSV and CSV files; narrow the pattern")
    return Input(section, field, source, snapshot, files, kind, delimiters.pop())


def _published(part: str, data: TwhinDataConfig, snapshot: str) -> Input:
    section = "train_data" if part == "train" else "validation_data"
    field = f"{section}.data_root"
    assert data.data_root is not None
    files = list_files(data.data_root)
    if not files:
        raise UserError(
            f"{field}: {data.data_root}: no such file (working directory {os.getcwd()}); correct the path, or make "
            "files of this kind with `twhin generate --like`"
        )
    kinds = {_format(file, field) for file in files}
    if kinds != {"parquet"}:
        raise UserError(f"{field}: {data.data_root}: must be Parquet; for CSV use the section `source`")
    source = SourceConfig(path=data.data_root, ids="indexed", columns=Columns(rel="rel"))
    return Input(section, field, source, snapshot, files, "parquet", split=part, offset=data.offset, limit=data.limit)


def find_snapshots(config: TwhinConfig) -> list[str]:
    """List the snapshots there are edges for, oldest first: those that every dated source has.

    A source is dated by its `snapshots`, or by `{snapshot}` in its path. Where none is, there is one snapshot, the day
    of the newest file or table (UTC); a query tells no day. Of an event log whose `snapshots` are days, a day counts
    once it is over (UTC) and a file of the log has been written since.

    Raises:
        UserError: The listing fails, with what to mend.
    """
    sources = config.all_sources
    if not sources:
        roots = [r for r in (config.train_data.data_root, config.validation_data.data_root) if r is not None]
        return _newest(_modified(file) for root in roots for file in list_files(root))
    dated = [dates for source in sources if (dates := _dates(source)) is not None]
    if dated:
        return sorted(set.intersection(*dated))
    return _newest(time for source in sources for time in _times(source))


def newest_snapshot(config: TwhinConfig) -> str:
    """Return the newest snapshot there are edges for.

    Raises:
        UserError: There is none, with where it was looked for.
    """
    if snapshots := find_snapshots(config):
        return snapshots[-1]
    named = config.named_sources
    for section, source in named:
        if isinstance(source.snapshots, SnapshotDays) and not _dates(source):
            raise UserError(
                f"{section}.snapshots: no day from {source.snapshots.first} on is over (UTC) and in the source yet; "
                "choose an earlier day, or pass --snapshot YYYY-MM-DD"
            )
    if named and all(_is_query(source) for _, source in named):
        raise UserError(
            f"{named[0][0]}: SQL does not tell which snapshots there are; set {named[0][0]}.snapshots, or pass "
            "--snapshot YYYY-MM-DD"
        )
    paths = [source.resolve(source.path) for _, source in named if source.path is not None]
    where = ", ".join(paths) or config.train_data.data_root
    raise UserError(f"no snapshot was found at {where}; correct the path, or pass --snapshot YYYY-MM-DD")


def undated(config: TwhinConfig, snapshot: str) -> list[str]:
    """Say which sources give the same edges whatever the snapshot's date is, and which do not know that date."""
    lines = []
    for section, source in config.named_sources:
        field = f"{section}.path" if source.path is not None else f"{section}.sql"
        if source.snapshots is not None:
            if snapshot not in source.snapshots:
                days = source.snapshots
                known = ", ".join(days) if isinstance(days, list) else f"every {days.every} from {days.first} on"
                lines.append(
                    f"{section}.snapshots does not list {snapshot} (it has {known}), and it is read all the same"
                )
        elif source.path is not None and _is_query(source):
            continue  # the query is in the file
        elif "{snapshot}" not in (source.path or source.sql or "") and source.columns.time is None:
            changed = max(_times(source), default=None)
            last = f", last changed on {changed:%Y-%m-%d}" if changed is not None else ""
            lines.append(
                f"{field} has no {{snapshot}}, so it is read as it is now{last}, and {snapshot} is only the name of "
                "what was read; write {snapshot} into the path of dated files, or list dates in "
                f"{section}.snapshots"
            )
    return lines


def _dates(source: SourceConfig) -> set[str] | None:
    """Return the snapshots that a source has; None where it is not dated."""
    days = source.snapshots
    if isinstance(days, list):
        return set(days)
    if source.path is None or "{snapshot}" not in source.path:
        return None if days is None else set(_until(days, _last_whole_day(source)))
    path = source.resolve(source.path)
    # A date's own shape keeps `{snapshot}` from matching a folder or file that is none.
    pattern = re.compile(_as_regex(_plain(path)) + "$")
    listed = list_files(path.replace("{snapshot}", "????-??-??"), tables=source.format in TABLES)
    matches = (pattern.search(_plain(file)) for file in listed)
    dates = {match["snapshot"] for match in matches if match and _is_date(match["snapshot"])}
    return dates if days is None else {snapshot for snapshot in dates if snapshot in days}


def _until(days: SnapshotDays, newest: date) -> Iterator[str]:
    """Yield the snapshots of a log up to a day, oldest first."""
    day, step = date.fromisoformat(days.first), duration(days.every)
    last = newest if days.last is None else min(newest, date.fromisoformat(days.last))
    while day <= last:
        yield f"{day:%Y-%m-%d}"
        day += step


def _last_whole_day(source: SourceConfig) -> date:
    """Return the newest day (UTC) of a log that is over, and that was over when the newest of its files was written."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    if _is_query(source):
        return yesterday
    changed = max(_times(source), default=None)
    return date.min if changed is None else min(yesterday, changed.date() - timedelta(days=1))


def is_log(source: SourceConfig) -> bool:
    """Tell whether a source is an event log: every snapshot reads the same files, up to the snapshot's day."""
    return source.columns.time is not None and "{snapshot}" not in (source.path or source.sql or "")


def fingerprint(config: TwhinConfig, snapshot: str) -> str:
    """Return 12 hex digits that change when a file of a snapshot's edges does: its name, size or time.

    Files of an event log do not count: they change every day, and a past day's edges in them hardly ever do
    (`log_rows` tells).

    Raises:
        UserError: The listing fails, or a file is missing.
    """
    digest = hashlib.sha256()
    for given in inputs(config, snapshot):
        digest.update(f"{given.section} {given.sql or ''}\n".encode())
        if given.format != "sql" and not is_log(given.source):
            digest.update(_states(given))
    return digest.hexdigest()[:12]


def log_state(config: TwhinConfig, snapshot: str) -> str:
    """Return 12 hex digits that change when a file of an event log does; empty where no source has files of one.

    Raises:
        UserError: The listing fails, or a file is missing.
    """
    logs = [given for given in inputs(config, snapshot) if given.format != "sql" and is_log(given.source)]
    return hashlib.sha256(b"".join(_states(given) for given in logs)).hexdigest()[:12] if logs else ""


def _states(given: Input) -> bytes:
    return "".join(f"{file} {_state(file, given.format)}\n" for file in given.files).encode()


def _state(file: str, kind: str) -> str:
    """Return a text that changes when a file or table does."""
    if kind in TABLES:
        from twhin_pipeline.graph import lake

        return str(lake.modified(file, kind))
    if (local := remote.local_path(file)) is not None:
        found = os.stat(local)
        return f"{found.st_size} {found.st_mtime_ns}"
    with remote.reading(file):
        fs, inner = remote.filesystem(file)
        info = fs.info(inner)
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "mtime", "LastModified", "created", "updated"))


def _times(source: SourceConfig) -> Iterator[datetime]:
    """Yield when each file or table of an undated source was changed."""
    if source.path is None or _is_query(source):
        return
    for file in list_files(source.resolve(source.path), tables=source.format in TABLES):
        if source.format in TABLES:
            from twhin_pipeline.graph import lake

            yield lake.modified(file, source.format)
        else:
            yield _modified(file)


def _is_query(source: SourceConfig) -> bool:
    if source.path is None or source.format == "sql":
        return True
    return source.format == "auto" and _name(source.path).endswith(".sql")


def list_files(path: str, tables: bool = False) -> list[str]:
    """Return the files that a path, glob or URL names, in order of name; URLs keep their protocol.

    With `tables`, it names tables: folders, or files that describe them.

    Raises:
        UserError: It is a folder, or the URL cannot be listed.
    """
    local = remote.local_path(path)
    if local is not None:
        folder = not tables and os.path.isdir(local)
        if folder:
            raise UserError(f"{path}: is a folder; name its files, such as {path.rstrip('/')}/*.parquet")
        result = sorted(file for file in glob.glob(local, recursive=True) if tables or os.path.isfile(file))
        if not result and not tables:
            remote.refuse_special(local)
        for file in result:
            if any("\udc80" <= sign <= "\udcff" for sign in file):
                shown = os.fsencode(file).decode(errors="backslashreplace")
                raise UserError(f"{shown}: its name is no UTF-8 text; rename it")
        prefix = path[: len(path) - len(local)]
        return [prefix + file for file in result]
    if tables and not any(sign in path for sign in "*?["):
        return [path]  # the table's own library reads it, and knows protocols that fsspec may lack
    with remote.reading(path):
        fs, inner = remote.filesystem(path)
        if any(sign in inner for sign in "*?["):
            return sorted(str(fs.unstrip_protocol(file)) for file in fs.glob(inner))
        return [path] if _exists(fs, inner) else []


def _exists(fs: Any, path: str) -> bool:
    """Tell whether a remote file is there. Raises what kept its server from saying so."""
    try:
        fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return False
        raise cause from None
    return True


def stem(file: str, source: SourceConfig, snapshot: str) -> str:
    """Return the name of a file or table without its ending, and without the snapshot if the path has `{snapshot}`."""
    path = file.partition("?")[0] if "://" in file else file
    name = path.rstrip("/").rpartition("/")[2]
    ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.lower().endswith(ending)), "")
    name = name[: len(name) - len(ending)]
    if source.path is not None and "{snapshot}" in source.path:
        name = "-".join(part for each in name.split(snapshot) if (part := each.strip("-_. ")))
    return name


def check_snapshot(snapshot: str) -> date:
    """Return the snapshot's day. Raises UserError where it is not a date, YYYY-MM-DD."""
    if not _is_date(snapshot):
        raise UserError(f"snapshot {snapshot!r} must be a date, YYYY-MM-DD")
    day = date.fromisoformat(snapshot)
    if day == date.max:
        raise UserError(f"snapshot {snapshot!r} has no day after it; choose an earlier one")
    return day


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
        raise UserError(
            f"{field}: {file}: the ending tells no format (known: {known}); rename it or set "
            f"{field.rpartition('.')[0]}.format"
        )
    if lowered.endswith(".sql"):
        return "sql"
    return "parquet" if lowered.endswith(".parquet") else "csv"


def _read_text(file: str, field: str) -> str:
    """Read a file of SQL."""
    try:
        return remote.text(file, LARGEST_QUERY, "a file of SQL")
    except UserError as error:
        raise type(error)(f"{field}: {error}") from error


def _newest(times: Iterable[datetime]) -> list[str]:
    """Return the day of the newest time (UTC), or nothing where there is none."""
    newest = max(times, default=None)
    return [f"{newest:%Y-%m-%d}"] if newest is not None else []


def _modified(file: str) -> datetime:
    """Return when a file was changed (UTC)."""
    if "://" not in file:
        return datetime.fromtimestamp(os.path.getmtime(file), UTC)
    fs, inner = remote.filesystem(file)
    try:
        return _aware(fs.modified(inner)).astimezone(UTC)
    except Exception:  # of many kinds, as the libraries are
        return datetime.now(UTC)  # a server that tells no date: as of today


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
