-- An id has one row, and a row one id.
-- Finding: {n} [id or row is|ids or rows are] there more than once
SELECT entity, 'id' AS twice, id AS value, count(*) AS times
FROM vocabulary GROUP BY entity, id HAVING count(*) > 1
UNION ALL
SELECT entity, 'row', CAST(row AS VARCHAR), count(*)
FROM vocabulary GROUP BY entity, row HAVING count(*) > 1
