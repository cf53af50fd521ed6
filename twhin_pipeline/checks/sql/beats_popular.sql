-- The model ranks held-out edges better than the most-popular baseline does (filtered MRR over all relations).
-- Finding: the model does not rank held-out edges better than popularity does
SELECT relation, side, metric, value, baseline, edges, coalesce(value > baseline, false) AS ok,
    format('filtered MRR {:.4f}, of popularity {:.4f}', value, baseline) AS problem
FROM evaluation
WHERE metric = 'filtered_mrr' AND relation = 'all' AND side = 'both'
