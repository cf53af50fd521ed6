"""The release that a worker answers from, and the change to the next one while requests go on.

A request takes `opened` once and keeps it to its end. A change puts a new `Opened` in its place by one assignment, so
each request is answered from one release. The former one is freed when the last request that has it ends.

A release is warmed before it is used: by then everything that a request reads has been opened. From then on it is read
through mapped files, which stay readable when retention removes them: the system keeps a file that is mapped.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from twhin_pipeline.errors import UserError
from twhin_pipeline.serving.metrics import Metrics
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import CURRENT, FOLDER, Release
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.opening import open_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

log = logging.getLogger("twhin.serving")
SEARCHED_ROWS = 100_000
"""Of a larger table the ids that look like an unknown one are not searched, as unknown ids are asked for often."""
RETRY_S = 30.0
"""Seconds until a release that could not be opened is tried again."""


@dataclass(frozen=True)
class Opened:
    """A release with its model, ready to answer."""

    release: Release
    model: TwhinEmbeddings
    since: float
    """When it was opened, s since 1970."""

    @property
    def name(self) -> str:
        """The release's name."""
        return self.release.name


@dataclass(frozen=True)
class Failure:
    """Why the release that is current could not be opened."""

    release: str | None
    """Its name; None where it is not known which one is current."""
    reason: str


class CurrentRelease:
    """Follows a store's current release. Until the first one is open, `opened` is None."""

    def __init__(self, home: str, metrics: Metrics, interval: float = 2.0, *, interests: bool = False) -> None:
        """Take a store; nothing is opened yet.

        Args:
            home: A folder or URL.
            metrics: Where changes and failures are counted.
            interval: Seconds between two looks.
            interests: Prepare recommendations by many interests too.
        """
        self.store = Store(home)
        self.interval, self.interests = interval, interests
        self.opened: Opened | None = None
        self.failure: Failure | None = None
        self._metrics = metrics
        self._followed: str | None = None
        """The content of `releases/current.json` whose release is open."""
        self._refused: tuple[str | None, float] | None = None
        """The content whose release could not be opened, and when to try again."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Open the release that is current now, if that is another than the open one; an error keeps the open one."""
        content, name = None, None
        try:
            content = self._pointer()
            if content is not None and content == self._followed:
                self._worked(content)
                return
            if self._refused is not None and content == self._refused[0] and time.monotonic() < self._refused[1]:
                return
            current = releases.current(self.store)
            if current is None:
                raise UserError(f"{self.store.root}: nothing has been published yet; `twhin run` does it")
            name = current.name
            if self.opened is None or self.opened.name != name:
                self._change(open_release(self.store, current, interests=self.interests))
        except Exception as error:  # whatever it is, the former release goes on answering
            self._failed(content, name, error)
            return
        self._worked(content)

    def start(self) -> None:
        """Look again and again in a thread of its own, until `stop`."""
        self._thread = threading.Thread(target=self._watch, name="twhin-releases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self.interval)

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self.look()

    def _pointer(self) -> str | None:
        try:
            return self.store.read_text([FOLDER, f"{CURRENT}.json"])
        except FileNotFoundError:
            return None

    def _change(self, new: Opened) -> None:
        former, self.opened = self.opened, new
        if former is not None:
            self._metrics.swaps.inc()
            self._metrics.release.labels(former.name, former.release.snapshot).set(0)
        self._metrics.release.labels(new.name, new.release.snapshot).set(1)
        log.info("answering from release %s%s", new.name, f", before from {former.name}" if former else "")

    def _worked(self, content: str | None) -> None:
        self._followed, self._refused, self.failure = content, None, None
        self._metrics.failing.set(0)

    def _failed(self, content: str | None, name: str | None, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failure = Failure(name, reason)
        if failure != self.failure:
            kept = f"; still answering from {self.opened.name}" if self.opened else "; not ready"
            expected = isinstance(error, UserError)
            log.error("release %s: %s%s", name or "unknown", reason, kept, exc_info=None if expected else error)
        self._refused, self.failure = (content, time.monotonic() + RETRY_S), failure
        if content is not None:
            self._metrics.failures.inc()
            self._metrics.failing.set(1)


def open_release(store: Store, release: Release, *, interests: bool = False) -> Opened:
    """Open and warm a release; with `interests`, make the clusters of each relation's tails too.

    Raises:
        UserError: It cannot be opened, or another release became current meanwhile.
    """
    model = open_model(releases.opened(store, release), release.snapshot)
    for table in model.tables.values():
        table.searched_rows = SEARCHED_ROWS
    model.map_known_edges()
    warm(model)
    for relation in model.relations if interests else ():
        model.prepare_interests(relation, Interests())
    return Opened(release, model, time.time())


def warm(model: TwhinEmbeddings) -> None:
    """Ask a model one question of each kind, so that all that answers need is open and in memory."""
    first = {name: table.ids([0])[0] for name, table in model.tables.items() if len(table)}
    for entity, id in first.items():
        model.neighbors(entity, id, 1)
        model.neighbors(entity, [id], 1).read_all()
    of_pair = {(one.lhs, one.rhs): one for one in model.config.relations}
    for relation in of_pair.values():
        if relation.lhs in first and relation.rhs in first and not model.normalized:
            model.recommend(relation.name, [first[relation.lhs]], 1).read_all()
            model.predict_relation(first[relation.lhs], first[relation.rhs], relation.name)
