"""The store: where tables live. A version of a table exists when its manifest does, and is never changed.

    <root>/<asset>/<snapshot>/<version>/*.parquet        the data of one version
    <root>/<asset>/<snapshot>/<version>/_*               what belongs to it besides; no rows of the table
    <root>/<asset>/<snapshot>/<version>/_manifest.json   written last
    <root>/<asset>/<snapshot>/<version>/_verdict.json    what its checks said

Readers get the newest version that no check has refused. A writer fills a new version's folder and then writes its
manifest, so a crash leaves the older ones as they were and nothing that a reader would take for finished. No writer
removes or changes another version; retention alone removes versions (`lifecycle/retention.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

import twhin_pipeline.store.conditional as conditional
import twhin_pipeline.store.removals as removals
from twhin_pipeline import remote
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.store.draft import Draft, has_rows, is_data, unfinished
from twhin_pipeline.store.locks import is_written
from twhin_pipeline.store.locks import writing as locked
from twhin_pipeline.store.manifest import FORMER, MANIFEST, VERDICT, Manifest, Verdict, maker

if TYPE_CHECKING:
    import pyarrow.dataset as ds

DEFAULT_HOME = ".twhin"
_DEEPEST = 2
"""Slashes in a table's name at most, such as `refit/training_set/positives`."""
_NO_TABLES = ("releases", "retention", "tracking", "mlartifacts", "dagster_home", "logs", "tune", "nights")
"""Folders of the root that hold no tables."""
_STAMP = "%Y%m%dT%H%M%S.%f"
VIEWS = {"refit": {name: f"refit/{name}" for name in ("training_set", "held_out", "twhin_model")}}
"""Views of a store, by name: each shows tables of its own under the usual names, so that the same stages make them.
`refit` has the model that is trained once more on all edges, and its training set (`refit.py`)."""


class Store:
    """Tables under one root: a folder, or any fsspec URL."""

    def __init__(self, root: str | None = None, view: str | None = None) -> None:
        """Open a store, or one of its `VIEWS`."""
        self.view = view
        self._pins: dict[tuple[str, str], str | None] | None = None
        root = str(root or os.environ.get("TWHIN_HOME") or DEFAULT_HOME)
        remote.refuse_password(root, "the store's root")
        self.fs, path = remote.filesystem(root)
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        self.is_local = protocol in ("file", "local")
        self.root: str = os.path.abspath(path) if self.is_local else f"{protocol}://{path.rstrip('/')}"

    def __repr__(self) -> str:
        return f"Store({self.root!r})" if self.view is None else f"Store({self.root!r}, {self.view!r})"

    def seen_as(self, view: str | None) -> Store:
        """Return a view of the same store; None: the store itself."""
        return Store(self.root, view)

    def pinned(self, *manifests: Manifest) -> Store:
        """Return the same store for one reader: each table stays at the version that this reader opened first.

        `manifests` are versions to begin with. A table that the reader itself writes is the one that it wrote.
        """
        store = Store(self.root, self.view)
        named = {self._seen(one.asset) if self.view else one.asset: one for one in manifests}
        store._pins = {**(self._pins or {}), **{(name, one.snapshot): one.version for name, one in named.items()}}
        return store

    @property
    def pins(self) -> dict[tuple[str, str], str | None]:
        """The versions at which a pinned store's tables stay so far, by table and snapshot."""
        return dict(self._pins or {})

    def pinned_at(self, pins: dict[tuple[str, str], str | None]) -> Store:
        """Return the same store with the `pins` of another process's store, so that both read the same versions."""
        store = Store(self.root, self.view)
        store._pins = dict(pins)
        return store

    def real(self, asset: str) -> str:
        """Return a table's name in the store, where this view shows one of its own under the usual name."""
        first, slash, rest = asset.partition("/")
        return f"{VIEWS[self.view].get(first, first)}{slash}{rest}" if self.view else asset

    def path(self, *parts: str) -> str:
        """Return the path or URL of something under the root."""
        return "/".join([self.root, *(self.real(part) if i == 0 else part for i, part in enumerate(parts))])

    def exists(self, asset: str, snapshot: str) -> bool:
        """Tell whether the table has a version that readers get."""
        return self._readable(asset, snapshot) is not None

    def manifest(self, asset: str, snapshot: str, version: str | None = None) -> Manifest:
        """Read the manifest of a version; None: of the newest version that no check has refused.

        Raises:
            UserError: There is none, with the command that makes it; every version was refused by a check; or the
                manifest is damaged.
        """
        version = version or self._readable(asset, snapshot)
        if version is not None:
            for place in (self.path(asset, snapshot, version, MANIFEST), self.path(asset, snapshot, FORMER)):
                with suppress(FileNotFoundError):
                    return Manifest.from_json(self._text(place), place)
        stage = maker(asset)
        if version is None and (refused := self._committed(asset, snapshot)):
            verdict = self.verdict(asset, snapshot, refused[-1])
            failed = ", ".join(verdict.failed_checks) if verdict else ""
            raise UserError(
                f"{asset} of snapshot {snapshot} is held back, as its check {failed} failed; mend the cause and make "
                f"it again with `twhin {stage} --snapshot {snapshot}`, or accept it on the record with "
                f"`twhin accept {asset} --snapshot {snapshot} --reason TEXT`"
            )
        there = ", ".join(self.snapshots(asset)) or "none"
        of = f"version {version} of " if version else ""
        if version and (when := removals.removed(self, version)) is not None:
            raise UserError(
                f"{self.root}: version {version} of {asset} of snapshot {snapshot} was removed by `twhin prune` "
                f"({when}); open the current release, or make it again with `twhin {stage} --snapshot {snapshot}`"
            )
        raise UserError(
            f"{self.root}: no {of}table {asset} for snapshot {snapshot} (snapshots with one: {there}); "
            f"make it with `twhin {stage} --snapshot {snapshot}`"
        )

    def newest(self, asset: str, snapshot: str) -> Manifest | None:
        """Return the manifest of the newest version, whatever its checks said; None where there is no version."""
        committed = self._committed(asset, snapshot)
        return self.manifest(asset, snapshot, committed[-1]) if committed else None

    def snapshots(self, asset: str, *, accepted: bool = False) -> list[str]:
        """List the snapshots for which the table can be read, oldest first; `accepted`: whose checks have passed."""
        readable = self._accepted if accepted else self._readable
        return [name for name in self._children(asset) if readable(asset, name) is not None]

    def latest_before(self, asset: str, snapshot: str) -> Manifest | None:
        """Return the newest version of an older snapshot that has passed its checks, or was overruled; else None."""
        for older in reversed([name for name in self._children(asset) if name < snapshot]):
            version = self._accepted(asset, older)
            if version is not None:
                return self.manifest(asset, older, version)
        return None

    def passed_over(self, asset: str, snapshot: str) -> list[str]:
        """List older snapshots that `latest_before` passes over because the checks of their tables never ran."""
        result: list[str] = []
        for older in reversed([name for name in self._children(asset) if name < snapshot]):
            if self._accepted(asset, older) is not None:
                break
            committed = self._committed(asset, older)
            if committed and self.verdict(asset, older, committed[-1]) is None:
                result.append(older)
        return result

    def last_accepted(self, asset: str, snapshot: str, before: str | None = None) -> Manifest | None:
        """Return the newest version of this snapshot that has passed its checks, older than the version `before`."""
        version = self._accepted(asset, snapshot, before)
        return None if version is None else self.manifest(asset, snapshot, version)

    def snapshots_made(self, asset: str) -> list[str]:
        """List the snapshots for which the table has any version, one that a check refused included, oldest first."""
        return [name for name in self._children(asset) if self._committed(asset, name)]

    def versions_of(self, asset: str, snapshot: str) -> list[str]:
        """List all finished versions of a table, oldest first, whatever their checks said."""
        return self._committed(asset, snapshot)

    def assets(self) -> list[str]:
        """List every table of which some snapshot can be read, such as `vocabulary/user`."""
        result = []
        waiting = list(self._children())
        while waiting:
            asset = waiting.pop()
            if any(self.exists(asset, name) for name in self._children(asset) if _is_snapshot(name)):
                result.append(asset)
            elif asset.count("/") < _DEEPEST:
                inner = (f"{asset}/{name}" for name in self._children(asset) if not _is_snapshot(name))
                waiting += [name for name in inner if not name.rsplit("/", 1)[1].startswith((".", "_"))]
        return sorted(result)

    def tables(self) -> Iterator[tuple[str, str]]:
        """Yield every table and snapshot that has a folder, also where no version can be read."""
        waiting = [name for name in self._children() if name not in _NO_TABLES and not name.startswith((".", "_"))]
        while waiting:
            asset = waiting.pop()
            names = self._children(asset)
            yield from ((asset, name) for name in names if _is_snapshot(name))
            if asset.count("/") < _DEEPEST:
                waiting += [f"{asset}/{n}" for n in names if not _is_snapshot(n) and not n.startswith((".", "_"))]

    def verdict(self, asset: str, snapshot: str, version: str) -> Verdict | None:
        """Return what the checks of a version said; None where they have not run."""
        try:
            return Verdict.from_json(self._text(self.path(asset, snapshot, version, VERDICT)))
        except FileNotFoundError:
            return None

    def judge(self, manifest: Manifest, verdict: Verdict) -> None:
        """Store what the checks of a version said, in place of what they said before."""
        asset = manifest.asset if self.view is None else self._seen(manifest.asset)
        self.put(self.path(asset, manifest.snapshot, manifest.version, VERDICT), verdict.to_json())

    def _seen(self, real: str) -> str:
        """Return the name under which this view shows a table of the store."""
        assert self.view is not None
        shown = {inner: name for name, inner in VIEWS[self.view].items()}
        for inner, name in shown.items():
            if real == inner or real.startswith(f"{inner}/"):
                return name + real[len(inner) :]
        return real

    def readable(self, asset: str, snapshot: str) -> str | None:
        """Return the version that readers get; None where there is none."""
        return self._readable(asset, snapshot)

    def accepted(self, asset: str, snapshot: str) -> str | None:
        """Return the newest version that has passed its checks, or was overruled; None where there is none."""
        return self._accepted(asset, snapshot)

    def _readable(self, asset: str, snapshot: str) -> str | None:
        """Return the newest version that no check has refused; of a pinned store, the one that it was first."""
        if self._pins is not None and self._pins.get((asset, snapshot)) is not None:
            return self._pins[asset, snapshot]
        result = self._newest_not_refused(asset, snapshot)
        if self._pins is not None:
            self._pins[asset, snapshot] = result
        return result

    def _newest_not_refused(self, asset: str, snapshot: str) -> str | None:
        for version in reversed(self._committed(asset, snapshot)):
            verdict = self.verdict(asset, snapshot, version)
            if verdict is None or verdict.accepted:
                return version
        return None

    def _accepted(self, asset: str, snapshot: str, before: str | None = None) -> str | None:
        """Return the newest version, older than `before`, whose checks have passed or were overruled."""
        for version in reversed(self._committed(asset, snapshot)):
            if before is not None and version >= before:
                continue
            verdict = self.verdict(asset, snapshot, version)
            # Format 1 kept no verdicts, and what follows an old table must still grow from it.
            accepted = version == self._former(asset, snapshot) if verdict is None else verdict.accepted
            if accepted:
                return version
        return None

    def _former(self, asset: str, snapshot: str) -> str | None:
        """Return the version that a manifest of format 1 names, which was written for the snapshot as a whole."""
        place = self.path(asset, snapshot, FORMER)
        return Manifest.from_json(self._text(place), place).version if self.fs.exists(place) else None

    def _committed(self, asset: str, snapshot: str) -> list[str]:
        """Return the finished versions, oldest first."""
        names = self._children(asset, snapshot)
        result = [n for n in names if _is_version(n) and self.fs.exists(self.path(asset, snapshot, n, MANIFEST))]
        if FORMER in names and (former := self._former(asset, snapshot)) is not None:
            result.append(former)
        return sorted(set(result))

    def _children(self, *parts: str) -> list[str]:
        """Return the names in a folder, sorted. It is listed, not matched: a path may hold `[` or `?`."""
        try:
            result = self.fs.ls(self.fs._strip_protocol(self.path(*parts)), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in result)

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder under the root, sorted; none where it is not there."""
        return self._children(folder)

    def read_text(self, parts: Sequence[str]) -> str:
        """Read a small file under the root. Raises FileNotFoundError where there is none."""
        return self._text(self.path(*parts))

    def read_pointer(self, parts: Sequence[str]) -> tuple[str | None, str | None]:
        """Return the text of a pointer, such as which release is current, and its tag; None and None: there is none."""
        try:
            if self.is_local:
                return self.read_text(parts), None
            content, tag = conditional.read(self.fs, self.path(*parts))
            return content.decode(), tag
        except FileNotFoundError:
            return None, None

    def move_pointer(self, parts: Sequence[str], text: str, tag: str | None) -> None:
        """Write a pointer at once, in place of the one whose tag `read_pointer` gave. Hold its folder's lock.

        Behind a URL it is a conditional write, so that nothing is lost where this process lost the lock unnoticed.

        Raises:
            UnavailableError: Another process has moved it since it was read.
        """
        if self.is_local:
            self.write_text(parts, text)
            return
        path, content = self.path(*parts), text.encode()
        try:
            if tag is None:
                conditional.create(self.fs, path, content)
            else:
                conditional.replace(self.fs, path, content, tag)
        except (conditional.Changed, FileExistsError):
            # A retry of a write whose answer was lost is refused.
            if self.read_pointer(parts)[0] != text:
                raise UnavailableError(f"{path}: was changed by another process meanwhile; run this again") from None

    def write_text(self, parts: Sequence[str], text: str) -> None:
        """Write a small file under the root at once: a reader sees the old one or the new one."""
        self.write_bytes(self.path(*parts), text.encode())

    def _text(self, place: str) -> str:
        if self.is_local:
            return Path(place).read_text(encoding="utf-8")
        return bytes(self.fs.cat_file(self.fs._strip_protocol(place))).decode()

    def put(self, place: str, text: str) -> None:
        """Write a small file at once: a reader sees the old one or the new one."""
        self._put(place, text.encode())

    def write_bytes(self, place: str, content: bytes) -> None:
        """Write a small file at a path or URL of the store at once; its folder is made where there is none."""
        if self.is_local:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        self._put(place, content)

    def _put(self, place: str, content: bytes) -> None:
        if self.is_local:
            draft = f"{place}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
            Path(draft).write_bytes(content)
            os.replace(draft, place)
        else:
            self.fs.pipe_file(self.fs._strip_protocol(place), content)

    def files(self, asset: str, snapshot: str) -> list[str]:
        """Return the table's Parquet files (paths, or URLs in a remote store), in order."""
        return self.files_of(self.manifest(asset, snapshot))

    def files_of(self, manifest: Manifest) -> list[str]:
        """Return the Parquet files of a manifest's rows.

        Raises:
            UserError: A file is missing, or has another size than when it was written.
        """
        base = f"{self.root}/{manifest.asset}/{manifest.snapshot}/{manifest.version}"
        sizes = self.sizes(base)
        for file in manifest.files:
            if sizes.get(file["path"]) != file["bytes"]:
                self._refuse_damaged(manifest, file, f"has {sizes.get(file['path'], 0):,} bytes of {file['bytes']:,}")
        return [f"{base}/{file['path']}" for file in manifest.files if has_rows(manifest.asset, file["path"])]

    def part_files(self, manifest: Manifest) -> dict[str, str]:
        """Return the Parquet files beside a manifest's rows, by the part's name, such as `losses`."""
        base = f"{self.root}/{manifest.asset}/{manifest.snapshot}/{manifest.version}"
        paths = [file["path"] for file in manifest.files]
        return {
            path.removesuffix(".parquet"): f"{base}/{path}"
            for path in paths
            if is_data(path) and not has_rows(manifest.asset, path)
        }

    def read_part(self, manifest: Manifest, part: str) -> pa.Table:
        """Read a Parquet file beside a manifest's rows whole, such as a model's `losses`."""
        with self.parquet(self.part_files(manifest)[part]) as file:
            return file.read()

    def verify(self, manifest: Manifest) -> int:
        """Read all files of a version and compare their checksums; return their bytes.

        Raises:
            UserError: A file is missing or differs from what was written.
        """
        self.files_of(manifest)
        base = f"{self.root}/{manifest.asset}/{manifest.snapshot}/{manifest.version}"
        for file in manifest.files:
            if "sha256" in file and self.sha256(f"{base}/{file['path']}") != file["sha256"]:
                self._refuse_damaged(manifest, file, "has other contents than when it was written")
        return manifest.bytes

    def _refuse_damaged(self, manifest: Manifest, file: dict[str, Any], how: str) -> None:
        if (when := removals.removed(self, manifest.version)) is not None:
            raise UserError(
                f"{manifest.asset} of snapshot {manifest.snapshot}, version {manifest.version}, was removed by "
                f"`twhin prune` ({when}) after this reader had opened it; open the current release"
            )
        raise UserError(
            f"{manifest.asset} of snapshot {manifest.snapshot} is damaged: {file['path']} of version "
            f"{manifest.version} {how}; restore the file, or make the table again with "
            f"`twhin {manifest.maker} --snapshot {manifest.snapshot}`"
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files below a folder, by their paths in it."""
        base = self.fs._strip_protocol(folder).rstrip("/")
        result = self.fs.find(base, detail=True)
        return {str(path)[len(base) + 1 :]: int(info["size"]) for path, info in result.items()}

    def sha256(self, path: str) -> str:
        with self.fs.open(self.fs._strip_protocol(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def parquet(self, path: str) -> Iterator[pq.ParquetFile]:
        """Open one of the store's Parquet files (a path or URL, as `files` gives them).

        Arrow opens local files by itself: of one that Python reads for it a thread of Arrow's may hold a part when the
        interpreter ends, which aborts the process (exit code 134).
        """
        if self.is_local:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                yield file
        else:
            with self.fs.open(path, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
                yield file

    def batches(
        self, files: list[str], columns: list[str], size: int, first: int = 0, count: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Stream rows of Parquet files that follow one another, in batches of at most `size` rows.

        Args:
            files: The files (paths or URLs), in order.
            columns: The columns to read.
            size: Rows of a batch.
            first: The first row, counted from the first file's.
            count: The number of rows; fewer come where the files end before. None: all that follow.
        """
        left = sys.maxsize if count is None else count
        for path in files:
            if left <= 0:
                return
            with self.parquet(path) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                groups = list(range(len(rows)))
                while groups and first >= rows[groups[0]]:
                    first -= rows[groups.pop(0)]
                for batch in file.iter_batches(size, row_groups=groups, columns=columns) if groups else ():
                    passed = min(first, len(batch))
                    first -= passed
                    taken = batch.slice(passed, left)
                    left -= len(taken)
                    if len(taken):
                        yield taken
                    if left <= 0:
                        return

    def dataset(self, asset: str, snapshot: str) -> ds.Dataset:
        """Open the table as an Arrow dataset, its files in order."""
        import pyarrow.dataset as ds  # which loads pandas, if it is there

        files = self.files(asset, snapshot)
        if self.is_local:
            return ds.dataset(files, format="parquet")
        return ds.dataset([self.fs._strip_protocol(f) for f in files], format="parquet", filesystem=self.fs)

    def read(self, asset: str, snapshot: str, columns: list[str] | None = None) -> pa.Table:
        """Read the whole table into memory, in the order it was written."""
        return self.dataset(asset, snapshot).to_table(columns=columns)

    def versions(self, snapshot: str, assets: Iterable[str]) -> dict[str, str]:
        """Return the present version of each table, for a child's `parents`. Raises UserError where one is missing."""
        return {self.real(asset): self.manifest(asset, snapshot).version for asset in assets}

    def stale(self, asset: str, snapshot: str) -> list[str]:
        """Return the parents of a finished table that have been made anew since it read them, or are gone.

        A parent of another snapshot may be gone.
        """
        if self.view:
            return self.seen_as(None).stale(self.real(asset), snapshot)
        stale = []
        for parent, version in self.manifest(asset, snapshot).parents.items():
            name, _, at = parent.partition("@")
            if at and name.endswith("twhin_model"):
                continue  # where a training started: an earlier version stays, and is as good as it was
            now = self._readable(name, at or snapshot)
            if at and (now is None or now < version) and version not in self.versions_of(name, at):
                continue  # retention has removed an earlier snapshot's: what grew from it is as good as it was
            if now != version:
                stale.append(parent)
        return stale

    def refuse_stale(self, snapshot: str, assets: Iterable[str]) -> None:
        """Raise UserError where one of these tables, or one above it, was made from what has been replaced since.

        Tables that are not there are passed over: who reads them says so.
        """
        if self.view:  # parents are named as they are in the store
            self.seen_as(None).refuse_stale(snapshot, [self.real(asset) for asset in assets])
            return
        waiting = [asset for asset in assets if self.exists(asset, snapshot)]
        seen = set()
        while waiting:
            asset = waiting.pop(0)
            if asset in seen:
                continue
            seen.add(asset)
            stale = self.stale(asset, snapshot)
            if stale:
                stage = maker(asset)
                raise UserError(
                    f"{asset} of snapshot {snapshot} is stale: {', '.join(sorted(stale))} changed after it was made; "
                    f"make it and what follows it again, from `twhin {stage} --snapshot {snapshot}` on"
                )
            waiting += [parent for parent in self.manifest(asset, snapshot).parents if "@" not in parent]

    @contextmanager
    def writing(self, snapshot: str, assets: Iterable[str], wait_s: float | None = None) -> Iterator[None]:
        """Exclude other writers of these tables of a snapshot; versions may be begun inside.

        Args:
            snapshot: Which one.
            assets: The tables.
            wait_s: How long to wait for another writer; None: `locks.WAIT_S`.

        Raises:
            UserError: Another process writes one of them; the message names it.
        """
        names = list(assets)
        if not names:
            yield
            return
        folders = [self.path(asset, snapshot) for asset in names]
        what = f"{', '.join(names) if len(names) < 2 else f'{names[0]} and others'} of snapshot {snapshot}"
        with locked(self.fs, self.is_local, folders, what, wait_s):
            yield

    def begin(self, asset: str, snapshot: str) -> Draft:
        """Start a new version of a table. Nothing is visible until `Draft.commit`, and others cannot write it.

        Raises:
            UserError: Another process writes the table.
        """
        held = ExitStack()
        held.enter_context(self.writing(snapshot, [asset]))
        try:
            self._tidy(asset, snapshot)
            newest = max([name for name in self._children(asset, snapshot) if _is_version(name)], default="")
            version = _version(newest)
            draft = Draft(self, asset, snapshot, version)
        except BaseException:
            held.close()
            raise
        draft.held = held
        unfinished.add(draft.location)
        return draft

    def _tidy(self, asset: str, snapshot: str) -> None:
        """Remove what dead writers left: versions without a manifest, which nobody writes while we hold the lock."""
        for name in self.drafts(asset, snapshot):
            self.remove(self.path(asset, snapshot, name))

    def drafts(self, asset: str, snapshot: str) -> list[str]:
        """List the versions without a manifest that no writer of this process fills: another's, or a dead one's."""
        committed = set(self._committed(asset, snapshot))
        names = [one for one in self._children(asset, snapshot) if _is_version(one) and one not in committed]
        return [name for name in names if self.path(asset, snapshot, name) not in unfinished]

    def remove(self, place: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing where there is none."""
        with suppress(FileNotFoundError):
            self.fs.rm(self.fs._strip_protocol(place), recursive=True)

    def remove_version(self, asset: str, snapshot: str, version: str) -> None:
        """Remove a version: its manifest first, so that at every moment it is there as a whole, or not at all.

        What is left where this breaks off is an unfinished draft, which the next writer of the table removes. Hold the
        table's lock.
        """
        former = self._former(asset, snapshot) == version
        self.remove(self.path(asset, snapshot, FORMER) if former else self.path(asset, snapshot, version, MANIFEST))
        self.remove(self.path(asset, snapshot, version))

    def is_written(self, asset: str, snapshot: str) -> bool:
        """Tell whether another process writes a table of a snapshot."""
        return is_written(self.fs, self.is_local, self.path(asset, snapshot))

    @contextmanager
    def replace(
        self,
        asset: str,
        snapshot: str,
        *,
        config_hash: str,
        parents: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Iterator[Draft]:
        """Write a new version of a table: committed where the block ends well, discarded where it raises.

        Set `draft.details` inside the block for what the stage counted.
        """
        draft = self.begin(asset, snapshot)
        try:
            yield draft
            draft.commit(config_hash=config_hash, parents=parents or {}, settings=settings)
        except BaseException:
            draft.discard()
            raise


def _version(newest: str) -> str:
    """Return the name of a new version: its time, always after that of the newest one, and something random."""
    now = datetime.now(UTC)
    if newest:  # the clock may have been set back, or be another machine's
        stamp = newest.split("-")[0]
        last = datetime.strptime(stamp, _STAMP if "." in stamp else "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        now = max(now, last + timedelta(microseconds=1))
    return f"{now.strftime(_STAMP)}-{uuid.uuid4().hex[:8]}"


def _is_version(name: str) -> bool:
    return re.fullmatch(r"\d{8}T\d{6}(\.\d{6})?-[0-9a-f]{8}", name) is not None


def _is_snapshot(name: str) -> bool:
    return re.fullmatch(r"\d{4}-\d{2}-\d{2}", name) is not None
