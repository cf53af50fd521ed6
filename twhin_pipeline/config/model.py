"""Entity tables, relations, and how an edge is scored."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from twhin_pipeline.config.base import Section
from twhin_pipeline.config.optimizer import Adagrad, OptimizerConfig, RowwiseAdagrad
from twhin_pipeline.errors import unknown

# The configuration loads without torch, so the names stand here; tests hold them equal to the registries.
OPERATOR_NAMES = ("translation", "identity", "diagonal", "linear", "affine", "complex_diagonal", "rotation")
COMPARATOR_NAMES = ("dot", "cosine", "l2", "squared_l2")
LOSS_NAMES = ("bce", "softmax", "margin", "self_adversarial", "bsl")

# Names of tables become folders, SQL views and method names.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
EVERY_OTHER = "*"
"""The name of the entry in `model.relations` that stands for the source's other relations."""
TAKEN = (EVERY_OTHER, "all")
"""Names that no relation of the source may have: `all` is every relation together in the table `evaluation`."""


RESERVED_TYPES = ("relations",)
"""Names that no entity type may have: `embeddings/relations` is a table of its own."""
LONGEST_NAME = 100
"""Characters of an entity type's name, which names folders and files."""


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must be a letter, then letters, digits and underscores; rename it")
    if name in RESERVED_TYPES:
        raise ValueError(f"name {name!r} is that of a table of the store (embeddings/{name}); rename the entity type")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"name {name[:20]!r}… has {len(name)} characters, more than {LONGEST_NAME}; shorten it")
    return name


def names_relation(text: str) -> bool:
    """Tell whether a relation may be called so: text, but blanks, control signs, lone surrogates and `TAKEN`."""
    odd = any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text)
    return bool(text.strip()) and text not in TAKEN and not odd


def _check_relation(name: str) -> str:
    if name != EVERY_OTHER and not names_relation(name):
        raise ValueError(
            f"name {name!r} must be text without control characters or lone surrogates, neither blank nor 'all' (which "
            "stands for all relations together in the evaluation); rename it"
        )
    return name


class Pretrained(Section):
    """Where a table's first vectors come from."""

    emb_name: str
    """The entity type's name in that snapshot (the folder `embeddings/<emb_name>`)."""
    embedding_snapshot_uri: str
    """A Parquet file or glob (path or URL) with columns `id` and `embedding`; or a store, whose `embeddings/<emb_name>`
    is read."""


class TableConfig(Section):
    """One entity type's embedding table."""

    name: str
    """The entity type; relations refer to it."""
    num_embeddings: int | None = Field(None, ge=1, le=2**32)
    """Rows of the table. Left out: as many as the vocabulary has. Given: a vocabulary that outgrows it is an error."""
    embedding_dim: int = Field(128, ge=4, le=65_536, multiple_of=4)
    """Length of a vector; equal in all tables (said in one, it is that of all), and a multiple of 4 (the embedding
    kernel's vector width)."""
    data_type: Literal["fp32", "fp16"] = "fp32"
    """Storage type of the vectors; equal in all tables."""
    optimizer: OptimizerConfig = OptimizerConfig(rowwise_adagrad=RowwiseAdagrad(lr=0.1))
    """The optimizer fused into this table's backward pass."""
    vocab: str | None = None
    """A Parquet file with columns `id` and `row` that the vocabulary starts from; its ids keep these rows."""
    pretrained: Pretrained | None = None
    """Vectors to start from, matched by id; entities that are not in it start at random."""
    pull: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of a pull of each vector towards that of the model in `training.initial_checkpoint_dir`: the squared
    distance, once for each edge of the entity in a step, is added to the loss. New entities are not pulled."""
    freeze: bool = False
    """Entities that the model in `training.initial_checkpoint_dir` has trained keep their vectors to the last bit; new
    ones, the other tables and the operators learn. Without such a model all learn."""

    _name = field_validator("name")(_check_name)

    @model_validator(mode="after")
    def _held_once(self) -> TableConfig:
        if self.freeze and self.pull:
            raise ValueError("pull has nothing to do where freeze keeps the vectors; leave one of them out")
        return self

    @model_validator(mode="after")
    def _no_fused_momentum(self) -> TableConfig:
        if self.optimizer.sgd is not None and self.optimizer.sgd.momentum:
            raise ValueError("the fused sgd of a table has no momentum; set optimizer.sgd.momentum to 0, or use adam")
        return self


class EmbeddingsConfig(Section):
    """The entity tables."""

    tables: list[TableConfig] = Field(min_length=1)
    """One table an entity type."""
    tables_to_log: list[str] | None = None
    """Tables whose vectors' norms are sampled, shard by shard, and logged at each `training.train_log_every_n`."""

    @model_validator(mode="before")
    @classmethod
    def _one_dimension(cls, data: Any) -> Any:
        # A dimension that one table says is that of the tables that say none.
        tables = data.get("tables") if isinstance(data, dict) else None
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            return data
        dimension = next((table["embedding_dim"] for table in tables if "embedding_dim" in table), None)
        if dimension is None:
            return data
        return {**data, "tables": [{"embedding_dim": dimension, **table} for table in tables]}

    @model_validator(mode="after")
    def _alike(self) -> EmbeddingsConfig:
        names = [table.name for table in self.tables]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tables are named {name!r}; rename or remove one")
        if "translation" in names:
            raise ValueError("no table may be named 'translation': so is the operators' learning rate; rename it")
        for field in ("embedding_dim", "data_type"):
            values = {table.name: getattr(table, field) for table in self.tables}
            if len(set(values.values())) > 1:
                message = ", ".join(f"{name} {value}" for name, value in values.items())
                raise ValueError(f"{field} must be equal in all tables, got {message}; an edge compares two of them")
        for name in self.tables_to_log or ():
            if name not in names:
                raise ValueError(f"tables_to_log: {unknown('table', name, names)}")
        return self


class Relation(Section):
    """A named edge type from one entity type to another."""

    name: str
    """The relation's name, as in the column `rel`: any text without control characters but `all`. One entry may have
    the name `"*"`: each relation of the source that is not listed by itself is as that one says. They come after the
    listed ones, sorted by name."""
    lhs: str
    """The table of the left-hand side."""
    rhs: str
    """The table of the right-hand side."""
    operator: str = "translation"
    """What is applied to the left-hand side's vector: `translation` (x + r), `identity`, `diagonal` (x * r), `linear`
    (A x), `affine` (A x + b), `complex_diagonal` (complex x * r; the first half of a vector is real, the second
    imaginary) or `rotation` (the same, of modulus 1)."""
    sides: Literal["both", "lhs", "rhs"] | None = None
    """Which side of this relation's edges is corrupted; left out, as `negatives.sides` says."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Factor on the loss of this relation's edges."""

    _name = field_validator("name")(_check_relation)

    @field_validator("operator")
    @classmethod
    def _known_operator(cls, value: str) -> str:
        if value not in OPERATOR_NAMES:
            raise ValueError(unknown("operator", value, OPERATOR_NAMES))
        return value


class Regularization(Section):
    """A penalty on the vectors and operators of a step's edges, added to the loss (Lacroix et al., 2018)."""

    norm: Literal["n3", "l2"] = "n3"
    """`n3`: the sum of cubed moduli (of complex elements, where a relation's operator is complex). `l2`: the sum of
    squares."""
    entities: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the penalty on entities' vectors."""
    operators: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of the penalty on operators' parameters; rotations and identity have none to penalize."""
    degree_weighted: bool = True
    """Penalize an entity or a relation once for each of its edges in the step, and so in proportion to its degree; if
    false, once a step."""


class TwhinModelConfig(Section):
    """Tables, relations and the scorer."""

    embeddings: EmbeddingsConfig
    """The entity tables."""
    relations: list[Relation] = Field(min_length=1)
    """The edge types. Their order numbers them: an indexed edge file's `rel` counts from 0 in this list."""
    translation_optimizer: OptimizerConfig = OptimizerConfig(adagrad=Adagrad(lr=0.1, eps=1e-8))
    """The optimizer of the operators' parameters."""
    comparator: str = "dot"
    """How the two sides' vectors are compared: `dot`, `cosine` (usually with a `temperature` near 0.1), `l2` (the
    negative distance) or `squared_l2`."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Scores are divided by it."""
    init_scale: float = Field(0.1, gt=0, allow_inf_nan=False)
    """A new vector's expected length: the standard deviation of its elements times the square root of the dimension."""
    operator_init: Literal["identity", "random"] = "identity"
    """How operators start. `identity`: they leave vectors as they are. `random`: like the elements of a new vector
    (rotations by any angle); better where what a relation joins is unlike, as in knowledge graphs."""
    reciprocal: bool = False
    """Predict heads with operators of their own (reciprocal relations; Kazemi and Poole, 2018; Lacroix et al., 2018):
    the score of a head is that of the tail under its relation's second operator with the head."""
    regularization: Regularization = Regularization()
    """Penalty on what a step's edges use."""
    max_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Longer entity vectors are scaled down to this length; left out, any length."""
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the elements of entity vectors that training sets to 0 in each step (the others are scaled up)."""

    @field_validator("comparator")
    @classmethod
    def _known_comparator(cls, value: str) -> str:
        if value not in COMPARATOR_NAMES:
            raise ValueError(unknown("comparator", value, COMPARATOR_NAMES))
        return value

    @model_validator(mode="after")
    def _relations_fit(self) -> TwhinModelConfig:
        tables = [table.name for table in self.embeddings.tables]
        names = Counter(relation.name for relation in self.relations)
        for i, relation in enumerate(self.relations):
            if names[relation.name] > 1:
                raise ValueError(f"relations[{i}].name: two relations are named {relation.name!r}; rename one")
            for side in ("lhs", "rhs"):
                if getattr(relation, side) not in tables:
                    raise ValueError(f"relations[{i}].{side}: {unknown('table', getattr(relation, side), tables)}")
        used = {side for relation in self.relations for side in (relation.lhs, relation.rhs)}
        for name in tables:
            if name not in used:
                raise ValueError(f"table {name!r} is on no side of any relation; remove it or name it in a relation")
        if self.translation_optimizer.name in ("rowwise_adagrad", "rmsprop"):
            raise ValueError(
                f"translation_optimizer: {self.translation_optimizer.name} is for tables; use adagrad, adam or sgd"
            )
        return self

    def table(self, name: str) -> TableConfig:
        """Return the table of that name. Raises KeyError where there is none."""
        for table in self.embeddings.tables:
            if table.name == name:
                return table
        raise KeyError(unknown("table", name, self.table_names))

    @property
    def table_names(self) -> list[str]:
        """Entity types, in the configuration's order."""
        return [table.name for table in self.embeddings.tables]

    @property
    def relation_names(self) -> list[str]:
        """Relations, in the configuration's order; an edge's `rel` is an index into it."""
        return [relation.name for relation in self.relations]

    @property
    def every_other(self) -> Relation | None:
        """The entry that stands for the source's other relations; a resolved configuration has none."""
        return next((relation for relation in self.relations if relation.name == EVERY_OTHER), None)

    @property
    def embedding_dim(self) -> int:
        """Length of every vector."""
        return self.embeddings.tables[0].embedding_dim
