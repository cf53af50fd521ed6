-- Every overall metric reaches its floor in `evaluation.floors`. Retrieval (recall, NDCG) and calibration have tails only.
-- Finding: {n} [metric is below its|metrics are below their] floor in evaluation.floors
SELECT f.metric, e.value, f.least AS floor, coalesce(e.value >= f.least, false)  AS ok,
    format('{} is {}, its floor {}', f.metric, coalesce(format('{:.4f}', e.value), 'not there'), f.least) AS problem
FROM floors f
LEFT JOIN evaluation e ON e.metric = f.metric AND e.relation = 'all'
    AND e.side = CASE WHEN regexp_matches(f.metric, '^((recall|ndcg)@|calibrated_rce)') THEN 'rhs' ELSE 'both' END
