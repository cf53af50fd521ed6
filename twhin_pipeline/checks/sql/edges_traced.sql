-- An edge of each chunk (of 10,000 of them, where there are more), traced back by the vocabularies, is a raw edge.
-- Finding: {n} [edge of the sample is no raw edge|edges of the sample are no raw edges]
WITH one AS (
    SELECT chunk, rel, lhs, rhs FROM chunks WHERE position = 0 ORDER BY hash(chunk), chunk LIMIT 10_000
),
traced AS MATERIALIZED (
    SELECT c.chunk, r.name AS relation, c.lhs, c.rhs, l.id AS lhs_id, t.id AS rhs_id
    FROM one c
    JOIN relation r ON c.rel = r.rel
    LEFT JOIN vocabulary l ON r.lhs = l.entity AND c.lhs = l.row
    LEFT JOIN vocabulary t ON r.rhs = t.entity AND c.rhs = t.row
),
found AS MATERIALIZED (
    SELECT d.relation, d.lhs_id, d.rhs_id
    FROM raw_edges e
    JOIN traced d ON e.rel = d.relation AND CAST(e.lhs AS VARCHAR) = d.lhs_id AND CAST(e.rhs AS VARCHAR) = d.rhs_id
)
SELECT d.* FROM traced d
ANTI JOIN found f ON d.relation = f.relation AND d.lhs_id = f.lhs_id AND d.rhs_id = f.rhs_id
