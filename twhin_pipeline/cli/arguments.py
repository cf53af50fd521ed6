"""Options that several commands share, and what they stand for: a configuration, a store, a snapshot, a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.stages.run import Run
    from twhin_pipeline.store import Store

ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        envvar="TWHIN_CONFIG",
        help="YAML file, or the name of a bundled one, such as debian; default: the only one in this folder.",
    ),
]
Home = Annotated[
    str | None, typer.Option("--home", envvar="TWHIN_HOME", help="The store: a folder or URL; default: .twhin.")
]
Snapshot = Annotated[str | None, typer.Option("--snapshot", "-s", help="YYYY-MM-DD; default: the newest there is.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field by its path, such as training.num_epochs=3.")
]
NoTracking = Annotated[
    bool,
    typer.Option("--no-tracking", envvar="TWHIN_NO_TRACKING", help="Track nothing in MLflow."),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def untracked(no_tracking: bool) -> None:
    """Track nothing in this process and in those that it starts, if so asked."""
    if no_tracking:
        os.environ["TWHIN_NO_TRACKING"] = "1"


def to_stderr(message: str) -> None:
    """Print a line for people on standard error."""
    print(f"twhin: {message}", file=sys.stderr)


def read_config(path: str | None, overrides: list[str] | None, store: Store | None = None) -> tuple[TwhinConfig, str]:
    """Return the configuration and its file. Raises UserError as `configuration_file.choose` and `load_config` do."""
    from twhin_pipeline.config import configuration_file, load_config

    file, was_searched = configuration_file.choose(path, store)
    if was_searched:
        to_stderr(f"note: configuration {file}, the only one in this folder")
    return load_config(file, overrides or ()), file


def open_store(home: str | None) -> Store:
    """Return the store. Raises UserError where `home` is no folder or URL of one."""
    from twhin_pipeline.store import Store

    try:
        return Store(home)
    except (ValueError, ImportError) as error:
        raise UserError(f"--home {home}: is no folder or URL of a store ({error})") from error


def newest_table(store: Store, asset: str) -> str:
    """Return the newest snapshot of a table. Raises UserError where there is none."""
    return _newest(store, asset, store.snapshots(asset))


def newest_made(store: Store, asset: str) -> str:
    """Return the newest snapshot of a table, also where a check refused it. Raises UserError where there is none."""
    return _newest(store, asset, store.snapshots_made(asset))


def _newest(store: Store, asset: str, snapshots: list[str]) -> str:
    if not snapshots:
        raise UserError(f"{store.root}: there is no {asset} yet; make one with `twhin run`, or pass --home")
    return snapshots[-1]


def make_run(
    config: str | None, home: str | None, snapshot: str | None, overrides: list[str] | None
) -> tuple[Run, str]:
    """Return a run, and a line about what it reads and writes."""
    from twhin_pipeline.graph.source import check_snapshot
    from twhin_pipeline.stages.run import Run

    store = open_store(home)
    loaded, path = read_config(config, overrides, store)
    choice = ""
    if snapshot is None:
        snapshot, choice = _newest_snapshot(loaded)
    check_snapshot(snapshot)
    line = f"configuration {path}, snapshot {snapshot}{choice}, store {store.root}"
    return Run(loaded, path, overrides or [], store, snapshot), line


def _newest_snapshot(config: TwhinConfig) -> tuple[str, str]:
    """Return the newest snapshot, and in parentheses how it was chosen."""
    from twhin_pipeline.graph import source

    snapshots = source.find_snapshots(config)
    newest = snapshots[-1] if snapshots else source.newest_snapshot(config)  # which raises
    if not any(one.snapshots is not None or "{snapshot}" in (one.path or "") for one in config.all_sources):
        return newest, " (the day of the newest file)"
    return newest, f" (the newest of {len(snapshots)})" if len(snapshots) > 1 else " (the only one)"


@contextmanager
def remembered(run: Run) -> Iterator[None]:
    """Write into the store which configuration its tables were made by, also where a later stage failed."""
    from twhin_pipeline.config import configuration_file

    try:
        yield
    finally:
        # A node that joins another's training may have the file elsewhere.
        if not run.config.launch.node_rank and run.store.exists("raw_edges", run.snapshot):
            configuration_file.remember(run.store, run.config_path)
