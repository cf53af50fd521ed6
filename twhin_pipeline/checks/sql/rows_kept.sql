-- An id of the snapshot before has the row it had there, or, where rows were compacted, its new row is noted beside the
-- one it had, and only evicted ids are gone (passes where there is none).
-- Finding: {n} [id|ids] of the snapshot before [has|have] another row, or none
SELECT before.entity, before.id, before.row AS row_before, now.row AS row_now, now.row_before AS noted_row_before
FROM previous_vocabulary before
LEFT JOIN vocabulary now USING (entity, id)
WHERE now.row_before IS DISTINCT FROM before.row AND NOT (before.evicted AND now.row IS NULL AND getvariable('compacted'))
