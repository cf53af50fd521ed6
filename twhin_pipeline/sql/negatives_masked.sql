-- No unmasked negative is a true edge, in-batch candidates included (of very large sets an even sample of chunks).
WITH pool AS MATERIALIZED (
    SELECT n.epoch, n.chunk, n.side, c.rel, least(getvariable('in_batch'), c.edges) AS in_batch, c.edges, n.row,
           n.mask_position, n.mask_candidate
    FROM pools n JOIN chunk_size c ON n.chunk = c.chunk
    WHERE n.chunk IN (SELECT chunk FROM audited)
),
window_candidate AS (
    SELECT epoch, chunk, side, rel, unnest(range(in_batch)) AS candidate,
           (epoch * getvariable('in_batch') + unnest(range(in_batch))) % edges AS position
    FROM pool
),
candidate AS MATERIALIZED (
    SELECT w.epoch, w.chunk, w.side, w.rel, w.candidate, CASE w.side WHEN 0 THEN c.lhs ELSE c.rhs END AS row
    FROM window_candidate w JOIN chunks c ON w.chunk = c.chunk AND w.position = c.position
    UNION ALL
    SELECT epoch, chunk, side, rel, in_batch + unnest(range(len(row))), unnest(row) FROM pool
),
-- The side that stays, once a chunk: hubs would otherwise repeat all their edges for each position.
place AS MATERIALIZED (
    SELECT chunk, rel, 1 AS side, position, lhs AS anchor FROM chunks WHERE chunk IN (SELECT chunk FROM audited)
    UNION ALL
    SELECT chunk, rel, 0, position, rhs FROM chunks WHERE chunk IN (SELECT chunk FROM audited)
),
anchor AS MATERIALIZED (SELECT DISTINCT chunk, rel, side, anchor FROM place),
truth_by_side AS (
    SELECT 1 AS side, rel, lhs AS anchor, rhs AS row FROM truth
    UNION ALL
    SELECT 0, rel, rhs, lhs FROM truth
),
known AS MATERIALIZED (
    SELECT DISTINCT a.chunk, a.side, a.anchor, t.row
    FROM anchor a JOIN truth_by_side t ON a.side = t.side AND a.rel = t.rel AND a.anchor = t.anchor
),
hit AS MATERIALIZED (
    SELECT n.epoch, n.chunk, n.side, n.candidate, n.row, k.anchor
    FROM candidate n JOIN known k ON n.chunk = k.chunk AND n.side = k.side AND n.row = k.row
),
hit_position AS MATERIALIZED (
    SELECT h.epoch, h.chunk, h.side, p.position, h.candidate, h.anchor, h.row
    FROM hit h JOIN place p ON h.chunk = p.chunk AND h.side = p.side AND h.anchor = p.anchor
),
mask AS MATERIALIZED (
    SELECT epoch, chunk, side, unnest(mask_position) AS position, unnest(mask_candidate) AS candidate FROM pool
)
SELECT h.epoch, h.chunk, h.side, h.position, h.candidate, h.anchor AS kept_row, h.row AS candidate_row
FROM hit_position h
ANTI JOIN mask m
    ON h.epoch = m.epoch AND h.chunk = m.chunk AND h.side = m.side
   AND h.position = m.position AND h.candidate = m.candidate
