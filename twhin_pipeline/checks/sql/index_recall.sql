-- A search by the index finds the wanted share of the best rows (indexes.recall) for each relation and each k. Remedies: another indexes.kind, a lower indexes.recall.
-- Finding: {n} [recall is|recalls are] below indexes.recall
SELECT relation, k, recall, wanted_recall, parameters, coalesce(recall >= wanted_recall, false) AS ok,
    format('{:.3f} for k = {} of {}', recall, k, coalesce(relation, 'neighbors')) AS problem
FROM search
