-- Every masked pair is a true edge, so that no negative is lost (of very large sets an even sample of chunks).
WITH pool AS (
    SELECT n.epoch, n.chunk, n.side, c.rel, least(getvariable('in_batch'), c.edges) AS in_batch, c.edges, n.row,
           n.mask_position, n.mask_candidate
    FROM pools n JOIN chunk_size c ON n.chunk = c.chunk
    WHERE n.chunk % getvariable('audit_every') = 0
),
mask AS (
    SELECT epoch, chunk, side, rel, in_batch, edges, row,
           unnest(mask_position) AS position, unnest(mask_candidate) AS candidate
    FROM pool
),
named AS (
    SELECT m.epoch, m.chunk, m.side, m.rel, m.position, m.candidate,
           CASE m.side WHEN 0 THEN c.rhs ELSE c.lhs END AS anchor,
           CASE WHEN m.candidate >= m.in_batch THEN m.row[m.candidate - m.in_batch + 1]
                WHEN m.side = 0 THEN w.lhs ELSE w.rhs END AS row
    FROM mask m
    LEFT JOIN chunks c ON m.chunk = c.chunk AND m.position = c.position
    LEFT JOIN chunks w
        ON m.candidate < m.in_batch AND m.chunk = w.chunk
       AND (m.epoch * getvariable('in_batch') + m.candidate) % m.edges = w.position
)
SELECT n.epoch, n.chunk, n.side, n.position, n.candidate, n.anchor AS kept_row, n.row AS candidate_row
FROM named n
ANTI JOIN truth t
    ON n.rel = t.rel
   AND t.lhs = CASE n.side WHEN 0 THEN n.row ELSE n.anchor END
   AND t.rhs = CASE n.side WHEN 0 THEN n.anchor ELSE n.row END
