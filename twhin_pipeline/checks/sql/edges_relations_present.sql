-- Every relation of the model has edges (a warning: its vector would stay where it started).
-- Finding: {n} [relation|relations] of the model [has|have] no edge
SELECT r.name AS relation, count(e.rel) AS edges, count(e.rel) > 0 AS ok, r.name AS problem
FROM relation r
LEFT JOIN raw_edges e ON e.rel = r.name
GROUP BY r.rel, r.name
ORDER BY r.rel
