-- Every entity has a training edge, so that its vector was learned (the others are marked by trained_edges = 0, and are left out of neighbours and recommendations).
-- Finding: {n} entities have no training edge
SELECT entity, count(*) FILTER (trained_edges = 0) AS untrained, count(*) AS entities, untrained = 0 AS ok
FROM embeddings
GROUP BY entity
