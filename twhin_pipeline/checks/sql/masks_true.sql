-- Every masked pair is a true edge, so that no negative is lost, and stands at the first position of its kept entity
-- (of large sets an even sample of pools). With `negatives.mask: own` it is an edge of the chunk.
-- Finding: {n} masked [pair is|pairs are] no true edge, or not at the first position of [its|their] kept entity
WITH pool AS MATERIALIZED (
    SELECT n.epoch, n.chunk, n.side, least(getvariable('in_batch'), c.edges) AS in_batch, c.edges, n.row,
           n.mask_position, n.mask_candidate
    FROM pools n
    SEMI JOIN audited a ON n.epoch = a.epoch AND n.chunk = a.chunk
    JOIN chunk_size c ON n.chunk = c.chunk
),
window_candidate AS (
    SELECT epoch, chunk, side, unnest(range(in_batch)) AS candidate,
           (epoch * getvariable('in_batch') + unnest(range(in_batch))) % edges AS position
    FROM pool
),
candidate AS MATERIALIZED (
    SELECT w.epoch, w.chunk, w.side, w.candidate, CASE w.side WHEN 0 THEN c.lhs ELSE c.rhs END AS row
    FROM window_candidate w JOIN audited_chunks c ON w.chunk = c.chunk AND w.position = c.position
    UNION ALL
    SELECT epoch, chunk, side, in_batch + unnest(range(len(row))), unnest(row) FROM pool
),
mask AS MATERIALIZED (
    SELECT epoch, chunk, side, unnest(mask_position) AS position, unnest(mask_candidate) AS candidate FROM pool
),
first AS MATERIALIZED (
    SELECT chunk, position, rel, lhs, rhs,
           position = min(position) OVER (PARTITION BY chunk, lhs) AS first_of_lhs,
           position = min(position) OVER (PARTITION BY chunk, rhs) AS first_of_rhs
    FROM audited_chunks
),
-- A pair that names no position or no candidate has null ends, which no true edge has.
named AS MATERIALIZED (
    SELECT m.epoch, m.chunk, m.side, m.position, m.candidate, p.rel,
           CASE m.side WHEN 0 THEN n.row ELSE p.lhs END AS lhs,
           CASE m.side WHEN 0 THEN p.rhs ELSE n.row END AS rhs,
           CASE m.side WHEN 0 THEN p.first_of_rhs ELSE p.first_of_lhs END AS is_first
    FROM mask m
    LEFT JOIN candidate n
        ON m.epoch = n.epoch AND m.chunk = n.chunk AND m.side = n.side AND m.candidate = n.candidate
    LEFT JOIN first p ON m.chunk = p.chunk AND m.position = p.position
),
untrue AS (
    SELECT DISTINCT n.rel, n.lhs, n.rhs FROM named n
    ANTI JOIN truth t ON n.rel = t.rel AND n.lhs = t.lhs AND n.rhs = t.rhs
    WHERE n.rel IS NOT NULL AND n.lhs IS NOT NULL AND n.rhs IS NOT NULL
)
SELECT epoch, chunk, side, position, candidate, lhs, rhs, is_first
FROM named
WHERE rel IS NULL OR lhs IS NULL OR rhs IS NULL OR NOT is_first
   OR (rel, lhs, rhs) IN (SELECT (rel, lhs, rhs) FROM untrue)
   OR (getvariable('own_edges') AND (chunk, lhs, rhs) NOT IN (SELECT (chunk, lhs, rhs) FROM first))
