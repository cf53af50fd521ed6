-- On test edges, calibrated probabilities are better than the base rate (`calibrated_rce` above 0), and on average within
-- 5 percentage points of the share of edges (`ece` below 0.05), over all relations, where there are 200 test edges.
-- Finding: {n} [figure says|figures say] that probabilities do not hold on test edges
SELECT relation, side, metric, value, edges,
    coalesce(CASE metric WHEN 'ece' THEN value < 0.05 ELSE value > 0 END, false) AS ok,
    format('{} is {:.4f}', metric, value) AS problem
FROM evaluation
WHERE metric IN ('calibrated_rce', 'ece') AND relation = 'all' AND edges >= getvariable('least_edges')
