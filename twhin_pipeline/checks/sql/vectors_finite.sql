-- Every element of every vector is a finite number, and all vectors have the model's length.
-- Finding: {n} [vector has|vectors have] an element that is not finite, or another length than the model's
SELECT entity, id, row, len(embedding) AS length, len(list_filter(embedding, lambda x: x IS NULL OR NOT isfinite(x))) AS not_finite
FROM embeddings
WHERE embedding IS NULL OR len(embedding) <> getvariable('embedding_dim')
   OR NOT isfinite(list_sum(list_transform(embedding, lambda x: CAST(x AS DOUBLE))))
