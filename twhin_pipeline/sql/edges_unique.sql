-- No edge is there twice: duplicates were merged, their weights added.
SELECT lhs, rel, rhs, count(*) AS copies
FROM raw_edges
GROUP BY lhs, rel, rhs
HAVING count(*) > 1
ORDER BY copies DESC
