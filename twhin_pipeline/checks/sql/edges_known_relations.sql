-- Every relation of the edges is one of the model's.
-- Finding: {n} relations of the edges are none of the model's
SELECT e.rel, count(*) AS edges
FROM raw_edges e
ANTI JOIN relation r ON e.rel = r.name
GROUP BY e.rel
ORDER BY edges DESC
