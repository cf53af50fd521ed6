"""Checkpoints: the whole state of a run, written beside the training and found again after it was killed.

    <base>/<snapshot>/<config hash>/step-00000100/    tensors (torch.distributed.checkpoint) and state.json
    <base>/<snapshot>/<config hash>/finished.json     the run has ended well: the next one starts anew
    <base>/<snapshot>/<config hash>/lock              held while a run trains here

`<base>` is `training.save_dir`, else `twhin_model/<snapshot>/checkpoints` in the store. A checkpoint exists when its
`.metadata` does, which torch writes last.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.store import Store

# A process that was just killed holds its lock until the last of its threads has ended.
LOCK_PATIENCE_S = 3.0
STEP = re.compile(r"step-(\d{8,})")


def folder_of(config: TwhinConfig, store: Store, snapshot: str, save_dir: str | None = None) -> str:
    """Return the folder of a run's checkpoints: by snapshot and configuration, so that only the same run resumes."""
    base = save_dir or config.training.save_dir
    parent = f"{base.rstrip('/')}/{snapshot}" if base else store.path("twhin_model", snapshot, "checkpoints")
    return f"{parent}/{config.hash()}"


def snapshot_of(value: Any) -> Any:
    """Return a copy of a state dict on the CPU that later training steps do not change."""
    if isinstance(value, dict):
        return {key: snapshot_of(item) for key, item in value.items()}
    if isinstance(value, ShardedTensor):
        shards = [Shard(shard.tensor.detach().cpu().clone(), shard.metadata) for shard in value.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, value.metadata(), process_group=value._process_group
        )
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return value


class CheckpointFolder:
    """The checkpoints of one run. Every method but `steps` and `read_state` is for all ranks together."""

    def __init__(self, path: str, ranks: Ranks, keep: int | None = None) -> None:
        """Open a folder.

        Args:
            path: A folder or URL.
            ranks: This process among the others.
            keep: How many of the latest checkpoints stay, besides the best; None: all.
        """
        self.fs, plain = fsspec.core.url_to_fs(path)
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self.path = os.path.abspath(plain) if self.is_local else path
        self.ranks, self.keep = ranks, keep
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Any] | None = None
        self.lock: Any = None

    def acquire(self) -> None:
        """Take the folder for this run, until the process ends. A remote folder cannot be locked.

        Raises:
            UserError: Another run trains here.
        """
        problem = None
        if self.ranks.rank == 0:
            self.fs.makedirs(self.path, exist_ok=True)
            if self.is_local:
                problem = self._lock()
        problem = self.ranks.broadcast(problem)
        if problem:
            raise UserError(problem)

    def _lock(self) -> str | None:
        path = Path(self.path) / "lock"
        self.lock = path.open("a+")
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while not self._flock():
            if time.monotonic() > deadline:
                self.lock.seek(0)
                holder = self.lock.read().strip() or "another process"
                return f"{self.path}: {holder} trains this snapshot with this configuration; wait for it, or end it"
            time.sleep(0.05)
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()
        return None

    def _flock(self) -> bool:
        try:
            # The kernel lets go of it however this process ends.
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Let another run have the folder."""
        self.writer.shutdown(wait=True)
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def steps(self) -> list[int]:
        """List the steps of the whole checkpoints, ascending."""
        found = []
        for path in self.fs.glob(f"{self.path}/step-*/.metadata"):
            match = STEP.fullmatch(str(path).split("/")[-2])
            if match and self.fs.exists(f"{self.step_path(int(match[1]))}/state.json"):
                found.append(int(match[1]))
        return sorted(found)

    def step_path(self, step: int) -> str:
        """Return a checkpoint's folder."""
        return f"{self.path}/step-{step:08d}"

    def read_state(self, step: int) -> dict[str, Any]:
        """Read what a checkpoint holds beside tensors."""
        with self.fs.open(f"{self.step_path(step)}/state.json", "r") as file:
            state: dict[str, Any] = json.load(file)
            return state

    def finished(self) -> bool:
        """Tell whether the run in this folder has ended well."""
        return bool(self.ranks.broadcast(self.fs.exists(f"{self.path}/finished.json")))

    def finish(self, details: dict[str, Any]) -> None:
        """Say that the run has ended well."""
        if self.ranks.rank == 0:
            self._write_json("finished.json", details)

    def clear(self) -> None:
        """Remove an earlier run's checkpoints."""
        if self.ranks.rank == 0:
            for path in self.fs.glob(f"{self.path}/step-*"):
                self.fs.rm(str(path), recursive=True)
            if self.fs.exists(f"{self.path}/finished.json"):
                self.fs.rm(f"{self.path}/finished.json")
        self.ranks.barrier()

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        best: int | None = None,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint in the background, from a copy of the state; at most one is being written at a time.

        Args:
            step: Its number; one that exists is not written again.
            tensors: A nested state dict of tensors, sharded or equal on all ranks.
            state: JSON values; rank 0's are written.
            best: The step of the best checkpoint, which stays however old it is.
            wait: Return only when it is written.
        """
        self.flush()
        if not self.ranks.broadcast(step in self.steps()):
            if self.ranks.rank == 0:
                if self.fs.exists(self.step_path(step)):
                    self.fs.rm(self.step_path(step), recursive=True)
                self.fs.makedirs(self.step_path(step))
                self._write_json(f"{self.step_path(step).split('/')[-1]}/state.json", state)
            self.ranks.barrier()
            copied = snapshot_of(tensors)
            self.pending = self.writer.submit(self._write, step, copied, best)
        elif self.ranks.rank == 0:
            self._remove_old(best)
        if wait:
            self.flush()

    def _write(self, step: int, tensors: dict[str, Any], best: int | None) -> None:
        # Its own process group: the training's collectives go on beside it.
        dcp.save(tensors, checkpoint_id=self.step_path(step), process_group=self.ranks.saving, no_dist=self._alone)
        if self.ranks.rank == 0:
            self._remove_old(best)

    @property
    def _alone(self) -> bool:
        return self.ranks.saving is None

    def flush(self) -> None:
        """Wait for the checkpoint that is being written, if any; its error is raised here."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Read a checkpoint's tensors into those of `tensors`, in place, at any world size."""
        self.flush()
        self.ranks.barrier()
        load_tensors(self.step_path(step), tensors, self.ranks)

    def _remove_old(self, best: int | None) -> None:
        if self.keep is None:
            return
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                self.fs.rm(self.step_path(step), recursive=True)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with self.fs.open(f"{self.path}/{name}", "w") as file:
            json.dump(value, file, allow_nan=False)


def load_tensors(path: str, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Read a checkpoint into `tensors`, in place. Raises UserError where it does not hold them in these sizes."""
    try:
        dcp.load(tensors, checkpoint_id=path, process_group=ranks.saving, no_dist=ranks.saving is None)
    except dcp.api.CheckpointException as error:
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise UserError(f"{path}: the checkpoint does not fit this model: {'; '.join(sorted(causes))}") from error
