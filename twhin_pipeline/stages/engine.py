"""The engine that prepares the data, as the configuration's `engine` says: the one place where the two part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store


def ingest(config: TwhinConfig, store: Store, snapshot: str) -> None:
    """Write `raw_edges` and `raw_edges_rejected`."""
    if config.engine.name == "spark":
        from twhin_pipeline.spark import edges

        edges.ingest(config, store, snapshot)
        return
    from twhin_pipeline.graph import raw_edges

    raw_edges.ingest(config, store, snapshot)


def vocabulary(config: TwhinConfig, store: Store, snapshot: str, *, compact: bool = False) -> None:
    """Write `vocabulary/<entity>`; `compact`: without the rows of those that were evicted."""
    if config.engine.name == "spark":
        from twhin_pipeline.spark import vocabulary as on_spark

        on_spark.build(config, store, snapshot, compact=compact)
        return
    from twhin_pipeline.graph import vocabulary as numbering

    numbering.build(config, store, snapshot, compact=compact)


def sample(config: TwhinConfig, store: Store, snapshot: str) -> None:
    """Write the training set and what is held out."""
    if config.engine.name == "spark":
        from twhin_pipeline.spark import examples, session
        from twhin_pipeline.spark import negatives as on_spark

        with session.session(config):  # one for both
            examples.build(config, store, snapshot)
            on_spark.build(config, store, snapshot)
        return
    from twhin_pipeline.training_set import negatives, positives

    positives.build_positives(config, store, snapshot)
    negatives.build(config, store, snapshot)
