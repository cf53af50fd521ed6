-- There is at least one edge.
-- Finding: there is no edge
SELECT 'no edge was kept' AS problem
FROM (SELECT count(*) AS edges FROM raw_edges)
WHERE edges = 0
