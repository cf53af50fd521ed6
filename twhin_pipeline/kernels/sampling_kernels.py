"""Loops that sample pools and search true edges, compiled for the CPU by numba. They let other threads run."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline.kernels.compiled import compiled

Array = np.ndarray[Any, Any]

# Philox4x64-10 (Salmon et al., 2011), as `numpy.random.Philox` has it.
_ROUNDS = 10
_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_GOLDEN = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF
# By so many bits a sieve's hashes are longer than those of the table that it stands before.
_SIEVE_BITS = 4


@compiled()
def _high(a: Any, b: Any) -> Any:
    """Return the upper 64 bits of a product (uint64)."""
    low, half = np.uint64(_LOW), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)


@compiled()
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Return the four numbers (uint64) of a counter and a key."""
    f0, f1, w0, w1 = np.uint64(_FACTORS[0]), np.uint64(_FACTORS[1]), np.uint64(_WEYL[0]), np.uint64(_WEYL[1])
    for step in range(_ROUNDS):
        if step:
            k0, k1 = k0 + w0, k1 + w1
        high0, low0, high1, low1 = _high(f0, c0), f0 * c0, _high(f1, c2), f1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


@compiled()
def draw(
    seed: Any,
    stream: int,
    epoch: int,
    chunk: int,
    size: int,
    present: Array,
    popular: int,
    cumulative: Array,
    row: Array,
) -> None:
    """Draw a pool into `row`, int64 `[K]`: uniform over `size`, but its last `popular` ones by `cumulative` [N].

    What is uniform is a row of `present` (int64 `[size]`), or, where that is empty, below `size`.

    The K numbers are those of `numpy.random.Philox(key=[seed, stream], counter=[0, 0, chunk, epoch])`.
    """
    k0, k1, c2, c3 = np.uint64(seed), np.uint64(stream), np.uint64(chunk), np.uint64(epoch)
    drawn = np.empty(4, np.uint64)
    total = cumulative[-1]
    split = len(row) - popular if total > 0 else len(row)
    for i in range(len(row)):
        if i % 4 == 0:
            numbers = _philox(np.uint64(i // 4 + 1), np.uint64(0), c2, c3, k0, k1)
            drawn[0], drawn[1], drawn[2], drawn[3] = numbers
        unit = np.float64(np.int64(drawn[i % 4] >> np.uint64(11))) * 2.0**-53
        if i < split:
            row[i] = min(np.int64(unit * size), size - 1)
            if len(present):
                row[i] = present[row[i]]
        else:
            row[i] = np.searchsorted(cumulative, unit * total, side="right")


@compiled()
def _slot(value: int, shift: int) -> Any:
    return np.int64((np.uint64(value) * np.uint64(_GOLDEN)) >> np.uint64(shift))


@compiled()
def _find(table: Array, shift: int, values: Array, value: int) -> Any:
    """Return the place of `value` among `values` that the hash `table` holds, or -1; and its slot, or the free one."""
    slot, last = _slot(value, shift), len(table) - 1
    while table[slot] >= 0 and values[table[slot]] != value:
        slot = (slot + 1) & last
    return table[slot], slot


@compiled()
def _bits(length: int) -> Any:
    """Return how many bits number the slots of a hash table that is at most half full."""
    bits = 1
    while (1 << bits) < 2 * length:
        bits += 1
    return bits


@compiled()
def _at_least(array: Array, begin: int, end: int, wanted: Array, into: Array) -> None:
    """Write the first places in the ascending `array[begin:end]`, not empty, whose elements are not below the wanted.

    All `wanted` `[m]` are searched at the same time, so that none waits for the memory that another one reads.
    """
    into[:] = begin
    left = end - begin
    while left > 1:
        half = left >> 1
        for i in range(len(wanted)):
            into[i] += half * np.int64(array[into[i] + half - 1] < wanted[i])
        left -= half
    for i in range(len(wanted)):
        into[i] += np.int64(array[into[i]] < wanted[i])


@compiled()
def _sieve(bits: int) -> Any:
    """Return room for a set of hashes of so many bits."""
    return np.zeros(max((1 << bits) >> 6, 1), np.uint64)


@compiled(inline="always")
def _add(sieve: Array, number: Any) -> None:
    sieve[number >> 6] |= np.uint64(1) << np.uint64(number & 63)


@compiled(inline="always")
def _has(sieve: Array, number: Any) -> Any:
    return (sieve[number >> 6] >> np.uint64(number & 63)) & np.uint64(1)


@compiled()
def _mark(marks: Array, position: int, place: int, following: Array) -> Any:
    """Set the bits of a position and of the candidates in a chain; return how many were not set."""
    result = 0
    while place >= 0:
        word, bit = place >> 6, np.uint64(1) << np.uint64(place & 63)
        if marks[position, word] & bit == 0:
            marks[position, word] |= bit
            result += 1
        place = following[place]
    return result


@compiled()
def true_pairs(
    neighbors: Array,
    entities: Array,
    start: Array,
    kept: Array,
    ends: Array,
    listed: Array,
    own: bool,
    probe_cost: int,
    position: Array,
    candidate: Array,
    filled: int,
) -> Any:
    """Append the pairs of a chunk's queries and its candidates that are joined by a true edge.

    Args:
        neighbors: `int64 [E]` the other ends of true edges, by the entity on the candidates' side.
        entities: `int64 [n]` those with an edge, ascending.
        start: `int64 [n + 1]` where each one's neighbors begin; they ascend.
        kept: `int64 [C]` the chunk's kept entities; a query is named by the first position of its own.
        ends: `int64 [C]` the chunk's other ends.
        listed: `int64 [N]` the candidates.
        own: Only edges of the chunk are true.
        probe_cost: A candidate with more neighbors than so many for each query is tried against each query.
        position: `int32 [M]` to be filled from `filled` on, ascending; replaced where it is too short.
        candidate: `int32 [M]` likewise; ascending within a position.
        filled: How much of both is filled.

    Returns:
        `position`, `candidate`, how much is filled, and the number of queries.
    """
    size, count = len(kept), len(listed)
    bits = _bits(size)
    table, shift = np.full(1 << bits, -1, np.int32), 64 - bits
    queries, distinct = np.empty(size, np.int32), 0
    # Most neighbors are no query: few of them get through a sieve of one bit a hash, wider than the table.
    sieve, sieve_shift = _sieve(bits + _SIEVE_BITS), shift - _SIEVE_BITS
    for p in range(size):
        at, slot = _find(table, shift, kept, kept[p])
        if at < 0:
            table[slot] = p
            queries[distinct] = p
            distinct += 1
            _add(sieve, _slot(kept[p], sieve_shift))
    # The first place of each candidate is in a table; from it a chain leads to the others.
    bits = _bits(count)
    places, place_shift = np.full(1 << bits, -1, np.int32), 64 - bits
    following = np.full(count, -1, np.int32)
    heads, groups = np.empty(count, np.int32), 0
    for j in range(count):
        at, slot = _find(places, place_shift, listed, listed[j])
        if at < 0:
            places[slot] = j
            heads[groups] = j
            groups += 1
        else:
            following[j], following[at] = following[at], j
    marks, more = np.zeros((size, (count + 63) >> 6), np.uint64), 0
    if own:
        for p in range(size):
            place, _ = _find(places, place_shift, listed, ends[p])
            if place >= 0:
                at, _ = _find(table, shift, kept, kept[p])
                more += _mark(marks, at, place, following)
    elif len(entities):
        wanted, result = np.empty(groups, np.int64), np.empty(groups, np.int64)
        for g in range(groups):
            wanted[g] = listed[heads[g]]
        _at_least(entities, 0, len(entities), wanted, result)
        pairs, at_least = np.empty(distinct, np.int64), np.empty(distinct, np.int64)
        for g in range(groups):
            i = result[g]
            if i == len(entities) or entities[i] != wanted[g]:
                continue
            begin, end = start[i], start[i + 1]
            if end - begin <= probe_cost * distinct:
                for k in range(begin, end):
                    value = neighbors[k]
                    if _has(sieve, _slot(value, sieve_shift)):
                        at, _ = _find(table, shift, kept, value)
                        if at >= 0:
                            more += _mark(marks, at, heads[g], following)
            else:
                for q in range(distinct):
                    pairs[q] = kept[queries[q]]
                _at_least(neighbors, begin, end, pairs, at_least)
                for q in range(distinct):
                    k = at_least[q]
                    if k < end and neighbors[k] == pairs[q]:
                        more += _mark(marks, queries[q], heads[g], following)
    if filled + more > len(position):
        longer = np.empty(2 * (filled + more), np.int32)
        longer[:filled] = position[:filled]
        position = longer
        longer = np.empty(2 * (filled + more), np.int32)
        longer[:filled] = candidate[:filled]
        candidate = longer
    for q in range(distinct):
        p = queries[q]
        for word in range(marks.shape[1]):
            left, place = marks[p, word], word << 6
            while left:
                if left & np.uint64(1):
                    position[filled], candidate[filled] = p, place
                    filled += 1
                left >>= np.uint64(1)
                place += 1
    return position, candidate, filled, distinct


@compiled()
def samples(
    seed: Any,
    streams: Array,
    epoch: int,
    first_chunk: int,
    start: Array,
    sides: Array,
    ends: Any,
    window: int,
    pool: int,
    popular: int,
    sizes: Array,
    present: Any,
    cumulative: Any,
    known: Any,
    own: bool,
    probe_cost: int,
) -> Any:
    """Sample consecutive chunks of one relation; for each its sides, in their order.

    Args:
        seed: The generator's key.
        streams: `int64 [2]` the rest of the key, by side.
        epoch: The epoch.
        first_chunk: The number of the first chunk.
        start: `int64 [c + 1]` where the c chunks' edges begin.
        sides: `int64 [s]` those that are replaced.
        ends: The edges' left-hand and right-hand ends, `int64 [E]` each.
        window: How many of the chunk's own entities are candidates, from one that moves on with the epochs.
        pool: How many are drawn, the last `popular` ones by degree.
        popular: See `pool`.
        sizes: `int64 [2]` how many entities may be drawn, by side.
        present: Which these are, by side; empty: all rows.
        cumulative: The running sum of mass over the rows, by side.
        known: neighbors, entities and start of the relation's true edges, by the side of the entity: see `true_pairs`.
        own: Only edges of the chunk are true.
        probe_cost: See `true_pairs`.

    Returns:
        The pools `int64 [c s pool]`, the candidates `int64 [L]`, how many each pool's list has in its window
        `int64 [c s]`, the masks' positions and candidates `int32 [M]`, where each pool's masks begin `int32 [c s + 1]`,
        and how many pairs of a query and a candidate there are.
    """
    chunks, most = len(start) - 1, 0
    for i in range(chunks):
        most += min(window, start[i + 1] - start[i])
    rows = np.empty(chunks * len(sides) * pool, np.int64)
    listed = np.empty(len(rows) + most * len(sides), np.int64)
    windows = np.empty(chunks * len(sides), np.int64)
    offsets = np.zeros(chunks * len(sides) + 1, np.int32)
    position, candidate = np.empty(4096, np.int32), np.empty(4096, np.int32)
    filled = pairs = unit = written = 0
    for i in range(chunks):
        begin, end = start[i], start[i + 1]
        size = end - begin
        taken = min(window, size)
        for side in sides:
            row = rows[unit * pool : (unit + 1) * pool]
            draw(
                seed, streams[side], epoch, first_chunk + i, sizes[side], present[side], popular, cumulative[side], row
            )
            here = listed[written : written + taken + pool]
            written += len(here)
            for j in range(taken):
                here[j] = ends[side][begin + (epoch * window + j) % size]
            here[taken:] = row
            neighbors, entities, places = known[side]
            position, candidate, filled, queries = true_pairs(
                neighbors,
                entities,
                places,
                ends[1 - side][begin:end],
                ends[side][begin:end],
                here,
                own,
                probe_cost,
                position,
                candidate,
                filled,
            )
            pairs += queries * len(here)
            windows[unit] = taken
            unit += 1
            offsets[unit] = filled
    return rows, listed, windows, position[:filled].copy(), candidate[:filled].copy(), offsets, pairs


@compiled()
def masks_of_part(
    seed: Any,
    stream: int,
    epochs: int,
    chunks: Array,
    sizes: Array,
    start: Array,
    positions: Array,
    kept: Array,
    ends_start: Array,
    ends: Array,
    window: int,
    pool: int,
    popular: int,
    size: int,
    present: Array,
    cumulative: Array,
    known: Any,
    probe_cost: int,
) -> Any:
    """Find the true pairs of some queries of chunks: of those whose kept entity is in one part of all entities.

    Args:
        seed: The generator's key.
        stream: The rest of the key, of the side.
        epochs: How many epochs, from 0.
        chunks: `int64 [c]` numbers of the chunks.
        sizes: `int64 [c]` how many edges each has.
        start: `int64 [c + 1]` where each one's queries begin.
        positions: `int32 [Q]` positions of edges in their chunks, ascending.
        kept: `int64 [Q]` their kept entities; all edges of an entity are there.
        ends_start: `int64 [c + 1]` where each chunk's own entities begin.
        ends: `int64 [L]` the other ends of each chunk's first edges, as many as windows reach.
        window: See `samples`.
        pool: See `samples`.
        popular: See `samples`.
        size: How many entities may be drawn.
        present: See `draw`.
        cumulative: See `draw`.
        known: neighbors, entities and start of the true edges of the part: see `true_pairs`.
        probe_cost: See `true_pairs`.

    Returns:
        The masks' positions and candidates `int32 [M]`, and where those of each chunk and epoch begin
        `int64 [c epochs + 1]`.
    """
    neighbors, entities, places = known
    offsets = np.zeros(len(chunks) * epochs + 1, np.int64)
    position, candidate = np.empty(4096, np.int32), np.empty(4096, np.int32)
    row, filled, unit = np.empty(pool, np.int64), 0, 0
    for i in range(len(chunks)):
        own, here = kept[start[i] : start[i + 1]], ends[ends_start[i] : ends_start[i + 1]]
        taken = min(window, sizes[i])
        listed = np.empty(taken + pool, np.int64)
        for epoch in range(epochs):
            draw(seed, stream, epoch, chunks[i], size, present, popular, cumulative, row)
            for j in range(taken):
                listed[j] = here[(epoch * window + j) % sizes[i]]
            listed[taken:] = row
            begin = filled
            position, candidate, filled, _ = true_pairs(
                neighbors, entities, places, own, own, listed, False, probe_cost, position, candidate, filled
            )
            for k in range(begin, filled):
                position[k] = positions[start[i] + position[k]]
            unit += 1
            offsets[unit] = filled
    return position[:filled].copy(), candidate[:filled].copy(), offsets


@compiled()
def fill_keys(entities: Array, neighbors: Array, width: int, keys: Array) -> None:
    """Write each edge's entity * width + neighbor to `keys` [E]; `width` is above all neighbors."""
    for i in range(len(entities)):
        keys[i] = entities[i] * width + neighbors[i]


@compiled()
def count_entities(keys: Array, width: int) -> Any:
    """Return how many different entities ascending keys (entity * width + neighbor) have."""
    result = limit = 0
    for key in keys:
        if key >= limit:
            result += 1
            limit = (key // width + 1) * width
    return result


@compiled()
def split_keys(keys: Array, width: int, entities: Array, start: Array) -> None:
    """Write the n entities of ascending keys, and where each one's begin `[n + 1]`; leave the neighbors in `keys`."""
    result = base = limit = 0
    for i in range(len(keys)):
        if keys[i] >= limit:
            entity = keys[i] // width
            entities[result], start[result] = entity, i
            base, limit = entity * width, (entity + 1) * width
            result += 1
        keys[i] -= base
    start[result] = len(keys)


@compiled()
def contains(neighbors: Array, start: Array, end: Array, wanted: Array, found: Array) -> None:
    """Write whether each of `wanted` [P] is in the ascending `neighbors[start[i]:end[i]]`, to `found`, bool [P]."""
    for i in range(len(wanted)):
        low, high = start[i], end[i]
        while low < high:
            middle = (low + high) >> 1
            if neighbors[middle] < wanted[i]:
                low = middle + 1
            else:
                high = middle
        found[i] = low < end[i] and neighbors[low] == wanted[i]


@compiled()
def count_rows(rows: Array, counts: Array) -> None:
    """Add 1.0 to the element of `counts` [N] for each of `rows` [E]."""
    for row in rows:
        counts[row] += 1.0


@compiled()
def without_repeats(values: Array) -> int:
    """Move each distinct one of `values` (ascending) to the front, once; return how many these are."""
    count = 0
    for i in range(len(values)):
        if i == 0 or values[i] != values[i - 1]:
            values[count] = values[i]
            count += 1
    return count
