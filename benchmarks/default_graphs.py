"""The graphs of `defaults.py`: what their files are, and what is to be reached.

Those of `GRAPHS` lie in the folder of the data sets; those of `GENERATED` are written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twhin_pipeline.operations.generate import KINDS, Kind, write
from twhin_pipeline.operations.shop import Truth, generate_shop, load_truth

RECALL, MRR, ALL = "recall@20", "filtered_mrr", "all"
BASELINES = {"popularity": "baseline", "item_knn": "item_knn", "als": "als"}
"""The column of each baseline in the table `evaluation`."""

GOWALLA, FLICKR, FB15K_237, WN18RR, DEBIAN = 0.165, 0.0118, 0.33, 0.46, 0.258
SHOP_TO_ORACLE = 0.94
"""Of the shop's Recall@20 over all relations, the least ratio to the oracle."""
SHOP_PRODUCTS = 2_000
"""The shop log's products before its newcomers."""
LEAST_TO_BEST, LEAST_TO_ORACLE = 0.98, 0.92
"""Of the shop and of generated graphs: the least ratio to the best baseline; of generated ones also to the oracle."""


@dataclass(frozen=True)
class Goal:
    """A figure must be at least `floor`; with `of`, at least `floor` times the best of these (or the oracle)."""

    relation: str | None
    """Which one; None: each relation with enough test edges."""
    floor: float
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A graph in files, as its owner would describe it."""

    files: tuple[str, ...]
    """What has to be in the data folder."""
    sources: tuple[Mapping[str, Any], ...]
    """The section `sources`; paths are below the data folder."""
    tables: tuple[str, ...]
    relations: tuple[tuple[str, str, str], ...]
    """Name, type of the heads, type of the tails."""
    split: Mapping[str, Any] | None = None
    metric: str | None = None
    """What is compared. None: Recall@20 where a relation joins two entity types, else filtered MRR."""
    overall: bool = False
    """Whether all relations together are compared as well."""
    goals: tuple[Goal, ...] = ()
    truth: str | None = None
    """File with what a generated shop was drawn from."""


def _events(*names: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, "user", "product") for name in names)


FOLLOWS = ("follows", "user", "user")
KNOWLEDGE = {"tables": ("entity",), "relations": (("*", "entity", "entity"),), "split": {"strategy": "given"}}
GRAPHS: dict[str, Graph] = {
    "shop": Graph(
        files=("shop/2026-10-30.parquet", "shop/truth.npz"),
        sources=({"path": "shop/2026-10-30.parquet", "columns": {"time": "time"}},),
        tables=("user", "product"),
        relations=(*_events("view", "cart", "buy"), FOLLOWS),
        split={"strategy": "temporal", "validation": 0.05, "test": 0.1, "relations": ["view", "cart", "buy"]},
        metric=RECALL,
        overall=True,
        goals=(Goal(ALL, SHOP_TO_ORACLE, ("oracle",)), Goal(None, LEAST_TO_BEST, tuple(BASELINES))),
        truth="shop/truth.npz",
    ),
    "gowalla": Graph(
        files=("gowalla/edges.parquet",),
        sources=({"path": "gowalla/edges.parquet", "columns": {"split": "split"}},),
        tables=("user", "place"),
        relations=(("visits", "user", "place"),),
        split={"strategy": "given", "validation": 0.05},
        metric=RECALL,
        goals=(Goal("visits", GOWALLA),),
    ),
    "flickr": Graph(
        files=("flickr/edges.parquet",),
        sources=({"path": "flickr/edges.parquet"},),
        tables=("user", "photo"),
        relations=(FOLLOWS, ("favorites", "user", "photo")),
        split={"strategy": "random", "validation": 0.05, "test": 0.1, "relations": ["favorites"]},
        metric=RECALL,
        goals=(Goal("favorites", FLICKR), Goal("favorites", 1.0, ("als",))),
    ),
    "fb15k-237": Graph(
        files=("fb15k-237/edges.parquet",),
        sources=({"path": "fb15k-237/edges.parquet", "columns": {"split": "split"}},),
        metric=MRR,
        overall=True,
        goals=(Goal(ALL, FB15K_237),),
        **KNOWLEDGE,
    ),
    "wn18rr": Graph(
        files=("wn18rr/edges.parquet",),
        sources=({"path": "wn18rr/edges.parquet", "columns": {"split": "split"}},),
        metric=MRR,
        overall=True,
        goals=(Goal(ALL, WN18RR),),
        **KNOWLEDGE,
    ),
    "debian": Graph(
        files=("debian/2025-08-09.parquet",),
        sources=({"path": "debian/2025-08-09.parquet"},),
        tables=("package", "maintainer", "tag", "section"),
        relations=(
            *((name, "package", "package") for name in ("depends", "recommends", "suggests", "enhances")),
            ("maintained_by", "package", "maintainer"),
            ("tagged", "package", "tag"),
            ("in_section", "package", "section"),
        ),
        metric=MRR,
        overall=True,
        goals=(Goal(ALL, DEBIAN),),
    ),
}

TO_BEST = Goal(None, LEAST_TO_BEST, tuple(BASELINES))
TO_ORACLE = Goal(None, LEAST_TO_ORACLE, ("oracle",))


@dataclass(frozen=True)
class Log:
    """Arguments of a generated shop; users and products grow with `--scale`."""

    users: int
    products: int
    communities: int
    events_per_user: float
    events: tuple[str, ...] = ("view", "cart", "buy")
    exponent: float = 1.0
    background: float = 0.15
    follows_per_user: float = 0.0
    sigma: float = 0.8

    def make(self, folder: Path, scale: float) -> Graph:
        """Write the log and return how to read it."""
        users, products = _scaled(self.users, scale), max(self.communities, _scaled(self.products, scale))
        generate_shop(
            str(folder), users=users, products=products, communities=self.communities,
            events_per_user=self.events_per_user, events=dict.fromkeys(self.events), exponent=self.exponent,
            background=self.background, follows_per_user=self.follows_per_user, sigma=self.sigma, format="parquet",
        )  # fmt: skip
        columns = {"lhs": "user_id", "rel": "event_type", "rhs": "product_id", "time": "event_time"}
        sources: list[Mapping[str, Any]] = [{"path": "events.parquet", "columns": columns}]
        relations = _events(*self.events)
        if self.follows_per_user:
            columns = {"lhs": "follower", "rhs": "followee"}
            sources.append({"path": "follows.parquet", "relation": "follows", "columns": columns})
            relations += (FOLLOWS,)
        split = {"strategy": "temporal", "validation": 0.05, "test": 0.1, "relations": list(self.events)}
        return Graph(
            files=(), sources=tuple(sources), tables=("user", "product"), relations=relations, split=split,
            metric=RECALL, overall=len(self.events) > 1, goals=(TO_BEST, TO_ORACLE), truth="truth.npz",
        )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Arguments of a generated graph with communities; entities and edges grow with `--scale`."""

    sizes: Mapping[str, int]
    kinds: tuple[Kind, ...]
    edges: int
    communities: int
    within: float = 0.8
    exponent: float = 0.75

    def make(self, folder: Path, scale: float) -> Graph:
        """Write the edges and return how to read them."""
        sizes = {name: _scaled(size, scale) for name, size in self.sizes.items()}
        write(
            str(folder / "edges.parquet"), sizes, self.kinds, _scaled(self.edges, scale), communities=self.communities,
            within=self.within, exponent=self.exponent, ids="string", seed=0,
        )  # fmt: skip
        return Graph(
            files=(), sources=({"path": "edges.parquet"},), tables=tuple(sizes),
            relations=tuple((kind.name, kind.lhs, kind.rhs) for kind in self.kinds),
            split={"strategy": "random", "validation": 0.05, "test": 0.1}, goals=(TO_BEST,),
        )  # fmt: skip


def _scaled(number: int, scale: float) -> int:
    return max(2, round(number * scale))


GENERATED: dict[str, Log | Network] = {
    "few-tastes": Log(1_000, 500, 3, 60.0, ("view", "buy"), follows_per_user=6.0),
    "many-tastes": Log(8_000, 6_000, 300, 20.0, ("view",), follows_per_user=6.0),
    "flat": Log(3_000, 2_000, 20, 40.0, exponent=0.0),
    "steep": Log(3_000, 2_000, 20, 40.0, exponent=1.6),
    "dense": Log(1_000, 400, 10, 120.0, ("view",), exponent=0.7),
    "sparse": Log(20_000, 5_000, 20, 6.0, follows_per_user=4.0),
    "six-events": Log(5_000, 2_000, 30, 40.0, ("view", "cart", "buy", "wishlist", "share", "review")),
    "many-users": Log(300_000, 3_000, 20, 1.5, ("view", "buy"), background=0.1),
    "follows-only": Network({"user": 8_000}, (Kind(*FOLLOWS),), 150_000, 50),
    "users-and-items": Network({"user": 8_000, "item": 4_000}, KINDS, 200_000, 40),
}


def read_truth(path: Path) -> Truth:
    """Read what a shop was drawn from: `twhin generate` wrote it, or, with fewer arrays, the shop log's own program."""
    with np.load(path) as file:
        if "ucom" not in file.files:
            return load_truth(str(path))
        communities, community, popularity = file["ucom"], file["icom"], file["ipop"].copy()
    # The newcomers of day 31, which are no part of the log, and the mean of each user's own mixture, which is not kept.
    popularity[SHOP_PRODUCTS:] = 0
    return Truth(
        user_ids=np.array([f"u_{n:06d}" for n in range(len(communities))], np.bytes_),
        product_ids=np.array([f"SKU-{n:05d}" for n in range(len(community))], np.bytes_),
        user_communities=communities.astype(np.int32), mixture=np.full(len(communities), 5 / 7),
        product_community=community.astype(np.int32), popularity=popularity, background=0.15, first_event="view",
    )  # fmt: skip


def configuration(graph: Graph, folder: Path, seed: int) -> dict[str, Any]:
    """Return the minimal configuration of a graph whose files are in `folder`.

    Beside what the graph is, it has the seeds, and no refit, as the figures are of the evaluated model.
    """
    data: dict[str, Any] = {
        "sources": [{**source, "path": str(folder / source["path"])} for source in graph.sources],
        "model": {
            "embeddings": {"tables": [{"name": name} for name in graph.tables]},
            "relations": [dict(zip(("name", "lhs", "rhs"), relation, strict=True)) for relation in graph.relations],
        },
        "training": {"refit": False, "seed": seed},
        "negatives": {"seed": seed},
    }
    return data if graph.split is None else {**data, "split": dict(graph.split)}
