-- The exported table has exactly the vocabulary's ids, but for evicted ones, each at its row.
-- Finding: {n} [id is|ids are] missing, too many, or at another row than in the vocabulary
SELECT coalesce(v.entity, m.entity) AS entity, coalesce(v.id, m.id) AS id, v.row AS vocabulary_row, m.row AS exported_row
FROM (SELECT v.* FROM vocabulary v SEMI JOIN entity e ON v.entity = e.entity AND e.asked WHERE NOT v.evicted) v
FULL JOIN embeddings m ON v.entity = m.entity AND v.id = m.id
WHERE v.row IS DISTINCT FROM m.row
UNION ALL
SELECT entity, id, NULL, row FROM embeddings GROUP BY entity, id, row HAVING count(*) > 1
