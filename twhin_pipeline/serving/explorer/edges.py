"""An entity's edges in the graph of a release, and why the graph would recommend what the model recommends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import duckdb
import pyarrow as pa

from twhin_pipeline.serving.explorer.opened import Opened
from twhin_pipeline.store import database

RAW_EDGES = "raw_edges"
REASONS = 2
"""Reasons of each kind that a recommendation has at most; of `near`, one more."""
NEAR = 50
"""Entities with near vectors that are asked for the tail."""
POPULAR = 100_000
"""Ends of a known tail that are looked at, at most: of a tail that everybody has they say little, and take long."""


@dataclass(frozen=True)
class Linked:
    """What an entity is linked with by one relation, seen from one side."""

    relation: str
    side: str
    """The side on which the entity itself is."""
    entity: str
    """The entity type of the others."""
    count: int
    ids: list[str]
    """Some of them: those of the heaviest edges."""


def linked(con: duckdb.DuckDBPyConnection, opened: Opened, entity: str, id: str, limit: int) -> list[Linked] | None:
    """Return what an entity is linked with in `raw_edges`: training edges and held-out ones alike.

    The table is sorted by relation and head: an entity's tails are read from a few row groups, its heads by a pass over
    the column of tails.

    Args:
        con: A connection that can read the store.
        opened: The release.
        entity: The entity type.
        id: Its id, as text.
        limit: Ids of each relation and side that are returned at most.

    Returns:
        The relations of the entity type, by side, those without an edge included; None where the release has no edges.
    """
    edges = _edges(opened)
    if edges is None:
        return None
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for side, other in (("lhs", "rhs"), ("rhs", "lhs")):
        names = [name for name, mine, here, _ in opened.ends if mine == side and here == entity]
        if names:
            query = (
                f"SELECT rel, {other}::VARCHAR, count(*) OVER (PARTITION BY rel) FROM {edges} "
                f"WHERE rel IN ({_listed(names)}) AND {side} = ? "
                f"QUALIFY row_number() OVER (PARTITION BY rel ORDER BY weight DESC, {other}) <= ? "
                f"ORDER BY rel, weight DESC, {other}"
            )
            for name, one, count in _rows(con, opened, query, [_value(opened, id), limit]):
                found.setdefault((name, side), (count, []))[1].append(one)
    return [
        Linked(name, side, theirs, *found.get((name, side), (0, [])))
        for name, side, mine, theirs in opened.ends
        if mine == entity
    ]


def reasons(
    con: duckdb.DuckDBPyConnection, opened: Opened, relation: str, head: str, tails: Sequence[str]
) -> dict[str, list[dict[str, Any]]] | None:
    """Find what in the graph speaks for recommended tails. The model does not use it: it is a reading beside its score.

    Four kinds, in this order, each with at most `REASONS` for a tail:

    - `direct`: an edge between the two by another relation, or the other way round.
    - `together`: a tail that the head has already and whose heads overlap with those of the recommended one, the most
      similar first. The similarity is the cosine of the two sets of heads (item-kNN; Sarwar et al., "Item-based
      Collaborative Filtering Recommendation Algorithms", WWW 2001).
    - `via`: an entity that both are linked with, the rarest first, as each counts by 1 / log(its edges) (Adamic and
      Adar, "Friends and neighbors on the Web", 2003).
    - `near`: entities with the nearest vectors to the head's that have the tail by the relation.

    Args:
        con: A connection that can read the store.
        opened: The release.
        relation: The relation by which tails were recommended.
        head: The head's id.
        tails: Ids of the recommended tails.

    Returns:
        By tail a list of reasons, which have `kind` and what the kind needs; None where the release has no edges.
    """
    edges = _edges(opened)
    if edges is None:
        return None
    result: dict[str, list[dict[str, Any]]] = {tail: [] for tail in tails}
    if not tails:
        return result
    mine, theirs = next((here, other) for name, side, here, other in opened.ends if (name, side) == (relation, "lhs"))
    tails = list(result)
    con.register("tails", pa.table({"id": pa.array([_value(opened, tail) for tail in tails])}))
    con.register(
        "ends", pa.table(dict(zip(("rel", "side", "mine", "other"), zip(*opened.ends, strict=True), strict=True)))
    )
    both = (
        f"(SELECT rel, 'lhs' AS side, lhs AS a, rhs AS b FROM {edges} UNION ALL "
        f"SELECT rel, 'rhs' AS side, rhs AS a, lhs AS b FROM {edges})"
    )
    of_head = [_value(opened, head), mine]
    query = (
        f"SELECT b::VARCHAR, rel, side FROM {both} JOIN ends USING (rel, side) "
        "WHERE a = ? AND mine = ? AND other = ? AND b IN (SELECT id FROM tails) ORDER BY rel, side"
    )
    for tail, name, side in _rows(con, opened, query, [*of_head, theirs]):
        if (name, side) != (relation, "lhs"):
            result[tail].append({"kind": "direct", "relation": name, "side": side})
    for tail, together in _together(con, opened, edges, relation, head).items():
        result[tail] += together
    for tail, via in _via(con, opened, both, of_head, theirs).items():
        result[tail] += via
    for tail, near in _near(con, opened, edges, mine, relation, head).items():
        result[tail] += near
    return result


def _together(
    con: duckdb.DuckDBPyConnection, opened: Opened, edges: str, relation: str, head: str
) -> dict[str, list[dict[str, Any]]]:
    value = _value(opened, head)
    query = (
        f"WITH known AS (SELECT rhs FROM {edges} WHERE rel = $rel AND lhs = $head), "
        f"heads AS (SELECT lhs, rhs FROM {edges} WHERE rel = $rel AND lhs <> $head "
        "AND rhs IN (SELECT rhs FROM known UNION ALL SELECT id FROM tails) "
        "QUALIFY row_number() OVER (PARTITION BY rhs ORDER BY lhs) <= $most), "
        "sizes AS (SELECT rhs, count(*) AS heads FROM heads GROUP BY rhs) "
        "SELECT t.rhs::VARCHAR, x.rhs::VARCHAR, count(*), any_value(ts.heads), any_value(xs.heads) "
        "FROM heads t JOIN heads x USING (lhs) JOIN sizes ts ON ts.rhs = t.rhs JOIN sizes xs ON xs.rhs = x.rhs "
        "WHERE t.rhs IN (SELECT id FROM tails) AND x.rhs IN (SELECT rhs FROM known) AND t.rhs <> x.rhs "
        "GROUP BY t.rhs, x.rhs"
    )
    found = defaultdict(list)
    for tail, known, shared, of_tail, of_known in _rows(
        con, opened, query, {"rel": relation, "head": value, "most": POPULAR}
    ):
        found[tail].append((shared / sqrt(of_tail * of_known), known, shared, of_tail))
    return {
        tail: [
            {"kind": "together", "id": known, "shared": shared, "heads": of_tail, "cosine": cosine}
            for cosine, known, shared, of_tail in sorted(every, key=lambda one: (-one[0], one[1]))[:REASONS]
        ]
        for tail, every in found.items()
    }


def _via(
    con: duckdb.DuckDBPyConnection, opened: Opened, both: str, of_head: list[Any], theirs: str
) -> dict[str, list[dict[str, Any]]]:
    # An entity that the head has by several relations is one reason, by the first of them.
    near = (
        "SELECT a, b, other, min((rel, side)) AS how "
        f"FROM {both} JOIN ends USING (rel, side) WHERE {{}} GROUP BY a, b, other"
    )
    head, kind = of_head
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE via AS WITH here AS ({near.format('a = $head AND mine = $kind')}), "
        f"there AS ({near.format('a IN (SELECT id FROM tails) AND mine = $theirs')}) "
        "SELECT there.a AS tail, there.b AS id, there.other AS entity, here.how AS first, there.how AS second "
        "FROM there JOIN here ON here.b = there.b AND here.other = there.other "
        # The two ends themselves are no third entity between them.
        "WHERE NOT (there.b = $head AND there.other = $kind) AND NOT (there.b = there.a AND there.other = $theirs)",
        {"head": head, "kind": kind, "theirs": theirs},
    )
    degrees = (
        f"SELECT a AS id, mine AS entity, count(*) AS degree FROM {both} JOIN ends USING (rel, side) "
        "WHERE a IN (SELECT id FROM via) GROUP BY a, mine"
    )
    query = (
        "SELECT tail::VARCHAR, id::VARCHAR, entity, first[1], first[2], second[1], second[2], degree "
        f"FROM via JOIN ({degrees}) USING (id, entity) "
        "QUALIFY row_number() OVER (PARTITION BY tail ORDER BY degree, entity, id) <= ? "
        "ORDER BY tail, degree, entity, id"
    )
    found = defaultdict(list)
    for tail, id, entity, name, side, their_name, their_side, degree in _rows(con, opened, query, [REASONS]):
        found[tail].append(
            {
                "kind": "via",
                "entity": entity,
                "id": id,
                "relation": name,
                "side": side,
                "tail_relation": their_name,
                "tail_side": their_side,
                "degree": degree,
                "weight": 1 / log(max(degree, 2)),
            }
        )
    return found


def _near(
    con: duckdb.DuckDBPyConnection, opened: Opened, edges: str, entity: str, relation: str, head: str
) -> dict[str, list[dict[str, Any]]]:
    cosines = {str(one): cosine for one, cosine in opened.model.neighbors(entity, head, NEAR)}
    con.register("near", pa.table({"id": pa.array([_value(opened, one) for one in cosines])}))
    query = (
        f"SELECT rhs::VARCHAR, lhs::VARCHAR FROM {edges} WHERE rel = ? AND lhs IN (SELECT id FROM near) "
        "AND rhs IN (SELECT id FROM tails)"
    )
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for tail, one in sorted(_rows(con, opened, query, [relation]), key=lambda row: (-cosines[row[1]], row[1])):
        if len(found[tail]) <= REASONS:
            found[tail].append({"kind": "near", "id": one, "cosine": cosines[one]})
    return found


def _edges(opened: Opened) -> str | None:
    """Return the SQL that scans a release's edges; None where it has none."""
    manifest = opened.table(RAW_EDGES)
    return None if manifest is None else database.parquet(opened.store.files_of(manifest))


def _value(opened: Opened, id: str) -> int | str:
    """Return an id as the edges have it. Where one entity type has texts for ids, all have texts there."""
    manifest = opened.table(RAW_EDGES)
    assert manifest is not None
    return int(id) if manifest.schema["lhs"].startswith("int") else id


def _rows(con: duckdb.DuckDBPyConnection, opened: Opened, query: str, values: Any) -> list[tuple[Any, ...]]:
    with database.explained(f"{opened.store.root}, {RAW_EDGES} of {opened.snapshot}"):
        return con.execute(query, values).fetchall()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(database.literal(name) for name in names)
