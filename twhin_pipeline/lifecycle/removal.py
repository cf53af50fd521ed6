"""Carrying out what `retention.plan` says: in an order in which a crash leaves a store that opens, and on the record.

First the numbers of training edges are written that stay in place of a training set. Then releases go, so that nobody
promotes one whose tables are going. Then versions go, the newest of a snapshot first, so that no table is left that was
made from one that has gone; of each version its manifest goes first (`Store.remove_version`). A snapshot is locked as a
whole before anything of it goes. It is left alone where somebody writes in it, or where it has other versions than when
the plan was made.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import groupby

from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle import leftovers, nights
from twhin_pipeline.lifecycle.ancestry import write_seen_edges
from twhin_pipeline.lifecycle.retention import Item, Plan
from twhin_pipeline.store import Store, catalog, database, releases, removals
from twhin_pipeline.store.locks import LOCK, WRITER
from twhin_pipeline.words import MODELS, PROMOTION


@dataclass
class Outcome:
    """What was removed, and what was left alone although the plan named it."""

    removed: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes that were given back."""
        return sum(one.bytes for one in self.removed)


def carry_out(store: Store, plan: Plan, by: str) -> Outcome:
    """Remove what a plan names.

    Args:
        store: The plan's.
        plan: It.
        by: Who decides; stored.

    Raises:
        UserError: Another process removes, or the current release or the pins are others than when the plan was made.
    """
    base = store.seen_as(None)
    done = Outcome(notes=list(plan.notes))
    held = ExitStack()
    try:
        held.enter_context(base.writing("prune", [removals.FOLDER], wait_s=0))
    except UserError as error:
        raise UserError(
            f"{base.root}: another process removes by policy now; run this again when it is done"
        ) from error
    with held:
        record = {
            "at": plan.at.isoformat(timespec="seconds"),
            "by": by,
            "policy": plan.policy.model_dump(mode="json"),
            "notes": done.notes,
        }
        planned = [asdict(one) for one in plan.goes]
        # Before anything goes: a process that is killed leaves on the record what it was about to remove.
        name = removals.write(base, {**record, "status": "began", "bytes": plan.bytes, "removed": planned})
        status = "broke off"
        try:
            left = _remember(base, plan, done)
            _releases(base, plan, done)
            versions = [one for one in plan.goes if one.kind in ("version", "draft") and one.snapshot not in left]
            for snapshot, items in groupby(sorted(versions, key=_place, reverse=True), key=lambda one: one.snapshot):
                _of_snapshot(base, plan, snapshot, list(items), done)
            _leftovers(base, plan, done)
            _tell(base, plan, done)
            status = "ended"
        finally:
            removed = [asdict(one) for one in done.removed]
            removals.write(base, {**record, "status": status, "bytes": done.bytes, "removed": removed}, name)
    return done


def _place(one: Item) -> tuple[str, str]:
    return one.snapshot, one.name


def _remember(store: Store, plan: Plan, done: Outcome) -> set[str]:
    """Write the numbers of edges that stay; return snapshots whose models stay because theirs cannot be written."""
    left = set()
    for model in plan.remember:
        home = store if model.asset == MODELS[0] else store.seen_as("refit")
        try:
            with database.connect(store=store) as con:
                write_seen_edges(con, home, store.manifest(*model), plan.policy.seen_edges_days)
        except UserError as error:
            left.add(model.snapshot)
            done.notes.append(f"snapshot {model.snapshot} is left alone: {error}")
    return left


def _releases(store: Store, plan: Plan, done: Outcome) -> None:
    going = [one for one in plan.goes if one.kind == "release"]
    if decided := {one.snapshot for one in plan.goes if one.table == PROMOTION}:
        nights.note_decided(store, decided)  # they have run, and are not to run again
    with store.writing(releases.CURRENT, [releases.FOLDER]):
        moves = releases.history(store)
        now = moves[-1].release if moves else None, frozenset(releases.pins(store))
        if now != (plan.current, plan.pinned):
            raise UserError(f"{store.root}: the current release or the pins have changed meanwhile; run this again")
        for one in going:
            store.remove(store.path(releases.FOLDER, f"{one.name}.json"))
            done.removed.append(one)


def _of_snapshot(store: Store, plan: Plan, snapshot: str, items: list[Item], done: Outcome) -> None:
    """Remove versions of one snapshot, the newest first; leave all of them where somebody works in the snapshot."""
    places = [place for place in plan.versions if place[1] == snapshot]
    assets = [asset for asset, _ in places]
    try:
        with store.writing(snapshot, assets, wait_s=0):
            if any(one.running for one in leftovers.checkpoints(store, snapshot=snapshot)):
                raise UserError(f"a training of snapshot {snapshot} is running")
            changed = [a for a, at in places if frozenset(store.versions_of(a, at)) != plan.versions[a, at]]
            # What this run has written itself is no sign of somebody else.
            if [asset for asset in changed if asset != "seen_edges"]:
                raise UserError(f"{changed[0]} of snapshot {snapshot} was made meanwhile")
            for one in items:
                store.remove_version(*one.key)
                done.removed.append(one)
            for asset in {one.table for one in items}:
                _remove_empty(store, asset, snapshot)
    except UserError as error:
        done.notes.append(f"left alone: {error}")


def _remove_empty(store: Store, asset: str, snapshot: str) -> None:
    """Remove a snapshot's folder that has nothing but our lock. Who waits for the lock makes the folder anew."""
    if store.is_local and set(store.children(f"{asset}/{snapshot}")) <= {LOCK, WRITER}:
        store.remove(store.path(asset, snapshot))


def _leftovers(store: Store, plan: Plan, done: Outcome) -> None:
    for one in plan.goes:
        if one.kind == "checkpoints":
            if leftovers.remove_checkpoints(plan.checkpoints[one.name]):
                done.removed.append(one)
            else:
                done.notes.append(f"left alone: a training is running in {one.name}")
        elif one.kind == "logs":
            store.remove(one.name)
            done.removed.append(one)
        elif one.kind == "copy":
            leftovers.remove_copy(plan.copies[one.name])
            done.removed.append(one)


def _tell(store: Store, plan: Plan, done: Outcome) -> None:
    """Let the catalog and MLflow's registry know."""
    if done.removed and store.fs.exists(store.fs._strip_protocol(store.path(catalog.CATALOG))):
        catalog.refresh(store)
    if done.removed and plan.model_uris:
        from twhin_pipeline import tracking

        try:
            tracking.note_removed(store, plan.model_uris, plan.at.isoformat(timespec="seconds"))
        except Exception as error:  # of the server: what was removed is on record in the store
            done.notes.append(f"MLflow was not told which registered models have gone: {tracking.reason(error)}")
