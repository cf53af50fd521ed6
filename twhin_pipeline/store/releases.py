"""Releases: what consumers see. A release names the versions of tables that belong together; `current` names one.

    <root>/releases/<name>.json     one release; never changed
    <root>/releases/current.json    which one is current, since when and why, and the ones before it
    <root>/releases/pinned/<name>.json   one that retention must not remove: since when, by whom and why

`current` is replaced as one file, so a reader sees the release before or the one after. Promotion and rollback move it
and are recorded there.
"""

from __future__ import annotations

import getpass
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store.draft import code_version
from twhin_pipeline.store.store import Store
from twhin_pipeline.words import PUBLISHED

FOLDER, CURRENT, PINNED = "releases", "current", "pinned"
NAME = re.compile(r"\d{4}-\d{2}-\d{2}-\d{8}T\d+")
"""What a release is called: its snapshot, and when it was made."""


@dataclass(frozen=True)
class Release:
    """The versions of one snapshot's tables that belong together."""

    name: str
    snapshot: str
    created: str
    tables: Mapping[str, str]
    """Table to version; tables of views by their names in the store, such as `refit/twhin_model`."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What evaluation measured overall."""
    model_uri: str | None = None
    """The registered model in MLflow."""
    code_version: str = ""


@dataclass(frozen=True)
class Promotion:
    """One move of `current`, or a pin."""

    release: str
    at: str
    by: str
    reason: str


def user() -> str:
    """Return who moves `current` or accepts a table: the user's name, or its number where it has none (containers)."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return f"uid {os.getuid()}"


def make(
    store: Store, snapshot: str, tables: Mapping[str, str], figures: Mapping[str, float], model_uri: str | None
) -> Release:
    """Write a release of these tables and of every table of the snapshot that they were made from.

    Args:
        store: Where the tables are.
        snapshot: Their snapshot.
        tables: Table to version.
        figures: What evaluation measured overall.
        model_uri: The registered model.
    """
    base = store.seen_as(None)
    result: dict[str, str] = {}
    waiting = list(tables.items())
    while waiting:
        asset, version = waiting.pop()
        if asset not in result and "@" not in asset:  # an earlier snapshot's tables are not this release's
            result[asset] = version
            waiting += base.manifest(asset, snapshot, version).parents.items()
    now = datetime.now(UTC)
    name = f"{snapshot}-{now:%Y%m%dT%H%M%S%f}"
    release = Release(
        name, snapshot, now.isoformat(timespec="seconds"), dict(sorted(result.items())), dict(figures), model_uri,
        code_version(),
    )  # fmt: skip
    store.write_text([FOLDER, f"{name}.json"], json.dumps(asdict(release), indent=1, allow_nan=False))
    return release


def names(store: Store) -> list[str]:
    """List the releases, oldest snapshot first."""
    result = (name.removesuffix(".json") for name in store.children(FOLDER) if name.endswith(".json"))
    return [name for name in result if NAME.fullmatch(name)]


def read(store: Store, name: str) -> Release:
    """Read a release. Raises UserError where there is none of that name."""
    try:
        if not NAME.fullmatch(name):  # it may come from a request: no other file is read by it
            raise FileNotFoundError(name)
        values = json.loads(store.read_text([FOLDER, f"{name}.json"]))
    except FileNotFoundError:
        raise UserError(f"{store.root}: {unknown('release', name, names(store))}") from None
    known = {one.name for one in fields(Release)}
    return Release(**{key: value for key, value in values.items() if key in known})


def of_published(store: Store, snapshot: str, version: str) -> list[Release]:
    """Return the releases of a version of the table `published`, the oldest first."""
    made = [read(store, name) for name in names(store) if name.startswith(snapshot)]
    found = [one for one in made if one.tables.get(PUBLISHED) == version]
    return sorted(found, key=lambda one: (one.created, one.name))


def latest(store: Store) -> Release | None:
    """Return the release that was made last, of whichever snapshot; None where there is none."""
    made = sorted(names(store), key=lambda name: name[len("YYYY-MM-DD-") :])
    return read(store, made[-1]) if made else None


def history(store: Store) -> list[Promotion]:
    """Return every move of `current`, the first one first."""
    return _moves(store)[0]


def _moves(store: Store) -> tuple[list[Promotion], str | None]:
    """Return every move of `current`, and the tag of the file that records them (`Store.read_pointer`)."""
    text, tag = store.read_pointer([FOLDER, f"{CURRENT}.json"])
    moves: list[dict[str, Any]] = json.loads(text)["history"] if text is not None else []
    return [Promotion(**move) for move in moves], tag


def trusted(store: Store) -> set[str]:
    """Return the releases that were current, without those that were given up for an earlier one since."""
    result: set[str] = set()
    before: str | None = None
    for move in history(store):
        if move.release in result and before is not None and before != move.release:
            result.discard(before)  # a return to a former release: the one in between was no good
        result.add(move.release)
        before = move.release
    return result


def current(store: Store) -> Release | None:
    """Return the release that consumers see; None where nothing has been published."""
    moves = history(store)
    return read(store, moves[-1].release) if moves else None


def stated(reason: str) -> str:
    """Return why someone decides. Raises UserError where it says nothing."""
    if not reason.strip():
        raise UserError("the reason is empty; say why, as it is stored with the decision")
    return reason


def promote(store: Store, name: str, by: str, reason: str) -> Release:
    """Make a release the current one, and record it; a release that was current before is rolled back to so.

    Raises:
        UserError: The reason is empty, there is no such release, one of its tables is gone, or another process moves
            `current`.
    """
    stated(reason)
    release = read(store, name)
    base = store.seen_as(None)
    for asset, version in release.tables.items():
        base.manifest(asset, release.snapshot, version)
    with store.writing(CURRENT, [FOLDER]):
        before, tag = _moves(store)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        moves = [asdict(move) for move in (*before, Promotion(name, now, by, reason))]
        store.move_pointer([FOLDER, f"{CURRENT}.json"], json.dumps({"release": name, "history": moves}, indent=1), tag)
    return release


def pin(store: Store, name: str, by: str, reason: str) -> Promotion:
    """Keep a release, with its tables, whatever the policy of retention says; return the record.

    Raises:
        UserError: The reason is empty, there is no such release, or one of its tables is gone.
    """
    stated(reason)
    release = read(store, name)
    base = store.seen_as(None)
    for asset, version in release.tables.items():
        base.manifest(asset, release.snapshot, version)
    made = Promotion(name, datetime.now(UTC).isoformat(timespec="seconds"), by, reason)
    store.write_text([FOLDER, PINNED, f"{name}.json"], json.dumps(asdict(made), indent=1))
    return made


def unpin(store: Store, name: str) -> None:
    """Leave a release to the policy of retention again. Raises UserError where it is not pinned."""
    if name not in (known := pins(store)):
        raise UserError(f"{store.root}: {unknown('pinned release', name, known)}")
    store.remove(store.path(FOLDER, PINNED, f"{name}.json"))


def pins(store: Store) -> dict[str, Promotion]:
    """Return the records of the pinned releases by name."""
    names = [one for one in store.children(f"{FOLDER}/{PINNED}") if one.endswith(".json")]
    return {one.removesuffix(".json"): Promotion(**json.loads(store.read_text([FOLDER, PINNED, one]))) for one in names}


def opened(store: Store, release: Release) -> Store:
    """Return the store as a reader of a release sees it: each of its tables at the release's version."""
    return store.pinned(*(store.seen_as(None).manifest(a, release.snapshot, v) for a, v in release.tables.items()))
