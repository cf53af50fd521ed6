-- Of an entity type's ids that have edges at most 5 %, or 20, are new and differ from a known id by letter case, spaces at
-- their ends or Unicode normal form alone: more of them mean that a source writes its ids otherwise than before, and each
-- would begin without a history (`normalize_ids` of the source makes them one).
-- Finding: {n} entity [type has|types have] new ids that are known ones written otherwise
WITH keyed AS MATERIALIZED (
    SELECT v.entity, v.id, v.degree, lower(trim(nfc_normalize(v.id))) AS alike, p.id IS NULL AS is_new
    FROM vocabulary v
    LEFT JOIN previous_vocabulary p USING (entity, id)
),
known AS (
    SELECT DISTINCT entity, alike FROM keyed WHERE NOT is_new
),
counted AS (
    SELECT k.entity, count(*) AS new_alike, list_sort(list(k.id))[:5] AS first_ids
    FROM keyed k SEMI JOIN known USING (entity, alike)
    WHERE k.is_new
    GROUP BY k.entity
)
SELECT entity, new_alike, used, first_ids,
       format('{}: {:,} of {:,}, such as {}', entity, new_alike, used, first_ids[1]) AS problem
FROM counted
JOIN (SELECT entity, count(*) FILTER (degree > 0) AS used FROM keyed GROUP BY entity) USING (entity)
WHERE new_alike > 20 AND new_alike > 0.05 * used
