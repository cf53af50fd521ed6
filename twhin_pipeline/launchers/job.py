"""What the schedulers have in common: a job, the states it passes, and the command that runs on each of its nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from twhin_pipeline.store import Store
from twhin_pipeline.training.launch import train_arguments

ENDED = "ended"
"""The kind of the record that a job's script prints last: `{"code": …}`."""
FAILURE = "failure"
"""The kind of the record with the failure of a node's first rank to fail: the fields of `launch.Failure`."""
NODE = "twhin_pipeline.launchers.node"


@dataclass(frozen=True)
class State:
    """Where a job is."""

    phase: Literal["waiting", "running", "ended"]
    text: str = ""
    """What a person should know: why it waits, or how it ended."""
    succeeded: bool = False


@dataclass(frozen=True)
class Training:
    """What a job trains: what its nodes are given."""

    config_path: str
    store: Store
    snapshot: str
    overrides: Sequence[str] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """The job's name. It is the same for each try of a training, and another for each store, view and snapshot."""
        where = f"{self.store.root}|{self.store.view or ''}"
        return f"twhin-{self.snapshot}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"

    def node_arguments(self, config_path: str) -> list[str]:
        """Return what follows `python` on each node; the node itself adds where the first node is.

        Args:
            config_path: Where nodes read the configuration.
        """
        return ["-m", NODE, *train_arguments(config_path, self.store, self.snapshot, self.overrides)]


class Job(Protocol):
    """A training at a scheduler. Only one thread calls it."""

    def start(self) -> str:
        """Submit it and return what it is called there.

        Raises:
            UserError: The scheduler refuses it, or is not there.
        """

    def lines(self) -> list[str]:
        """Return the lines that came since the last call, in order; it does not wait for more."""

    def state(self) -> State:
        """Ask the scheduler. Called several times a second: it must not ask more often than the scheduler bears."""

    def stop(self) -> None:
        """Let its ranks write a checkpoint and end. Raises UserError where the scheduler does not do it, as `kill`."""

    def kill(self) -> None:
        """End it, whatever its ranks do."""
