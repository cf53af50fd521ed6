"""Nights: which snapshot runs next, and why one does not. The command line and Dagster both decide by this.

A snapshot is *published* once something was decided about its release: the table `promotion` was made, whether a gate
held the release back or not, or someone made the release the current one. It is *held* where a check or a user's
mistake ended its run, *failed* where its run ended by something that may pass by itself, and else *not run*. They run
one after another, the oldest first, since vocabularies grow from older to newer: a failed one is tried again, after a
pause, before the next one runs; a held one waits until its source or the configuration changes, or someone runs it,
and stops nobody.

How runs ended and what was decided is kept in `<root>/nights/nights.json`, also of snapshots whose tables are gone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.graph import source
from twhin_pipeline.lifecycle.decisions import in_words
from twhin_pipeline.store import locks, releases
from twhin_pipeline.words import PROMOTION

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

FOLDER, FILE = "nights", "nights.json"
TRIES = 4
"""A snapshot that failed so often is held."""
PAUSE = timedelta(minutes=15)
"""From a failure to the next try; it doubles with each further failure."""
MOST_ATTEMPTS = 20
"""Attempts of one snapshot that are kept, the newest."""

Outcome = Literal["held", "failed"]
Status = Literal["published", "held", "failed", "not run"]


@dataclass(frozen=True)
class Log:
    """What an event log was when a run of one of its days ended."""

    state: str
    """Of its files (`source.log_state`)."""
    rows: str
    """Of its rows of the day's window (`log_rows.digest`); empty where they cannot be told."""


@dataclass(frozen=True)
class Attempt:
    """A run of the chain that did not come to its end."""

    at: str
    """When it ended, ISO 8601 in UTC."""
    outcome: Outcome
    reason: str
    inputs: str
    """`inputs` of the run: what has to change before a held snapshot runs again."""
    run: str | None = None
    """Dagster's id of the run."""
    log: Log | None = None
    """Of an event log what else has to change."""


@dataclass(frozen=True)
class Night:
    """What is known of one snapshot."""

    snapshot: str
    status: Status
    reason: str = ""
    """Of a published one what was decided about its release, of others why they have not run."""
    again: datetime | None = None
    """When a failed snapshot is tried again."""

    def is_due(self, now: datetime) -> bool:
        """Tell whether the snapshot may run now."""
        return self.status == "not run" or (self.status == "failed" and (self.again is None or self.again <= now))


@dataclass
class Nights:
    """How the runs of a store's snapshots ended."""

    published: dict[str, str] = field(default_factory=dict)
    """Snapshots that have run, and what was decided about their releases; empty where nobody remembers."""
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)


def read(store: Store) -> Nights:
    """Return what has been kept; nothing where nothing has run."""
    try:
        values: dict[str, Any] = json.loads(store.read_text([FOLDER, FILE]))
    except FileNotFoundError:
        return Nights()
    attempts = {name: [_attempt(one) for one in many] for name, many in values["attempts"].items()}
    published = values["published"]  # a list in files of earlier versions
    return Nights(published if isinstance(published, dict) else dict.fromkeys(published, ""), attempts)


def _attempt(values: dict[str, Any]) -> Attempt:
    log = values.pop("log", None)
    return Attempt(**values, log=Log(**log) if log else None)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Exclude other backfills of a store: each would compare its release with one that the other replaces.

    Raises:
        UnavailableError: Another process runs one; the message names it.
    """
    with locks.writing(store.fs, store.is_local, [store.path(FOLDER, "backfill")], "the chain of snapshots", 0):
        yield


def note(store: Store, snapshot: str, attempt: Attempt) -> None:
    """Keep how a run ended, once for each run of Dagster's."""
    with _changing(store) as nights:
        before = nights.attempts.get(snapshot, [])
        if attempt.run is None or attempt.run not in {one.run for one in before}:
            nights.attempts[snapshot] = [*before, attempt][-MOST_ATTEMPTS:]


def note_decided(store: Store, snapshots: Iterable[str]) -> None:
    """Keep what was decided about the releases of snapshots, as retention may remove the tables `promotion`."""
    decided = _decided(store, snapshots)
    with _changing(store) as nights:
        nights.published |= decided


def _decided(store: Store, snapshots: Iterable[str]) -> dict[str, str]:
    """Return what was decided about the release of each snapshot that has one about which something was decided."""
    made = set(store.children(PROMOTION))
    # A store of an earlier version has no table `promotion`, and made each release current.
    current = {move.release.rpartition("-")[0]: move for move in releases.history(store)}
    result = {}
    for snapshot in snapshots:
        if snapshot in made and store.exists(PROMOTION, snapshot):
            result[snapshot] = in_words(store.manifest(PROMOTION, snapshot).details)
        elif snapshot in current:
            result[snapshot] = f"promoted: {current[snapshot].reason}"
    return result


@contextmanager
def _changing(store: Store) -> Iterator[Nights]:
    with store.writing("all nights", [FOLDER]):
        nights = read(store)
        yield nights
        values = {
            "published": dict(sorted(nights.published.items())),
            "attempts": {name: [asdict(one) for one in many] for name, many in sorted(nights.attempts.items())},
        }
        store.write_text([FOLDER, FILE], json.dumps(values, indent=1))


@contextmanager
def noted(config: TwhinConfig, store: Store, snapshot: str) -> Iterator[None]:
    """Keep how the run inside ended, where it did not come to its end; a run that someone stopped is not kept."""
    from twhin_pipeline.training.launch import TrainingCancelled

    since, began = datetime.now(UTC), log_state(config, snapshot)
    try:
        yield
    except TrainingCancelled:
        raise
    except Exception as error:
        held = isinstance(error, UserError) and not isinstance(error, UnavailableError)
        reason = str(error) or type(error).__name__
        log = log_of(config, store, snapshot, since, began)
        attempt = Attempt(_now(), "held" if held else "failed", reason, inputs(config, snapshot), log=log)
        with suppress(OSError, UserError):  # a store that cannot be written is what the error is about
            note(store, snapshot, attempt)
        raise


def inputs(config: TwhinConfig, snapshot: str) -> str:
    """Return 12 hex digits that change when the snapshot's files or the configuration do.

    Which snapshots there are, what is searched (`tune`) and what is kept (`retention`) do not count. Empty where the
    source cannot be listed.
    """
    fields = config.model_dump(mode="json", exclude={"tune", "retention"})
    for one in (fields.get("source"), *(fields.get("sources") or ())):
        if one is not None:
            one.pop("snapshots", None)
    try:
        files = source.fingerprint(config, snapshot)
    except UserError:
        return ""
    return hashlib.sha256(f"{files} {json.dumps(fields, sort_keys=True)}".encode()).hexdigest()[:12]


def log_state(config: TwhinConfig, snapshot: str) -> str:
    """Return what `source.log_state` does; empty where the source cannot be listed, or is read by Spark."""
    if config.engine.name == "spark":  # such a log is not read once more to see whether it has changed
        return ""
    try:
        return source.log_state(config, snapshot)
    except UserError:
        return ""


def log_of(config: TwhinConfig, store: Store, snapshot: str, since: datetime, began: str) -> Log | None:
    """Return what an event log was for a run that has ended, None where there is none.

    Args:
        config: Names the source.
        store: Of the run.
        snapshot: The run's.
        since: When the run began.
        began: `log_state` then. Where it is another by now, the edges that the run has made say what it has read.
    """
    state = log_state(config, snapshot)
    if not state:
        return None
    if state == began:
        return Log(state, _rows(config, snapshot, state))
    made = store.newest("raw_edges", snapshot)
    if made is None or datetime.fromisoformat(made.created) < since.replace(microsecond=0):  # nobody knows
        return Log(began, "")
    return Log(began, made.details.get("log_rows", ""))


_rows_known: dict[tuple[str, str, str], str] = {}
"""Digests of rows that this process has computed: a sensor looks each minute, and reads a log once for each change."""


def _rows(config: TwhinConfig, snapshot: str, state: str) -> str:
    """Return the digest of a log's rows of a day; one that no digest has where they cannot be read."""
    from twhin_pipeline.graph import log_rows

    key = (config.hash(), snapshot, state)
    if key not in _rows_known:
        try:
            _rows_known[key] = log_rows.digest(config, snapshot)
        except UnavailableError:
            return ""
        except UserError:
            _rows_known[key] = "unreadable"
    return _rows_known[key]


def _log_changed(config: TwhinConfig, snapshot: str, log: Log | None) -> bool:
    state = log_state(config, snapshot) if log is not None else ""
    if log is None or not state:
        return False
    if not log.rows:
        return True
    if state == log.state:
        return False
    now = _rows(config, snapshot, state)
    return bool(now) and now != log.rows


def look(config: TwhinConfig, store: Store, snapshots: Iterable[str]) -> list[Night]:
    """Return what is known of each snapshot, in their order."""
    nights, every = read(store), list(snapshots)
    new = _decided(store, [one for one in every if one not in nights.published])
    if new:
        # Retention may remove the table; the snapshot has run all the same.
        with suppress(OSError, UserError), _changing(store) as kept:
            kept.published |= new
    known = nights.published | new
    return [
        Night(snapshot, "published", known[snapshot])
        if snapshot in known
        else _unpublished(config, snapshot, nights.attempts.get(snapshot, []))
        for snapshot in every
    ]


def _unpublished(config: TwhinConfig, snapshot: str, attempts: Sequence[Attempt]) -> Night:
    if not attempts:
        return Night(snapshot, "not run")
    last = attempts[-1]
    failures = 0
    for one in reversed(attempts):
        if one.outcome != "failed" or one.inputs != last.inputs:
            break
        failures += 1
    if last.outcome == "failed" and failures < TRIES:
        return Night(snapshot, "failed", last.reason, datetime.fromisoformat(last.at) + PAUSE * 2 ** (failures - 1))
    now = inputs(config, snapshot)
    if (now and now != last.inputs) or _log_changed(config, snapshot, last.log):
        return Night(snapshot, "not run", f"its source or the configuration changed since it was held: {last.reason}")
    return Night(snapshot, "held", f"failed {failures} times; the last: {last.reason}" if failures else last.reason)


def next_night(nights: Iterable[Night]) -> Night | None:
    """Return the oldest snapshot that has to run, now or after its pause; None where none has."""
    return next((night for night in nights if night.status in ("not run", "failed")), None)


@dataclass(frozen=True)
class Result:
    """What a backfill did for one snapshot."""

    snapshot: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    """Of a published one what was decided about its release, of others why they have not run."""


def backfill(
    nights: Iterable[Night],
    run: Callable[[str], str],
    *,
    again: bool = False,
    skip_held: bool = False,
    stop_when_held: bool = False,
) -> Iterator[Result]:
    """Run the snapshots that have not been published, one after another in their order, and yield how each ended.

    A held one does not stop the next; one that fails does, as what follows grows from it.

    Args:
        nights: The snapshots, oldest first.
        run: Runs the chain for a snapshot, and returns what was decided about its release.
        again: Run published ones too.
        skip_held: Leave held ones as they are until their source or the configuration changes.
        stop_when_held: Stop at a held one too.
    """
    from twhin_pipeline.training.launch import TrainingCancelled

    stopped = ""
    for night in nights:
        if stopped:
            yield Result(night.snapshot, night.status, reason=f"waits for {stopped}")
            continue
        if night.status == "published" and not again:
            yield Result(night.snapshot, "published", reason=_before(night))
            continue
        if night.status == "held" and skip_held:
            yield Result(night.snapshot, "held", reason=night.reason)
            continue
        started = time.perf_counter()
        status: Status = "published"
        reason = ""
        try:
            reason = run(night.snapshot)
        except UnavailableError as error:
            status, reason = "failed", str(error)
        except UserError as error:
            status, reason = "held", str(error)
        except TrainingCancelled:
            raise
        except Exception as error:
            status, reason = "failed", str(error) or type(error).__name__
        if status == "failed" or (status == "held" and stop_when_held):
            stopped = night.snapshot
        yield Result(night.snapshot, status, time.perf_counter() - started, reason)


def _before(night: Night) -> str:
    return f"{night.reason} (ran before)" if night.reason else "was published before"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
