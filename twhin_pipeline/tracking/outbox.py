"""The outbox: what a tracking server could not take, in files beside the tables, until it is sent.

    <root>/tracking/<run id>.jsonl        one event a line, in their order
    <root>/tracking/sent.json             which MLflow run a run that began without a server has become

A store at a URL keeps its outbox in `.twhin/tracking` of the working directory, where its runs are too.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twhin_pipeline.store import Store

PREFIX = "unsent-"
"""Begins the id of a run that no tracking server knows yet."""
FOLDER, SENT = "tracking", "sent.json"
Event = dict[str, Any]


def folder(store: Store) -> Path:
    """Return where the outbox of a store is."""
    return Path(store.root if store.is_local else ".twhin").absolute() / FOLDER


def new_id() -> str:
    """Return an id for a run that no tracking server knows yet."""
    return f"{PREFIX}{uuid.uuid4().hex}"


def resolved(store: Store, run_id: str) -> str:
    """Return the MLflow run that a run has become, or the same id where it has not been sent."""
    return str(_sent(store).get(run_id, run_id)) if run_id.startswith(PREFIX) else run_id


def add(store: Store, run_id: str, event: Event) -> None:
    """Add an event. Raises OSError where it cannot be written."""
    place = folder(store)
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{run_id}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def waiting(store: Store) -> list[str]:
    """List the runs that have events to send, oldest first."""
    place = folder(store)
    files = sorted(place.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns) if place.is_dir() else []
    return [path.stem for path in files]


def events(store: Store, run_id: str) -> Iterator[Event]:
    """Yield a run's events; a last line that was cut off is left out."""
    path = folder(store) / f"{run_id}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def note(store: Store, run_id: str, became: str) -> None:
    """Note which MLflow run a run has become."""
    place = folder(store)
    draft = place / f"{SENT}.{os.getpid()}"
    draft.write_text(json.dumps({**_sent(store), run_id: became}, indent=1), encoding="utf-8")
    os.replace(draft, place / SENT)


def remove(store: Store, run_id: str) -> None:
    """Remove a run's events, which have been sent."""
    (folder(store) / f"{run_id}.jsonl").unlink()


def _sent(store: Store) -> dict[str, str]:
    try:
        result: dict[str, str] = json.loads((folder(store) / SENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return result
