"""First vectors: random ones, and over them those of an earlier model. Each rank fills only the rows that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import nn

from twhin_pipeline import remote
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TableConfig
from twhin_pipeline.config.training import PREVIOUS
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.ancestors import Origin, origins_in
from twhin_pipeline.graph import vocabulary
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.model.anchors import Anchor
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.optimizer_state import OptimizerState
from twhin_pipeline.sharding.placement import init_tables, local_shards, table_weights, unwrapped
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.training import new_ids
from twhin_pipeline.training.checkpoint import STEP, load_tensors
from twhin_pipeline.vectors.model_files import ASSET, ModelTables, has_release, locate, vectors_of

BLOCK = 65_536
PATH = "training.initial_checkpoint_dir"
Say = Callable[[str], None]
Array = np.ndarray[Any, Any]
Vectors = Iterator[tuple[pa.Array, Array]]
"""Ids, null where the vector is not to be taken, and their vectors `[n, D]`."""


@dataclass(frozen=True)
class Filled:
    """Rows of a table that this rank has filled, bool `[ids]`, and of all vectors that it was filled from the mean
    (float32 `[D]`; None: of none) and the mean length.
    """

    rows: Array
    mean: Array | None = None
    length: float = 0.0


def initialize(
    model: nn.Module,
    optimizer: OptimizerState,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    ranks: Ranks,
    say: Say,
) -> tuple[tuple[Origin, ...], int]:
    """Fill the tables: at random, then by `pretrained`, then from `training.initial_checkpoint_dir`.

    With `training.new_ids: neighbors` ids that none of these gives a vector then start from their neighbors (new_ids).

    A store without a snapshot stands for its newest release of an older snapshot than the one to train: a model that
    has seen this snapshot, or a later one, would know what evaluation asks for.

    Returns:
        The models that tables start from, and the steps that the optimizers' state has seen.

    Raises:
        UserError: A source is missing, or its vectors do not fit.
    """
    init_tables(model, config.training.seed)
    weights = table_weights(model)
    filled: dict[str, Filled] = {}
    origins: list[Origin] = []
    for i, table in enumerate(config.model.embeddings.tables):
        if table.pretrained is not None:
            origin = f"model.embeddings.tables[{i}].pretrained"
            vectors = _pretrained(table, origin, store, ranks, origins)
            filled[table.name] = _fill(weights[table.name], table, store, snapshot, ranks, vectors, origin, say)
    source = config.training.initial_checkpoint_dir
    if source == PREVIOUS:
        source = _store_with_model(store, snapshot, ranks)
        if source is None:
            say(f"every vector starts at random: no release of a snapshot before {snapshot} is there yet")
    if source is None:
        return tuple(origins), 0
    checkpoint = _checkpoint_in(source)
    if checkpoint is not None:
        _refuse_other_relations(checkpoint, config)
        _refuse_other_rows(checkpoint, vocabulary.compactions(config, store, snapshot))
        load_tensors(checkpoint, {"model": model.state_dict()}, ranks)
        say(f"every vector starts from checkpoint {checkpoint}, by row; the optimizers start afresh")
        return (*origins, _origin_of(checkpoint)), 0
    origin = PATH
    earlier, at = _agreed(ranks, lambda: _earlier_model(source, snapshot))
    tables = ModelTables.open(earlier, at)
    for table in config.model.embeddings.tables:
        if table.name in tables.names:
            vectors = _of_model(tables, table.name)
            result = _fill(weights[table.name], table, store, snapshot, ranks, vectors, origin, say)
            before = filled.get(table.name)
            filled[table.name] = result if before is None else replace(result, rows=result.rows | before.rows)
        else:
            say(f"table {table.name} starts at random: the model of {at} has none")
    _load_operators(unwrapped(model).scorer, config, tables, say)
    if config.training.new_ids == "neighbors":
        _place_new_ids(model, config, store, snapshot, filled, ranks, say)
    steps = 0
    if config.training.carry_optimizer_state:
        steps = _load_states(optimizer, config, store, snapshot, tables, ranks, say)
    return (*origins, Origin.of_model(earlier, tables.manifest, store)), steps


def anchors(config: TwhinConfig, store: Store, snapshot: str, origins: Sequence[Origin], say: Say) -> dict[str, Anchor]:
    """Return what holds known ids of the tables with `pull` or `freeze`; nothing where there is no earlier model.

    The earlier vectors are read from a file that all processes of a machine map; a process holds 8 bytes an id.

    Args:
        config: Its tables, and `training.initial_checkpoint_dir`.
        store: Has the vocabularies.
        snapshot: Theirs.
        origins: As `initialize` returned them, also where the run was interrupted since.
        say: Takes a line about each table.

    Raises:
        UserError: The earlier model is a checkpoint, or it is gone.
    """
    held = [table for table in config.model.embeddings.tables if table.pull or table.freeze]
    if not held or config.training.initial_checkpoint_dir is None or not origins:
        return {}
    origin = origins[-1]
    if origin.checkpoint is not None:
        raise UserError(
            f"{PATH}: {origin} is taken over row by row, so which ids are known is not known; for the pull and freeze "
            f"of {', '.join(table.name for table in held)} give the store of the trained model"
        )
    tables = ModelTables(*_with_vocabularies(*origin.opened(store)))
    result = {}
    for table in held:
        if table.name not in tables.names:
            continue
        ids = store.read(f"vocabulary/{table.name}", snapshot, ["id"]).column("id").combine_chunks()
        place = pc.index_in(ids, value_set=_ids_of(tables, table.name).cast(ids.type))
        rows = place.fill_null(-1).to_numpy().astype(np.int64)
        result[table.name] = Anchor(tables.table(table.name), rows, table.pull, table.freeze)
        how = "keep their vectors" if table.freeze else f"are pulled towards their earlier vectors by {table.pull:g}"
        say(f"{int((rows >= 0).sum()):,} of {len(rows):,} ids of {table.name} {how}")
    return result


def restore_frozen(
    model: nn.Module,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    origins: Sequence[Origin],
    ranks: Ranks,
    held: Mapping[str, Anchor],
) -> None:
    """Write the earlier vectors of frozen tables into this rank's shards once more: not a bit of them may differ."""
    weights = table_weights(model)
    for table in config.model.embeddings.tables:
        if table.name in held and table.freeze:
            tables = ModelTables(*_with_vocabularies(*origins[-1].opened(store)))
            vectors = _of_model(tables, table.name)
            _fill(weights[table.name], table, store, snapshot, ranks, vectors, PATH, lambda line: None)


def untrained_rows(
    config: TwhinConfig, store: Store, snapshot: str, origins: Sequence[Origin]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return, by entity type, the rows whose vectors are as they were drawn: int64 `[n]`, ascending.

    Those are departed ids that neither this training nor the models behind it had an edge of: of a snapshot whose run
    ended before it was published, or of one before a training that started at random.

    Args:
        config: Its tables.
        store: Has the vocabularies.
        snapshot: Theirs.
        origins: As `initialize` returned them. Of a checkpoint all rows count as trained.
    """
    earlier = origins[-1] if origins and config.training.initial_checkpoint_dir is not None else None
    if earlier is not None and earlier.checkpoint is not None:
        return {}
    tables = ModelTables(*_with_vocabularies(*earlier.opened(store))) if earlier is not None else None
    result = {}
    for name in config.model.table_names:
        present = present_rows(store, snapshot, name)
        if present is None:
            continue
        rows = store.manifest(f"vocabulary/{name}", snapshot).rows
        departed = np.setdiff1d(np.arange(rows), present, assume_unique=True)
        if tables is not None and name in tables.names:
            ids = store.read(f"vocabulary/{name}", snapshot, ["id"]).column("id").combine_chunks()
            known = _ids_of(tables, name).drop_null().cast(ids.type)
            seen = pc.index_in(known, value_set=ids.take(pa.array(departed))).drop_null().to_numpy()
            departed = np.delete(departed, seen)
        result[name] = departed
    return result


def _store_with_model(store: Store, snapshot: str, ranks: Ranks) -> str | None:
    """Return the root of the store where it has a release to start from, as rank 0 sees it; else None."""
    root: str | None = None
    if ranks.rank == 0 and has_release(store, before=snapshot):
        root = store.root
    return ranks.broadcast(root)


def _agreed(ranks: Ranks, find: Callable[[], tuple[Store, str]]) -> tuple[Store, str]:
    """Return what rank 0 finds, a pinned store and a snapshot, so that all ranks read the same versions.

    Raises:
        UserError: As `find` does, on all ranks alike.
    """
    result, problem = None, None
    if ranks.rank == 0:
        try:
            earlier, at = find()
            result = earlier.root, earlier.view, at, earlier.pins
        except UserError as error:
            problem = str(error)
    result, problem = ranks.broadcast((result, problem))
    if result is None:
        raise UserError(str(problem))
    root, view, at, pins = result
    return Store(root, view).pinned_at(pins), at


def _earlier_model(source: str, snapshot: str) -> tuple[Store, str]:
    """Locate the model to start from, with the vocabularies that it was trained with."""
    earlier, at = locate(source, before=snapshot)
    return _with_vocabularies(earlier, earlier.manifest(ASSET, at))[0], at


def _with_vocabularies(store: Store, model: Manifest) -> tuple[Store, Manifest]:
    """Return the store with a model and the vocabularies that it was trained with at their versions, and the model."""
    base, at = store.seen_as(None), model.snapshot
    read = {name: version for name, version in model.parents.items() if name.startswith("vocabulary/")}
    with_it = [base.manifest(name, at, version) for name, version in read.items() if "@" not in name]
    return store.pinned(model, *with_it), model


def _origin_of(checkpoint: str) -> Origin:
    """Name a checkpoint, with the training set and the origins that its state names."""
    fs, plain = remote.filesystem(f"{checkpoint}/state.json")
    if not fs.exists(plain):
        return Origin(checkpoint=checkpoint)
    with fs.open(plain, "r") as file:
        state = json.load(file)
    return Origin(checkpoint=checkpoint, training_set=state.get("training_set"), before=origins_in(state))


def _fill(
    target: Any,
    table: TableConfig,
    store: Store,
    snapshot: str,
    ranks: Ranks,
    vectors: Vectors,
    origin: str,
    say: Say,
    what: str = "vectors",
) -> Filled:
    """Copy rows of vectors, or of an optimizer's state, into this rank's shards of `target`, matched by id.

    Rows whose id is not among them stay as they are.

    Returns:
        Which rows of this rank's shards were filled, and what all vectors are in the mean, known here or not.
    """
    ids = store.read(f"vocabulary/{table.name}", snapshot, ["id"]).column("id").combine_chunks()
    shards = [(first, rows, ids.slice(first, len(rows))) for first, rows in local_shards(target)]
    result = Filled(np.zeros(len(ids), bool))
    total, length, taken = np.zeros(table.embedding_dim), 0.0, 0
    for theirs, values in vectors:
        # Integers among texts are the texts that they are written as, as in vocabularies; never the other way round.
        if not (pa.types.is_integer(theirs.type) or (_is_text(theirs.type) and _is_text(ids.type))):
            raise UserError(
                f"{origin}: ids are {theirs.type}, but those of {table.name!r} are {ids.type}; convert them"
            )
        if values.ndim > 1 and values.shape[1] != table.embedding_dim:
            afresh = f", or train once from the start: `--set {PATH}=null`" if origin == PATH else ""
            raise UserError(
                f"{origin}: vectors have {values.shape[1]} elements, but embedding_dim of {table.name!r} is "
                f"{table.embedding_dim}; make them equal{afresh}"
            )
        given = np.flatnonzero(theirs.is_valid().to_numpy(zero_copy_only=False))
        if values.ndim > 1:  # every rank reads all of them in the same order, so the mean is the same
            total, taken = total + values[given].sum(axis=0, dtype=np.float64), taken + len(given)
            length += float(np.linalg.norm(values[given], axis=1).sum(dtype=np.float64))
        for first, rows, known in shards:
            place = pc.index_in(theirs.cast(ids.type), value_set=known)
            matched = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
            if len(matched):
                where = torch.from_numpy(place.drop_null().to_numpy().astype(np.int64)).to(rows.device)
                with torch.no_grad():
                    rows[where] = torch.from_numpy(values[matched]).to(rows)
                result.rows[first + place.drop_null().to_numpy().astype(np.int64)] = True
    count = int(ranks.sum([int(result.rows.sum())])[0])
    if count == 0 and table.pretrained is not None and origin.endswith(".pretrained"):
        raise UserError(f"{origin}: has none of the ids of {table.name!r}; mend the path, or leave it out")
    say(f"{count:,} of {len(ids):,} {what} of {table.name} start from {origin}")
    return replace(result, mean=(total / taken).astype(np.float32), length=length / taken) if taken else result


def _place_new_ids(
    model: nn.Module,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    filled: Mapping[str, Filled],
    ranks: Ranks,
    say: Say,
) -> None:
    """Move new ids to where their known neighbors want them, and say how many."""
    known = {}
    for name in config.model.table_names:
        size = store.manifest(f"vocabulary/{name}", snapshot).rows
        mine = filled.get(name, Filled(np.zeros(size, bool)))
        packed = ranks.gather(np.packbits(mine.rows))
        rows = np.unpackbits(np.bitwise_or.reduce(packed), count=size).astype(bool)
        present = present_rows(store, snapshot, name)
        if present is not None:  # an id without an edge is nobody's neighbor, and need not start anywhere
            here = np.zeros(size, bool)
            here[present] = True
            rows |= ~here
        known[name] = new_ids.Known(rows, mine.mean, mine.length)
    counts = new_ids.start_from_neighbors(model, store, snapshot, config.model.relations, known, ranks)
    for name, (new, placed) in counts.items():
        if new:
            rest = "the type's mean" if known[name].mean is not None else "random vectors"
            say(f"{new:,} ids of {name} are new: {placed:,} start from known neighbors, {new - placed:,} from {rest}")


def _load_states(
    optimizer: OptimizerState,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    tables: ModelTables,
    ranks: Ranks,
    say: Say,
) -> int:
    """Take over the state of optimizers that are the same as before; return the steps that it has seen."""
    kept = tables.manifest.details.get("optimizer")
    if kept is None:
        say("the optimizers start afresh: the earlier model has no state of them (training.carry_optimizer_state)")
        return 0
    scalars = {}
    for table in config.model.embeddings.tables:
        before = kept["tables"].get(table.name)
        if before is None or before["algorithm"] != table.optimizer.name:
            say(f"the optimizer of {table.name} starts afresh: it was {before and before['algorithm']}")
            continue
        if table.freeze and table.optimizer.name == "adam":
            say(f"the optimizer of {table.name} starts afresh: its momentum would move vectors that freeze keeps")
            continue
        for name in before["states"]:
            mine, states = optimizer.tables[table.name][name], _of_states(tables, table.name, name)
            _fill(mine, table, store, snapshot, ranks, states, PATH, say, f"rows of {name} of the optimizer")
        known = optimizer.scalars[table.name]
        scalars[table.name] = {name: value for name, value in before["scalars"].items() if name in known}
    optimizer.count_steps(kept["steps"], scalars)
    operators = kept["operators"]
    if operators["states"] and operators["algorithm"] == config.model.translation_optimizer.name:
        fresh = optimizer.operator_rows()
        rows = {
            state: {name: row for name, row in of_relations.items() if _fits(fresh, state, name, row)}
            for state, of_relations in tables.operator_states().items()
            if state in fresh
        }
        optimizer.load_operator_rows(rows, operators["scalars"])
    return int(kept["steps"])


def _fits(fresh: dict[str, dict[str, torch.Tensor]], state: str, relation: str, row: torch.Tensor) -> bool:
    return relation in fresh[state] and fresh[state][relation].shape == row.shape


def _of_states(tables: ModelTables, name: str, state: str) -> Vectors:
    ids = _ids_of(tables, name)
    for numbers, values in tables.state_blocks(name, state):
        known = int(np.searchsorted(numbers, len(ids)))
        if known:
            yield ids.slice(int(numbers[0]), known), values[:known]


def _ids_of(tables: ModelTables, name: str) -> pa.Array:
    """Return the ids of a model's table in the order of rows; null where no training has given the id its vector.

    That is one that has never had an edge, that had some only in snapshots that no model behind this one was trained
    on, or that is evicted: it starts like a new one.
    """
    asset, store = f"vocabulary/{name}", tables.store
    files = store.files(asset, tables.manifest.snapshot)
    with store.parquet(files[0]) as file:
        noted = [column for column in ("last_snapshot", "evicted") if column in file.schema_arrow.names]
    table = store.read(asset, tables.manifest.snapshot, ["id", *noted]).combine_chunks()
    ids = table.column("id").combine_chunks()
    untrained = np.zeros(len(ids), bool)
    untrained[tables.untrained(name)] = True
    if len(noted) == 2:  # not written by an earlier version of this package
        gone = pc.or_(table.column("last_snapshot").is_null(), table.column("evicted")).combine_chunks()
        untrained |= gone.to_numpy(zero_copy_only=False)
    return pc.if_else(pa.array(untrained), pa.scalar(None, ids.type), ids)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _of_model(tables: ModelTables, name: str) -> Vectors:
    ids = _ids_of(tables, name)
    for numbers, vectors in tables.blocks(name):
        known = int(np.searchsorted(numbers, len(ids)))  # a table may have more rows than its vocabulary
        if known:
            yield ids.slice(int(numbers[0]), known), vectors[:known]


def _pretrained(table: TableConfig, origin: str, store: Store, ranks: Ranks, origins: list[Origin]) -> Vectors:
    """Return the vectors that a table is to start from; the model that they were exported from goes to `origins`."""
    assert table.pretrained is not None
    uri, asset = table.pretrained.embedding_snapshot_uri, f"embeddings/{table.pretrained.emb_name}"
    if uri.endswith(".parquet") or "*" in uri:
        fs, path = remote.filesystem(uri)
        files = sorted(str(file) for file in fs.glob(path))
    else:
        result, at = _agreed(ranks, lambda: _exported(uri, asset))
        fs, files = result.fs, result.files(asset, at)
        origins += _models_of(result, result.manifest(asset, at), store)
    if not files:
        raise UserError(f"{origin}.embedding_snapshot_uri: no file matches {uri!r}; give a Parquet file, glob or store")
    return _vectors_of_files(fs, files, origin)


def _exported(uri: str, asset: str) -> tuple[Store, str]:
    result, at = locate(uri, asset)
    result.manifest(asset, at)  # which version it is, is known from here on
    return result, at


def _models_of(found: Store, vectors: Manifest, child: Store) -> list[Origin]:
    """Return the model that vectors were exported from, where it is there."""
    models = []
    for name, version in vectors.parents.items():
        view = name.removesuffix(ASSET).rstrip("/") or None
        if name.endswith(ASSET):
            home = found.seen_as(view)
            models.append(Origin.of_model(home, home.manifest(ASSET, vectors.snapshot, version), child))
    return models


def _vectors_of_files(fs: Any, files: list[str], origin: str) -> Vectors:
    for file in files:
        with fs.open(file, "rb") as opened:
            yield from _vectors_in(opened, f"{origin}: {file}")


def _vectors_in(opened: Any, origin: str) -> Vectors:
    try:
        parquet = pq.ParquetFile(opened, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"{origin}: cannot be read as Parquet ({error}); mend the path") from error
    missing = {"id", "embedding"} - set(parquet.schema_arrow.names)
    if missing:
        raise UserError(f"{origin}: has no column {' and '.join(sorted(missing))}; rename its columns")
    for batch in parquet.iter_batches(BLOCK, columns=["id", "embedding"]):
        if not len(batch):
            continue
        try:
            vectors = vectors_of(batch.column("embedding"))
        except UserError as error:
            raise UserError(f"{origin}: column embedding: {error}") from error
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise UserError(
                f"{origin}: the vector of {batch.column('id')[int(wrong[0])].as_py()!r} is not finite; leave it out"
            )
        yield batch.column("id"), vectors


def _checkpoint_in(path: str) -> str | None:
    """Return `path` if it is a checkpoint, the latest one in it if it is a run's folder of them, else None."""
    if path.startswith(("models:/", "runs:/")):
        return None
    fs, plain = remote.filesystem(path)
    if fs.exists(f"{plain}/.metadata"):
        return path.rstrip("/")
    steps = [str(file).split("/")[-2] for file in fs.glob(f"{plain}/step-*/.metadata")]
    steps = sorted((step for step in steps if STEP.fullmatch(step)), key=lambda step: int(step.removeprefix("step-")))
    return f"{path.rstrip('/')}/{steps[-1]}" if steps else None


def _refuse_other_relations(checkpoint: str, config: TwhinConfig) -> None:
    """Raise UserError where the rows of operators in a checkpoint are other relations' than the configuration's.

    Entities keep their rows for ever, but relations found in the source are numbered anew in each snapshot.
    """
    fs, plain = remote.filesystem(f"{checkpoint}/state.json")
    if not fs.exists(plain):
        return  # tensors alone, as another program writes them
    with fs.open(plain, "r") as file:
        written = json.load(file)["config"]["model"]["relations"]
    before = [(relation["name"], relation["operator"]) for relation in written]
    if before != [(relation.name, relation.operator) for relation in config.model.relations]:
        raise UserError(
            f"training.initial_checkpoint_dir: {checkpoint}: was trained with other relations, operators or another "
            "order of them, and a checkpoint is taken over row by row; give the store of the trained model, from which "
            "operators are taken by name"
        )


def _refuse_other_rows(checkpoint: str, now: Mapping[str, str | None]) -> None:
    """Raise UserError where entity types were compacted since a checkpoint: its rows are other ids' now."""
    fs, plain = remote.filesystem(f"{checkpoint}/state.json")
    if not fs.exists(plain):
        return  # tensors alone, as another program writes them
    with fs.open(plain, "r") as file:
        before = json.load(file).get("compacted", {})
    moved = [f"{name} in snapshot {at}" for name, at in now.items() if at != before.get(name)]
    if moved:
        raise UserError(
            f"{PATH}: {checkpoint}: is taken over row by row, but rows have other numbers since `twhin compact` "
            f"({', '.join(moved)}); give the store of the trained model, from which vectors are taken by id"
        )


def _load_operators(scorer: Scorer, config: TwhinConfig, tables: ModelTables, say: Say) -> None:
    """Take over the operators of relations that had the same one before."""
    rows, before = scorer.state_rows(), tables.relation_rows()
    operators = {relation.name: relation.operator for relation in tables.config.relations}
    kept = [
        relation.name
        for relation in config.model.relations
        if operators.get(relation.name) == relation.operator
        and before[relation.name].shape == rows[relation.name].shape
    ]
    scorer.load_rows({**rows, **{name: before[name] for name in kept}})
    say(f"{len(kept)} of {len(rows)} relations start from training.initial_checkpoint_dir")
