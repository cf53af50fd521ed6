"""The vectors of a trained model by id: the part of the read API that needs no scorer but for ids it does not have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import pyarrow as pa

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.vectors.chosen import Chosen, New
from twhin_pipeline.vectors.entity_table import EntityTable, UnknownName, as_list
from twhin_pipeline.vectors.model_files import vectors_array

if TYPE_CHECKING:
    from twhin_pipeline.vectors.scoring import EdgeScores

GETTER = re.compile(r"get_(?P<entity>\w+)_embedding")
Missing = Literal["error", "skip", "infer"]


class VectorsById:
    """The vectors of each entity type, to read by id.

    Each entity type has its getter: `get_user_embedding(id)` is `get_embedding("user", id)`.
    """

    def __init__(
        self,
        model_config: TwhinModelConfig,
        tables: Mapping[str, EntityTable],
        open_scores: Callable[[], EdgeScores],
        *,
        normalized: bool,
        maps: Mapping[str, np.ndarray] | None,
    ) -> None:
        """Take what `TwhinEmbeddings` does."""
        self.config = model_config
        self.tables = dict(tables)
        self._open_scores = cache(open_scores)
        self.normalized = normalized
        self.maps = maps
        self.dim = model_config.embedding_dim

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

    @property
    def _scores(self) -> EdgeScores:
        return self._open_scores()

    @property
    def entities(self) -> list[str]:
        """Entity types."""
        return list(self.tables)

    @overload
    def get_embedding(
        self, entity: str, ids: Any, missing: Literal["error", "infer"] = "error", edges: Any = None
    ) -> np.ndarray: ...

    @overload
    def get_embedding(
        self, entity: str, ids: Any, missing: Literal["skip"], edges: Any = None
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def get_embedding(
        self, entity: str, ids: Any, missing: Missing = "error", edges: Any = None
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the vector of an id, float32 `[D]`, or of n ids, `[n, D]`.

        With `load_model(…, compatible_with=…)` it is in that release's space; scores and neighbors stay the model's.
        Of ids without a training edge it warns: their vectors are the random ones that training began with, or those of
        an earlier release.

        Args:
            entity: The entity type.
            ids: An id, or a sequence of ids: a list, or an array of NumPy, pandas or Arrow.
            missing: What happens to ids that have no vector. "error" raises. "skip" leaves them out. "infer" makes
                their vectors from `edges`: the mean of what these edges want
                ([new ids](../how-to/retrieve.md#ids-that-the-model-does-not-have)).
            edges: For "infer", the edges of those ids to ids that have vectors: a mapping `{id: [(relation, known
                id), …]}`, in which the id is the head where a relation's heads are of its type; or a table (Arrow,
                pandas) with the columns `lhs`, `rel` and `rhs`.

        Returns:
            The vectors; with "skip" of several ids, two arrays: the vectors `[m, D]`, and `found`, bool `[n]`, which of
            the ids they are of.

        Raises:
            KeyError: The entity type or an id is unknown; the message names the nearest known ones.
            UserError: The type has no map into that space, an id has no edges, or `skip` is asked of a single id.
        """
        if ids is None:
            raise UserError("get_embedding takes ids; `batches` streams all vectors of an entity type")
        chosen = self._choose(entity, ids, missing, edges)
        self._warn_untrained(chosen)
        vectors = self._mapped(entity, chosen.vectors(slice(None)))
        if chosen.found is not None:
            return vectors, chosen.found
        return vectors[0] if chosen.one else vectors

    def _choose(self, entity: str, ids: Any, missing: Missing = "error", edges: Any = None) -> Chosen:
        """Return the entities that a call asks for; all in the order of rows where `ids` is None."""
        table = self._table(entity)
        if ids is None:
            return Chosen(table, np.arange(len(table)), None, every=True)
        if missing not in get_args(Missing):
            raise UserError(f"missing must be 'error', 'skip' or 'infer', got {missing!r}")
        one = is_one(ids)
        if one and missing == "skip":
            raise UserError("missing='skip' takes several ids; ask `has` for one")
        ids = [ids] if one else ids
        if missing == "error":
            return Chosen(table, table.rows(ids), None, one=one)
        rows = table.find(ids)
        if missing == "skip":
            return Chosen(table, rows[rows >= 0], None, found=rows >= 0)
        new = np.flatnonzero(rows < 0)
        if not len(new):
            return Chosen(table, rows, None, one=one)
        from twhin_pipeline.vectors import inference

        values = as_list(ids)
        names = [values[at] for at in new.tolist()]
        found = inference.new_edges(edges, entity, names, self.config.relations, self.tables)
        self._check_lengths()
        vectors = found.estimate(len(names), self.config.relations, self.tables, self._scores, entity)
        return Chosen(table, rows, New(new, [str(one) for one in names], vectors, found), one=one)

    def _warn_untrained(self, chosen: Chosen, level: int = 3) -> None:
        """Warn of the entities named that no training edge has: with Python's defaults once for each of them.

        `level` is how many calls above this one the reader was called.
        """
        table = chosen.table
        if table.trained is None or chosen.every:
            return
        rows = chosen.rows[chosen.rows >= 0]
        without = rows[~table.trained[rows]]
        if len(without):
            several = f" ({len(without):,} such ids)" if len(without) > 1 else ""
            warnings.warn(
                f"{table.name} {table.ids(without[:1])[0]!r} has no training edge, so its vector says nothing{several}",
                stacklevel=level,
            )

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

    def has(self, entity: str, id: Any) -> bool:
        """Tell whether an entity type has the id. Raises KeyError where the type is unknown."""
        return self._table(entity).has(id)

    def _table(self, entity: str) -> EntityTable:
        if entity not in self.tables:
            raise UnknownName(unknown("entity type", entity, self.entities))
        return self.tables[entity]

    def _check_lengths(self) -> None:
        if self.normalized:
            raise UserError(
                "these vectors were exported with export.normalize: true, and the scorer needs their lengths; "
                "export again with normalize: false"
            )


def is_one(ids: Any) -> bool:
    """Tell whether `ids` is a single id rather than a sequence."""
    return np.ndim(ids) == 0
