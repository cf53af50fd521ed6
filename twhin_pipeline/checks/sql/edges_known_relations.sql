-- Every relation of the edges is one of the model's.
-- Finding: {n} [relation|relations] of the edges [is|are] none of the model's
SELECT e.rel, count(*) AS edges, format('{}: {:,} {}', e.rel, count(*), CASE count(*) WHEN 1 THEN 'edge' ELSE 'edges' END) AS problem
FROM raw_edges e
ANTI JOIN relation r ON e.rel = r.name
GROUP BY e.rel
ORDER BY edges DESC
