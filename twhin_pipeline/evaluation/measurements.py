"""What evaluation measures of one relation's test edges, before it is summed up in metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from twhin_pipeline.evaluation.held_out import Edges
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.words import SIDES, Side


@dataclass(frozen=True)
class Scored:
    """What one scorer (the model, or popularity) makes of the test edges of one relation and side.

    `raw` and `filtered` rank them; `positive` `[E]` and `negative` `[M]` are scores of edges and of sampled ones.
    """

    raw: np.ndarray
    filtered: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """Where the tails of E test edges are in the whole catalogue less the tails that their heads are known to have."""

    edges: Edges
    model: Counts
    baseline: Counts


@dataclass(frozen=True)
class Ranks:
    """Filtered ranks of test edges by side, float64 `[E]` each, and where their tails are in the whole catalogue."""

    filtered: dict[Side, np.ndarray]
    retrieved: Counts | None


@dataclass(frozen=True)
class Compared:
    """What the model and the further baselines make of the same test edges of a relation.

    `edges` is their number, `heads` int64 `[P]` the heads of those that are retrieved, and `ranks` has `compared` (the
    model) and each baseline that was fitted.
    """

    edges: int
    heads: np.ndarray
    ranks: dict[str, Ranks]


@dataclass
class Measured:
    """One relation's test edges and what is measured of them: by side, and as retrieval where that is asked for.

    `held_out` are all of its test edges, and `chosen` those that are ranked; `rng` draws these, then what each side
    needs, then retrieval's.
    """

    name: str
    scores: RelationScores
    held_out: Edges
    chosen: Edges
    rng: np.random.Generator
    present: dict[Side, np.ndarray | None] = field(default_factory=lambda: dict.fromkeys(SIDES))
    """By side, the rows that may be candidates, int64 `[P]`; None: all."""
    candidates: dict[Side, CandidateSet] = field(default_factory=dict)
    model: dict[Side, Scored] = field(default_factory=dict)
    baseline: dict[Side, Scored] = field(default_factory=dict)
    retrieved: Retrieved | None = None
    compared: Compared | None = None

    def catalogue(self, side: Side) -> CandidateSet:
        """Return all entities that may be candidates."""
        return CandidateSet(self.scores.num_entities(side), self.present[side])

    @property
    def edges(self) -> int:
        """How many are ranked."""
        return len(self.chosen["lhs"])

    @property
    def retrieves_ranked(self) -> bool:
        """Whether retrieval is of the ranked edges, and against the same candidates: all of the catalogue."""
        everything = not self.candidates["rhs"].sampled
        return everything and self.retrieved is not None and self.retrieved.edges is self.chosen
