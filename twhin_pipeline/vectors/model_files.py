"""The files of a trained model: written by ranks, shard by shard; read memory-mapped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store import Draft, Manifest, Store, releases
from twhin_pipeline.store.array_cache import cached, new_array
from twhin_pipeline.store.manifest import maker

if TYPE_CHECKING:
    import torch

    from twhin_pipeline.model.scorer import Scorer

ASSET = "twhin_model"
BLOCK = 65_536
NAMES = ["relation", "embedding"]
_CURRENT = "@current"
"""Behind a store, names the release that is current."""
Array = np.ndarray[Any, Any]


def is_state(part: str, table: str) -> bool:
    """Tell whether a part of a model, by its name, has the state of a table's optimizer."""
    return part.startswith(f"optimizer/{table}/")


def vectors_type(dim: int, element: pa.DataType | None = None) -> pa.DataType:
    """Return the type of a column of vectors of `dim` numbers.

    None of them is null: Parquet files are then written and read in two thirds of the time.
    """
    return pa.list_(pa.field("element", element or pa.float32(), nullable=False), dim)


def vectors_array(vectors: Array) -> pa.FixedSizeListArray:
    """Return `vectors` float32 [N, D] as an Arrow column of fixed-size lists."""
    flat = np.ascontiguousarray(vectors, np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), type=vectors_type(vectors.shape[1]))


def vectors_of(column: pa.Array | pa.ChunkedArray) -> Array:
    """Return a column of equally long lists of numbers as float32 [N, D]. Raises UserError where they are not."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not len(column):
        return np.zeros((0, 0), np.float32)
    if column.null_count:
        raise UserError("a column of vectors has nulls; leave those rows out")
    kind = column.type
    lists = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"a column of vectors is of type {kind}; it must hold lists of numbers")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) % len(column) or (
        not pa.types.is_fixed_size_list(column.type) and len(np.unique(column.value_lengths())) != 1
    ):
        raise UserError("a column of vectors has lists of different lengths; write one length only")
    return flat.astype(np.float32, copy=False).reshape(len(column), -1)


def parameters_array(rows: Sequence[torch.Tensor]) -> pa.Array:
    """Return operators' parameters, `[P]` each, as an Arrow column of lists, of a fixed size where all P are equal."""
    arrays = [row.float().numpy() for row in rows]
    if len({len(row) for row in arrays}) == 1:
        return vectors_array(np.stack(arrays))
    return pa.array(arrays, pa.list_(pa.float32()))


def parameters_of(relations: pa.Table) -> dict[str, torch.Tensor]:
    """Return each relation's operator parameters `[P]`, of a table with columns `relation` and `embedding`."""
    import torch

    names, rows = relations.column("relation").to_pylist(), relations.column("embedding")
    return {name: torch.tensor(row.values.to_numpy()) for name, row in zip(names, rows, strict=True)}


class Writer:
    """Writes a model into a draft: each rank its own rows, rank 0 the rest."""

    def __init__(self, draft: Draft, rank: int) -> None:
        self.draft, self.rank = draft, rank

    def table(self, name: str, shards: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Write this rank's shards of a table.

        Args:
            name: The table.
            shards: First row and vectors `[n, D]` of each shard, in the order of rows; none, and no file is written.
        """
        parts = [(first, rows) for first, rows in shards if len(rows)]
        if not parts:
            return
        vectors = pa.field("embedding", vectors_type(parts[0][1].shape[1]), nullable=False)
        schema = pa.schema([("row", pa.int64()), vectors])
        with self.draft.writer(f"tables/{name}/part-{self.rank:05d}.parquet", schema) as writer:
            for first, rows in parts:
                for start in range(0, len(rows), BLOCK):
                    block = rows[start : start + BLOCK].detach().float().cpu().numpy()
                    numbers = np.arange(first + start, first + start + len(block), dtype=np.int64)
                    columns = [pa.array(numbers), vectors_array(block)]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def states(self, name: str, states: Mapping[str, Iterable[tuple[int, torch.Tensor]]]) -> None:
        """Write this rank's rows of the state of a table's optimizer, a column for each of `states`.

        Args:
            name: The table.
            states: By name the first row and the numbers `[n]` or `[n, D]` of each shard, as of `table`.
        """
        parts = {state: [(first, rows) for first, rows in shards if len(rows)] for state, shards in states.items()}
        if not any(parts.values()):
            return
        shapes = {state: shards[0][1].shape[1:] for state, shards in parts.items()}
        kinds = {state: vectors_type(shape[0]) if shape else pa.float32() for state, shape in shapes.items()}
        fields = [pa.field(state, kind, nullable=False) for state, kind in kinds.items()]
        schema = pa.schema([("row", pa.int64()), *fields])
        with self.draft.writer(f"optimizer/{name}/part-{self.rank:05d}.parquet", schema) as writer:
            for shard, (first, rows) in enumerate(next(iter(parts.values()))):
                for start in range(0, len(rows), BLOCK):
                    last = min(start + BLOCK, len(rows))
                    columns: list[pa.Array] = [pa.array(np.arange(first + start, first + last, dtype=np.int64))]
                    for shards in parts.values():
                        block = shards[shard][1][start:last].detach().float().cpu().numpy()
                        columns.append(vectors_array(block) if block.ndim > 1 else pa.array(block))
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def operator_states(self, relations: Sequence[str], states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Write the state of the operators' optimizer: each relation's numbers `[P]`, a column for each of `states`."""
        if states:
            columns = {state: parameters_array([rows[name] for name in relations]) for state, rows in states.items()}
            self.draft.write(pa.table({"relation": pa.array(relations), **columns}), "optimizer/relations.parquet")

    def untrained(self, name: str, rows: Array) -> None:
        """Write the rows of a table whose vectors no training has moved, int64 `[n]`; no file where there is none."""
        if len(rows):
            self.draft.write(pa.table({"row": pa.array(rows, pa.int64())}), f"untrained/{name}/part-00000.parquet")

    def relations(self, model_config: TwhinModelConfig, rows: dict[str, torch.Tensor]) -> None:
        """Write each relation's operator parameters `[P]`."""
        table = {
            "relation": pa.array([relation.name for relation in model_config.relations]),
            "operator": pa.array([relation.operator for relation in model_config.relations]),
            "embedding": parameters_array([rows[name] for name in model_config.relation_names]),
        }
        self.draft.write(pa.table(table), "relations.parquet")

    def records(self, name: str, records: list[dict[str, Any]], schema: pa.Schema) -> None:
        """Write rows of numbers, such as `losses` or `metrics`; keys that the schema lacks become float columns."""
        extra = dict.fromkeys(key for record in records for key in record if key not in schema.names)
        for key in extra:
            schema = schema.append(pa.field(key, pa.float64()))
        self.draft.write(pa.Table.from_pylist(records, schema=schema), f"{name}.parquet")


class ModelTables:
    """A trained model in the store, read without loading it: tables are memory-mapped."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.folder = store.path(manifest.asset, manifest.snapshot, manifest.version)
        self._tables: dict[str, Array] = {}

    @classmethod
    def open(cls, store: Store, snapshot: str) -> ModelTables:
        """Open a snapshot's model. Raises UserError where there is none."""
        return cls(store, store.manifest(ASSET, snapshot))

    @property
    def config(self) -> TwhinModelConfig:
        """The model section of the configuration that it was trained with."""
        return TwhinModelConfig.model_validate(self.manifest.details["model"])

    @property
    def names(self) -> list[str]:
        """The tables there are, in the configuration's order."""
        return self.config.table_names

    def trained_on(self, assets: Iterable[str]) -> dict[str, str]:
        """Return the present version of each table (those that the model did not read pass).

        Raises:
            UserError: One is missing, or was made anew since the model was trained on it.
        """
        snapshot = self.manifest.snapshot
        versions = self.store.versions(snapshot, assets)
        moved = [name for name, held in versions.items() if self.manifest.parents.get(name, held) != held]
        if moved:
            raise UserError(
                f"{ASSET} of {snapshot} was trained before {', '.join(moved)} was made anew, so its rows mean other "
                f"entities; train again with `twhin train --snapshot {snapshot}`"
            )
        return versions

    def parts(self, name: str) -> list[str]:
        """Return a table's Parquet files in the order of rows. Raises UserError where there is no such table."""
        prefix = f"{self.folder}/tables/{name}/"
        result = [path for path in self.store.files_of(self.manifest) if path.startswith(prefix)]
        if not result:
            raise UserError(f"{self.folder}: {unknown('table', name, self.names)}")
        # Shards are laid on ranks in the order of rows, and a part's name is its rank.
        return result

    def blocks(self, name: str) -> Iterator[tuple[Array, Array]]:
        """Stream a table: rows int64 [n] and vectors float32 [n, D], in the order of rows."""
        for path in self.parts(name):
            with self.store.parquet(path) as file:
                for batch in file.iter_batches(BLOCK):
                    yield batch.column("row").to_numpy(), vectors_of(batch.column("embedding"))

    def state_blocks(self, name: str, state: str) -> Iterator[tuple[Array, Array]]:
        """Stream a state of a table's optimizer: rows int64 [n] and numbers float32 [n] or [n, D], in order of rows."""
        for path in sorted(p for part, p in self.store.part_files(self.manifest).items() if is_state(part, name)):
            with self.store.parquet(path) as file:
                for batch in file.iter_batches(BLOCK, columns=["row", state]):
                    column = batch.column(state)
                    single = pa.types.is_floating(column.type)
                    yield batch.column("row").to_numpy(), column.to_numpy() if single else vectors_of(column)

    def operator_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return each state of the operators' optimizer by relation, `[P]`; none where none is stored."""
        if "optimizer/relations" not in self.store.part_files(self.manifest):
            return {}
        table = self.store.read_part(self.manifest, "optimizer/relations")
        states = [name for name in table.column_names if name != "relation"]
        return {state: parameters_of(table.select(["relation", state]).rename_columns(NAMES)) for state in states}

    def untrained(self, name: str) -> Array:
        """Return the rows of a table whose vectors no training has moved, int64 `[n]`."""
        part = f"untrained/{name}/part-00000"
        if part not in self.store.part_files(self.manifest):
            return np.zeros(0, np.int64)
        return self.store.read_part(self.manifest, part).column("row").to_numpy()

    def rows(self, name: str) -> int:
        """Return the rows of a table (its vocabulary may have fewer)."""
        paths = {os.path.relpath(path, self.folder) for path in self.parts(name)}
        return sum(file["rows"] for file in self.manifest.files if file["path"] in paths)

    def table(self, name: str) -> Array:
        """Return a table, read-only float32 [N, D], mapped from a file that is written at the first call."""
        if name not in self._tables:
            self.parts(name)
            self._tables[name] = np.load(
                cached(self.store, self.manifest, self._write_mapped) / f"{name}.npy", mmap_mode="r"
            )
        return self._tables[name]

    def scorer(self) -> Scorer:
        """Return the scorer with its trained operator parameters, on the CPU."""
        from twhin_pipeline.model.scorer import Scorer

        return Scorer.from_rows(self.config, self.relation_rows())

    def relation_rows(self) -> dict[str, torch.Tensor]:
        """Return each relation's operator parameters `[P]`."""
        return parameters_of(self.read("relations"))

    def read(self, name: str) -> pa.Table:
        """Read `relations`, `losses` or `metrics` whole."""
        with self.store.parquet(f"{self.folder}/{name}.parquet") as file:
            return file.read()

    def _write_mapped(self, folder: Path) -> None:
        for name in self.names:
            shape = (self.rows(name), self.config.embedding_dim)
            mapped = new_array(folder / f"{name}.npy", shape)
            for numbers, vectors in self.blocks(name):
                mapped[numbers] = vectors
            mapped.flush()


def locate(path: str, asset: str = ASSET, snapshot: str | None = None, before: str | None = None) -> tuple[Store, str]:
    """Find the model, or a table made of it such as `embeddings/relations`, that `path` names.

    Args:
        path: A store (path or URL); one of its snapshots (`<store>@YYYY-MM-DD`, or the folder
            `<store>/twhin_model/YYYY-MM-DD`) or releases (`<store>@<its name>`, `<store>@current`); or an MLflow model
            URI (`models:/name/3`, `models:/name@alias`, `runs:/<id>/model`).
        asset: The table to find there.
        snapshot: The snapshot, where `path` does not name one. Left out: that of the current release, and where
            nothing has been published the newest that has the table.
        before: Look only at older snapshots, where neither `path` nor `snapshot` names one: the newest release of
            them, and where there is none the newest that has the table.

    Returns:
        The store, in which the tables that belong together stay at their versions, and the snapshot.

    Raises:
        UserError: There is none, or two snapshots are named.
    """
    if path.startswith(("models:/", "runs:/")):
        return _registered(path, asset, snapshot)
    if path.endswith(_CURRENT):
        store = Store(path.removesuffix(_CURRENT))
        if (release := releases.current(store)) is None:
            raise UserError(f"{path}: nothing has been published there; `twhin run` does where its checks have passed")
        return _of_release(store.root, release.name, asset, snapshot)
    if (of_release := re.fullmatch(rf"(.+?)@({releases.NAME.pattern})/?", path)) is not None:
        return _of_release(of_release[1], of_release[2], asset, snapshot)
    named = re.fullmatch(rf"(.+?)(?:@|/{ASSET}/)(\d{{4}}-\d{{2}}-\d{{2}})/?", path)
    root, at = (named[1], named[2]) if named else (path, snapshot)
    if at is not None and snapshot not in (None, at):
        raise UserError(f"{path} and snapshot={snapshot!r} name two snapshots; give one of them")
    store = Store(root)
    if at is None and (release := _release(store, asset, before)) is not None:
        return releases.opened(store, release), release.snapshot
    before = None if at is not None else before
    made = [one for one in store.snapshots(asset) if before is None or one < before]
    if not made or (at is not None and at not in made):
        there = f"it has {', '.join(made)}" if made else "it has none of any snapshot"
        there += f" before {before}" if before is not None and not made else ""
        remedy = "give a store, or a snapshot of one, that has it, or make it with"
        command = f"twhin {maker(asset)}" + (f" --snapshot {at}" if at else "")
        raise UserError(f"{path}: no {asset} there ({there}); {remedy} `{command}`")
    return store.pinned(), at or made[-1]


def _of_release(root: str, name: str, asset: str, snapshot: str | None) -> tuple[Store, str]:
    store = Store(root)
    release = releases.read(store, name)
    if snapshot not in (None, release.snapshot):
        raise UserError(f"release {name} is of snapshot {release.snapshot}, not of {snapshot}; leave the snapshot out")
    if asset not in release.tables:
        raise UserError(f"{store.root}: release {name} has no {asset}; choose another (`twhin releases`)")
    return releases.opened(store, release), release.snapshot


def has_release(store: Store, before: str) -> bool:
    """Tell whether `locate` finds the model of a release of an older snapshot than `before`."""
    return _release(store.seen_as(None), ASSET, before) is not None


def _release(store: Store, asset: str, before: str | None) -> releases.Release | None:
    """Return the current release, or the newest one of an older snapshot that was current and not rolled back from.

    None where there is none with the table.
    """
    if before is None:
        release = releases.current(store)
    else:
        there = set(releases.names(store)) & releases.trusted(store)
        older = [releases.read(store, name) for name in sorted(there) if name < before]
        # Retention has removed some, and of others it has left the maps alone.
        older = [one for one in older if one.tables.get(asset) in store.versions_of(asset, one.snapshot)]
        release = max(older, key=lambda one: (one.snapshot, one.name), default=None)
    return release if release is not None and asset in release.tables else None


def _registered(path: str, asset: str, snapshot: str | None) -> tuple[Store, str]:
    """Find a registered model, or the table that was made of it: a version stays as long as it is registered."""
    from twhin_pipeline import tracking  # loads mlflow

    registered = tracking.pointer(path)
    at, version = registered["snapshot"], registered["version"]
    if snapshot not in (None, at):
        raise UserError(f"{path} and snapshot={snapshot!r} name two snapshots; give one of them")
    store = Store(registered["store"], registered.get("view"))
    if asset == ASSET:
        return store.pinned(store.manifest(ASSET, at, version)), at
    for made in reversed(store.versions_of(asset, at)):
        manifest = store.manifest(asset, at, made)
        if model_version(manifest) == version:
            base = store.seen_as(None)
            with_it = [
                base.manifest(name, at, held)
                for name, held in manifest.parents.items()
                if name.startswith("embeddings/")
            ]
            return store.pinned(manifest, *with_it), at
    raise UserError(
        f"{path} is version {version} of snapshot {at}, of which {store.root} has no {asset}; make it with "
        f"`twhin export --snapshot {at}`, or load another version of the registered model"
    )


def model_version(manifest: Manifest) -> str:
    """Return the version of the model that a table of vectors was exported from."""
    return next(version for table, version in manifest.parents.items() if table.endswith(ASSET))


def manifest_details(config: TwhinConfig) -> dict[str, Any]:
    """Return what every model's manifest says of its configuration: enough to open it."""
    return {"model": config.model.model_dump(mode="json")}
