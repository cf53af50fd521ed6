-- Every edge that happens again in the test's time, and is evaluated as such, is a training edge.
-- Finding: {n} [edge that is evaluated as repeated is no training edge|edges that are evaluated as repeated are no training edges]
SELECT r.name AS relation, c.lhs, c.rhs
FROM chunks c
ANTI JOIN positives p ON c.rel = p.rel AND c.lhs = p.lhs AND c.rhs = p.rhs
LEFT JOIN relation r ON c.rel = r.rel
