"""Arrays in temporary files mapped into memory, which the system may write back to disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline import scratch


def mapped_zeros(path: str, length: int, dtype: type) -> np.ndarray[Any, Any]:
    """Return zeros `[length]` in a new file mapped into memory (an empty file cannot be mapped).

    Raises:
        OSError: The disk has too little room.
    """
    if not length:
        return np.zeros(0, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="w+", shape=(length,))
    scratch.reserve(path)
    return np.asarray(mapped)
