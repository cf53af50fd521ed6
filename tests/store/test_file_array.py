"""FileArray: ranges of a file, and nothing else of it."""

from pathlib import Path

import numpy as np
import pytest

from twhin_pipeline.store import file_array
from twhin_pipeline.store.file_array import FileArray


def test_ranges_come_in_their_order_and_those_that_follow_one_another_are_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.arange(100, dtype=np.int32).tofile(tmp_path / "a")
    reads = []
    plain = file_array.read_at
    monkeypatch.setattr(file_array, "read_at", lambda *given: (reads.append(given[2]), plain(*given)))
    array = FileArray(tmp_path / "a", np.int32)
    starts, lengths = np.array([7, 50, 52, 52, 0]), np.array([2, 2, 0, 3, 1])
    assert array.take(starts, lengths).tolist() == [7, 8, 50, 51, 52, 53, 54, 0]
    assert reads == [4 * 7, 4 * 50, 0]
    assert array.take(np.zeros(0, int), np.zeros(0, int)).tolist() == []
    assert len(array) == 100


def test_a_file_that_ends_early_is_an_error_that_names_it(tmp_path: Path) -> None:
    np.arange(4, dtype=np.int32).tofile(tmp_path / "short")
    with pytest.raises(OSError, match="short: ended early"):
        FileArray(tmp_path / "short", np.int32).take(np.array([2]), np.array([3]))
