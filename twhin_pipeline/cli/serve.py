"""The command that answers requests."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from twhin_pipeline import extras
from twhin_pipeline.cli.arguments import Home, open_store

commands = typer.Typer()


@commands.command(rich_help_panel="Use")
def serve(
    home: Home = None,
    host: Annotated[
        str, typer.Option(help="The address; another than this machine's own needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port; 0: one that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes; they share the vectors in memory.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a process that compute; default: cores divided by workers.")
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.05, help="Seconds between two looks at which release is current.")
    ] = 2.0,
    api_key_file: Annotated[
        str | None, typer.Option(help="A file with API keys, one a line; default: the key in TWHIN_API_KEY.")
    ] = None,
    max_k: Annotated[int, typer.Option(min=1, help="Results for one id at most.")] = 1_000,
    max_batch: Annotated[int, typer.Option(min=1, help="Ids of one request at most.")] = 1_000,
    max_results: Annotated[int, typer.Option(min=1, help="Results of one request at most, ids times k.")] = 100_000,
    max_body: Annotated[int, typer.Option(min=1_000, help="Bytes of a request's body at most.")] = 1 << 20,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 10.0,
    interests: Annotated[
        bool, typer.Option("--interests", help="Let recommendations be asked for by many interests.")
    ] = False,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request, without ids.")] = True,
) -> None:
    """Answer recommendations, neighbors, probabilities and vectors over HTTP.

    It answers from the current release, and changes to the next one without dropping a request.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        extras.need(package, "this command")
    from twhin_pipeline.serving.options import ServeOptions
    from twhin_pipeline.serving.server import serve as run_service

    run_service(
        ServeOptions(
            home=open_store(home).root,
            host=host,
            port=port,
            workers=workers,
            threads=threads or max(1, (os.cpu_count() or 1) // workers),
            interval=interval,
            api_key_file=api_key_file,
            max_k=max_k,
            max_batch=max_batch,
            max_results=max_results,
            max_body=max_body,
            time_limit=time_limit,
            interests=interests,
            access_log=access_log,
        )
    )
