"""Commands around a run: is everything installed, will it fit, how fast will it be, and MLflow's pages."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from twhin_pipeline.cli.arguments import (
    AsJson,
    ConfigPath,
    Home,
    Overrides,
    Snapshot,
    make_run,
    open_store,
    read_config,
    remembered,
)
from twhin_pipeline.errors import UserError

commands = typer.Typer()


@commands.command("plan", rich_help_panel="Operate")
def plan_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks; default: launch.nproc_per_node x launch.nnodes.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", help="Rows of a table, such as package=70000; repeatable."),
    ] = None,
    edges: Annotated[int | None, typer.Option(min=1, help="Training edges; default: the store's, if known.")] = None,
    rates_file: Annotated[
        str | None, typer.Option("--rates", help="A file of rates, as `twhin rates` writes it: for the time of a step.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a training run: memory, traffic, disk.

    With --rates it estimates the speed too.
    """
    from twhin_pipeline.config import load_config, relations
    from twhin_pipeline.operations import plan, rates
    from twhin_pipeline.views import console

    store = open_store(home)
    loaded, path = read_config(config, overrides, store)
    if world_size is not None and loaded.launch.nnodes == 1:  # a recipe's optimizer depends on the number of ranks
        loaded = load_config(path, [*(overrides or []), f"launch.nproc_per_node={world_size}"])
    snapshots = store.snapshots(f"vocabulary/{loaded.model.table_names[0]}")
    snapshot = snapshot or (snapshots[-1] if snapshots else None)
    if snapshot is not None and store.exists("raw_edges", snapshot):
        loaded = relations.resolve(loaded, store, snapshot)
    sizes = plan.table_rows(loaded, store, snapshot, plan.parse_rows(rows or []))
    ranks = world_size or loaded.launch.nproc_per_node * loaded.launch.nnodes
    speeds = None if rates_file is None else rates.load(rates_file)
    estimate = plan.estimate(loaded, sizes, ranks, edges or plan.training_edges(store, snapshot), speeds)
    if as_json:
        console.print_json(estimate.as_dict())
    else:
        console.print_plan(estimate)


@commands.command("rates", rich_help_panel="Operate")
def rates_command(
    out: Annotated[str, typer.Argument(help="The file to write (YAML), for `twhin plan --rates`.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> None:
    """Measure this machine's speed, for `twhin plan --rates`.

    It takes seconds. launch.nproc_per_node says how many ranks work at the same time. The rest of the configuration
    says how large a training step is.
    """
    from twhin_pipeline.operations import rates

    loaded, path = read_config(config, overrides)
    for name, rate in rates.measured(loaded, path, overrides or [], out).model_dump(exclude_none=True).items():
        print(f"{name}: {rate}")


@commands.command("compact", rich_help_panel="Operate")
def compact_command(
    config: ConfigPath = None, snapshot: Snapshot = None, home: Home = None, overrides: Overrides = None
) -> None:
    """Make a snapshot's vocabularies without the rows of evicted ids.

    In place of `twhin vocabulary`, after `twhin ingest`. All other ids get new rows, in the same order; the column
    `row_before` has the rows that they had. Later snapshots grow from these.
    """
    from twhin_pipeline.stages import chain

    run, line = make_run(config, home, snapshot, overrides)
    print(line)
    with remembered(run):
        made = chain.run_stage(run, chain.COMPACTION, print)
    for table, manifest in made.items():
        left_out = manifest.details["left_out"]
        print(f"  {table}: {manifest.rows:,} rows, {left_out:,} rows of evicted ids left out")


@commands.command("doctor", rich_help_panel="Operate")
def doctor_command(
    config: ConfigPath = None, home: Home = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Check that everything is installed and works.

    With a configuration, the scheduler that launch.kind names is looked at too.
    The exit code is 1 where something is wrong; its line ends in the remedy.
    """
    from dataclasses import asdict

    from twhin_pipeline.operations import doctor
    from twhin_pipeline.views import console

    launch = None if config is None and not overrides else read_config(config, overrides)[0].launch
    findings = doctor.examine(open_store(home), launch)
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        console.print_findings(findings)
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(1)


@commands.command("track", rich_help_panel="Operate")
def track_command(
    home: Home = None,
    send: Annotated[bool, typer.Option("--send", help="Send them now.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the runs that MLflow has not taken yet, or send them to it.

    While MLflow is away, training goes on, and what it would have logged is kept in the store.
    """
    from twhin_pipeline import tracking
    from twhin_pipeline.tracking import outbox
    from twhin_pipeline.views import console

    store = open_store(home)
    waiting = outbox.waiting(store)
    lines: list[dict[str, Any]] = []
    for run_id in waiting:
        if send:
            try:
                became = tracking.send(store, run_id)
            except Exception as error:
                raise UserError(
                    f"MLflow at {tracking.uri(store)} does not take run {run_id} ({tracking.reason(error)}); it "
                    f"is kept in {outbox.folder(store)}; try again when MLflow is there, or set MLFLOW_TRACKING_URI to "
                    "another"
                ) from error
            lines.append({"run": run_id, "sent_as": became})
        else:
            lines.append({"run": run_id, "events": sum(1 for _ in outbox.events(store, run_id))})
    if as_json:
        console.print_json(lines)
    elif not lines:
        print(f"MLflow has taken all runs of {store.root}")
    else:
        console.print_table(list(lines[0]), [list(line.values()) for line in lines])


@commands.command(rich_help_panel="Operate")
def mlflow(
    home: Home = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
) -> None:
    """Serve MLflow's pages about the store's runs."""
    import os

    from twhin_pipeline import extras, tracking

    extras.need("mlflow", "this command")
    store = open_store(home)
    uri = tracking.uri(store)
    if uri.startswith(("http://", "https://", "databricks")):
        raise UserError(f"runs are tracked at {uri}: open that page, or unset MLFLOW_TRACKING_URI for the store's own")
    print(f"MLflow: http://{host}:{port} on {uri} (ctrl-c ends it)", flush=True)
    # MLflow's telemetry is not ours to send, and its job runners (seven processes) have nothing to do here.
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")):
        os.environ.setdefault(name, value)
    arguments = ["ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])
