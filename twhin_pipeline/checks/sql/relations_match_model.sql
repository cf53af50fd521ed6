-- There is one vector of finite numbers for each relation of the model, with its operator and ends.
-- Finding: {n} [vector of a relation is|vectors of relations are] missing, there twice, or with another operator or end
SELECT r.name AS relation, r.operator, r.lhs, r.rhs, x.operator AS exported_operator, len(x.embedding) AS length,
       coalesce(r.name, x.relation) AS problem
FROM relation r
FULL JOIN embedding_relation x ON r.name = x.relation AND r.lhs = x.lhs AND r.rhs = x.rhs AND r.operator = x.operator
WHERE r.name IS NULL OR x.relation IS NULL OR x.embedding IS NULL
   OR NOT isfinite(list_sum(list_transform(x.embedding, lambda e: CAST(e AS DOUBLE))))
