"""Ancestors: the models that a model started from, and the edges that they were trained on.

An edge that is held out today may have been a training edge of an earlier snapshot's model. Where today's model started
from that one, it has seen the edge, so neither evaluation nor validation may ask for it. Where retention has removed
the earlier training set, a number of each of its edges is left (`seen_edges`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import seen_edges
from twhin_pipeline.store import Manifest, Store, database
from twhin_pipeline.vectors.model_files import ASSET
from twhin_pipeline.words import SIDES

POSITIVES = "training_set/positives"
EDGE = pa.schema([("rel", pa.int64()), ("lhs", pa.int64()), ("rhs", pa.int64())])


@dataclass(frozen=True)
class Origin:
    """A model, or a checkpoint of one, that vectors started from; it is stored with the model that did."""

    snapshot: str | None = None
    version: str | None = None
    """Of the model's table; None: a checkpoint."""
    view: str | None = None
    """The view of the store that has the model, such as `refit`."""
    store: str | None = None
    """Its root; None: the store of the model that started from it."""
    checkpoint: str | None = None
    training_set: str | None = None
    """The version of the training set that a checkpoint names."""
    before: tuple[Origin, ...] = ()
    """What the training of a checkpoint started from."""

    def __str__(self) -> str:
        if self.checkpoint is not None:
            return f"checkpoint {self.checkpoint}"
        table = ASSET if self.view is None else f"{self.view}/{ASSET}"
        return f"{table} of snapshot {self.snapshot}" + (f" in {self.store}" if self.store else "")

    def as_details(self) -> dict[str, Any]:
        """Return it as JSON values, without what is empty."""
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "before"}
        return values | ({"before": [one.as_details() for one in self.before]} if self.before else {})

    @classmethod
    def from_details(cls, values: Mapping[str, Any]) -> Origin:
        """Read what `as_details` returned."""
        return cls(**{**values, "before": tuple(cls.from_details(one) for one in values.get("before", ()))})

    @classmethod
    def of_model(cls, store: Store, manifest: Manifest, child: Store) -> Origin:
        """Name a model of `store` that a model of the store `child` starts from."""
        view = next((view for view in (None, "refit") if Store(store.root, view).real(ASSET) == manifest.asset), None)
        elsewhere = None if store.root == child.root else store.root
        return cls(manifest.snapshot, manifest.version, view, elsewhere)

    def opened(self, child: Store) -> tuple[Store, Manifest]:
        """Return the store with the model, and its manifest. Raises UserError where it is gone."""
        assert self.snapshot is not None and self.version is not None
        root = self.store or child.root
        if self.store is not None and not Store(root).assets():
            root = child.root  # an earlier version of this package noted the full path, and the store has moved
        store = Store(root, self.view)
        if self.view is None and self.version not in store.versions_of(ASSET, self.snapshot):
            # An earlier version of this package did not note the view.
            refitted = Store(root, "refit")
            store = refitted if self.version in refitted.versions_of(ASSET, self.snapshot) else store
        return store, store.manifest(ASSET, self.snapshot, self.version)


def origins_of(manifest: Manifest) -> tuple[Origin, ...]:
    """Return what a model started from, as its manifest says."""
    return origins_in(manifest.details)


def origins_in(details: Mapping[str, Any]) -> tuple[Origin, ...]:
    """Return what the `started_from` of a manifest's details, or of a checkpoint's state, says."""
    noted = details.get("started_from") or []
    return tuple(Origin.from_details(one) for one in ([noted] if isinstance(noted, dict) else noted))


@dataclass(frozen=True)
class Trained:
    """The training edges of one ancestor: Parquet files, its relations in order, and where its ids have their rows."""

    files: list[str]
    relations: list[tuple[str, str, str]]
    """Name and entity types of the sides."""
    vocabularies: dict[str, list[str]] | None
    """Parquet files with `id` and `row` by entity type; None: its rows are ours."""
    snapshot: str
    numbers: bool = False
    """Whether the files have the edges' numbers (`seen_edges`), and not their rows."""
    ancestors: int = 1
    """How many models these are the edges of."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeenBefore:
    """Held-out edges that ancestors were trained on: `edges` has the columns of `EDGE`, in our rows."""

    edges: pa.Table = field(default_factory=EDGE.empty_table)
    ancestors: int = 0
    unknown: tuple[str, ...] = ()
    """Ancestors whose training edges are not known, each with the reason."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the known ones."""

    def __len__(self) -> int:
        return int(self.edges.num_rows)

    def per_relation(self, names: Sequence[str]) -> dict[str, int]:
        """Return how many of each relation were trained on, without those of none."""
        counts = np.bincount(self.edges["rel"].to_numpy(), minlength=len(names)).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}


def find(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    origins: Sequence[Origin],
    files: list[str],
) -> SeenBefore:
    """Return which of the edges in `files` any ancestor was trained on.

    Entities are matched by id, relations by name. The training edges of each ancestor are read once, and what is held
    in memory grows with the held-out edges alone.

    Args:
        con: Joins the edges.
        config: The configuration, relations resolved.
        store: The model's.
        snapshot: Of the held-out edges.
        origins: What the model started from.
        files: Parquet files with `rel`, `lhs` and `rhs`.
    """
    if not origins or not files:
        return SeenBefore()
    unknown: list[str] = []
    ancestors = 0
    con.execute(
        "CREATE OR REPLACE TEMP TABLE asked AS SELECT DISTINCT CAST(rel AS BIGINT) AS rel, CAST(lhs AS BIGINT) AS lhs, "
        f"CAST(rhs AS BIGINT) AS rhs FROM {database.parquet(files)}"
    )
    con.execute("CREATE OR REPLACE TEMP TABLE seen AS SELECT * FROM asked WHERE false")
    notes: list[str] = []
    for trained in trained_on(store, origins, unknown):
        ancestors += trained.ancestors
        notes += trained.notes
        for path in [*trained.files[:1], *(files[0] for files in (trained.vocabularies or {}).values())]:
            if "://" in path:
                database.register(con, path)
        _look_up(con, config, store, snapshot, trained)
    edges = con.sql("SELECT rel, lhs, rhs FROM seen ORDER BY ALL").to_arrow_table().cast(EDGE)
    con.execute("DROP TABLE asked")
    con.execute("DROP TABLE seen")
    return SeenBefore(edges, ancestors, tuple(unknown), tuple(notes))


def trained_on(store: Store, origins: Sequence[Origin], unknown: list[str]) -> Iterator[Trained]:
    """Yield every ancestor's training edges, the nearest first; the reasons of those that cannot be read go to
    `unknown`.

    Args:
        store: That of the model that started from `origins`.
        origins: What it started from.
        unknown: Gets the reasons.
    """
    waiting = [(store, one) for one in origins]
    done: set[tuple[str, str]] = set()
    while waiting:
        child, origin = waiting.pop(0)
        waiting += [(child, one) for one in origin.before]
        if (origin.store or child.root, origin.version or "") in done:
            continue
        try:
            if origin.version is None:
                yield _of_checkpoint(child, origin)
                continue
            done.add((origin.store or child.root, origin.version))
            home, model = origin.opened(child)
            trained = of_model(home, model)
        except UserError as error:
            left = _left_of(child, origin, unknown)
            if left is None:
                unknown.append(f"{origin}: {error}")
            else:
                yield left
            continue
        waiting += [(home, one) for one in origins_of(model)]
        yield trained


def _left_of(child: Store, origin: Origin, unknown: list[str]) -> Trained | None:
    """Return what is left of the training edges of an ancestor, and of those before it; None where nothing is."""
    if origin.version is None or origin.snapshot is None:
        return None
    base = Store(origin.store) if origin.store else child.seen_as(None)
    manifest = seen_edges.of_model(base, origin.snapshot, origin.version)
    if manifest is None:
        return None
    details = manifest.details
    unknown += details["unknown"]
    notes = (
        (f"edges that no model was trained on after {details['since']} are forgotten",) if details["forgotten"] else ()
    )
    return Trained(base.files_of(manifest), [], None, manifest.snapshot, True, int(details["ancestors"]), notes)


def of_model(home: Store, model: Manifest) -> Trained:
    """Return the training edges of a model. Raises UserError where they cannot be read."""
    version = model.parents.get(home.real(POSITIVES))
    if version is None:
        raise UserError("its manifest does not name its training set")
    base, at = home.seen_as(None), model.snapshot
    names = [name for name in model.parents if name.startswith("vocabulary/") and "@" not in name]
    vocabularies = {
        name.partition("/")[2]: base.files_of(base.manifest(name, at, model.parents[name])) for name in names
    }
    relations = [(one["name"], one["lhs"], one["rhs"]) for one in model.details["model"]["relations"]]
    return Trained(home.files_of(home.manifest(POSITIVES, at, version)), relations, vocabularies, at)


def _of_checkpoint(store: Store, origin: Origin) -> Trained:
    """Find a checkpoint's training set. It is taken over row by row, so its rows and relations are ours."""
    for view in (None, "refit"):
        home = store.seen_as(view)
        for snapshot in home.snapshots_made(POSITIVES):
            if origin.training_set in home.versions_of(POSITIVES, snapshot):
                files = home.files_of(home.manifest(POSITIVES, snapshot, origin.training_set))
                return Trained(files, [], None, snapshot)
    raise UserError(
        "it does not say what it was trained on"
        if origin.training_set is None
        else f"{store.root} has no version {origin.training_set} of {POSITIVES}"
    )


def _look_up(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str, trained: Trained
) -> None:
    """Move the `asked` edges that are among an ancestor's training edges to `seen`."""
    ours = [(one.name, one.lhs, one.rhs) for one in config.model.relations]
    if trained.numbers:
        for rel, relation in enumerate(ours):
            con.execute(f"CREATE OR REPLACE TEMP TABLE found AS {_numbered(store, snapshot, trained, rel, relation)}")
            _move_found(con)
        return
    theirs = trained.relations or ours
    pairs = [(rel, theirs.index(one)) for rel, one in enumerate(ours) if one in theirs]
    if not pairs:
        return
    values = ", ".join(f"({now}, {then})" for now, then in pairs)
    con.execute(f"CREATE OR REPLACE TEMP TABLE relation_then AS SELECT * FROM (VALUES {values}) t(rel, rel_then)")
    if trained.vocabularies is None:
        then = (
            "SELECT rel, lhs, rhs, rel_then, lhs AS lhs_then, rhs AS rhs_then FROM asked JOIN relation_then USING (rel)"
        )
    else:
        _map_rows(con, config, store, snapshot, trained.vocabularies)
        then = (
            "SELECT rel, lhs, rhs, rel_then, l.row_then AS lhs_then, r.row_then AS rhs_then "
            "FROM asked JOIN relation_then USING (rel) JOIN relation_types USING (rel) "
            "JOIN row_then l ON l.entity = lhs_type AND l.row = lhs "
            "JOIN row_then r ON r.entity = rhs_type AND r.row = rhs"
        )
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE found AS SELECT DISTINCT a.rel, a.lhs, a.rhs "
        f"FROM {database.parquet(trained.files)} e JOIN ({then}) a "
        "ON e.rel = rel_then AND e.lhs = lhs_then AND e.rhs = rhs_then"
    )
    _move_found(con)


def _move_found(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("INSERT INTO seen SELECT * FROM found")
    con.execute("CREATE OR REPLACE TEMP TABLE asked AS SELECT * FROM asked ANTI JOIN found USING (rel, lhs, rhs)")


def _numbered(store: Store, snapshot: str, trained: Trained, rel: int, relation: tuple[str, str, str]) -> str:
    """Return the SQL of the `asked` edges of a relation whose number is among an ancestor's."""
    _, left, right = relation
    ids = [database.scan(store, f"vocabulary/{entity}", snapshot) for entity in (left, right)]
    return (
        f"SELECT rel, lhs, rhs FROM (SELECT a.rel, a.lhs, a.rhs, {seen_edges.number(relation, 'l.id', 'r.id')} AS edge "
        f"FROM asked a JOIN {ids[0]} l ON l.row = a.lhs JOIN {ids[1]} r ON r.row = a.rhs WHERE a.rel = {rel}) "
        f"SEMI JOIN {database.parquet(trained.files)} USING (edge)"
    )


def _map_rows(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    vocabularies: Mapping[str, list[str]],
) -> None:
    """Make `relation_types(rel, lhs_type, rhs_type)` and `row_then(entity, row, row_then)` of the `asked` entities."""
    types = pa.table(
        {
            "rel": pa.array(range(len(config.model.relations)), pa.int64()),
            **{f"{side}_type": [getattr(one, side) for one in config.model.relations] for side in SIDES},
        }
    )
    con.register("relation_types", types)
    con.execute("CREATE OR REPLACE TEMP TABLE row_then(entity VARCHAR, row BIGINT, row_then BIGINT)")
    for entity, files in vocabularies.items():
        if entity not in config.model.table_names:
            continue
        name = database.literal(entity)
        requested = " UNION ".join(
            f"SELECT {side} AS row FROM asked JOIN relation_types USING (rel) WHERE {side}_type = {name}"
            for side in SIDES
        )
        con.execute(
            f"INSERT INTO row_then SELECT {name}, ours.row, theirs.row FROM {database.parquet(files)} theirs JOIN "
            f"(SELECT CAST(id AS VARCHAR) AS id, row FROM {database.scan(store, f'vocabulary/{entity}', snapshot)} "
            f"SEMI JOIN ({requested}) USING (row)) ours ON CAST(theirs.id AS VARCHAR) = ours.id"
        )
