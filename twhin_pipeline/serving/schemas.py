"""What requests ask and responses say. OpenAPI is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema


def _id(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("an id is a string or an integer")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("an id has half a Unicode character") from None
    return value


Id = Annotated[int | str, PlainValidator(_id), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]})]
"""An id as the data has it. An integer may come as text."""
Exclude = bool | Literal["any"]
Count = Annotated[int, Field(ge=1, description="How many results; fewer come where there are no more.")]
Relation = Annotated[
    str | None, Field(description="The relation; may be left out where the model has only one.", examples=["buy"])
]
Entity = Annotated[str, Field(description="The entity type.", examples=["product"])]
Untrained = Annotated[bool, Field(description="Entities without training edges too: their vectors say nothing.")]
ExcludeKnown = Annotated[
    Exclude,
    Field(
        description="Leave out the tails that the head has by the relation in the release's edges; `any`: by any "
        "relation between the same two entity types."
    ),
]


Missing = Annotated[
    Literal["error", "skip", "infer"],
    Field(
        description="What happens to ids that have no vector. `error`: the request gets 404. `skip`: they are left out "
        "of the results, and listed in `missing`. `infer`: their vectors are made from `edges`."
    ),
]
NewEdges = Annotated[
    dict[str, list[tuple[str, Id]]] | None,
    Field(
        description="For `infer`: by new id its edges to known ids, each a relation and the other id. The new id is "
        "the head where the relation's heads are of its type.",
        examples=[{"u_new": [["buy", "SKU-00012"], ["view", "SKU-00007"]]}],
    ),
]


Search = Annotated[
    Literal["auto", "exact", "index"],
    Field(description="Compare all, or search by an index; `auto`: where there is one."),
]
ManyInterests = Annotated[
    bool, Field(description="Search by several vectors a head, one for each kind of tail that it engaged with.")
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _New(_Request):
    missing: Missing = "error"
    edges: NewEdges = None


class RecommendOne(_Request):
    """Recommendations for one head."""

    id: Annotated[str, Field(description="The head.", examples=["u_000042"])]
    relation: Relation = None
    k: Count = 10
    exclude_known: ExcludeKnown = True
    exclude: Annotated[list[str], Field(description="Tails to leave out; may be repeated.")] = []
    untrained: Untrained = False
    interests: ManyInterests = False
    search: Search = "auto"


class RecommendMany(_New):
    """Recommendations for several heads."""

    ids: Annotated[list[Id], Field(description="The heads.", min_length=1, examples=[["u_000042", "u_000007"]])]
    relation: Relation = None
    k: Count = 10
    exclude_known: ExcludeKnown = True
    exclude: Annotated[list[Id], Field(description="Tails to leave out of every head's results.")] = []
    untrained: Untrained = False
    interests: ManyInterests = False
    search: Search = "auto"


class NeighborsOne(_Request):
    """Neighbors of one entity."""

    entity: Entity
    id: Annotated[str, Field(description="The entity's id.", examples=["SKU-00012"])]
    k: Count = 10
    untrained: Untrained = False
    search: Search = "auto"


class NeighborsMany(_New):
    """Neighbors of several entities of a type."""

    entity: Entity
    ids: Annotated[list[Id], Field(description="The entities' ids.", min_length=1, examples=[["SKU-00012"]])]
    k: Count = 10
    untrained: Untrained = False
    search: Search = "auto"


class ScoreOne(_Request):
    """The probability of one edge."""

    lhs: Annotated[str, Field(description="The head.", examples=["u_000042"])]
    rhs: Annotated[str, Field(description="The tail.", examples=["SKU-00012"])]
    relation: Relation = None


class ScoreMany(_Request):
    """The probabilities of edges: heads and tails one to one, or one of a side with all of the other side's."""

    lhs: Annotated[list[Id], Field(description="The heads.", min_length=1, examples=[["u_000042"]])]
    rhs: Annotated[list[Id], Field(description="The tails.", min_length=1, examples=[["SKU-00012", "SKU-00007"]])]
    relation: Relation = None


class EmbeddingOne(_Request):
    """The vector of one entity."""

    entity: Entity
    id: Annotated[str, Field(description="The entity's id.", examples=["SKU-00012"])]


class EmbeddingMany(_New):
    """The vectors of several entities of a type."""

    entity: Entity
    ids: Annotated[list[Id], Field(description="The entities' ids.", min_length=1, examples=[["SKU-00012"]])]


class _Answer(BaseModel):
    release: Annotated[
        str, Field(description="The release that answered.", examples=["2025-08-09-20250809T060102123456"])
    ]
    snapshot: Annotated[str, Field(description="The release's snapshot.", examples=["2025-08-09"])]


class _Found(_Answer):
    missing: Annotated[list[Id], Field(description="With `skip`, the ids that have no vector; they have no result.")]


class Tail(BaseModel):
    """A recommended tail."""

    id: Id
    score: Annotated[float, Field(description="The model's score; higher is better.")]
    probability: Annotated[
        float | None,
        Field(
            description="That the head has the relation to it, as of `/score`; null: the relation is not calibrated."
        ),
    ]


class TailsOf(BaseModel):
    """The best tails of a head, the best first."""

    id: Id
    tails: list[Tail]


class Recommendations(_Found):
    """Recommendations, in the order of the heads."""

    relation: str
    results: list[TailsOf]


class Neighbor(BaseModel):
    """A near entity."""

    id: Id
    similarity: Annotated[float, Field(description="The cosine of the two vectors.")]


class NeighborsOf(BaseModel):
    """The nearest entities of an entity, the nearest first."""

    id: Id
    neighbors: list[Neighbor]


class Neighbors(_Found):
    """Neighbors, in the order of the ids."""

    entity: str
    results: list[NeighborsOf]


class Probabilities(_Answer):
    """Probabilities, in the order of the edges."""

    relation: str
    probabilities: list[float]


class Embeddings(_Found):
    """Vectors, in the order of the ids."""

    entity: str
    embeddings: list[list[float]]


class Health(BaseModel):
    """The process is alive."""

    status: Literal["alive"]


class Unopened(BaseModel):
    """The release that should be in use and could not be opened."""

    release: Annotated[str | None, Field(description="None: it is not known which one is current.")]
    reason: str


class Readiness(BaseModel):
    """Whether this worker can answer, and from which release."""

    ready: bool
    release: str | None
    snapshot: str | None
    since: Annotated[str | None, Field(description="When it was opened, ISO 8601 in UTC.")]
    failed: Annotated[
        Unopened | None, Field(description="The current release, where it could not be opened; `release` goes on.")
    ]


class Error(BaseModel):
    """What was wrong, and what to do."""

    error: Annotated[str, Field(examples=["no user has the id 'u_00042'; nearest: 'u_000042', 'u_000422'"])]
