-- Vectors have not collapsed: two of a sample of 500 do not, in the mean, point in nearly the same direction.
-- Finding: vectors have collapsed: two of a sample point in nearly the same direction
WITH sample AS (
    SELECT entity, row, embedding, row_number() OVER (PARTITION BY entity ORDER BY hash(row)) AS i
    FROM embeddings
    WHERE list_dot_product(embedding, embedding) > 0
    QUALIFY i <= 500
)
SELECT a.entity, count(*) AS pairs, avg(list_cosine_similarity(a.embedding, b.embedding)) AS mean_cosine,
       format('{}: mean cosine {:.3f}', a.entity, mean_cosine) AS problem,
       avg(list_cosine_similarity(a.embedding, b.embedding)) < 0.95 AS ok
FROM sample a JOIN sample b ON a.entity = b.entity AND a.i < b.i AND b.i - a.i <= 10
GROUP BY a.entity
