"""Recipes: values for the fields that a configuration leaves out, chosen from the graph's schema and counts.

A configuration says what its graph is; how to train it well depends on the graph, and the recipe knows that. It looks
at the types that relations join, and at how many edges and entities there are, and sets every field of the model, the
negatives, the loss and the training loop that the file does not. A value in the file, or given by `--set`, always wins,
and the values that depend on it follow: a file that says `comparator: cosine` gets the temperature of a cosine.

`docs/how-to/choose-a-model.md` says what each recipe chooses, `docs/quality.md` what it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.store import Store

INTERACTIONS, GRAPH, NONE, AUTO = "interactions", "graph", "none", "auto"
DIMENSION = 64
"""Of users and items, unless more directions than that stand out of their edges; then it is twice as much."""
LARGE_TABLE = 2_000_000
"""Rows above which a table's optimizer keeps one number a row instead of one an element."""


@dataclass(frozen=True)
class AtFirst:
    """What the graph was when its vocabularies began. The dimension goes by it, and so stays while the graph grows:
    who reads vectors relies on it, and a training that starts from the previous model does too.
    """

    edges: int
    """All of them."""
    directions: Mapping[str, Mapping[str, int]]
    """What `graph.directions` counted, by type of heads and then of tails."""


@dataclass(frozen=True)
class Pairs:
    """How many edges of a relation join a pair that another relation between the same types joins too."""

    edges: int
    """All of the relation's."""
    shared: int
    """Those of such a pair."""
    late: int
    """Those of the latest tenth of all edges between the two types."""
    known: int
    """Those of them whose pair another relation joined before that tenth, or without a time."""


@dataclass(frozen=True)
class Counts:
    """What a recipe looks at: edges by relation, entities by type, and the relations none of whose edges has a time."""

    edges: Mapping[str, int]
    entities: Mapping[str, int]
    undated: frozenset[str] = frozenset()
    first: AtFirst | None = None
    """None: vocabularies that began with an earlier version do not say it."""
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    """What `graph.pairs` counted, by relation."""

    @classmethod
    def read(cls, config: TwhinConfig, store: Store, snapshot: str) -> Counts | None:
        """Read the counts of a snapshot; None where its edges or a vocabulary are not there yet."""
        vocabularies = {name: f"vocabulary/{name}" for name in config.model.table_names}
        if not all(store.exists(table, snapshot) for table in ("raw_edges", *vocabularies.values())):
            return None
        details = store.manifest("raw_edges", snapshot).details
        edges = details.get("edges_per_relation", {})
        dated: dict[bool, set[str]] = {True: set(), False: set()}
        for one in details.get("sources", []):
            # A store of an earlier version may not say it.
            dated[one.get("time_range", "") is not None].update(one.get("edges_per_relation", {}))
        manifests = {name: store.manifest(table, snapshot) for name, table in vocabularies.items()}
        entities = {name: manifest.rows for name, manifest in manifests.items()}
        of_relations = {name: int(edges.get(name, 0)) for name in config.model.relation_names}
        began = (manifest.details.get("first") for manifest in manifests.values())
        first = next((AtFirst(one["edges"], one["directions"]) for one in began if one is not None), None)
        counted: Mapping[str, Mapping[str, int]] = next(iter(manifests.values())).details.get("pairs", {})
        pairs = {name: Pairs(**one) for name, one in counted.items()}
        return cls(of_relations, entities, frozenset(dated[False] - dated[True]), first, pairs)

    @property
    def total(self) -> int:
        """All edges."""
        return sum(self.edges.values())

    @property
    def total_at_first(self) -> int:
        """All edges that the graph had when its vocabularies began."""
        return self.total if self.first is None else self.first.edges

    @property
    def degree(self) -> float:
        """Mean number of edges an entity has, both ends counted."""
        return 2 * self.total / max(sum(self.entities.values()), 1)


@dataclass(frozen=True)
class Value:
    """One field: its path as for `--set`, its value, whether the recipe chose it, and why."""

    path: str
    value: Any
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Recipe:
    """What a recipe came to. `name` is `none` where nothing was chosen."""

    name: str
    reason: str
    config: TwhinConfig
    values: list[Value] = field(default_factory=list)

    def as_details(self) -> dict[str, Any]:
        """Return the recipe as JSON values, for a manifest."""
        return {"name": self.name, "reason": self.reason, "values": [asdict(value) for value in self.values]}

    def lines(self) -> list[str]:
        """Return the recipe in a few lines, for the output of a run."""
        if self.name == NONE:
            return [f"recipe     none: {self.reason}"]
        model = self.config.model
        scores = f"{model.comparator}, dimension {model.embedding_dim}, {self.config.loss.name}"
        table = model.embeddings.tables[0].optimizer
        training = self.config.training
        lines = [
            f"recipe     {self.name}: {self.reason}",
            f"           {scores}, {table.name} at {table.algorithm.lr}, dropout {model.embedding_dropout}, "
            f"up to {training.num_epochs} epochs, best {training.selection_metric} of validation edges",
        ]
        kept = [value.path for value in self.values if not value.chosen]
        if kept:
            lines.append(f"           set by the configuration: {', '.join(kept)}")
        lines.append("           every value and its reason: twhin config --explain, with the same -c and --home")
        return lines

    def explanation(self) -> str:
        """Return every value with its reason, as YAML comments beside the fields' paths."""
        lines = [f"# recipe: {self.name}, because {self.reason}"]
        width = max((len(f"{value.path}={_text(value.value)}") for value in self.values), default=0)
        for value in self.values:
            lines.append(f"{f'{value.path}={_text(value.value)}':<{min(width, 60)}}  # {value.reason}")
        return "\n".join(lines) + "\n"


def apply(config: TwhinConfig, counts: Counts) -> Recipe:
    """Choose a recipe, unless `recipe` names one, and fill in the fields that the configuration leaves out.

    Args:
        config: A configuration whose relations are all listed.
        counts: Of the snapshot that is trained.

    Raises:
        UserError: The chosen values contradict the configuration's; names the fields.
    """
    values = _Values(config, counts)
    name, reason = _name_of(values)
    if name == NONE:
        return Recipe(NONE, reason, config)
    (_interactions if name == INTERACTIONS else _graph)(values)
    try:
        # The source stays as it is: it knows the folder that its path is relative to.
        chosen = TwhinConfig.model_validate({**values.data, **values.kept})
        return Recipe(name, reason, chosen, values.values)
    except ValueError as error:
        raise UserError(
            f"recipe {name}: its values contradict the configuration's: {' '.join(str(error).split())}; set these "
            "fields too, or recipe: none"
        ) from error


def _name_of(values: _Values) -> tuple[str, str]:
    """Return which recipe suits the graph, and why."""
    config, counts = values.config, values.counts
    if config.recipe == NONE:
        return NONE, "the configuration says so"
    if not config.all_sources:
        return NONE, "a configuration of the published system says everything itself"
    relations = config.model.relations
    same = sum(counts.edges[r.name] for r in relations if r.lhs == r.rhs) / max(counts.total, 1)
    result = (
        f"{len(relations)} relation{'s' if len(relations) > 1 else ''} over {len(counts.entities)} entity "
        f"type{'s' if len(counts.entities) > 1 else ''}, {counts.total:,} edges, {same:.0%} of them between "
        "entities of one type"
    )
    if config.recipe != AUTO:
        return config.recipe, f"the configuration says so ({result})"
    if same >= 0.5 and len(relations) == 1:
        return INTERACTIONS, f"the graph has {result}, and one relation says who is near whom and who is popular"
    if same >= 0.5 and (asked := values.share_asked_within_a_type()) < 0.5:
        return INTERACTIONS, f"the graph has {result}, but {asked:.0%} of those of relations that are held out"
    return (GRAPH if same >= 0.5 else INTERACTIONS), f"the graph has {result}"


class _Values:
    """The configuration as nested data, and what has been chosen so far."""

    def __init__(self, config: TwhinConfig, counts: Counts) -> None:
        self.config, self.counts = config, counts
        self.kept = {name: getattr(config, name) for name in ("source", "sources") if name in config.model_fields_set}
        self.data: dict[str, Any] = config.model_dump(exclude_unset=True, exclude={"source", "sources"})
        self.values: list[Value] = []

    @property
    def dim(self) -> int | None:
        """The dimension that the configuration says."""
        tables = self.data["model"]["embeddings"]["tables"]
        return next((table["embedding_dim"] for table in tables if "embedding_dim" in table), None)

    def get(self, path: str) -> Any:
        """Return the value in force: the file's, the recipe's, or the default."""
        node: Any = self.data
        keys = path.split(".")
        for key in keys:
            if not isinstance(node, dict) or key not in node:
                break
            node = node[key]
        else:
            return node
        value: Any = self.config
        for key in keys:
            value = getattr(value, key)
        return value

    def is_set(self, path: str) -> bool:
        """Tell whether the file, or the recipe, says this field."""
        node: Any = self.data
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return False
            node = node[key]
        return True

    def choose(self, path: str, value: Any, reason: str) -> Any:
        """Set a field, unless the file says it; return the value in force."""
        if self.is_set(path):
            held = self.get(path)
            if path not in {value.path for value in self.values}:
                self.values.append(Value(path, held, False, "set by the configuration"))
            return held
        node = self.data
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
        self.values.append(Value(path, value, True, reason))
        return value

    def choose_in_tables(self, field_: str, value: Any, reason: str) -> None:
        """Set a field of every table that does not say it."""
        self._choose_in(self.data["model"]["embeddings"]["tables"], "model.embeddings.tables", field_, value, reason)

    def choose_in_relations(self, field_: str, value: Any, reason: str) -> None:
        """Set a field of every relation that does not say it."""
        self._choose_in(self.data["model"]["relations"], "model.relations", field_, value, reason)

    def choose_in_unasked(self, field_: str, value: Any, reason: str) -> None:
        """Set a field of every relation within one entity type of which the split holds nothing out."""
        if unasked := [item for item in self._within_a_type() if not self._is_asked(item)]:
            self._choose_in(unasked, "model.relations", field_, value, reason)

    def asks_within_a_type(self) -> bool:
        """Tell whether the split holds out edges of a relation within one entity type."""
        return any(self._is_asked(item) for item in self._within_a_type())

    def _within_a_type(self) -> list[dict[str, Any]]:
        return [item for item in self.data["model"]["relations"] if item["lhs"] == item["rhs"]]

    def _is_asked(self, relation: Mapping[str, Any]) -> bool:
        """Tell whether the split holds edges of a relation out; one by time leaves those without a time in training."""
        requested = self.get("split.relations")
        if self._splits_by_time() and relation["name"] in self.counts.undated:
            return False
        return requested is None or relation["name"] in requested

    def _splits_by_time(self) -> bool:
        return self.get("split.strategy") == "temporal" and self.get("split.later_snapshot") is None

    def degree_asked(self) -> float:
        """Return the mean number of edges an entity has of the relations held out, both ends counted."""
        asked = sum(self.counts.edges[item["name"]] for item in self.data["model"]["relations"] if self._is_asked(item))
        return 2 * asked / max(sum(self.counts.entities.values()), 1)

    def share_asked_within_a_type(self) -> float:
        """Return how much of the edges of relations held out joins entities of one type; 1 where there are none."""
        asked = [item for item in self.data["model"]["relations"] if self._is_asked(item)]
        within = sum(self.counts.edges[item["name"]] for item in asked if item["lhs"] == item["rhs"])
        total = sum(self.counts.edges[item["name"]] for item in asked)
        return within / total if total else 1.0

    def known_share(self) -> float:
        """Return the share of the edges held out whose pair training knows by another relation, about."""
        asked = [item["name"] for item in self.data["model"]["relations"] if self._is_asked(item)]
        counted = [self.counts.pairs[name] for name in asked if name in self.counts.pairs]
        if self._splits_by_time():
            return sum(one.known for one in counted) / max(sum(one.late for one in counted), 1)
        return sum(one.shared for one in counted) / max(sum(one.edges for one in counted), 1)

    def directions(self) -> int:
        """Return the most directions that the edges of two types have, of whose relations some are held out."""
        counted = self.counts.first.directions if self.counts.first is not None else {}
        asked = (item for item in self.data["model"]["relations"] if self._is_asked(item))
        return max((counted.get(item["lhs"], {}).get(item["rhs"], 0) for item in asked), default=0)

    def alike(self) -> bool:
        """Tell whether several relations join the same two entity types."""
        pairs = [(item["lhs"], item["rhs"]) for item in self.data["model"]["relations"]]
        return len(set(pairs)) < len(pairs)

    def _choose_in(self, items: list[dict[str, Any]], path: str, field_: str, value: Any, reason: str) -> None:
        without = [item for item in items if field_ not in item]
        for item in without:
            item[field_] = value
        if len(without) < len(items):
            names = ", ".join(str(item["name"]) for item in items if item not in without)
            self.values.append(
                Value(f"{path}.*.{field_}", "as written", False, f"set by the configuration for {names}")
            )
        if without:
            all_of = self.data["model"]["relations"] if path == "model.relations" else items
            everywhere = "*" if len(without) == len(all_of) else ",".join(str(item["name"]) for item in without)
            self.values.append(Value(f"{path}.{everywhere}.{field_}", value, True, reason))


WORK = 1_300_000_000
"""Edges that training visits, times the dimension, where that makes fewer epochs than a recipe's most: 2 to 4 minutes
on 2 cores."""
FEWEST_EPOCHS, MOST_EPOCHS = 3, 30
FEWEST_STEPS, MOST_EPOCHS_OF_FEW_STEPS = 1_500, 120
"""Where `MOST_EPOCHS` are fewer steps, `interactions` trains more epochs, up to so many."""
MANY_EDGES = 10
"""Edges an entity, on average, from which vectors stand masks and the stronger dropout."""


def may_need_more(edges: int, entities: int = 0) -> bool:
    """Tell whether `interactions` would train a graph of this size in twice the dimension, if its edges ask for it."""
    return 2 * edges >= MANY_EDGES * entities and edges * 2 * DIMENSION * MOST_EPOCHS <= WORK


def may_need_memory(edges: int) -> bool:
    """Tell whether `interactions` would train so many edges with the stronger dropout, if their pairs let it."""
    return edges * DIMENSION * MOST_EPOCHS <= WORK


MANY_KNOWN = 0.2
"""The share of held-out edges known by another relation from which dropout would cost more than it gains."""
FEW_IN_ALL = 45_000
"""Edges in all below which the penalty grows with the root of how many fewer there are, up to three times."""
MOST_PENALTY = 0.3
"""Twice as much left nothing but popularity (docs/quality.md)."""
NEGATIVES = ("train_data.global_negatives", "train_data.in_batch_negatives", "train_data.sampled_per_step")


def _interactions(v: _Values) -> None:
    """Users and what they do with items, or one relation within a type, such as who follows whom.

    Compared by a product, in which popularity counts by a vector's length. Trained by RMSprop with a rate that decays
    to 0 (`sections/optimizer.py`), against a pool of uniform negatives whose scores `log_q` turns into an estimate of
    the softmax over all (Bengio and Senécal, 2008), with dropout and a penalty on the vectors, since most entities have
    few edges.

    Within a type a head is popular in another way than a tail: reciprocal translations `r`, `r'` score a tail by
    `h·t + r·t` and a head by `t·h + r'·h`, a symmetric product and a popularity for each side, and as they are not
    penalized, the penalty takes nothing of it. ComplEx of one relation has no such term, and its operator grows in
    place of the penalized vectors (docs/quality.md).
    """
    many = v.directions() > DIMENSION
    why = f"more than {DIMENSION} directions stand out of its edges" if many else "enough for its edges"
    comparator = _scorer(v, dim=2 * DIMENSION if many else DIMENSION, why=why)
    within = all(item["lhs"] == item["rhs"] for item in v.data["model"]["relations"])
    if v.asks_within_a_type():
        v.choose("model.reciprocal", True, "an entity may be popular as a tail and not as a head, or the reverse")
    _loss(v)
    v.choose("negatives.sides", "both", "predicting heads too is a second view of the same few edges")
    # As measured on graphs of 60,000 to 500,000 edges, where masks, more dropout and less of `follows` each help. On
    # Gowalla too few epochs are affordable for them, and at 3 edges an entity they lose (docs/quality.md).
    affordable = v.counts.total * (v.dim or DIMENSION) * MOST_EPOCHS <= WORK
    # Within a type both ends of an edge are of the one table.
    strong = affordable and (within or v.counts.degree >= MANY_EDGES)
    why = f"{v.counts.degree:.0f} edges an entity, {MOST_EPOCHS if affordable else 'fewer'} epochs"
    if strong:
        v.choose("negatives.mask", "known", f"what a user has need not compete for a place; {why}")
        # Where the edges asked for are fewer, the others are what tells most of an entity (docs/quality.md).
        if v.degree_asked() >= MANY_EDGES:
            v.choose_in_unasked("weight", 0.3, "nothing of it is held out: it informs, and is not what is asked for")
    else:
        v.choose("negatives.mask", "own", f"known items compete with those yet unknown; {why}")
    _pool(v, 1024)
    if comparator == "cosine":
        v.choose("model.embedding_dropout", 0.1, "vectors of few edges overfit")
    else:
        if strong and (known := v.known_share()) >= MANY_KNOWN:
            why = f"{known:.0%} of what is held out is known by another relation, which more would blur"
            v.choose("model.embedding_dropout", 0.2, why)
        else:
            v.choose("model.embedding_dropout", 0.5 if strong else 0.3, f"vectors of few edges overfit; {why}")
        # Of reciprocal operators a penalty would take the popularity.
        reciprocal = bool(v.get("model.reciprocal"))
        l2 = 0.02 if within else 0.1
        if strong and not within and not reciprocal:
            # What few edges say by chance is a larger share of what they say.
            l2 = round(min(0.05 * max(1.0, (FEW_IN_ALL / max(v.counts.total, 1)) ** 0.5), 0.15), 3)
        few = not within and v.counts.degree < MANY_EDGES
        if few:
            # Each edge penalizes its ends, so that fewer would hold a vector down less.
            l2 = round(min(l2 * MANY_EDGES / max(v.counts.degree, 1.0), MOST_PENALTY), 2)
        operators = l2 if v.alike() and not reciprocal and not few else 0.0
        _penalty(v, "l2", l2, operators, "relations that join the same types differ by few edges")
    rate = 0.004 if comparator == "cosine" else 0.01
    _optimizers(v, rate=rate, rows_rate=0.1, algorithm="rmsprop")
    metric = "filtered_mrr" if within else "recall@20"
    batch = _power_of_two(v.counts.total / 400, 500, 8_000)
    _loop(v, metric=metric, most_epochs=MOST_EPOCHS, batch=batch, fewest_steps=FEWEST_STEPS)


def _graph(v: _Values) -> None:
    """Several relations within an entity type: ComplEx, reciprocal, with the N3 penalty (Lacroix et al., 2018).

    Heads and tails are different questions there, and a relation may be symmetric, inverse to another, or neither.
    Penalty and dropout fall with the mean degree, as they do between the configurations tuned for WN18RR (degree 4),
    Debian's packages (16) and FB15k-237 (37).
    """
    dense = math.log2(max(v.counts.degree, 1.0)) - 2
    edges = v.counts.total_at_first
    dim = 512 if edges <= 200_000 else 256 if edges <= 2_000_000 else 128
    comparator = _scorer(v, dim=dim, why=f"enough for {edges:,} edges")
    v.choose_in_relations("operator", "complex_diagonal", "it expresses symmetric, antisymmetric and inverse relations")
    v.choose("model.operator_init", "random", "relations begin unlike each other")
    v.choose("model.reciprocal", True, "heads and tails are different questions")
    _loss(v)
    v.choose("negatives.mask", "own", "a query has many true answers, which compete with each other")
    many = len(v.counts.edges) > 20
    rate = 0.15 if dense >= 1 else 0.3
    if many:
        _step_sample(v, 1_000 if dense >= 1 else 4_000)
        v.choose("negatives.chunk_size", 50, "many relations, of which each chunk has one")
    else:
        _pool(v, 1024)
    if comparator != "cosine":
        n3 = round(min(0.15, max(0.01, 0.12 - 0.022 * dense)), 3)
        _penalty(v, "n3", n3, round(n3 / 2, 4), "half of the entities'")
    dropout = round(min(0.35, max(0.0, 0.35 - 0.094 * dense)), 2)
    v.choose("model.embedding_dropout", dropout, f"{v.counts.degree:.0f} edges an entity on average")
    _optimizers(v, rate=rate, rows_rate=0.1, algorithm="adagrad")
    small = many or v.counts.total <= 200_000
    if small and not many:
        v.choose("negatives.chunk_size", 250, "small chunks mix the relations of a step")
    _loop(v, metric="filtered_mrr", most_epochs=20, batch=500 if small else 2_000, patience=4)


def _scorer(v: _Values, dim: int, why: str) -> str:
    """Choose dimension and comparator, and what goes with it; return the comparator."""
    v.choose_in_tables("embedding_dim", dim, why)
    comparator = str(v.choose("model.comparator", "dot", "popularity is part of what is to be learned"))
    if comparator == "cosine":
        v.choose("model.temperature", 0.1, "cosines lie within 1 of 0, too close for a softmax at temperature 1")
    v.choose("model.init_scale", 0.1, "first vectors are soon forgotten")
    return comparator


def _loss(v: _Values) -> None:
    name = v.choose("loss.name", "softmax", "the order of candidates is what counts")
    if name in ("softmax", "bsl"):
        v.choose("loss.log_q", True, "scores then estimate the softmax over all entities")


def _pool(v: _Values, size: int) -> None:
    """Choose a pool of uniform negatives for each chunk, unless the configuration says where negatives come from."""
    if any(v.is_set(path) for path in NEGATIVES):
        return
    v.choose("train_data.global_negatives", size, "uniform negatives, shared by a chunk")
    v.choose("train_data.in_batch_negatives", 0, "negatives in proportion to popularity push popular entities down")
    v.choose("negatives.degree_share", 0.0, "uniform: log_q has nothing to correct but their number")


def _step_sample(v: _Values, size: int) -> None:
    """Choose a sample a step that stands for all entities, unless the configuration says where negatives come from."""
    if any(v.is_set(path) for path in NEGATIVES):
        return
    v.choose("train_data.global_negatives", "all", "every entity is a candidate")
    v.choose("train_data.sampled_per_step", size, "a sample of all, shared by the relations of a step")
    v.choose("train_data.in_batch_negatives", 0, "the sample stands for all of them")
    v.choose("negatives.degree_share", 0.5, "popular entities are the ones that compete for a place")
    v.choose("negatives.alpha", 1.0, "in proportion to their edges")


def _penalty(v: _Values, norm: str, entities: float, operators: float, why: str) -> None:
    if v.is_set("model.regularization"):
        return
    names = {"n3": "N3", "l2": "L2"}
    v.choose("model.regularization.norm", norm, f"{names[norm]}, by an edge's ends")
    v.choose("model.regularization.entities", entities, "holds down vectors of few edges")
    if operators:
        v.choose("model.regularization.operators", operators, why)


def _optimizers(v: _Values, *, rate: float, rows_rate: float, algorithm: str) -> None:
    """Choose the tables' and the operators' optimizers; `rate` is the algorithm's, `rows_rate` of one number a row."""
    ranks = v.get("launch.nproc_per_node") * v.get("launch.nnodes")
    schedule = "a rate that decays to 0"
    if max(v.counts.entities.values(), default=0) > LARGE_TABLE:
        algorithm, rate, why = "rowwise_adagrad", rows_rate, "large tables: one number of state a row"
    elif algorithm == "rmsprop" and ranks > 1:
        algorithm, rate, why = "adagrad", rows_rate, "rmsprop trains in one process"
    else:
        why = f"steps of rare entities stay large; {schedule}" if algorithm == "rmsprop" else schedule
    eps = {"adagrad": {"eps": 1e-10}}.get(algorithm, {})
    decay = {"learning_rate": {"linear_decay": {"learning_rate": rate}}}
    v.choose_in_tables("optimizer", {algorithm: {"lr": rate, **eps}, **decay}, why)
    operators: dict[str, Any] = {"adagrad": {"lr": 0.1, "eps": 1e-10}}
    if v.get("model.reciprocal") and algorithm == "adagrad":
        operators = {"adagrad": {"lr": rate, "eps": 1e-10}, **decay}
    v.choose("model.translation_optimizer", operators, "of the operators")


def _loop(
    v: _Values, *, metric: str, most_epochs: int, batch: int, patience: int | None = None, fewest_steps: int = 0
) -> None:
    """Choose the size of steps, epochs, and what is looked at when, by the number of steps in an epoch."""
    total = max(v.counts.total, 1)
    dim = v.data["model"]["embeddings"]["tables"][0]["embedding_dim"]
    affordable = WORK // (total * dim)
    batch = int(v.choose("train_data.per_replica_batch_size", batch, f"{total:,} edges"))
    v.choose("negatives.chunk_size", min(batch, 1_000), "edges that share their negatives")
    steps = max(1, math.ceil(total / batch))
    most = max(most_epochs, min(math.ceil(fewest_steps / steps), MOST_EPOCHS_OF_FEW_STEPS))
    fits = max(FEWEST_EPOCHS, min(most, affordable))
    epochs = int(v.choose("training.num_epochs", fits, f"{total:,} edges; the best one is kept"))
    v.choose("negatives.epochs", max(1, min(epochs, 5)), "pools of so many epochs are made and used again")
    v.choose("training.num_train_steps", 2 * (steps + len(v.counts.edges)) * epochs, "num_epochs ends training")
    v.choose("training.selection_metric", metric, "what the vectors are for")
    v.choose("training.num_eval_steps", 0, "sampled candidates would only repeat it")
    v.choose("training.eval_every_n_epochs", max(1, epochs // 10), "ten evaluations, or one an epoch")
    v.choose("training.eval_max_edges", 10_000, "validation edges that are ranked")
    if patience is not None:
        v.choose("training.early_stopping_patience", patience, "evaluations without a gain")
    v.choose("training.train_log_every_n", max(1, min(1_000, steps * epochs // 40)), "some forty lines")
    v.choose("training.checkpoint_every_n", max(1, min(1_000, steps)), "one an epoch, at least")
    v.choose("training.checkpoint_max_to_keep", 1, "the last one, and the best")
    if not v.is_set("validation_data"):
        v.choose("validation_data.global_negatives", 16, "nothing reads more")
        v.choose("validation_data.in_batch_negatives", 0, "nothing reads them")


def _power_of_two(value: float, least: int, most: int) -> int:
    """Return the number of the form `least` * 2^n that is nearest to `value` (by ratio), within the bounds."""
    doubled = round(math.log2(max(value, least) / least))
    return int(min(least * 2**doubled, most))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
