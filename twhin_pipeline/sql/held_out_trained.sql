-- Every entity of a held-out edge has a training edge (a warning: its vector cannot be better than chance).
WITH trained AS (
    SELECT DISTINCT r.lhs AS entity, p.lhs AS row FROM positives p JOIN relation r ON p.rel = r.rel
    UNION
    SELECT DISTINCT r.rhs, p.rhs FROM positives p JOIN relation r ON p.rel = r.rel
),
tested AS (
    SELECT r.name AS relation, r.lhs AS entity, c.lhs AS row FROM chunks c JOIN relation r ON c.rel = r.rel
    UNION ALL
    SELECT r.name, r.rhs, c.rhs FROM chunks c JOIN relation r ON c.rel = r.rel
)
SELECT relation, entity, row, count(*) AS edges
FROM tested
ANTI JOIN trained USING (entity, row)
GROUP BY ALL
ORDER BY edges DESC, row
