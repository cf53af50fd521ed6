-- The model is not below the baselines in `evaluation.must_beat` (less the tolerance), over all relations and in each relation with enough test edges to tell.
-- Finding: the model is below a baseline of evaluation.must_beat in {n} [figure|figures]
WITH figures AS (
    SELECT e.relation, e.side, e.metric, b.baseline,
        CASE b.baseline WHEN 'popularity' THEN e.value ELSE e.compared END AS model_value,
        CASE b.baseline WHEN 'popularity' THEN e.baseline WHEN 'item_knn' THEN e.item_knn ELSE e.als END
            AS baseline_value,
        -- Where item-kNN or ALS was not computed there is nothing to hold the model against, so the gate is shut.
        CASE b.baseline WHEN 'popularity' THEN e.edges ELSE coalesce(e.compared_edges, e.edges) END AS edges
    FROM evaluation e
    LEFT JOIN relation r ON r.name = e.relation
    CROSS JOIN must_beat b
    WHERE e.metric = getvariable('chief_metric')
        AND e.side = CASE
            WHEN e.metric LIKE 'recall@%' THEN 'rhs'
            WHEN e.relation = 'all' THEN getvariable('overall_side')
            ELSE coalesce(r.side, 'both')
        END
)
SELECT relation, metric, baseline, model_value, baseline_value, edges,
    coalesce(model_value >= baseline_value * (1 - getvariable('must_beat_tolerance')), false) AS ok,
    format('{} of {}: {}, {} {}', metric, CASE relation WHEN 'all' THEN 'all relations' ELSE relation END,
           coalesce(format('{:.4f}', model_value), 'not measured'), baseline,
           coalesce(format('{:.4f}', baseline_value), 'not measured')) AS problem
FROM figures
WHERE relation = 'all' OR edges >= getvariable('least_edges')
UNION ALL
SELECT 'all', getvariable('chief_metric'), baseline, NULL, NULL, 0, false, 'nothing was measured'
FROM must_beat
WHERE NOT EXISTS (SELECT 1 FROM figures WHERE relation = 'all')
ORDER BY ok, relation, baseline
