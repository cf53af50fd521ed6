-- There is at least one edge.
-- Finding: there is no edge
SELECT 'raw_edges_rejected has the reasons of rows that are none' AS problem
FROM (SELECT count(*) AS edges FROM raw_edges)
WHERE edges = 0
