-- No unmasked negative of any edge is a true edge, in-batch candidates included (of large sets an even sample of
-- pools). With `negatives.mask: own` true edges are those of the chunk.
-- Finding: {n} [negative is a true edge|negatives are true edges], and not masked
WITH pool AS MATERIALIZED (
    SELECT n.epoch, n.chunk, n.side, c.rel, least(getvariable('in_batch'), c.edges) AS in_batch, c.edges, n.row,
           n.mask_position, n.mask_candidate
    FROM pools n
    SEMI JOIN audited a ON n.epoch = a.epoch AND n.chunk = a.chunk
    JOIN chunk_size c ON n.chunk = c.chunk
),
window_candidate AS (
    SELECT epoch, chunk, side, rel, unnest(range(in_batch)) AS candidate,
           (epoch * getvariable('in_batch') + unnest(range(in_batch))) % edges AS position
    FROM pool
),
candidate AS MATERIALIZED (
    SELECT w.epoch, w.chunk, w.side, w.rel, w.candidate, CASE w.side WHEN 0 THEN c.lhs ELSE c.rhs END AS row
    FROM window_candidate w JOIN audited_chunks c ON w.chunk = c.chunk AND w.position = c.position
    UNION ALL
    SELECT epoch, chunk, side, rel, in_batch + unnest(range(len(row))), unnest(row) FROM pool
),
-- A query: the edges of a chunk that keep the same entity, under the first of their positions.
place AS MATERIALIZED (
    SELECT chunk, rel, 1 AS side, position, lhs AS anchor FROM audited_chunks
    UNION ALL
    SELECT chunk, rel, 0, position, rhs FROM audited_chunks
),
query AS MATERIALIZED (
    SELECT chunk, rel, side, anchor, min(position) AS position, count(*) AS edges FROM place
    GROUP BY chunk, rel, side, anchor
),
truth_by_side AS (
    SELECT 1 AS side, rel, lhs AS anchor, rhs AS row FROM truth
    UNION ALL
    SELECT 0, rel, rhs, lhs FROM truth
),
own AS (
    SELECT chunk, 1 AS side, lhs AS anchor, rhs AS row FROM audited_chunks
    UNION ALL
    SELECT chunk, 0, rhs, lhs FROM audited_chunks
),
-- From the candidates, which are fewer than the queries: a list of neighbours for each entity among them.
neighbours AS MATERIALIZED (
    SELECT t.side, t.rel, t.row, list(t.anchor) AS anchors
    FROM truth_by_side t SEMI JOIN candidate n ON t.side = n.side AND t.rel = n.rel AND t.row = n.row
    WHERE NOT getvariable('own_edges')
    GROUP BY t.side, t.rel, t.row
),
reached AS (
    SELECT n.epoch, n.chunk, n.side, n.candidate, n.row, unnest(t.anchors) AS anchor
    FROM candidate n JOIN neighbours t ON n.side = t.side AND n.rel = t.rel AND n.row = t.row
    UNION ALL
    SELECT n.epoch, n.chunk, n.side, n.candidate, n.row, o.anchor
    FROM candidate n JOIN own o ON n.chunk = o.chunk AND n.side = o.side AND n.row = o.row
    WHERE getvariable('own_edges')
),
hit AS MATERIALIZED (
    SELECT DISTINCT n.epoch, n.chunk, n.side, q.position, q.edges, n.candidate, n.anchor, n.row
    FROM reached n JOIN query q ON n.chunk = q.chunk AND n.side = q.side AND n.anchor = q.anchor
),
mask AS MATERIALIZED (
    SELECT epoch, chunk, side, unnest(mask_position) AS position, unnest(mask_candidate) AS candidate FROM pool
)
SELECT h.epoch, h.chunk, h.side, h.position, h.edges, h.candidate, h.anchor AS kept_row, h.row AS candidate_row
FROM hit h
ANTI JOIN mask m
    ON h.epoch = m.epoch AND h.chunk = m.chunk AND h.side = m.side
   AND h.position = m.position AND h.candidate = m.candidate
