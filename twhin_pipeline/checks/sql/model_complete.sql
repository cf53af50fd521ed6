-- Training reported its results, and every table and relation was written whole.
-- Finding: {n} [table or relation|tables or relations] of the model [is|are] missing or incomplete
SELECT 'missing in the report: ' || wanted.key AS problem
FROM (SELECT unnest(['final_loss', 'steps', 'edges_per_second', 'world_size']) AS key) wanted
ANTI JOIN detail d ON wanted.key = d.key AND d.value IS NOT NULL
UNION ALL
SELECT 'table ' || e.entity || ' has ' || count(t.row) || ' vectors for ' || any_value(e.size) || ' entities'
FROM entity e LEFT JOIN model_row t ON e.entity = t.entity
GROUP BY e.entity
HAVING count(DISTINCT t.row) < any_value(e.size) OR count(t.row) <> count(DISTINCT t.row)
UNION ALL
SELECT 'relation ' || r.name || ' has no operator parameters'
FROM relation r ANTI JOIN model_relation m ON r.name = m.relation
