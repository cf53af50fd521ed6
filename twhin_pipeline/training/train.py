"""`python -m twhin_pipeline.training.train`: trains one snapshot, alone or as a rank under torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twhin_pipeline.training.rank_errors import end_if_mistaken, record_uncaught

if __name__ == "__main__":  # before anything that may fail to load
    record_uncaught()
    end_if_mistaken()

from twhin_pipeline.training.with_parent import die_with_parent

if __name__ == "__main__":  # before the seconds that imports take, in which a parent may die
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()

from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from twhin_pipeline.config import TwhinConfig, load_config, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.distributed import Ranks, process_group
from twhin_pipeline.store import Store
from twhin_pipeline.training.launch import CANCELLED_EXIT, TrainingCancelled, train_parser
from twhin_pipeline.training.reporting import make_reporter
from twhin_pipeline.training.trainer import Trainer

USER_ERROR_EXIT = 2
READ = (
    "training_set/positives", "training_set/negatives", "held_out/validation", "held_out/validation_negatives",
    "held_out/test",
)  # fmt: skip
"""Tables that training reads, besides vocabularies."""


def run(
    config: TwhinConfig, store: Store, snapshot: str, save_dir: str | None = None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train a snapshot in this process (a rank, where torchrun started it) and write the table `twhin_model`.

    Args:
        config: The configuration.
        store: Where the training set is and the model goes.
        snapshot: Which one.
        save_dir: Where checkpoints go, over `training.save_dir`.
        stop: Set it to stop at the next step.

    Returns:
        The details of the model's manifest.

    Raises:
        UserError: A mistake in configuration or data.
        TrainingCancelled: `stop` was set (on any rank), and a checkpoint was written.
    """
    stop = stop or threading.Event()
    recipe = relations.recipe(config, store, snapshot)
    with process_group(recipe.config) as ranks:
        try:
            reporter = make_reporter(ranks.rank)
            if ranks.world_size > 1:
                _same_everywhere(config, store, snapshot, ranks)
                store = agreed(config, store, snapshot, ranks)
                recipe = relations.recipe(config, store, snapshot)
            return Trainer(recipe.config, store, snapshot, ranks, reporter, save_dir, recipe).run(stop)
        except Exception as error:
            # Now, before this rank leaves: when it has left, the others fail of that, and the first error counts.
            get_error_handler().record_exception(error)
            raise


def agreed(config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> Store:
    """Return the store pinned to the versions that rank 0 reads, so that no rank sees a table that was made since.

    Args:
        config: Names the vocabularies.
        store: Where the tables are.
        snapshot: Which one.
        ranks: This process among the others; all call it together.
    """
    pinned = store.pinned()
    if ranks.rank == 0:
        for table in ("raw_edges", *READ, *(f"vocabulary/{name}" for name in config.model.table_names)):
            pinned.exists(table, snapshot)
    return store.pinned_at(ranks.broadcast(pinned.pins))


def _same_everywhere(config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> None:
    """Raise UserError on all ranks where one was started with something else than rank 0: nodes are started apart."""
    asked = ranks.gather({"configuration": config.hash(), "snapshot": snapshot, "store": store.root})
    for rank, one in enumerate(asked):
        for what, value in one.items():
            if value != asked[0][what]:
                raise UserError(
                    f"rank {rank} was started with another {what} than rank 0 ({value}, not {asked[0][what]}); give "
                    "each node the same file, --set, --snapshot and --home, but for launch.node_rank"
                )


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set. The second signal acts as usual."""
    stop = threading.Event()
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(number, previous[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@record
def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train. Exit code 2: a user's mistake; 75: stopped after a checkpoint."""
    parser = train_parser("twhin_pipeline.training.train", "Train one snapshot.")
    options = parser.parse_args(arguments)
    _quiet_libraries()
    try:
        with stop_on_signal() as stop:
            config = load_config(options.config, options.set)
            run(config, Store(options.home, options.view), options.snapshot, stop=stop)
    except UserError as error:
        _tell(error)
        sys.exit(USER_ERROR_EXIT)
    except TrainingCancelled as error:
        _tell(error)
        sys.exit(CANCELLED_EXIT)


def _quiet_libraries() -> None:
    """Leave out warnings of torch about its own insides, which a user can do nothing about."""
    warnings.filterwarnings("ignore", message=".*ShardedTensor.*", category=FutureWarning)
    # Checkpoints of one process alone; we tell torch so (`no_dist`).
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _tell(error: Exception) -> None:
    """Write the error where torchrun's parent finds it, or, without torchrun, to the terminal."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    elif not os.path.exists(os.environ["TORCHELASTIC_ERROR_FILE"]):
        get_error_handler().record_exception(error)


if __name__ == "__main__":
    main()
