-- Every entity with at least `vocabulary.min_count` edges has a row.
-- Finding: {n} [entity|entities] with enough edges [has|have] no row
WITH seen AS (
    SELECT r.lhs AS entity, CAST(e.lhs AS VARCHAR) AS id FROM raw_edges e JOIN relation r ON e.rel = r.name
    UNION ALL
    SELECT r.rhs, CAST(e.rhs AS VARCHAR) FROM raw_edges e JOIN relation r ON e.rel = r.name
)
SELECT entity, id, count(*) AS edges
FROM seen
SEMI JOIN entity ON seen.entity = entity.entity AND entity.asked
ANTI JOIN vocabulary v ON seen.entity = v.entity AND seen.id = v.id
GROUP BY entity, id
HAVING count(*) >= getvariable('min_count')
ORDER BY edges DESC
