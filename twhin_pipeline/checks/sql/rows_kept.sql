-- An id of the snapshot before has the row it had there (passes where there is none).
-- Finding: {n} ids of the snapshot before have another row, or none
SELECT before.entity, before.id, before.row AS row_before, now.row AS row_now
FROM previous_vocabulary before
LEFT JOIN vocabulary now USING (entity, id)
WHERE now.row IS DISTINCT FROM before.row
