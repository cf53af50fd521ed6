"""Arrays in temporary files mapped into memory, which the system may write back to disk."""

from __future__ import annotations

from typing import Any

import numpy as np


def mapped_zeros(path: str, length: int, dtype: type) -> np.ndarray[Any, Any]:
    """Return zeros `[length]` in a new file mapped into memory (an empty file cannot be mapped)."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=(length,))) if length else np.zeros(0, dtype)
