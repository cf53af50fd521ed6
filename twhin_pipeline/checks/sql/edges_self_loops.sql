-- No edge leads from an entity to itself (a warning: some graphs mean it).
-- Finding: {n} [edge leads|edges lead] from an entity to itself
SELECT e.lhs, e.rel, e.rhs
FROM raw_edges e
JOIN relation r ON e.rel = r.name AND r.lhs = r.rhs
WHERE e.lhs = e.rhs
