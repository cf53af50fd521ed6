"""The read API: `load_model(path)` gives vectors, probabilities of relations, neighbours and recommendations.

>>> model = load_model("/data/twhin")
>>> model.get_user_embedding(12)
>>> model.predict_relation(12, 34, "fav")
>>> model.neighbors("tweet", 34, k=10)
>>> model.recommend("fav", 12, k=10)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from twhin_pipeline import extras
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store import Manifest, Store, releases
from twhin_pipeline.vectors.entity_table import BATCH_ROWS, EntityTable, UnknownId
from twhin_pipeline.vectors.model_files import locate, model_version, parameters_of, vectors_array
from twhin_pipeline.vectors.recommendation import known_tails

if TYPE_CHECKING:
    import torch

    from twhin_pipeline.vectors.scoring import EdgeScores

GETTER = re.compile(r"get_(?P<entity>\w+)_embedding")
RELATIONS = "embeddings/relations"


class UnknownName(UnknownId):
    """An entity type or a relation that the model does not have: a KeyError that names the nearest ones."""


class TwhinEmbeddings:
    """A trained model, to read: the vectors of each entity type, and the scorer that training used.

    Vectors and neighbors come without torch; probabilities, candidates and recommendations need it.
    Each entity type has its getter: `get_user_embedding(id)` is `get_embedding("user", id)`.
    """

    def __init__(
        self,
        model_config: TwhinModelConfig,
        tables: Mapping[str, EntityTable],
        open_scores: Callable[[], EdgeScores],
        snapshot: str,
        version: str,
        *,
        normalized: bool = False,
        store: Store | None = None,
        maps: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Put together what `load_model` found.

        Args:
            model_config: Entity types and relations.
            tables: Each entity type's vectors.
            open_scores: Returns what scores edges; called when the first score is asked for.
            snapshot: The snapshot that the model was trained on.
            version: That of the table `twhin_model` which the vectors were exported from.
            normalized: The vectors were exported with `export.normalize`.
            store: Where the snapshot's edges are, for `recommend`.
            maps: By entity type, a matrix `[D, D']` into another space, for `get_embedding`; None: the model's own.
        """
        self.config = model_config
        self.tables = dict(tables)
        self._open_scores = open_scores
        self.snapshot, self.version = snapshot, version
        self.normalized = normalized
        self.store = store
        self.maps = maps
        self.dim = model_config.embedding_dim

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(table):,}" for name, table in self.tables.items())
        return f"TwhinEmbeddings({self.snapshot}: {sizes}; relations {', '.join(self.relations)})"

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(f"get_{name}_embedding" for name in self.entities)]

    def __getattr__(self, name: str) -> Callable[[Any], np.ndarray]:
        getter = GETTER.fullmatch(name)
        tables = self.__dict__.get("tables", {})
        if getter and getter["entity"] in tables:
            return partial(self.get_embedding, getter["entity"])
        message = f"; {unknown('entity type', getter['entity'], tables)}" if getter else ""
        known = ", ".join(tables)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{message} (entity types: {known})")

    @cached_property
    def _scores(self) -> EdgeScores:
        return self._open_scores()

    @property
    def entities(self) -> list[str]:
        """Entity types."""
        return list(self.tables)

    @property
    def relations(self) -> list[str]:
        """Relations."""
        return self.config.relation_names

    def get_embedding(self, entity: str, ids: Any) -> np.ndarray:
        """Return the vector of an id, float32 `[D]`, or of a sequence of n ids, `[n, D]`.

        With `load_model(…, compatible_with=…)` it is in that release's space; scores and neighbors stay the model's.

        Raises:
            KeyError: The entity type or an id is unknown; the message names the nearest known ones.
            UserError: The type has no map into that space.
        """
        return self._mapped(entity, self._own(entity, ids))

    def _mapped(self, entity: str, own: np.ndarray) -> np.ndarray:
        """Return vectors in the space of `compatible_with`, where one was given."""
        if self.maps is None:
            return own
        if entity not in self.maps:
            raise UserError(
                f"vectors of {entity} have no map into that release's space: too few of its ids are in both, or it was "
                "not there"
            )
        return (own @ self.maps[entity]).astype(np.float32)

    def schema(self, entity: str, element: pa.DataType | None = None) -> pa.Schema:
        """Return the schema of `batches`: `id`, and `embedding` as a list of D floats (`element`, default float32)."""
        table = self._table(entity)
        dim = self._mapped(entity, table.vectors[:0]).shape[1]
        kind = pa.list_(element or pa.float32(), dim)
        return pa.schema([pa.field("id", table.index.ids.type), pa.field("embedding", kind, nullable=False)])

    def count(self, entity: str, *, untrained: bool = False) -> int:
        """Return how many entities `batches` has."""
        table = self._table(entity)
        return len(table) if untrained or table.trained is None else int(table.trained.sum())

    def batches(self, entity: str, size: int = 65_536, *, untrained: bool = False) -> Iterator[pa.RecordBatch]:
        """Stream an entity type's ids and vectors in the order of rows, as `get_embedding` returns them.

        Args:
            entity: The entity type.
            size: Rows of a batch at most.
            untrained: Entities without training edges too.

        Raises:
            KeyError: The entity type is unknown.
            UserError: The type has no map into the space of `compatible_with`.
        """
        table, schema = self._table(entity), self.schema(entity)
        for start in range(0, len(table), size):
            rows = np.arange(start, min(start + size, len(table)))
            if not untrained and table.trained is not None:
                rows = rows[table.trained[rows]]
            if len(rows):
                vectors = vectors_array(self._mapped(entity, table.vectors[rows]))
                columns = [table.index.ids.take(pa.array(rows)), vectors.cast(schema.field("embedding").type)]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

    def _own(self, entity: str, ids: Any) -> np.ndarray:
        table = self._table(entity)
        if _is_one(ids):
            return np.array(table.vectors[table.rows([ids])[0]])
        return table.vectors[table.rows(ids)]

    def predict_relation(self, lhs: Any, rhs: Any, relation: str | None = None) -> float | np.ndarray:
        """Return the probability sigmoid(score) that `lhs` has `relation` to `rhs`.

        Where the comparator is a distance, scores are never above 0 and probabilities never above one half: they put
        edges in order, and no more.

        Args:
            lhs: An id, a sequence of n ids, or vectors of floats, `[D]` or `[n, D]`.
            rhs: Likewise; one entity is paired with all of the other side's n.
            relation: The relation's name; may be left out where the model has only one.

        Returns:
            A float for one edge, or float32 `[n]`.

        Raises:
            KeyError: The relation or an id is unknown.
            UserError: The relation is left out where there are several, or vectors or counts do not fit.
        """
        number, left, right = self._relation(relation)
        a, one_a = self._vectors(left, lhs)
        b, one_b = self._vectors(right, rhs)
        if not one_a and not one_b and len(a) != len(b):
            raise UserError(f"predict_relation pairs lhs and rhs one to one, got {len(a)} and {len(b)}")
        probability = self._scores.probabilities(a, number, b)
        return float(probability[0]) if one_a and one_b else probability

    def has(self, entity: str, id: Any) -> bool:
        """Tell whether an entity type has the id. Raises KeyError where the type is unknown."""
        return self._table(entity).has(id)

    def neighbors(self, entity: str, id: Any, k: int = 10, *, untrained: bool = False) -> list[tuple[Any, float]]:
        """Return the k entities of the same type whose vectors are nearest by cosine, as (id, cosine), best first.

        Entities that no training edge has are left out, unless `untrained` is set: their vectors say nothing.

        Raises:
            KeyError: The entity type or the id is unknown.
        """
        table = self._table(entity)
        row = int(table.rows([id])[0])
        query = np.array(table.vectors[row])
        lengths = table.lengths() * np.linalg.norm(query)

        def cosines(part: slice) -> np.ndarray:
            result = table.vectors[part] @ query / np.maximum(lengths[part], np.float32(1e-30))
            if part.start <= row < part.stop:
                result[row - part.start] = -np.inf
            return result

        return self._best(table, k, cosines if untrained else _trained(table, cosines))

    def candidates(
        self, relation: str | None, lhs: Any, k: int = 10, *, untrained: bool = False
    ) -> list[tuple[Any, float]]:
        """Return the k tails that `lhs` (an id or a vector `[D]`) most probably has `relation` to, as (id, score).

        The score is the model's; `1 / (1 + exp(-score))` is `predict_relation`'s probability. Tails that no training
        edge has are left out, unless `untrained` is set. `recommend` also leaves out what is known.

        Raises:
            KeyError: The relation or the id is unknown.
            UserError: More than one head was given.
        """
        number, left, right = self._relation(relation)
        vectors, one = self._vectors(left, lhs)
        if not one:
            raise UserError(f"candidates takes one head, got {len(vectors)}; call it once for each")
        table = self._table(right)
        scores = self._scores.of_tails(number, vectors, table.vectors)
        return self._best(table, k, scores if untrained else _trained(table, scores))

    def recommend(
        self,
        relation: str | None,
        id: Any,
        k: int = 10,
        exclude_known: bool | Literal["any"] = True,
        *,
        untrained: bool = False,
    ) -> list[tuple[Any, float]]:
        """Return the k best new tails for a head, as (id, score), best first; scores are those of `candidates`.

        Args:
            relation: The relation's name; may be None where the model has only one.
            id: The head.
            k: How many; fewer come where there are no more.
            exclude_known: True leaves out the tails that the head has by the relation in the snapshot's edges (those
                of training, validation and test), `"any"` those that it has by any relation between the same two entity
                types. Both leave out the head itself. False leaves out nothing.
            untrained: Do not leave out tails that no training edge has.

        Raises:
            KeyError: The relation or the id is unknown.
            UserError: The relation is None where there are several, or vectors were exported with
                `export.normalize: true`.
        """
        number, left, right = self._relation(relation)
        heads, tails = self._table(left), self._table(right)
        row = int(heads.rows([id])[0])
        if heads.trained is not None and not heads.trained[row]:
            warnings.warn(f"{left} {id!r} has no training edge, so what it is recommended says nothing", stacklevel=2)
        known = self._known(number, heads.ids([row])[0], exclude_known) if exclude_known else set()
        scores = self._scores.of_tails(number, heads.vectors[row : row + 1], tails.vectors)
        best = self._best(tails, max(k, 0) + len(known), scores if untrained else _trained(tails, scores))
        return [(tail, score) for tail, score in best if str(tail) not in known][: max(k, 0)]

    def _known(self, number: int, head: Any, which: bool | Literal["any"]) -> set[str]:
        """Return the tails of a head that are not to be recommended, as texts."""
        if which not in (True, "any"):
            raise UserError(f"exclude_known must be True, False or 'any', got {which!r}")
        chosen = self.config.relations[number]
        names: Sequence[str] = [chosen.name]
        if which == "any":
            pair = (chosen.lhs, chosen.rhs)
            names = [one.name for one in self.config.relations if (one.lhs, one.rhs) == pair]
        result = None if self.store is None else known_tails(self.store, self.snapshot, names, head)
        if result is None:
            warnings.warn(
                f"there is no table raw_edges of {self.snapshot}, so known edges are not left out", stacklevel=3
            )
        itself = {head} if chosen.lhs == chosen.rhs else set()
        return {str(tail) for tail in (result or set()) | itself}

    @staticmethod
    def _best(table: EntityTable, k: int, score: Callable[[slice], np.ndarray]) -> list[tuple[Any, float]]:
        """Return the k best (id, score) by blocks of rows, best first; equal scores in the order of rows.

        Scores of minus infinity are left out.
        """
        if k < 1:
            return []
        rows, values = np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, len(table), BATCH_ROWS):
            part = slice(start, min(start + BATCH_ROWS, len(table)))
            result = score(part)
            top = np.argpartition(-result, k - 1)[:k] if k < len(result) else np.arange(len(result))
            rows, values = np.concatenate([rows, top + start]), np.concatenate([values, result[top]])
            best = np.lexsort((rows, -values))[:k]
            best = best[values[best] > -np.inf]
            rows, values = rows[best], values[best]
        return [(name, float(value)) for name, value in zip(table.ids(rows), values, strict=True)]

    def _table(self, entity: str) -> EntityTable:
        if entity not in self.tables:
            raise UnknownName(unknown("entity type", entity, self.entities))
        return self.tables[entity]

    def _relation(self, name: str | None) -> tuple[int, str, str]:
        """Return a relation's number and the entity types of its sides."""
        if self.normalized:
            raise UserError(
                "these vectors were exported with export.normalize: true, and the scorer needs their lengths; "
                "export again with normalize: false"
            )
        if name is None:
            if len(self.relations) > 1:
                raise UserError(f"the model has several relations; say which one: {', '.join(self.relations)}")
            name = self.relations[0]
        if name not in self.relations:
            raise UnknownName(unknown("relation", name, self.relations))
        number = self.relations.index(name)
        relation = self.config.relations[number]
        return number, relation.lhs, relation.rhs

    def _vectors(self, entity: str, given: Any) -> tuple[np.ndarray, bool]:
        """Return float32 `[n, D]` of ids or vectors, and whether it was one that was given."""
        if hasattr(given, "detach"):  # a tensor of torch
            given = given.detach().cpu().numpy()
        if not _is_one(given):
            array = np.asarray(given)
            if np.issubdtype(array.dtype, np.floating):
                if array.ndim not in (1, 2) or array.shape[-1] != self.dim:
                    raise UserError(
                        f"vectors of {entity} must be [{self.dim}] or [n, {self.dim}], got {list(array.shape)}"
                    )
                return np.atleast_2d(array).astype(np.float32), array.ndim == 1
        vectors = self._own(entity, given)
        return np.atleast_2d(vectors), vectors.ndim == 1


def load_model(path: str, snapshot: str | None = None, *, compatible_with: str | None = None) -> TwhinEmbeddings:
    """Open exported embeddings: nothing is read until it is asked for.

    Args:
        path: A store's root (path or URL); that with `@YYYY-MM-DD` for one of its snapshots; or an MLflow model URI
            (`models:/name/3`, `models:/name@alias`, `runs:/<id>/model`).
        snapshot: The snapshot, in place of `@YYYY-MM-DD`. Left out: that of the current release; where nothing has been
            published, the newest that has embeddings.
        compatible_with: An earlier release (`twhin releases` lists them). `get_embedding` then returns vectors in its
            space, for a consumer that was trained on its vectors. While that release is the one that is opened, these
            are its own vectors.

    Raises:
        UserError: There are no embeddings there, they are not one whole set, or no map leads to that release.
    """
    return open_model(*locate(str(path), RELATIONS, snapshot), compatible_with=compatible_with)


def open_model(store: Store, snapshot: str, *, compatible_with: str | None = None) -> TwhinEmbeddings:
    """Open the exported embeddings of a snapshot, at the versions that this store shows (`releases.opened`).

    Raises:
        UserError: They are not there or not one whole set, or no map leads to the release `compatible_with`.
    """
    relations = store.manifest(RELATIONS, snapshot)
    model_config = TwhinModelConfig.model_validate(relations.details["model"])
    tables = {}
    for name in model_config.table_names:
        manifest = store.manifest(f"embeddings/{name}", snapshot)
        if relations.parents[manifest.asset] != manifest.version:
            raise UserError(
                f"{store.root}: {manifest.asset} of {snapshot} is not of the same export as {RELATIONS}; an export is "
                f"under way or broke off: run `twhin export --snapshot {snapshot}`"
            )
        tables[name] = EntityTable.open(store, manifest)
    version = model_version(relations)
    return TwhinEmbeddings(
        model_config,
        tables,
        partial(_open_scores, model_config, store, relations),
        snapshot,
        version,
        normalized=relations.details["normalize"],
        store=store,
        maps=None if compatible_with is None else _maps(store, relations, compatible_with),
    )


def _maps(store: Store, relations: Manifest, earlier: str) -> dict[str, np.ndarray] | None:
    """Return the maps into an earlier release's space, None where these are that release's own vectors."""
    from twhin_pipeline.vectors import compatibility

    made = [releases.read(store, name) for name in releases.names(store)]
    of_these = [release for release in made if release.tables.get(RELATIONS) == relations.version]
    if of_these and of_these[-1].name == earlier:
        return None
    if of_these:
        return compatibility.maps_into(store, of_these[-1], earlier)
    raise UserError(
        f"{store.root}: these vectors of {relations.snapshot} are in no release, so no map leads from them to "
        f"{earlier}; publish them (`twhin publish --snapshot {relations.snapshot}`)"
    )


def _open_scores(model_config: TwhinModelConfig, store: Store, relations: Manifest) -> EdgeScores:
    extras.need("torch", "scoring an edge", "reader")
    from twhin_pipeline.vectors.scoring import EdgeScores

    rows: dict[str, torch.Tensor] = {}
    for path in store.files_of(relations):
        with store.parquet(path) as file:
            rows |= parameters_of(file.read(columns=["relation", "embedding"]))
    return EdgeScores(model_config, rows)


def _trained(table: EntityTable, score: Callable[[slice], np.ndarray]) -> Callable[[slice], np.ndarray]:
    """Return the same scores, with minus infinity for entities without a training edge, where the table knows them."""
    trained = table.trained
    if trained is None:
        return score
    return lambda part: np.where(trained[part], score(part), np.float32(-np.inf))


def _is_one(ids: Any) -> bool:
    """Tell whether `ids` is a single id rather than a sequence."""
    return np.ndim(ids) == 0
