-- No vector is zero, and none is over 100 times as long as the middle one.
-- Finding: {n} [vector is|vectors are] zero, or over 100 times as long as the middle one
WITH normed AS (SELECT entity, id, row, sqrt(list_dot_product(embedding, embedding)) AS norm FROM embeddings),
middle AS (SELECT entity, median(norm) AS median_norm FROM normed GROUP BY entity)
SELECT entity, id, row, norm, median_norm
FROM normed JOIN middle USING (entity)
WHERE NOT coalesce(norm > 0 AND norm <= 100 * median_norm, false)
ORDER BY norm DESC
