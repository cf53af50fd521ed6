"""Edges that happen again: how well the model finds the pairs of training that occur once more in the test's time.

They are measured apart from the test, whose edges are new: what a user did before is the easiest guess of what comes
next, and mixing the two would hide how good the model is at either. Known pairs are candidates here, and none is left
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.baselines import read_degrees
from twhin_pipeline.evaluation.held_out import Questions, read_edges, some_heads
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts
from twhin_pipeline.evaluation.results import SCHEMA
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.store import Store, database
from twhin_pipeline.words import REPEATS


def parents(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, str]:
    """Return the version of the table that `measure` reads. Raises UserError where it is asked for and not there."""
    return store.versions(snapshot, [REPEATS]) if config.split.repeats else {}


def measure(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    scores: Sequence[RelationScores],
    catalogue: Mapping[str, CandidateSet],
) -> pa.Table:
    """Return rows of the table `evaluation`: `repeat_recall@k` and `repeat_ndcg@k`, by relation and of all together.

    A head's tails that happen again are ranked among all candidates of their type. The baseline ranks by degree.

    Args:
        config: Its `split.repeats` asks for them; `evaluation` says how many, and k.
        store: Has `held_out/repeats` and `training_set/positives`.
        snapshot: Of these.
        scores: Of each relation, in the model's order.
        catalogue: By entity type, the candidates.
    """
    options = config.evaluation
    if not config.split.repeats or not options.recall_at:
        return SCHEMA.empty_table()
    ranked: list[tuple[str, np.ndarray, Counts, Counts]] = []
    with database.connect(config, store) as con:
        every = read_edges(con, store.files(REPEATS, snapshot), len(scores))
        by_relation = {rel: edges for rel, edges in enumerate(every) if len(edges["lhs"])}
        train = store.files("training_set/positives", snapshot)
        degrees = read_degrees(con, train, "rhs", by_relation) if by_relation else {}
    for rel, edges in by_relation.items():
        relation = config.model.relations[rel]
        size = scores[rel].num_entities("rhs")
        rng = np.random.default_rng([options.seed, rel])
        questions = Questions.of("rhs", some_heads(edges, options.max_edges, rng), catalogue[relation.rhs], [])
        (of_model,) = questions.rank(scores[rel], options.block_size)
        (of_popularity,) = questions.popular(degrees[rel].of_all(size))
        ranked.append((relation.name, questions.queries, of_model, of_popularity))
    rows = []
    for name, group in [*((one[0], [one]) for one in ranked), *([("all", ranked)] if ranked else [])]:
        query = distinct(queries for _, queries, _, _ in group)
        of_model, of_popularity = joined([one[2] for one in group]), joined([one[3] for one in group])
        value, baseline = (retrieval_metrics(query, counts, options.recall_at) for counts in (of_model, of_popularity))
        rows += [
            {"relation": name, "side": "rhs", "metric": f"repeat_{metric}", "value": value[metric],
             "baseline": baseline[metric], "edges": len(query)}
            for metric in value
        ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)
