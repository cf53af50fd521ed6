-- No two ids of an entity type differ by letter case, spaces at their ends or Unicode normal form alone (a warning: they
-- may be one entity; `normalize_ids` of the source makes them one).
-- Finding: {n} [group|groups] of ids [differs|differ] by letter case, spaces at their ends, or Unicode form alone
WITH keyed AS MATERIALIZED (
    SELECT entity, id, lower(trim(nfc_normalize(id))) AS alike FROM vocabulary
),
-- Of ids that are alike, all but one at most are as their common form is.
changed AS (
    SELECT DISTINCT entity, alike FROM keyed WHERE id <> alike
)
SELECT entity, count(*) AS ids, list_sort(list(id))[:5] AS first_ids,
       format('{}: {}', entity, array_to_string(list_transform(first_ids, lambda x: '''' || x || ''''), ', ')) AS problem
FROM keyed
SEMI JOIN changed USING (entity, alike)
GROUP BY entity, alike
HAVING count(*) > 1
ORDER BY ids DESC, first_ids
