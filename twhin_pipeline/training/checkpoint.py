"""Checkpoints: the whole state of a run, written beside the training and found again after it was killed.

    <folder>/step-00000100/    tensors (torch.distributed.checkpoint) and state.json
    <folder>/finished.json     the run has ended well: the next one starts anew
    <folder>/lock              held while a run trains here; behind a URL a lease, .writer.json

`<folder>` is `<training.save_dir>/<snapshot>/<hash>`, else `twhin_model/<snapshot>/checkpoints/<hash>` in the store.
The hash is of what training reads. A checkpoint exists when its `checksums.json` does, which is written last. Loading
one never runs code of the checkpoint: it holds tensors and JSON.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType
from torch.distributed.remote_device import _remote_device

from twhin_pipeline import remote
from twhin_pipeline.config import TwhinConfig, stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.store import Store, locks

# A process that was just killed holds its lock until the last of its threads has ended.
LOCK_PATIENCE_S = 3.0
STEP = re.compile(r"step-(\d{8,})")
CHECKSUMS = "checksums.json"
BLOCK_BYTES = 32 << 20
_DCP = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
KNOWN_CLASSES = {
    *((f"{_DCP}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    (_SHARDED, "TensorProperties"), (_SHARDED, "MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"), (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""What the pickle `.metadata` of torch may name, besides dtypes: where tensors lie in files, and nothing that acts."""


def folder_of(config: TwhinConfig, store: Store, snapshot: str, save_dir: str | None = None) -> str:
    """Return the folder of a run's checkpoints: by snapshot and what training reads, so that only it resumes."""
    base = save_dir or config.training.save_dir
    parent = f"{base.rstrip('/')}/{snapshot}" if base else store.path("twhin_model", snapshot, "checkpoints")
    return f"{parent}/{stage_settings.digest(config, 'train')}"


class BlockPlanner(DefaultSavePlanner):
    """torch's plan of what to write, with large tensors in blocks of rows, which are written from where they are.

    torch reads an item of a checkpoint into memory as a whole. So that takes no more than a block, however large a
    table is.
    """

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank writes."""
        plan = super().create_local_plan()
        self.blocks: dict[MetadataIndex, tuple[WriteItem, int, int]] = {}
        """By the index of a block: the item that it is part of, its first row there, and how many it has."""
        items = [block for item in plan.items for block in self._blocks_of(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return what an item of the plan holds."""
        if write_item.index not in self.blocks:
            return super().resolve_data(write_item)
        source, first, rows = self.blocks[write_item.index]
        tensor = super().resolve_data(source)
        assert isinstance(tensor, torch.Tensor)
        block = tensor.detach()[first : first + rows]
        # torch would copy a part of a larger storage, and keep the copy for some time; NumPy's is a storage by itself.
        return torch.from_numpy(block.numpy()) if block.is_cpu and block.is_contiguous() else block

    def _blocks_of(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if data is None or not data.chunk.sizes:
            return [item]
        chunk, rows = data.chunk, data.chunk.sizes[0]
        row_bytes = math.prod(chunk.sizes[1:]) * torch._utils._element_size(data.properties.dtype)
        at_once = max(BLOCK_BYTES // max(row_bytes, 1), 1)
        if rows <= at_once:
            return [item]
        blocks = []
        for first in range(0, rows, at_once):
            size = min(at_once, rows - first)
            offsets = torch.Size([chunk.offsets[0] + first, *chunk.offsets[1:]])
            part = ChunkStorageMetadata(offsets, torch.Size([size, *chunk.sizes[1:]]))
            index = MetadataIndex(item.index.fqn, offsets)
            self.blocks[index] = item, first, size
            blocks.append(WriteItem(index, WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=part)))
        return blocks


def snapshot_of(value: Any) -> Any:
    """Return a copy of a state dict on the CPU that later training steps do not change."""
    if isinstance(value, dict):
        return {key: snapshot_of(item) for key, item in value.items()}
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        on_cpu = dataclasses.replace(metadata, shards_metadata=[_on_cpu(shard) for shard in metadata.shards_metadata])
        shards = [Shard(_copied(shard.tensor), _on_cpu(shard.metadata)) for shard in value.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, on_cpu, process_group=value._process_group
        )
    if isinstance(value, torch.Tensor):
        return _copied(value)
    return value


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _on_cpu(shard: ShardMetadata) -> ShardMetadata:
    """Say of a shard that it is on its rank's CPU: torch checks that against the copy."""
    assert isinstance(shard.placement, _remote_device)
    return dataclasses.replace(shard, placement=_remote_device(f"rank:{shard.placement.rank()}/cpu"))


class CheckpointFolder:
    """The checkpoints of one run. Every method but `steps` and `read_state` is for all ranks together."""

    def __init__(self, path: str, ranks: Ranks, keep: int | None = None) -> None:
        """Open a folder.

        Args:
            path: A folder or URL.
            ranks: This process among the others.
            keep: How many of the latest checkpoints stay, besides the best; None: all.
        """
        self.fs, plain = remote.filesystem(path)
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self.path = os.path.abspath(plain) if self.is_local else path
        self.ranks, self.keep = ranks, keep
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Any] | None = None
        self.lock: Any = None
        self.lease = ExitStack()

    def acquire(self, wait_s: float | None = None) -> None:
        """Take the folder for this run, until the process ends: by a lock of the system, or a lease behind a URL.

        Args:
            wait_s: How long to wait for a lease that another run holds; None: `locks.WAIT_S`.

        Raises:
            UserError: Another run trains here.
        """
        problem = None
        if self.ranks.rank == 0:
            self.fs.makedirs(self.path, exist_ok=True)
            if self.is_local:
                problem = self._lock()
            else:
                try:
                    self.lease.enter_context(locks.writing(self.fs, False, [self.path], self.path, wait_s))
                except UserError as error:
                    problem = str(error)
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
        self.lease.close()
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def problem(self, step: int) -> str | None:
        """Read a checkpoint's files and compare their checksums; say what is wrong, None where nothing is."""
        folder = self.step_path(step)
        try:
            with self.fs.open(f"{folder}/{CHECKSUMS}", "r") as file:
                wanted = json.load(file)
            for name, digest in wanted.items():
                if self._sha256(f"{folder}/{name}") != digest:
                    return f"{name} has other contents than when it was written"
        except FileNotFoundError as error:
            return f"a file is missing ({os.path.basename(str(error.filename or error))})"
        except ValueError:
            return f"{CHECKSUMS} is damaged"
        return None

    def remove(self, step: int) -> None:
        """Remove a checkpoint. For rank 0."""
        self.fs.rm(self.step_path(step), recursive=True)

    def _sha256(self, path: str) -> str:
        with self.fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def steps(self) -> list[int]:
        """List the steps of the whole checkpoints, ascending."""
        # Listed, and each looked at: a pattern over both fails on S3 where one is being removed.
        try:
            names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []
        found = [int(match[1]) for name in names if (match := STEP.fullmatch(name))]
        return sorted(step for step in found if self.fs.exists(f"{self.step_path(step)}/{CHECKSUMS}"))

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
        """Write a checkpoint; at most one is being written at a time.

        On a CPU the state is written from where it is, as far as the system's file cache, which takes about as long as
        a copy would. That the files reach the disk, and their checksums, are left to the background. A GPU's state is
        copied to the host's memory, and written from there in the background.

        Args:
            step: Its number; one that exists is not written again.
            tensors: A nested state dict of tensors, sharded or equal on all ranks.
            state: JSON values; rank 0's are written.
            best: The step of the best checkpoint, which stays however old it is.
            wait: Return only when it is written.
        """
        self.flush()
        if not self.ranks.broadcast(step in self.steps() if self.ranks.rank == 0 else None):
            if self.ranks.rank == 0:
                if self.fs.exists(self.step_path(step)):
                    self.fs.rm(self.step_path(step), recursive=True)
                self.fs.makedirs(self.step_path(step))
                self._write_json(f"{self.step_path(step).split('/')[-1]}/state.json", state)
            self.ranks.barrier()
            if self.ranks.device.type == "cuda":
                self.pending = self.writer.submit(self._write, step, snapshot_of(tensors), best)
            else:
                self._write_tensors(step, tensors)
                self.pending = self.writer.submit(self._seal, step, best)
        elif self.ranks.rank == 0:
            self._remove_old(best)
        if wait:
            self.flush()

    def _write(self, step: int, tensors: dict[str, Any], best: int | None) -> None:
        self._write_tensors(step, tensors)
        self._seal(step, best)

    def _write_tensors(self, step: int, tensors: dict[str, Any]) -> None:
        path = self.step_path(step)
        # Its own process group: where it writes in the background, the training's collectives go on beside it.
        dcp.save(
            tensors,
            storage_writer=(
                FileSystemWriter(path, sync_files=False)
                if self.is_local
                else FsspecWriter(path, sync_files=False, **remote.options(path))
            ),
            planner=BlockPlanner(),
            process_group=self.ranks.saving,
            no_dist=self._alone,
        )

    def _seal(self, step: int, best: int | None) -> None:
        """Make a checkpoint valid, once the files of all ranks are on their disks."""
        folder = self.step_path(step)
        if self.is_local:
            for path in [*Path(folder).glob(f"__{self.ranks.rank}_*"), *([Path(folder)] * (self.ranks.rank == 0))]:
                _sync(path)
        # Each rank reads its own files back, so that no machine reads all of a large checkpoint.
        names = sorted(str(path).rsplit("/", 1)[-1] for path in self.fs.ls(folder, detail=False))
        mine = [name for name in names if _writer_of(name) == self.ranks.rank]
        digests = {name: self._sha256(f"{folder}/{name}") for name in mine}
        gathered: list[Any] = [digests]
        if self.ranks.saving is not None:
            gathered = [None] * self.ranks.world_size
            dist.all_gather_object(gathered, digests, group=self.ranks.saving)
        if self.ranks.rank == 0:
            if not self.is_local:
                locks.confirm(self.path)
            self._write_json(f"{folder.split('/')[-1]}/{CHECKSUMS}", {k: v for one in gathered for k, v in one.items()})
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


def _writer_of(name: str) -> int | None:
    """Return the rank that wrote a file of a checkpoint: torch names tensors' `__<rank>_<number>.distcp`."""
    if name == CHECKSUMS:
        return None
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's `.metadata`, and refuses to make anything but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in KNOWN_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors does")


class _TensorReader(FsspecReader):
    """torch's reader of a folder or URL, without its unpickling of whatever `.metadata` holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            text = file.read()
        metadata = _MetadataUnpickler(io.BytesIO(text)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it does not describe tensors")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorPlanner(DefaultLoadPlanner):
    """torch's plan of what to read, without objects, which torch would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is an object, and not a tensor")


def load_tensors(path: str, tensors: dict[str, Any], ranks: Ranks) -> None:
    """Read a checkpoint into `tensors`, in place. No code of the checkpoint runs.

    Raises:
        UserError: It does not hold these tensors in these sizes, is damaged, or holds something else than tensors.
    """
    reader = _TensorReader(path, **remote.options(path))
    try:
        reader.read_metadata()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: its .metadata is damaged, or describes more than tensors ({error}); nothing of it was run"
        ) from error
    try:
        dcp.load(
            tensors,
            storage_reader=reader,
            planner=_TensorPlanner(),
            process_group=ranks.saving,
            no_dist=ranks.saving is None,
        )
    except dcp.api.CheckpointException as error:
        causes = {str(failure[0]) for failure in error.failures.values()}
        raise UserError(f"{path}: the checkpoint does not fit this model: {'; '.join(sorted(causes))}") from error
