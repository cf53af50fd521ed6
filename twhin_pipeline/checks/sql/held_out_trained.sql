-- Every entity of a held-out edge has a training edge (a warning: its vector cannot be better than chance).
-- Finding: {n} [entity|entities] of held-out edges [has|have] no training edge
WITH tested AS MATERIALIZED (
    SELECT r.name AS relation, r.lhs AS entity, c.lhs AS row FROM chunks c JOIN relation r ON c.rel = r.rel
    UNION ALL
    SELECT r.name, r.rhs, c.rhs FROM chunks c JOIN relation r ON c.rel = r.rel
),
-- Of the training edges' entities only those that are asked for.
trained AS (
    SELECT r.lhs AS entity, p.lhs AS row FROM positives p JOIN relation r ON p.rel = r.rel
    WHERE p.lhs IN (SELECT row FROM tested)
    UNION ALL
    SELECT r.rhs, p.rhs FROM positives p JOIN relation r ON p.rel = r.rel
    WHERE p.rhs IN (SELECT row FROM tested)
)
SELECT relation, entity, row, count(*) AS edges
FROM tested
ANTI JOIN (SELECT DISTINCT entity, row FROM trained) USING (entity, row)
GROUP BY ALL
ORDER BY edges DESC, row
