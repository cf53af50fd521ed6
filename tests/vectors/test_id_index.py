"""The index of ids finds every id at its row and no other one, whatever ids are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twhin_pipeline.vectors import id_index
from twhin_pipeline.vectors.id_index import IdIndex, hashes

TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "a" * 7,
    "a" * 8,
    "a" * 9,
    "a" * 300,
    "ü",
    "日本語",
    "a\x00b",
    "a\x00",
    "1",
    "01",
    " a",
    "A",
]


def index_of(folder: Path, ids: list[Any], batch: int = 5) -> IdIndex:
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.large_string()
    batches = [pa.array(ids[i : i + batch], kind) for i in range(0, len(ids), batch)]
    id_index.write(folder, batches, kind)
    return IdIndex(folder)


@pytest.mark.parametrize(
    "ids",
    [TEXTS, [f"user-{i}" for i in range(3_000)], [5, -3, 0, 2**63 - 1, -(2**63), 7], []],
    ids=["texts", "many", "integers", "none"],
)
def test_every_id_is_found_at_its_row_in_any_order(tmp_path: Path, ids: list[Any]) -> None:
    index = index_of(tmp_path, ids)
    order = np.random.default_rng(0).permutation(len(ids)).tolist()
    assert index.find([ids[row] for row in order]).tolist() == order and len(index) == len(ids)


def test_what_is_no_id_is_not_found(tmp_path: Path) -> None:
    texts, integers = tmp_path / "texts", tmp_path / "integers"
    texts.mkdir()
    integers.mkdir()
    asked = ["c", "a" * 299, "a\x00b\x00", "A ", "\ud800", "a"]
    assert index_of(texts, TEXTS).find(asked).tolist() == [-1, -1, -1, -1, -1, 1]
    assert index_of(integers, [5, 9]).find([4, 6, 9, 10, -(2**63)]).tolist() == [-1, -1, 1, -1, -1]


def test_ids_of_one_hash_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_index, "hashes", lambda ids: np.arange(len(ids), dtype=np.uint64) * 0 + 7)
    index = index_of(tmp_path, [f"user-{i}" for i in range(40)])
    assert index.find(["user-3", "nobody", "user-39"]).tolist() == [3, -1, 39]


def test_a_hash_depends_on_the_text_alone_and_does_not_change_between_versions() -> None:
    """Indexes on disk are read by later versions."""
    one = hashes(pa.array(["x", "long" * 9, "user-12"], pa.large_string()).slice(1))
    other = hashes(pa.array(["user-12", "long" * 9], pa.large_string()))
    assert one.tolist() == other.tolist()[::-1]
    assert [f"{value:016x}" for value in other.tolist()] == HASHES


HASHES = ["1bbdd433fd071aba", "47b82ce62472f50a"]


def test_hashes_of_similar_ids_differ() -> None:
    ids = pa.array([f"{kind}{i}" for kind in ("user-", "u", "item/2024/") for i in range(100_000)], pa.large_string())
    assert len(np.unique(hashes(ids))) == len(ids)
