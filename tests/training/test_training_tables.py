"""What ranks read of the training set, and what of it they hold in memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import SNAPSHOT, planted_config, write_planted

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Store, file_array
from twhin_pipeline.training import training_tables
from twhin_pipeline.training.dataset import EdgesDataset

CHUNK, POOL, ROWS = 64, 8, 20_000


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that were read of each file of the training set's local copies, by the file's name."""
    counted: Counter[str] = Counter()
    plain = file_array.read_at

    def counting(descriptor: int, into: np.ndarray, position: int, name: str) -> None:
        counted[Path(name).name] += into.nbytes
        plain(descriptor, into, position, name)

    monkeypatch.setattr(file_array, "read_at", counting)
    return counted


def many_edges(store: Store, edges: int) -> None:
    """Write vocabularies, positives and negatives of `edges` edges of one relation, in chunks of CHUNK."""
    write_planted(store, config())
    for name in ("user", "item"):
        with store.replace(f"vocabulary/{name}", SNAPSHOT, config_hash="test") as draft:
            draft.write(pa.table({"id": np.arange(ROWS), "row": np.arange(ROWS)}))
    rng = np.random.default_rng(0)
    chunk = np.arange(edges) // CHUNK
    columns = {
        "chunk": chunk.astype(np.int32),
        "lhs": rng.integers(0, ROWS, edges),
        "rhs": rng.integers(0, ROWS, edges),
        "rel": np.zeros(edges, np.int32),
        "weight": np.ones(edges, np.float32),
    }
    units = np.arange(2 * (chunk[-1] + 1))
    lists = [pa.array(rng.integers(0, ROWS, (len(units), POOL)).tolist(), pa.list_(pa.int64()))]
    lists += [pa.array([[1]] * len(units), pa.list_(pa.int32()))] * 2
    negatives = {"epoch": units * 0, "chunk": units // 2, "side": (units % 2).astype(np.int8)}
    negatives |= dict(zip(("row", "mask_position", "mask_candidate"), lists, strict=True))
    for asset, table in (("training_set/positives", columns), ("training_set/negatives", negatives)):
        with store.replace(asset, SNAPSHOT, config_hash="test") as draft:
            draft.write(pa.table(table))
            draft.details = {"chunk_size": CHUNK}


def config(**sections: Any) -> TwhinConfig:
    training = {"num_epochs": 2}
    return planted_config(negatives={"chunk_size": CHUNK, "epochs": 1}, training=training, **sections)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_reads_the_edges_and_pools_of_its_own_steps_alone(
    tmp_path: Path, read: Counter[str], world_size: int
) -> None:
    store = Store(str(tmp_path))
    write_planted(store, planted_config())
    edges = store.manifest("training_set/positives", SNAPSHOT).rows
    of_ranks = []
    for rank in range(world_size):
        dataset = EdgesDataset(config(), store, SNAPSHOT, rank=rank, world_size=world_size)
        read.clear()
        mine = sum(batch.num_edges for batch in dataset)
        assert read["edges"] == 12 * mine
        of_ranks.append(read.copy())
    assert sum(of_rank["edges"] for of_rank in of_ranks) == 12 * edges * dataset.num_epochs
    pools = sum(of_rank["rows"] for of_rank in of_ranks)
    assert pools == 2 * 2 * dataset.pool * dataset.num_chunks * dataset.num_epochs, "two sides, two bytes a row"


def test_opening_a_training_set_again_reads_none_of_its_edges(tmp_path: Path, read: Counter[str]) -> None:
    store = Store(str(tmp_path))
    write_planted(store, config())
    for settings in (config(), config(train_data={"global_negatives": "all", "in_batch_negatives": 0})):
        EdgesDataset(settings, store, SNAPSHOT)
        read.clear()
        EdgesDataset(settings, store, SNAPSHOT)
        assert not read


def held(store: Store, settings: TwhinConfig, steps: int = 20) -> int:
    """Return the most bytes that opening a training set and some of its steps take at a time."""
    next(iter(EdgesDataset(settings, store, SNAPSHOT)))  # makes the local copies, and compiles
    tracemalloc.start()
    for _ in itertools.islice(EdgesDataset(settings, store, SNAPSHOT), steps):
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


EVERY = {"train_data": {"global_negatives": "all", "in_batch_negatives": 0, "sampled_per_step": 9}}


@pytest.mark.parametrize("sections", [{}, {**EVERY, "loss": {"log_q": True}}], ids=["pools", "every entity"])
def test_memory_of_a_rank_does_not_grow_with_the_edges(tmp_path: Path, sections: dict[str, Any]) -> None:
    few, many = 20_000, 320_000
    most = []
    for edges in (few, many):
        store = Store(str(tmp_path / str(edges)))
        many_edges(store, edges)
        most.append(held(store, config(**sections)))
    # Positives alone would take 12 bytes an edge. Some numbers for each chunk are all that grows.
    assert most[1] - most[0] < 200 * (many - few) / CHUNK


def test_local_copies_are_made_a_batch_of_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    many_edges(store, 320_000)
    monkeypatch.setattr(training_tables, "EDGES_AT_ONCE", 4096)
    arrow = pa.default_memory_pool()
    before = arrow.bytes_allocated()
    tracemalloc.start()
    dataset = EdgesDataset(config(), store, SNAPSHOT)
    dataset._negatives(0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12 * 320_000 / 2
    assert arrow.bytes_allocated() - before < 1 << 20


def test_the_local_copy_has_wide_rows_where_they_need_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_planted(store, config())
    far = 2**31 + 5
    tables = planted_config().model.model_dump()["embeddings"]["tables"]
    tables[1]["num_embeddings"] = far + 1
    edges = {"chunk": [0, 0], "lhs": [0, 1], "rhs": [3, far], "rel": [0, 0], "weight": [1.0, 1.0]}
    types = {"chunk": pa.int32(), "rel": pa.int32(), "weight": pa.float32()}
    with store.replace("training_set/positives", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table({name: pa.array(values, types.get(name, pa.int64())) for name, values in edges.items()}))
    model = planted_config().model.model_dump()
    model["embeddings"]["tables"] = tables
    dataset = EdgesDataset(planted_config(model=model), store, SNAPSHOT)
    records, lengths = dataset.positives.read(np.array([0]))
    assert records["rhs"].tolist() == [3, far] and lengths.tolist() == [2]
