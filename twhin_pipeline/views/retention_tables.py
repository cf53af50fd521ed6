"""What retention removes and keeps, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from twhin_pipeline.lifecycle.removal import Outcome
from twhin_pipeline.lifecycle.retention import Item, Plan
from twhin_pipeline.views import console

GOES = ("what", "table", "snapshots", "how many", "bytes", "why")
STAYS = ("what stays", "how many", "bytes")


def gone(items: Iterable[Item]) -> list[Sequence[Any]]:
    """Return a row for each kind, table and reason: first and last snapshot, how many, and their bytes."""
    groups: dict[tuple[str, str, str], list[Item]] = {}
    for one in items:
        groups.setdefault((one.kind, one.table, one.why), []).append(one)
    rows = []
    for (kind, table, why), members in groups.items():
        snapshots = sorted({one.snapshot for one in members})
        span = snapshots[0] if len(snapshots) == 1 else f"{snapshots[0]} … {snapshots[-1]}"
        rows.append((kind, table, span, len(members), sum(one.bytes for one in members), why))
    return sorted(rows, key=lambda row: -row[4])


def stays(plan: Plan) -> list[tuple[str, int, int]]:
    """Return a row for each reason for which something stays."""
    return plan.reasons()


def show(plan: Plan, done: Outcome | None) -> None:
    """Print what would go, or has gone, and why the rest stays."""
    removed = plan.goes if done is None else done.removed
    if removed:
        rows = [(*row[:4], console.size(row[4]), row[5]) for row in gone(removed)]
        console.print_table(GOES, rows)
        print()
    console.print_table(STAYS, [(why, count, console.size(size)) for why, count, size in stays(plan)])
    for note in plan.notes if done is None else done.notes:
        print(f"note: {note}")
    if not removed:
        print("Nothing goes.")
    elif done is None:
        print(f"{console.size(plan.bytes)} would go; nothing was removed (--yes removes it).")
    else:
        print(f"{console.size(done.bytes)} removed.")


def as_dict(plan: Plan, done: Outcome | None) -> dict[str, Any]:
    """Return the same for programs."""
    return {
        "policy": plan.policy.model_dump(mode="json"),
        "removed": done is not None,
        "goes": [asdict(one) for one in (plan.goes if done is None else done.removed)],
        "bytes": plan.bytes if done is None else done.bytes,
        "stays": [asdict(one) for one in plan.stays],
        "notes": plan.notes if done is None else done.notes,
    }
