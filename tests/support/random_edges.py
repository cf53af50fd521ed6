"""Random edges of the relations in `edge_files`."""

from __future__ import annotations

import numpy as np

RELATION_SIDES = [("user", "user"), ("user", "item"), ("user", "item")]


def random_edges(count, users=40, items=30, seed=0):
    rng = np.random.default_rng(seed)
    found = set()
    while len(found) < count:
        rel = ("follows", "fav", "reply")[rng.integers(3)]
        tail = f"u{rng.integers(users)}" if rel == "follows" else f"i{rng.integers(items)}"
        found.add((f"u{rng.integers(users)}", rel, tail))
    return sorted(found)
