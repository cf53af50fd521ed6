"""Releases that are open for the explorer: their tables, their model, and a connection to query them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import duckdb

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store import Manifest, Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.entity_table import UnknownName
from twhin_pipeline.vectors.opening import load_model, open_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

MOST_OPEN = 12
"""Releases that stay open at once. Their vectors are mapped files, so one that is open takes little memory."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A release, or the newest vectors of a store that has none, with its tables at their versions."""

    release: Release | None
    store: Store
    model: TwhinEmbeddings

    @property
    def snapshot(self) -> str:
        """The snapshot that the vectors were trained on."""
        return self.model.snapshot

    @property
    def name(self) -> str | None:
        """The release's name; None where the store has no release."""
        return None if self.release is None else self.release.name

    @cached_property
    def ends(self) -> list[tuple[str, str, str, str]]:
        """Each relation from both sides: its name, the side, the entity type there and that of the other side."""
        pairs = [(one.name, one.lhs, one.rhs) for one in self.model.config.relations]
        return [(name, "lhs", lhs, rhs) for name, lhs, rhs in pairs] + [
            (name, "rhs", rhs, lhs) for name, lhs, rhs in pairs
        ]

    def table(self, asset: str) -> Manifest | None:
        """Return the release's version of a table; None where it has none, or retention has removed it."""
        if self.release is None:
            return self.store.manifest(asset, self.snapshot) if self.store.exists(asset, self.snapshot) else None
        version = self.release.tables.get(asset)
        there = version is not None and version in self.store.versions_of(asset, self.snapshot)
        return self.store.seen_as(None).manifest(asset, self.snapshot, version) if there else None

    def row(self, entity: str, id: str) -> int:
        """Return an entity's row. Raises KeyError where the entity type or the id is unknown."""
        self.check_type(entity)
        return int(self.model.tables[entity].rows([id])[0])

    def id(self, entity: str, id: str) -> str:
        """Return an id as the data has it: integers are known in other spellings, too. Raises KeyError as `row`."""
        return str(self.model.tables[entity].ids([self.row(entity, id)])[0])

    def check_type(self, entity: str) -> None:
        """Raise UnknownName, a KeyError, where the release has no such entity type."""
        if entity not in self.model.tables:
            raise UnknownName(unknown("entity type", entity, self.model.entities))


class Explorer:
    """A store, its releases as they are asked for, and a database to query them."""

    def __init__(self, root: str) -> None:
        """Explore the store at `root` (path or URL). Nothing is opened yet."""
        self.root = root
        self.store = Store(root)
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        return database.connect(store=self.store)  # at the first request: a process that forks must not share it

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Return a connection for one request; requests run in threads of their own."""
        return self._database.cursor()

    def opened(self, name: str | None = None) -> Opened:
        """Open a release.

        Args:
            name: Its name; None: the current one, in a store where none is current the newest, and in one without
                releases the newest vectors.

        Raises:
            UserError: There is no such release, its vectors are gone, or there are no vectors at all.
        """
        if name is None:
            release = releases.current(self.store) or self._newest()
            if release is None:
                model = load_model(self.root)
                assert model.store is not None
                return Opened(None, model.store, model)
        else:
            release = releases.read(self.store, name)
        with self._lock:
            if release.name not in self._opened:
                store = releases.opened(self.store, _vectors_of(self.store, release))
                self._opened[release.name] = Opened(release, store, open_model(store, release.snapshot))
                while len(self._opened) > MOST_OPEN:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(release.name)
            return self._opened[release.name]

    def _newest(self) -> Release | None:
        made = [releases.read(self.store, name) for name in releases.names(self.store)]
        return max(made, key=lambda one: (one.created, one.name), default=None)

    def with_vectors(self, entity: str | None = None) -> list[Release]:
        """Return the releases whose vectors are still there, of one entity type or any, the oldest first."""
        made = sorted((releases.read(self.store, name) for name in releases.names(self.store)), key=_age)
        table = "embeddings/relations" if entity is None else f"embeddings/{entity}"
        return [one for one in made if one.tables.get(table, "") in self.store.versions_of(table, one.snapshot)]


def _age(release: Release) -> tuple[str, str]:
    return release.created, release.name


def _vectors_of(store: Store, release: Release) -> Release:
    """Return a release without the tables that retention has removed. Raises UserError where vectors are among them."""
    there = {
        table: version
        for table, version in release.tables.items()
        if version in store.versions_of(table, release.snapshot)
    }
    if not any(table.startswith("embeddings/") for table in there):
        raise UserError(f"release {release.name}: its vectors were removed; choose a newer release")
    return Release(release.name, release.snapshot, release.created, there, release.figures, release.model_uri)
