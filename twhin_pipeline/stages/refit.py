"""Refit: the model that is published is trained once more, on all edges, held-out ones included.

Evaluation needs edges that training has not seen, so the evaluated model has not learned from the newest ones: under a
split by time, an entity that is new in the last days would be published with a vector that was never trained. So after
the evaluation the same configuration is trained from the beginning on every edge, for as many epochs as validation
chose. That model is exported; the evaluation is that of the one before it, of which it is the same recipe on more data.

Its training set and the model are in a view of the store (`store.VIEWS`), below `refit/`; the stage is in `chain.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.store import Manifest, Store

if TYPE_CHECKING:
    from twhin_pipeline.stages.run import Run

VIEW = "refit"
TABLE = "refit/twhin_model"
HELD_OUT = ("held_out/validation", "held_out/test")


def is_in_chain(config: TwhinConfig) -> bool:
    """Tell whether a configuration's chain has this stage."""
    return config.training.refit and bool(config.all_sources)


def reason_against(config: TwhinConfig, store: Store, snapshot: str) -> str | None:
    """Return why a snapshot's model is not trained once more, or None where it is."""
    if not config.training.refit:
        return "training.refit is false"
    if not config.all_sources:
        return "the configuration is one of the published system, which has no such step"
    if not any(store.exists(table, snapshot) and store.manifest(table, snapshot).rows for table in HELD_OUT):
        return "no edge was held out, so the model has seen all of them"
    return None


def overrides(store: Store, snapshot: str) -> list[str]:
    """Return what to set over the configuration that trained `twhin_model`: no edge held out, the chosen epochs."""
    epochs = max(1, int(store.manifest("twhin_model", snapshot).details["chosen_epoch"]))
    return [
        "split={strategy: random, validation: 0, test: 0}",
        f"training.num_epochs={epochs}",
        # Nothing is evaluated, so nothing may be waited for.
        "training.early_stopping_patience=null",
    ]


def prepare(run: Run) -> tuple[Run, dict[str, Manifest]]:
    """Make the training set of all edges; return the run that trains on it, in the view, and the tables.

    Raises:
        UserError: There is no trained model yet, or a table is missing.
    """
    from twhin_pipeline.stages import engine

    prepared = training_run(run)
    config, store = prepared.config, prepared.store
    engine.sample(config, store, run.snapshot)
    made = {
        table: store.manifest(table, run.snapshot) for table in ("training_set/positives", "training_set/negatives")
    }
    return prepared, made


def training_run(run: Run) -> Run:
    """Return the run that trains on all edges, in the view. Raises UserError where there is no trained model yet."""
    from twhin_pipeline.config import relations

    store = run.store.seen_as(VIEW)
    more = [*run.overrides, *overrides(run.store, run.snapshot)]
    config = relations.resolve(load_config(run.config_path, more), run.store, run.snapshot)
    return replace(run, config=config, overrides=more, store=store)


def published(config: TwhinConfig, store: Store, snapshot: str) -> Store:
    """Return the store, or its view, whose `twhin_model` is the one to export.

    Raises:
        UserError: It should have been trained once more and was not, or `twhin_model` was trained anew since.
    """
    if reason_against(config, store, snapshot) is not None:
        return store
    view = store.seen_as(VIEW)
    view.refuse_stale(snapshot, ["twhin_model"])
    view.manifest("twhin_model", snapshot)
    return view
