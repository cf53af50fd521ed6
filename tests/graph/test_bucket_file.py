"""BucketFile: what was added to a bucket, in order, by few reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from counted_reads import counted_reads

from twhin_pipeline.graph import bucket_file
from twhin_pipeline.graph.bucket_file import BucketFile

RECORD = np.dtype([("a", np.int32), ("b", np.float32)])
BUCKETS = 8


def piece(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    which = np.sort(np.random.default_rng(seed).integers(BUCKETS, size=size))
    records = np.empty(size, RECORD)
    records["a"], records["b"] = seed, np.arange(size)
    return records, np.searchsorted(which, np.arange(BUCKETS + 1))


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
def test_a_bucket_has_what_was_added_to_it_in_that_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(bucket_file, "BYTES_AT_ONCE", at_once)
    added = [(group, *piece(size, seed)) for seed, (group, size) in enumerate([(1, 50), (0, 30), (1, 0), (1, 70)])]
    with BucketFile(str(tmp_path / "b"), RECORD) as file:
        for group, records, ends in added:
            file.add(group, records, ends)
        for group in (0, 1, 2):
            for bucket in range(BUCKETS):
                parts = [r[e[bucket] : e[bucket + 1]].tolist() for g, r, e in added if g == group]
                assert file.read(group, bucket).tolist() == [one for part in parts for one in part]
        file.add(1, *piece(5, 9))
        assert sum(len(file.read(1, bucket)) for bucket in range(BUCKETS)) == 125, "more can be added after reading"


def test_reads_grow_in_proportion_to_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted_reads(monkeypatch, 4000)
    counts = {}
    for pieces in (100, 400):
        reads.clear()
        with BucketFile(str(tmp_path / str(pieces)), RECORD) as file:
            for seed in range(pieces):
                file.add(0, *piece(10, seed))
            assert sum(len(file.read(0, bucket)) for bucket in range(BUCKETS)) == 10 * pieces
        counts[pieces] = len(reads)
    assert counts[400] <= 4 * counts[100] and counts[400] < 400
