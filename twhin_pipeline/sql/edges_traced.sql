-- An edge of each chunk, traced back by the vocabularies, is a raw edge.
WITH traced AS MATERIALIZED (
    SELECT c.chunk, r.name AS relation, c.lhs, c.rhs, l.id AS lhs_id, t.id AS rhs_id
    FROM chunks c
    JOIN relation r ON c.rel = r.rel
    LEFT JOIN vocabulary l ON r.lhs = l.entity AND c.lhs = l.row
    LEFT JOIN vocabulary t ON r.rhs = t.entity AND c.rhs = t.row
    WHERE c.position = 0
),
found AS MATERIALIZED (
    -- A join, not a semi-join, is made from its smaller side.
    SELECT d.relation, d.lhs_id, d.rhs_id
    FROM raw_edges e
    JOIN traced d ON e.rel = d.relation AND CAST(e.lhs AS VARCHAR) = d.lhs_id AND CAST(e.rhs AS VARCHAR) = d.rhs_id
)
SELECT d.* FROM traced d
ANTI JOIN found f ON d.relation = f.relation AND d.lhs_id = f.lhs_id AND d.rhs_id = f.rhs_id
