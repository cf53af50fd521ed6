-- Every metric is a finite number in its range, and the overall ones are there (where an edge was held out).
-- Finding: {n} [metric is|metrics are] missing, not finite, or out of range
SELECT relation, side, metric, value, baseline, edges,
       format('{} of {} is {}', metric, CASE relation WHEN 'all' THEN 'all relations' ELSE relation END, value) AS problem
FROM evaluation
WHERE value IS NULL OR NOT isfinite(value)
   OR (regexp_matches(metric, 'mrr|hits|recall|ndcg|auc') AND NOT value BETWEEN 0 AND 1)
   OR (metric LIKE '%mean_rank' AND value < 1)
UNION ALL
SELECT 'all', 'both', wanted.metric, NULL, NULL, NULL, format('{} is missing', wanted.metric)
FROM (SELECT unnest(['filtered_mrr', 'raw_mrr']) AS metric) wanted
ANTI JOIN evaluation e ON e.metric = wanted.metric AND e.relation = 'all' AND e.side = 'both'
WHERE (SELECT count(*) FROM evaluation) > 0
