-- No edge is there twice: duplicates were merged.
-- Finding: {n} [edge is|edges are] there more than once
WITH suspect AS MATERIALIZED (
    -- Equal edges have equal hashes; edges of a hash that comes once need no comparison.
    SELECT hash(lhs, rel, rhs) AS number FROM raw_edges GROUP BY number HAVING count(*) > 1
)
SELECT lhs, rel, rhs, count(*) AS copies
FROM raw_edges
WHERE hash(lhs, rel, rhs) IN (SELECT number FROM suspect)
GROUP BY lhs, rel, rhs
HAVING count(*) > 1
ORDER BY copies DESC
