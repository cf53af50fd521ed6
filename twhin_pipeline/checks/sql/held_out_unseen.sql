-- No held-out edge is a training edge.
-- Finding: {n} held-out [edge is a training edge|edges are training edges]
SELECT h.split, r.name AS relation, h.lhs, h.rhs
FROM held_out h
SEMI JOIN positives p ON h.rel = p.rel AND h.lhs = p.lhs AND h.rhs = p.rhs
LEFT JOIN relation r ON h.rel = r.rel
