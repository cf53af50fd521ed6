"""The chain behind one vector: which tables it was made from, by which code and fields, down to the source's files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb

from twhin_pipeline.config import configuration_file
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.evaluation import seen_edges
from twhin_pipeline.evaluation.ancestors import POSITIVES, Origin, origins_of
from twhin_pipeline.store import Manifest, Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import SIDES

TEST, EDGES = "held_out/test", "raw_edges"


@dataclass(frozen=True)
class Made:
    """One version of a table in the chain, and by what it was made."""

    table: str
    snapshot: str
    version: str
    created: str
    code_version: str
    config_hash: str
    settings: dict[str, Any]
    """The fields that its stage read, by their paths; of a table of an earlier version of the package none."""

    @classmethod
    def of(cls, manifest: Manifest) -> Made:
        """Describe a version by its manifest."""
        return cls(
            manifest.asset, manifest.snapshot, manifest.version, manifest.created, manifest.code_version,
            manifest.config_hash, dict(manifest.settings),
        )  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Edges that an entity has by one relation on one side."""

    relation: str
    side: str
    raw: int
    """In `raw_edges`."""
    trained: int
    """In the training set of the model."""
    tested: int | None
    """In the test edges of the release; None where it has none."""


@dataclass(frozen=True)
class Ancestor:
    """A model that the model started from, or one before it."""

    name: str
    snapshot: str | None
    version: str | None
    state: str
    """`there`; `removed`, with or without the numbers of its training edges; or `of another store`."""
    mlflow_run_id: str | None


@dataclass(frozen=True)
class Lineage:
    """What is behind the vector of one entity."""

    entity: str
    id: Any
    release: dict[str, Any] | None
    """Name, when it was made, whether it is current, its figures and its registered model; None: no release has it."""
    row: int
    length: float
    """Of the vector."""
    trained_edges: int | None
    first_snapshot: str | None
    degree: int | None
    """As the vocabulary has them."""
    model: dict[str, Any]
    """Its MLflow run, steps and epoch; whether it was trained once more on all edges."""
    ancestors: list[Ancestor]
    edges: list[Counted]
    sources: list[dict[str, Any]]
    """The source's parts, each with its path in the configuration and rows read."""
    files: list[dict[str, Any]]
    """The source's files: path, bytes, modified and checksum, as far as they are known."""
    configuration: dict[str, Any] | None
    """The file that the store's tables were made by last, and the hash of its text."""
    tables: list[Made] = field(default_factory=list)
    """From the vectors down to the edges."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def trace(con: duckdb.DuckDBPyConnection, store: Store, entity: str, id: str, name: str | None = None) -> Lineage:
    """Follow a vector back to its edges and their files.

    Args:
        con: A connection that can read the store.
        store: Where it is.
        entity: The entity type.
        id: The entity's id, as text.
        name: The release; None: the current one, and where nothing has been published the newest vectors.

    Raises:
        UserError: There is no such release, entity type or id, or a table is gone.
    """
    base = store.seen_as(None)
    release = releases.current(base) if name is None else releases.read(base, name)
    vectors = _vectors(base, entity, release)
    at = vectors.snapshot
    shown = _one(con, base, vectors, id)
    asset = next(parent for parent in vectors.parents if parent.endswith("twhin_model"))
    model = base.manifest(asset, at, vectors.parents[asset])
    vocabulary = base.manifest(f"vocabulary/{entity}", at, vectors.parents[f"vocabulary/{entity}"])
    positives = base.manifest(*_parent(model, POSITIVES))
    raw = base.manifest(EDGES, at, vocabulary.parents[EDGES])
    test = release.tables.get(TEST) if release is not None else None
    held = base.manifest(TEST, at, test) if test is not None else None
    known = _one(con, base, vocabulary, id)
    tables = [vectors, model, vocabulary, positives, *([held] if held else []), raw]
    if (evaluated := model.parents.get("twhin_model")) is not None:
        tables.insert(2, base.manifest("twhin_model", at, evaluated))
    made_by = configuration_file.record(base)
    return Lineage(
        entity=entity,
        id=shown["id"],
        release=None if release is None else _release(base, release),
        row=int(shown["row"]),
        length=float(shown["length"]),
        trained_edges=shown.get("trained_edges"),
        first_snapshot=known.get("first_snapshot"),
        degree=known.get("degree"),
        model={
            "refit": asset != "twhin_model",
            **{key: model.details.get(key) for key in ("mlflow_run_id", "chosen_step", "chosen_epoch", "tuned")},
        },
        ancestors=_ancestors(base, model),
        edges=_edges(con, base, entity, str(shown["id"]), int(shown["row"]), model, positives, held, raw),
        sources=[
            {key: one[key] for key in ("source", "read", "edges", "rejected") if key in one}
            for one in raw.details.get("sources", [])
        ],
        files=raw.details.get("source_files") or [{"path": one} for one in raw.details.get("files", [])],
        configuration=None if made_by is None else vars(made_by),
        tables=[Made.of(one) for one in tables],
    )


def _vectors(store: Store, entity: str, release: Release | None) -> Manifest:
    asset = f"embeddings/{entity}"
    if release is not None:
        names = [one.partition("/")[2] for one in release.tables if one.startswith("embeddings/")]
        if asset not in release.tables or entity == "relations":
            known = [one for one in names if one != "relations"]
            raise UserError(f"release {release.name}: {unknown('entity type', entity, known)}")
        return store.manifest(asset, release.snapshot, release.tables[asset])
    snapshots = store.snapshots(asset)
    if not snapshots or entity == "relations":
        raise UserError(f"{store.root}: there are no vectors of {entity!r}; make them with `twhin run`")
    return store.manifest(asset, snapshots[-1])


def _one(con: duckdb.DuckDBPyConnection, store: Store, manifest: Manifest, id: str) -> dict[str, Any]:
    """Return the row of an id: its plain columns, and the length of its vector."""
    columns = [name for name in manifest.schema if name != "embedding"]
    if "embedding" in manifest.schema:
        columns.append("sqrt(list_sum(list_transform(embedding, lambda x: x::DOUBLE * x::DOUBLE))) AS length")
    query = f"SELECT {', '.join(columns)} FROM {database.parquet(store.files_of(manifest))} WHERE id::VARCHAR = ?"
    with database.explained(f"{store.root}, {manifest.asset}"):
        rows = con.execute(query, [id]).fetchall()
    if not rows:
        raise UserError(
            f"{manifest.asset} of {manifest.snapshot} has no id {id!r}; `twhin sql` looks ids up, such as by "
            f"`select id from {manifest.asset.replace('/', '_')} limit 9`"
        )
    return dict(zip([one[0] for one in con.description or []], rows[0], strict=True))


def _parent(child: Manifest, name: str) -> tuple[str, str, str]:
    """Return the table, snapshot and version that a table was made from; of the refit's model its own training set."""
    asset = next((one for one in child.parents if one.endswith(name)), None)
    if asset is None:
        raise UserError(f"{child.asset} of {child.snapshot} does not name its {name}: it is of an earlier version")
    return asset, child.snapshot, child.parents[asset]


def _release(store: Store, release: Release) -> dict[str, Any]:
    now = releases.current(store)
    return {
        "name": release.name,
        "created": release.created,
        "current": now is not None and now.name == release.name,
        "figures": dict(release.figures),
        "model": release.model_uri,
        "code_version": release.code_version,
    }


def _ancestors(store: Store, model: Manifest) -> list[Ancestor]:
    result = []
    waiting = list(origins_of(model))
    while waiting:
        origin = waiting.pop(0)
        waiting += origin.before
        found, before = _ancestor(store, origin)
        if found not in result:
            result.append(found)
            waiting += before
    return result


def _ancestor(store: Store, origin: Origin) -> tuple[Ancestor, tuple[Origin, ...]]:
    """Return an ancestor, and what it started from."""
    if origin.version is None or origin.snapshot is None:
        return Ancestor(str(origin), origin.snapshot, None, "a checkpoint", None), ()
    try:
        _, manifest = origin.opened(store)
    except UserError:
        state = "removed"
        if origin.store is None and seen_edges.of_model(store, origin.snapshot, origin.version) is not None:
            state = "removed; its training edges, and those of models before it, are known by number"
        return Ancestor(str(origin), origin.snapshot, origin.version, state, None), ()
    run_id = manifest.details.get("mlflow_run_id")
    state = "there" if origin.store is None else "of another store"
    return Ancestor(str(origin), origin.snapshot, origin.version, state, run_id), origins_of(manifest)


def _edges(
    con: duckdb.DuckDBPyConnection,
    store: Store,
    entity: str,
    id: str,
    row: int,
    model: Manifest,
    positives: Manifest,
    held: Manifest | None,
    raw: Manifest,
) -> list[Counted]:
    """Count the entity's edges by relation and side; relations of other entity types are left out."""
    relations = model.details["model"]["relations"]
    trained = _count(con, store, positives, row)
    tested = _count(con, store, held, row) if held is not None else None
    named = _count(con, store, raw, id)
    result = []
    for number, relation in enumerate(relations):
        for side in SIDES:
            if relation[side] == entity:
                encoded, key = (number, side), (relation["name"], side)
                counts = (
                    named.get(key, 0),
                    trained.get(encoded, 0),
                    tested.get(encoded, 0) if tested is not None else None,
                )
                result.append(Counted(relation["name"], side, *counts))
    return result


def _count(
    con: duckdb.DuckDBPyConnection, store: Store, manifest: Manifest, end: int | str
) -> dict[tuple[int | str, str], int]:
    """Count a table's edges with an end, by relation and side."""
    column = "{}" if isinstance(end, int) else "{}::VARCHAR"
    lhs, rhs = (f"count(*) FILTER ({column.format(side)} = $end)" for side in SIDES)
    query = f"SELECT rel, {lhs}, {rhs} FROM {database.parquet(store.files_of(manifest))} GROUP BY rel"
    with database.explained(f"{store.root}, {manifest.asset}"):
        rows = con.execute(query, {"end": end}).fetchall()
    return {(row[0], side): int(count) for row in rows for side, count in zip(SIDES, row[1:], strict=True)}
