-- Where the split goes by time, no edge is trained on that is new after an edge that is held out (10,000 are looked at).
-- Finding: {n} [edge that is trained on is|edges that are trained on are] new after an edge that is held out
WITH one AS (
    SELECT chunk, rel, lhs, rhs FROM chunks
    WHERE position = 0 AND getvariable('by_time')
    ORDER BY hash(chunk), chunk LIMIT 10_000
),
traced AS MATERIALIZED (
    SELECT r.name AS relation, l.id AS lhs_id, t.id AS rhs_id
    FROM one c
    JOIN relation r ON c.rel = r.rel
    JOIN vocabulary l ON r.lhs = l.entity AND c.lhs = l.row
    JOIN vocabulary t ON r.rhs = t.entity AND c.rhs = t.row
),
since AS MATERIALIZED (
    SELECT min(e.first_time) AS first_time
    FROM dated_edges e
    JOIN traced d ON e.rel = d.relation AND CAST(e.lhs AS VARCHAR) = d.lhs_id AND CAST(e.rhs AS VARCHAR) = d.rhs_id
),
-- Equal times are divided by the edges' hashes, so only later ones are looked at.
late AS MATERIALIZED (
    SELECT r.rel, r.name AS relation, r.lhs AS lhs_type, r.rhs AS rhs_type,
           CAST(e.lhs AS VARCHAR) AS lhs_id, CAST(e.rhs AS VARCHAR) AS rhs_id, e.first_time
    FROM dated_edges e
    JOIN relation r ON e.rel = r.name AND r.divided
    WHERE e.first_time > (SELECT first_time FROM since)
    ORDER BY hash(lhs_id, rhs_id), relation, lhs_id, rhs_id LIMIT 10_000
),
encoded AS MATERIALIZED (
    SELECT e.*, l.row AS lhs, t.row AS rhs
    FROM late e
    JOIN vocabulary l ON e.lhs_type = l.entity AND e.lhs_id = l.id
    JOIN vocabulary t ON e.rhs_type = t.entity AND e.rhs_id = t.id
)
SELECT e.relation, e.lhs_id AS lhs, e.rhs_id AS rhs, e.first_time, (SELECT first_time FROM since) AS held_out_from
FROM encoded e
SEMI JOIN positives p ON e.rel = p.rel AND e.lhs = p.lhs AND e.rhs = p.rhs
ORDER BY e.first_time DESC
