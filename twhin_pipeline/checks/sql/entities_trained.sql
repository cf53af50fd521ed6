-- Every entity that has an edge in the snapshot has a training edge, so that its vector was learned (the others are marked by trained_edges = 0, and are left out of neighbours and recommendations).
-- Finding: {n} entity [type has|types have] entities without a training edge
SELECT m.entity, count(*) FILTER (m.trained_edges = 0) AS untrained, count(*) AS entities, untrained = 0 AS ok,
       format('{}: {:,} of {:,}', m.entity, untrained, count(*)) AS problem
FROM embeddings m
JOIN vocabulary v ON m.entity = v.entity AND m.row = v.row AND v.degree > 0
GROUP BY m.entity
