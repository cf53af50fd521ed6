-- Rows are 0, 1, … n-1 without a gap, and there is at least one.
-- Finding: rows of {n} entity [type|types] are missing or out of order, or there is none
SELECT entity, count(*) AS entities, min(row) AS first_row, max(row) AS last_row,
       format('{}: {:,} ids, rows {} to {}', entity, count(*), min(row), max(row)) AS problem,
       coalesce(count(*) > 0 AND min(row) = 0 AND max(row) = count(*) - 1, false) AS ok
FROM vocabulary
GROUP BY entity
UNION ALL
SELECT entity, 0, NULL, NULL, format('{}: none', entity), false
FROM entity WHERE asked AND entity NOT IN (SELECT entity FROM vocabulary)
