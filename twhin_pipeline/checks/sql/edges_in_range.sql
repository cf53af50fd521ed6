-- Both ends of an edge are rows of their relation's entity types, and its weight is finite and not negative.
-- Finding: {n} [edge has|edges have] an end outside its table, or a weight that is negative or not finite
SELECT c.chunk, c.position, c.rel, r.name AS relation, c.lhs, l.size AS lhs_entities, c.rhs, t.size AS rhs_entities,
       c.weight
FROM chunks c
LEFT JOIN relation r ON c.rel = r.rel
LEFT JOIN entity l ON r.lhs = l.entity
LEFT JOIN entity t ON r.rhs = t.entity
WHERE r.rel IS NULL
   OR c.lhs IS NULL OR c.lhs < 0 OR c.lhs >= l.size
   OR c.rhs IS NULL OR c.rhs < 0 OR c.rhs >= t.size
   OR c.weight IS NULL OR NOT isfinite(c.weight) OR c.weight < 0
