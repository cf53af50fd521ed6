"""Synthetic graphs of any size: typed, seeded, with power-law degrees and planted communities, written as a stream.

Entity i of a type belongs to community i mod C, and its popularity falls as (i + 1)^-exponent (bounded Zipf, drawn by
inverting the integral of the density, so that no memory grows with the number of entities). An edge's ends are in the
same community with the probability asked for; otherwise the right end is drawn from the whole type.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

BLOCK = 1_000_000
Ids = Literal["string", "integer", "indexed"]


@dataclass(frozen=True)
class Kind:
    """A relation to generate: its name, its sides' entity types, and its share of the edges, beside the others'."""

    name: str
    lhs: str
    rhs: str
    share: float = 1.0


KINDS = (
    Kind("follows", "user", "user", 0.4),
    Kind("fav", "user", "item", 0.3),
    Kind("reply", "user", "item", 0.1),
    Kind("retweet", "user", "item", 0.2),
)


def generate(
    path: str,
    *,
    users: int = 50_000,
    items: int = 20_000,
    edges: int = 1_000_000,
    communities: int = 50,
    within: float = 0.8,
    exponent: float = 0.75,
    ids: Ids = "string",
    seed: int = 0,
    snapshot: str = "2025-01-01",
) -> str:
    """Write a graph of users and items as the Parquet file `path`, and return the path of a ready configuration.

    The configuration lies beside the edges (`<name>.yaml`) and has the one snapshot. `within` is the probability that
    an edge joins two of a community (by draw from the whole type it does so by chance too). Ids are `string`
    (`user_17`), `integer`, or `indexed` (rows, as in the published system); the graph is the same. Edges may repeat, as
    popular pairs do; ingestion merges them.

    Raises:
        UserError: A number is out of its range, or the path does not end in .parquet.
    """
    sizes = {"user": users, "item": items}
    write(path, sizes, KINDS, edges, communities=communities, within=within, exponent=exponent, ids=ids, seed=seed)
    config = f"{path.removesuffix('.parquet')}.yaml"
    Path(config).write_text(_config(path, sizes, KINDS, ids, snapshot), encoding="utf-8")
    return config


def generate_like(config: TwhinConfig, path: str | None = None, edges: int = 10_000, seed: int = 0) -> str:
    """Write indexed edges that fit `config` (its tables, `num_embeddings` and relations), and return their path.

    `path` may be left out where `train_data.data_root` tells it: a `*` in it becomes `part-00000`.

    Raises:
        UserError: A table has no `num_embeddings`, or no path is to be had.
    """
    if path is None:
        root = config.train_data.data_root
        if root is None or "://" in root:
            raise UserError("generate: train_data.data_root names no local files; give the path of the Parquet file")
        path = root.replace("*", "part-00000")
    sizes = {}
    for number, table in enumerate(config.model.embeddings.tables):
        if table.num_embeddings is None:
            raise UserError(
                f"model.embeddings.tables[{number}].num_embeddings: is left out, so generate cannot tell how many "
                f"{table.name} entities to make; give it"
            )
        sizes[table.name] = table.num_embeddings
    kinds = [Kind(relation.name, relation.lhs, relation.rhs) for relation in config.model.relations]
    write(path, sizes, kinds, edges, communities=50, within=0.8, exponent=0.75, ids="indexed", seed=seed)
    return path


def write(
    path: str,
    sizes: dict[str, int],
    kinds: Sequence[Kind],
    edges: int,
    *,
    communities: int,
    within: float,
    exponent: float,
    ids: Ids,
    seed: int,
) -> None:
    """Write `edges` edges between entity types of the given `sizes`, a block at a time; the same file for a seed.

    Raises:
        UserError: A number is out of its range, or the path does not end in .parquet.
    """
    _check(path, sizes, edges, communities=communities, within=within, exponent=exponent, ids=ids, seed=seed)
    communities = min(communities, *sizes.values())
    shares = np.cumsum([kind.share for kind in kinds])
    id_type = pa.int64() if ids != "string" else pa.string()
    schema = pa.schema([("lhs", id_type), ("rel", pa.int64() if ids == "indexed" else pa.string()), ("rhs", id_type)])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    draft = f"{path}.part"
    with pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        for block, start in enumerate(range(0, edges, BLOCK)):
            # Six numbers an edge, keyed by seed and block.
            rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, block]))
            unit = rng.random((6, min(BLOCK, edges - start)))
            rel = np.searchsorted(shares, unit[0] * shares[-1], side="right").clip(max=len(kinds) - 1)
            lhs, rhs = np.empty(len(rel), np.int64), np.empty(len(rel), np.int64)
            for number, kind in enumerate(kinds):
                at = np.flatnonzero(rel == number)
                ends = _draw(unit[1:, at], sizes[kind.lhs], sizes[kind.rhs], communities, within, exponent)
                lhs[at], rhs[at] = ends
                if kind.lhs == kind.rhs:
                    _unloop(lhs, rhs, at, sizes[kind.rhs], communities)
            columns = _columns(lhs, rel, rhs, kinds, ids)
            writer.write_table(pa.table(columns, schema=schema), row_group_size=BLOCK)
    os.replace(draft, path)


def _draw(
    unit: np.ndarray, heads: int, tails: int, communities: int, within: float, exponent: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of edges from `unit` [5, E] uniform numbers."""
    lhs = _zipf(unit[0], np.full(unit.shape[1], heads), exponent)
    community = lhs % communities
    members = (tails - community + communities - 1) // communities
    inside = community + communities * _zipf(unit[1], members, exponent)
    outside = _zipf(unit[2], np.full(unit.shape[1], tails), exponent)
    # Popularity alone would make the head's favourites the same for all: half of the inside draws are uniform.
    even = community + communities * np.minimum((unit[1] * members).astype(np.int64), members - 1)
    inside = np.where(unit[4] < 0.5, even, inside)
    return lhs, np.where(unit[3] < within, inside, outside)


def _zipf(unit: np.ndarray, size: np.ndarray, exponent: float) -> np.ndarray:
    """Return ranks from 0 to size - 1 with a density that falls as (rank + 1)^-exponent."""
    if exponent == 1:
        drawn = (size + 1.0) ** unit
    else:
        drawn = (unit * ((size + 1.0) ** (1 - exponent) - 1) + 1) ** (1 / (1 - exponent))
    return np.clip(drawn.astype(np.int64) - 1, 0, size - 1)


def _unloop(lhs: np.ndarray, rhs: np.ndarray, at: np.ndarray, size: int, communities: int) -> None:
    """Send an edge from an entity to itself to the community's next member (or, alone there, to the type's next)."""
    loops = at[lhs[at] == rhs[at]]
    moved = rhs[loops] + communities
    moved = np.where(moved < size, moved, rhs[loops] % communities)
    rhs[loops] = np.where(moved == lhs[loops], (lhs[loops] + 1) % size, moved)


def _columns(lhs: np.ndarray, rel: np.ndarray, rhs: np.ndarray, kinds: Sequence[Kind], ids: Ids) -> list[Any]:
    if ids == "indexed":
        return [lhs, rel.astype(np.int64), rhs]
    names = pa.array([kind.name for kind in kinds])
    relation = names.take(pa.array(rel))
    if ids == "integer":
        return [lhs, relation, rhs]
    sides = []
    for side, rows in (("lhs", lhs), ("rhs", rhs)):
        types = pa.array([f"{getattr(kind, side)}_" for kind in kinds]).take(pa.array(rel))
        sides.append(pc.binary_join_element_wise(types, pa.array(rows).cast(pa.string()), ""))
    return [sides[0], relation, sides[1]]


def _check(path: str, sizes: dict[str, int], edges: int, **numbers: Any) -> None:
    wrong = None
    if not path.endswith(".parquet") or "://" in path:
        wrong = f"{path!r} must be a local path that ends in .parquet"
    elif edges < 1:
        wrong = f"edges must be at least 1, got {edges}"
    elif min(sizes.values()) < 2:
        wrong = f"an entity type needs at least 2 entities, got {sizes}"
    elif numbers["communities"] < 1:
        wrong = f"communities must be at least 1, got {numbers['communities']}"
    elif not 0 <= numbers["within"] <= 1:
        wrong = f"within must be between 0 and 1, got {numbers['within']}"
    elif not 0 <= numbers["exponent"] <= 3:
        wrong = f"exponent must be between 0 and 3, got {numbers['exponent']}"
    elif numbers["ids"] not in ("string", "integer", "indexed"):
        wrong = f"ids must be string, integer or indexed, got {numbers['ids']!r}"
    elif numbers["seed"] < 0:
        wrong = f"seed must not be negative, got {numbers['seed']}"
    if wrong:
        raise UserError(f"generate: {wrong}")


def _config(path: str, sizes: dict[str, int], kinds: Sequence[Kind], ids: Ids, snapshot: str) -> str:
    """Return the YAML of a configuration that trains on the file as it is."""
    tables = [
        {"name": name, "embedding_dim": 64, "optimizer": {"rowwise_adagrad": {"lr": 0.1}}}
        | ({"num_embeddings": size} if ids == "indexed" else {})
        for name, size in sizes.items()
    ]
    source: dict[str, Any] = {"path": os.path.basename(path), "snapshots": [snapshot]}
    if ids == "indexed":
        source["ids"] = "indexed"
    data = {
        "source": source,
        "model": {
            "embeddings": {"tables": tables},
            "relations": [{"name": k.name, "lhs": k.lhs, "rhs": k.rhs, "operator": "translation"} for k in kinds],
            "comparator": "cosine",
            "temperature": 0.1,
        },
        "training": {"num_epochs": 3},
        "train_data": {"per_replica_batch_size": 4096, "global_negatives": 256, "in_batch_negatives": 64},
        "loss": {"name": "softmax"},
    }
    return "# A generated graph: `twhin run --config` this file trains on it.\n" + yaml.safe_dump(data, sort_keys=False)
