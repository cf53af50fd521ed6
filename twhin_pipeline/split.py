"""Which edges are held out. Deterministic whatever the threads: each edge has a number of its own, made from its ids.

The number `h` is a hash of seed, relation and ids, uniform over 64 bits, so an edge meets the same fate in every
snapshot: what one snapshot holds out, a model warm-started from another has not trained on either.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from twhin_pipeline.database import literal

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig

TRAIN, VALIDATION, TEST = range(3)
PARTS = ("train", "validation", "test")
MASK = 2**32 - 1
# Odd, with bits all over: from the golden ratio, xxHash and MurmurHash3.
FEISTEL = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE35)


def text_hash(text: str) -> str:
    """Return the SQL of a text's hash (UBIGINT). MD5, not DuckDB's `hash`, which another release may change."""
    return f"md5_number_lower({text})"


def numbered(query: str, columns: str) -> str:
    """Return the SQL of `columns` and `h`, from a query that has them and `lhs_hash`, `rhs_hash`, `rel_hash`.

    These are joined (the right one turned, so that a pair and its reverse differ) and mixed by three rounds of a
    Feistel network on 32-bit halves, whose products fit 64 bits: ten times as fast as hashing each edge's text.
    """
    turned = f"((rhs_hash >> 29) | ((rhs_hash & {2**29 - 1}) << 35))"
    joined = f"xor(xor(lhs_hash, rel_hash), {turned})"
    query = f"SELECT {columns}, ({joined} >> 32) AS a, ({joined} & {MASK}) AS b FROM ({query})"
    for factor in FEISTEL:
        query = f"SELECT {columns}, a, b, b * {factor} + {factor} AS p FROM ({query})"
        query = f"SELECT {columns}, b AS a, xor(a, xor(p >> 32, p & {MASK})) AS b FROM ({query})"
    return f"SELECT {columns}, (a << 32) | b AS h FROM ({query})"


def shuffled(seed: int, purpose: str) -> str:
    """Return the SQL of a sort key (UBIGINT below 2^32) from `h`: another order for every seed and purpose.

    Only the low half of `h` is used; the split goes by its size, so by its high bits.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    mask, factor = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little") | 1
    mixed = f"((xor(h & {MASK}, {mask}) * {factor}) & {MASK})"
    # A second round, on the halves exchanged: a product alone leaves the low bits as ordered as they were.
    return f"(xor(({mixed} >> 16) | (({mixed} & 65535) << 16), {mask ^ 0x9E3779B9}) * {factor ^ 0x5BD1E994} & {MASK})"


def assign(con: duckdb.DuckDBPyConnection, config: TwhinConfig, given: bool) -> None:
    """Add the column `part` (0 training, 1 validation, 2 test) to the table `edges`, and call the result `assigned`.

    `edges` has rel (index), lhs, rhs (rows), h, and `time` or `split` where the strategy asks for them. `given` says
    that the source has decided (a split column, or the published system's two `data_root`s). A split column without
    `validation` gets `split.validation` of its training edges as such, so that nothing is tuned on the test.
    """
    split = config.split
    if given:
        part = f"coalesce(list_position([{', '.join(literal(p) for p in PARTS)}], split) - 1, {TRAIN})"
        con.execute(f"CREATE TABLE assigned AS SELECT *, CAST({part} AS TINYINT) AS part FROM edges")
        con.execute("DROP TABLE edges")
        if split.strategy == "given" and not _count(con, f"assigned WHERE part = {VALIDATION}"):
            _validation_of_training(con, config)
    elif split.strategy == "temporal" and split.later_snapshot is None:
        _temporal(con, config)
    else:
        later = split.later_snapshot is not None
        _random(con, config, validation=split.validation, test=0.0 if later else split.test)


def splittable(config: TwhinConfig) -> str:
    """Return the SQL test of whether a relation's edges may be held out."""
    names = config.model.relation_names
    chosen = names if config.split.relations is None else config.split.relations
    return f"rel IN ({', '.join(str(names.index(r)) for r in chosen)})" if chosen else "false"


def _random(con: duckdb.DuckDBPyConnection, config: TwhinConfig, *, validation: float, test: float) -> None:
    """Hold out the edges with the smallest numbers; an entity's largest stays in training, if none other does."""
    test_below, held_below = int(test * 2**64), int((test + validation) * 2**64)
    con.execute(f"ALTER TABLE edges ADD COLUMN part TINYINT DEFAULT {TRAIN}")
    con.execute("ALTER TABLE edges RENAME TO assigned")
    con.execute(
        f"UPDATE assigned SET part = CASE WHEN h < {test_below} THEN {TEST} ELSE {VALIDATION} END "
        f"WHERE ({splittable(config)}) AND h < {held_below}"
    )
    if config.split.keep_connected and held_below > 0:
        _reconnect(con, config, (TEST, VALIDATION))


def _validation_of_training(con: duckdb.DuckDBPyConnection, config: TwhinConfig) -> None:
    """Hold out for validation the training edges with the smallest numbers."""
    below = int(config.split.validation * 2**64)
    con.execute(
        f"UPDATE assigned SET part = {VALIDATION} WHERE part = {TRAIN} AND ({splittable(config)}) AND h < {below}"
    )
    if config.split.keep_connected and below > 0:
        _reconnect(con, config, (VALIDATION,))


def _reconnect(con: duckdb.DuckDBPyConnection, config: TwhinConfig, parts: tuple[int, ...]) -> None:
    """Give entities that have an edge in `parts` and none in training one back, that with the largest number.

    An entity is without a training edge just when all of its edges are held out. Taking back one for each such entity
    is enough, and taking back more cannot undo it.
    """
    held = f"part IN ({', '.join(map(str, parts))})"
    con.execute(f"CREATE TABLE stranded AS {_untrained(config, held)}")
    for side in ("lhs", "rhs"):
        con.execute(
            f"UPDATE assigned SET part = {TRAIN} FROM stranded s WHERE {held} AND s.h = assigned.h "
            f"AND s.row = assigned.{side} AND s.type = {_type_of(config, side)}"
        )
    con.execute("DROP TABLE stranded")


def _untrained(config: TwhinConfig, held: str) -> str:
    """Return the SQL of the entities (type, row) with an edge of which `held` holds and none in training; the largest
    `h` of each one's.

    Held-out edges are few, so of the training edges only those of their entities are looked at.
    """

    def ends(test: str, taken: str) -> str:
        return " UNION ALL ".join(
            f"SELECT CAST({_type_of(config, side)} AS INTEGER) AS type, {side} AS row{taken} FROM assigned "
            f"WHERE {test.format(side=side)}"
            for side in ("lhs", "rhs")
        )

    trained = ends(f"part = {TRAIN} AND {{side}} IN (SELECT row FROM asked)", "")
    return (
        f"WITH asked AS MATERIALIZED (SELECT type, row, max(h) AS h FROM ({ends(held, ', h')}) GROUP BY type, row) "
        f"SELECT type, row, h FROM asked ANTI JOIN (SELECT DISTINCT type, row FROM ({trained})) USING (type, row)"
    )


def _temporal(con: duckdb.DuckDBPyConnection, config: TwhinConfig) -> None:
    """Hold out the latest edges as the test and those just before them for validation; equal times go by number."""
    total = _count(con, f"edges WHERE {splittable(config)}")
    test = round(total * config.split.test)
    held = round(total * (config.split.test + config.split.validation))
    con.execute(
        f"CREATE TABLE assigned AS SELECT * EXCLUDE age, CAST(CASE WHEN age <= {test} THEN {TEST} "
        f"WHEN age <= {held} THEN {VALIDATION} ELSE {TRAIN} END AS TINYINT) AS part FROM "
        f"(SELECT *, row_number() OVER (ORDER BY time DESC, h, lhs, rhs) AS age FROM edges WHERE {splittable(config)})"
    )
    con.execute(f"INSERT INTO assigned SELECT *, CAST({TRAIN} AS TINYINT) FROM edges WHERE NOT ({splittable(config)})")
    con.execute("DROP TABLE edges")


def leakage(con: duckdb.DuckDBPyConnection, config: TwhinConfig, part: int) -> dict[str, dict[str, int]]:
    """Count, by relation, held-out edges that training gives away: the reverse, or the pair otherwise related."""
    for name, which in (("TEMP VIEW seen", TRAIN), ("TEMP TABLE held", part)):
        con.execute(
            f"CREATE OR REPLACE {name} AS SELECT rel, lhs, rhs, {_type_of(config, 'lhs')} AS head, "
            f"{_type_of(config, 'rhs')} AS tail FROM assigned WHERE part = {which}"
        )
    pair = "s.head = h.head AND s.tail = h.tail AND s.lhs = h.lhs AND s.rhs = h.rhs"
    back = "s.head = h.tail AND s.tail = h.head AND s.lhs = h.rhs AND s.rhs = h.lhs"
    back += " AND NOT (h.lhs = h.rhs AND h.head = h.tail)"  # a self-loop is its own reverse
    counts: dict[str, dict[str, int]] = {name: {} for name in config.model.relation_names}
    for what, test in (("reverse", back), ("same_pair", pair)):
        rows = con.execute(f"SELECT rel, count(*) FROM held h SEMI JOIN seen s ON {test} GROUP BY rel").fetchall()
        told = {int(rel): int(count) for rel, count in rows}
        for rel, name in enumerate(config.model.relation_names):
            counts[name][what] = told.get(rel, 0)
    con.execute("DROP TABLE held")
    con.execute("DROP VIEW seen")
    return counts


def unseen(con: duckdb.DuckDBPyConnection, config: TwhinConfig) -> dict[str, int]:
    """Count, by entity type, entities with an edge but none in training."""
    rows: list[Any] = con.execute(
        f"SELECT type, count(*) FROM ({_untrained(config, f'part <> {TRAIN}')}) GROUP BY type"
    ).fetchall()
    told = {int(number): int(count) for number, count in rows}
    return {name: told.get(number, 0) for number, name in enumerate(config.model.table_names)}


def _count(con: duckdb.DuckDBPyConnection, what: str) -> int:
    return int(con.execute(f"SELECT count(*) FROM {what}").fetchall()[0][0])


def _type_of(config: TwhinConfig, side: str) -> str:
    """Return the SQL of the number of the entity type on a side of the relation `rel`."""
    tables = config.model.table_names
    numbers = [tables.index(getattr(relation, side)) for relation in config.model.relations]
    if len(set(numbers)) == 1:
        return str(numbers[0])
    return f"[{', '.join(map(str, numbers))}][rel + 1]"
