-- Every candidate of a pool is a row of the entity type that its relation has on that side, of an id with an edge in the
-- snapshot.
-- Finding: {n} [pool has|pools have] negatives that are no row of their relation's entity type, or whose id has no edge
WITH departed AS (
    SELECT entity, row FROM vocabulary QUALIFY degree = 0 AND max(degree) OVER (PARTITION BY entity) > 0
),
pool AS (
    SELECT n.epoch, n.chunk, n.side, n.row, c.rel, CASE n.side WHEN 0 THEN r.lhs ELSE r.rhs END AS entity
    FROM pools n
    LEFT JOIN chunk_size c ON n.chunk = c.chunk
    LEFT JOIN relation r ON c.rel = r.rel
)
SELECT p.epoch, p.chunk, p.side, p.entity, e.size AS entities, list_min(p.row) AS least, list_max(p.row) AS greatest
FROM pool p
LEFT JOIN entity e ON p.entity = e.entity
WHERE p.rel IS NULL OR p.side NOT IN (0, 1)
   OR (len(p.row) > 0 AND (list_min(p.row) < 0 OR list_max(p.row) >= e.size OR len(list_filter(p.row, lambda x: x IS NULL)) > 0))
UNION ALL
SELECT p.epoch, p.chunk, p.side, p.entity, NULL, p.row, p.row
FROM (SELECT epoch, chunk, side, entity, unnest(row) AS row FROM pool WHERE entity IN (SELECT entity FROM departed)) p
SEMI JOIN departed d ON p.entity = d.entity AND p.row = d.row
