-- No edge has a null or empty end, a null relation, or a weight that is not a finite number above or equal to 0.
-- Finding: {n} [edge has|edges have] a null or empty end, a null relation, or a weight that is negative or not finite
SELECT lhs, rel, rhs, weight
FROM raw_edges
WHERE lhs IS NULL OR rel IS NULL OR rhs IS NULL
   OR CAST(lhs AS VARCHAR) = '' OR CAST(rhs AS VARCHAR) = ''
   OR weight IS NULL OR NOT isfinite(weight) OR weight < 0
