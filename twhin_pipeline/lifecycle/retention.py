"""Retention: which versions, releases and leftovers of a store stay, and which go. `removal.py` removes them.

What stays, with everything that it was made from in its snapshot:

- the current release, the one that `twhin rollback` goes back to, pinned releases, the newest releases, and the newest
  of each week, as the policy says;
- models to which an alias of somebody's own, or `champion`, points in MLflow;
- the newest versions of the newest snapshots, and each table's last version that passed its checks: the next day's
  vocabulary grows from it;
- snapshots in which something is written or trained, or whose interrupted training may go on.

**Readers.** A reader says nowhere that it reads: the store may be read-only for it, and a lease would end with a
process that sleeps. So what was made, was the newest, or was in the current release stays for a time of grace (a day)
after that. Who opens the current release anew at least once a day never meets a version that is gone. What is mapped
into memory stays readable on a local disk, as the system removes a file once nobody has it open. Who reads one release
for longer pins it.

**Lineage.** Three chains would grow from day to day for ever. A vocabulary names that of the day before, but has all of
its rows, so the one before goes. A model that started from an earlier one is evaluated without the earlier one's
training edges: their numbers stay, in one table for the whole chain (`ancestry.py`). `load_model(…,
compatible_with=RELEASE)` multiplies the maps of all releases in between: the records and maps of those stay, a matrix
for each entity type, for as long as an older release stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import seen_edges
from twhin_pipeline.evaluation.ancestors import POSITIVES, Origin, origins_of
from twhin_pipeline.lifecycle import leftovers
from twhin_pipeline.lifecycle.leftovers import Checkpoints, Copy
from twhin_pipeline.store import Manifest, Store, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import CALIBRATION, MODELS, PROMOTION, PUBLISHED

EDGES, REJECTED = "raw_edges", "raw_edges_rejected"


class Key(NamedTuple):
    """A version of a table."""

    asset: str
    snapshot: str
    version: str


@dataclass(frozen=True)
class Item:
    """One thing that goes or stays."""

    kind: str
    """`version`, `draft` (unfinished, of a dead writer), `release`, `checkpoints`, `logs` or `copy`."""
    table: str
    snapshot: str
    name: str
    """The version, the release, or a folder."""
    bytes: int
    why: str

    @property
    def key(self) -> Key:
        """The version of a table that it is."""
        return Key(self.table, self.snapshot, self.name)


@dataclass
class Plan:
    """What a policy says of a store at one moment."""

    policy: RetentionConfig
    at: datetime
    goes: list[Item] = field(default_factory=list)
    """In the order of their removal: releases, versions, the newest first, then the rest."""
    stays: list[Item] = field(default_factory=list)
    remember: list[Key] = field(default_factory=list)
    """Models whose training set goes, and whose edges' numbers stay."""
    notes: list[str] = field(default_factory=list)
    current: str | None = None
    pinned: frozenset[str] = frozenset()
    """The current and the pinned releases, which must be the same when the plan is carried out."""
    versions: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """All versions by table and snapshot, which must be the same too."""
    checkpoints: dict[str, Checkpoints] = field(default_factory=dict)
    copies: dict[str, Copy] = field(default_factory=dict)
    """What goes of these, by its path."""
    model_uris: list[str] = field(default_factory=list)
    """Registered models whose tables go."""

    @property
    def bytes(self) -> int:
        """Bytes of what goes."""
        return sum(one.bytes for one in self.goes)

    def reasons(self) -> list[tuple[str, int, int]]:
        """Return why things stay, each with how many there are and their bytes, the largest first."""
        count, size = Counter(one.why for one in self.stays), Counter[str]()
        for one in self.stays:
            size[one.why] += one.bytes
        return sorted(((why, n, size[why]) for why, n in count.items()), key=lambda row: -row[2])


def plan(
    store: Store,
    policy: RetentionConfig,
    *,
    save_dir: str | None = None,
    registry: bool = True,
    now: datetime | None = None,
) -> Plan:
    """Say what goes and what stays; nothing is changed.

    Args:
        store: Which one.
        policy: What to keep.
        save_dir: Where trainings save checkpoints besides the store (`training.save_dir`).
        registry: Ask MLflow which models must stay.
        now: The present time.

    Raises:
        UserError: MLflow does not answer.
    """
    return _Planning(store.seen_as(None), policy, now or datetime.now(UTC)).plan(save_dir, registry)


class _Planning:
    """The state of one planning: what there is, and why it stays."""

    def __init__(self, store: Store, policy: RetentionConfig, now: datetime) -> None:
        self.store, self.policy, self.now = store, policy, now
        self.grace = timedelta(hours=policy.grace_hours)
        self.manifests: dict[Key, Manifest] = {}
        self.damaged: dict[Key, str] = {}
        self.drafts: list[Key] = []
        self.versions: dict[tuple[str, str], list[str]] = {}
        for asset, snapshot in sorted(store.tables()):
            self.versions[asset, snapshot] = store.versions_of(asset, snapshot)
            self.drafts += [Key(asset, snapshot, name) for name in store.drafts(asset, snapshot)]
            for version in self.versions[asset, snapshot]:
                key = Key(asset, snapshot, version)
                try:
                    self.manifests[key] = store.manifest(*key)
                except UserError as error:
                    self.damaged[key] = str(error)
        self.why: dict[Key, str] = {}
        """Why a version stays."""

    def plan(self, save_dir: str | None, registry: bool) -> Plan:
        moves = releases.history(self.store)
        pinned = releases.pins(self.store)
        trainings = leftovers.checkpoints(self.store, save_dir)
        result = Plan(self.policy, self.now, current=moves[-1].release if moves else None, pinned=frozenset(pinned))
        every = {name: releases.read(self.store, name) for name in releases.names(self.store)}
        kept = self._releases(every, result.current, pinned)
        for name, why in kept.items():
            for asset, version in every[name].tables.items():
                self._keep(Key(asset, every[name].snapshot, version), why)
        if registry:
            self._registered()
        else:
            result.notes.append("MLflow was not asked which models must stay (--without-registry)")
        self._newest()
        self._recent()
        self._busy(trainings)
        for key, text in self.damaged.items():
            self._keep(key, f"its manifest cannot be read: {text}")
        thin = self._maps(every, kept)
        self._decisions(kept, thin)
        self._rejected_rows()
        self._ancestors(result)
        self._fill(result, every, {**kept, **thin}, trainings)
        return result

    def _keep(self, key: Key, why: str, lineage: bool = True) -> None:
        """Keep a version, and what it was made from in its snapshot."""
        waiting = [key]
        while waiting:
            one = waiting.pop()
            if one in self.why or not (one in self.manifests or one in self.damaged):
                continue
            self.why[one] = why
            if lineage and one in self.manifests:
                parents = self.manifests[one].parents.items()
                waiting += [Key(asset, key.snapshot, version) for asset, version in parents if "@" not in asset]

    def _releases(self, every: dict[str, Release], current: str | None, pinned: Iterable[str]) -> dict[str, str]:
        """Return the releases that stay with all of their tables, with the reason."""
        moves = releases.history(self.store)
        kept: dict[str, str] = {}
        if current is not None:
            kept[current] = "the current release"
            before = [move.release for move in moves if move.release != current and move.release in every]
            if before:
                kept.setdefault(before[-1], "the release before the current one")
        for name in pinned:
            kept.setdefault(name, "a pinned release")
        by_age = sorted(every, key=lambda name: (every[name].created, name), reverse=True)
        for name in by_age[: self.policy.releases]:
            kept.setdefault(name, f"in {_newest(self.policy.releases, 'release')}")
        weeks: list[tuple[int, int]] = []
        for name in by_age:
            week = datetime.fromisoformat(every[name].created).isocalendar()[:2]
            if week not in weeks and len(weeks) < self.policy.weekly_releases:
                weeks.append(week)
                kept.setdefault(name, f"the newest release of one of {self.policy.weekly_releases} weeks")
        for move, ended in pairwise(moves):
            if self._is_recent(ended.at):
                kept.setdefault(move.release, "it was current until lately, and may be open")
        for name in by_age:
            if self._is_recent(every[name].created):
                kept.setdefault(name, "a release that was made lately")
        return {name: why for name, why in kept.items() if name in every}

    def _registered(self) -> None:
        from twhin_pipeline import tracking

        try:
            found = tracking.aliased(self.store)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"MLflow at {tracking.uri(self.store)} does not say which models must stay ({tracking.reason(error)}); "
                "try again when it answers, or go without it, on the record, by --without-registry"
            ) from error
        for alias, one in found.items():
            asset = "twhin_model" if not one.get("view") else f"{one['view']}/twhin_model"
            model = Key(asset, one["snapshot"], one["version"])
            self._keep(model, f"{alias} is in MLflow's registry")
            for key, manifest in self.manifests.items():  # its vectors: `load_model` of the alias reads them
                if key.asset.startswith("embeddings/") and manifest.parents.get(asset) == model.version:
                    self._keep(key, f"{alias} is in MLflow's registry")
            refitted = self.manifests.get(model) if one.get("view") else None
            evaluated = refitted.parents.get("twhin_model") if refitted else model.version
            for key, manifest in self.manifests.items():  # and what its probabilities come from
                if key.asset == CALIBRATION and manifest.parents.get("twhin_model") == evaluated:
                    self._keep(key, f"{alias} is in MLflow's registry")

    def _newest(self) -> None:
        snapshots = sorted({key.snapshot for key in self.manifests})[-self.policy.snapshots :]
        for asset, snapshot in self.versions:
            if snapshot in snapshots:
                why = f"the newest of its table, in {_newest(self.policy.snapshots, 'snapshot')}"
                self._keep_readable(asset, snapshot, why)
        last = {}
        for asset, snapshot in self.versions:  # in order
            if (version := self.store.accepted(asset, snapshot)) is not None:
                last[asset] = Key(asset, snapshot, version)
        for key in last.values():
            self._keep(key, "the last of its table that passed its checks")

    def _keep_readable(self, asset: str, snapshot: str, why: str) -> None:
        """Keep what readers of a snapshot get, and what the next snapshot would grow from."""
        for version in (self.store.readable(asset, snapshot), self.store.accepted(asset, snapshot)):
            if version is not None:
                self._keep(Key(asset, snapshot, version), why)

    def _recent(self) -> None:
        """Keep what is young, was its table's newest until lately, or was refused lately."""
        failed = timedelta(days=self.policy.failed_days)
        order = sorted(self.manifests, key=lambda key: (key.asset, key.snapshot, key.version), reverse=True)
        asset, superseded = "", ""
        for key in order:
            if key.asset != asset:
                asset, superseded = key.asset, ""
            created = self.manifests[key].created
            if self._is_recent(created):
                self._keep(key, "it was made lately")
            elif superseded and self._is_recent(superseded):
                self._keep(key, "it was the newest until lately, and may be open")
            superseded = min(superseded or created, created)
            verdict = self.store.verdict(*key)
            if verdict is not None and not verdict.accepted and self.now - _time(verdict.at) < failed:
                self._keep(key, f"a check refused it less than {self.policy.failed_days:g} days ago")

    def _busy(self, trainings: list[Checkpoints]) -> None:
        """Keep snapshots in which something is written or trained, or whose interrupted training may go on."""
        busy = {at: "its snapshot is being written" for asset, at in self.versions if self.store.is_written(asset, at)}
        busy |= {one.snapshot: "a training of its snapshot is running" for one in trainings if one.running}
        waiting = {one.snapshot for one in trainings if not one.finished and self._is_kept(one)}
        for (asset, snapshot), versions in self.versions.items():
            for version in versions if snapshot in busy else ():
                self._keep(Key(asset, snapshot, version), busy[snapshot])
            if snapshot in waiting:
                self._keep_readable(asset, snapshot, "a training of its snapshot was interrupted, and may go on")

    def _is_kept(self, one: Checkpoints) -> bool:
        """Tell whether checkpoints stay."""
        days = self.policy.grace_hours / 24 if one.finished else self.policy.failed_days
        return one.running or self.now.timestamp() - one.changed < days * 86_400

    def _rejected_rows(self) -> None:
        """Keep the rejected rows beside the edges that stay; no table names them as parents."""
        for key in [key for key in self.why if key.asset == EDGES]:
            before = [one for one in self.versions.get((REJECTED, key.snapshot), []) if one < key.version]
            if before:
                self._keep(Key(REJECTED, key.snapshot, before[-1]), self.why[key])

    def _maps(self, every: dict[str, Release], kept: dict[str, str]) -> dict[str, str]:
        """Keep the maps of releases between those that stay; return these releases, with the reason."""
        thin: dict[str, str] = {}
        for name in kept:
            passed: list[str] = []
            here: str | None = name
            while here is not None and here in every and here not in passed:
                passed.append(here)
                version = every[here].tables.get(PUBLISHED)
                manifest = self.manifests.get(Key(PUBLISHED, every[here].snapshot, version or ""))
                here = manifest.details.get("compatible_with") if manifest else None
            until = max((i for i, one in enumerate(passed) if one in kept), default=0)
            for one in passed[1:until]:
                if one not in kept:
                    thin[one] = "its maps lead to an older release that stays"
        for name, why in thin.items():
            release = every[name]
            self._keep(Key(PUBLISHED, release.snapshot, release.tables[PUBLISHED]), why, lineage=False)
        return thin

    def _decisions(self, kept: dict[str, str], thin: dict[str, str]) -> None:
        """Keep why the releases that stay were promoted or held back; no table names that as its parent."""
        for key, manifest in self.manifests.items():
            name = manifest.details.get("release") if key.asset == PROMOTION else None
            if name in kept or name in thin:
                self._keep(key, {**thin, **kept}[str(name)], lineage=name in kept)

    def _ancestors(self, result: Plan) -> None:
        """Keep what tells which edges the models before the kept ones were trained on."""
        models = {key.version: key for key in self.manifests if key.asset in MODELS}
        # The others too, as long as they are there: somebody may evaluate one before it goes.
        for key in sorted(models.values(), key=lambda one: one not in self.why):
            why = f"it tells which edges the model of {key.snapshot} has seen"
            for origin in _every(origins_of(self.manifests[key])):
                if origin.store is not None and origin.store != self.store.root:
                    continue
                if origin.version is None:  # of a checkpoint only the training set is known, and no model
                    if key in self.why:
                        self._keep_positives(origin.training_set, why)
                    continue
                before = models.get(origin.version)
                numbers = seen_edges.of_model(self.store, origin.snapshot or "", origin.version)
                if numbers is not None:
                    self._keep(Key(seen_edges.TABLE, numbers.snapshot, numbers.version), why)
                elif before is not None and before not in (*self.why, *result.remember) and key in self.why:
                    result.remember.append(before)

    def _keep_positives(self, version: str | None, why: str) -> None:
        for key in self.manifests:
            if key.asset.endswith(POSITIVES) and key.version == version:
                self._keep(key, why)

    def _fill(
        self, result: Plan, every: dict[str, Release], kept: dict[str, str], trainings: list[Checkpoints]
    ) -> None:
        for name, release in every.items():
            item = Item("release", "releases", release.snapshot, name, 0, kept.get(name, "no rule keeps it"))
            (result.stays if name in kept else result.goes).append(item)
            models = [Key(one, release.snapshot, release.tables[one]) for one in MODELS if one in release.tables]
            if release.model_uri and any(key in self.manifests and key not in self.why for key in models):
                result.model_uris.append(release.model_uri)
        order = sorted([*self.manifests, *self.damaged], key=lambda key: (key.snapshot, key.version), reverse=True)
        for key in order:
            size = sum(self.store.sizes(self.store.path(*key)).values())
            item = Item("version", *key, size, self.why.get(key, "no rule keeps it"))
            (result.stays if key in self.why else result.goes).append(item)
        for key in self.drafts:
            size = sum(self.store.sizes(self.store.path(*key)).values())
            written = self.store.is_written(key.asset, key.snapshot)
            why = "it is being written" if written else "an unfinished version, whose writer is dead"
            (result.stays if written else result.goes).append(Item("draft", *key, size, why))
        for one in trainings:
            stays = self._is_kept(one)
            state = "running" if one.running else "finished" if one.finished else "interrupted"
            why = f"checkpoints of a training: {state}{' lately' if stays and not one.running else ''}"
            item = Item("checkpoints", one.asset, one.snapshot, one.path, one.bytes, why)
            (result.stays if stays else result.goes).append(item)
            result.checkpoints[one.path] = one
        for one in leftovers.logs(self.store):
            stays = self._is_kept(one)
            why = "what trainings printed lately" if stays else "what trainings printed"
            item = Item("logs", one.asset, one.snapshot, one.path, one.bytes, why)
            (result.stays if stays else result.goes).append(item)
        for copy in leftovers.copies(self.store):
            stays = Key(copy.asset, copy.snapshot, copy.version) in self.why
            why = f"a copy on this machine of a version that {'stays' if stays else 'goes, or has gone'}"
            (result.stays if stays else result.goes).append(
                Item("copy", copy.asset, copy.snapshot, copy.path, copy.bytes, why)
            )
            result.copies[copy.path] = copy
        result.versions = {place: frozenset(names) for place, names in self.versions.items()}

    def _is_recent(self, at: str) -> bool:
        return self.now - _time(at) < self.grace


def _every(origins: Iterable[Origin]) -> Iterator[Origin]:
    for one in origins:
        yield one
        yield from _every(one.before)


def _newest(count: int, what: str) -> str:
    return f"the newest {what}" if count == 1 else f"the {count} newest {what}s"


def _time(text: str) -> datetime:
    result = datetime.fromisoformat(text)
    return result if result.tzinfo else result.replace(tzinfo=UTC)
