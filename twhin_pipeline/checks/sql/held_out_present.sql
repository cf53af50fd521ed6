-- There is at least one held-out edge where the split asks for some.
-- Finding: no edge is held out, and the split asks for some
SELECT 'raise split.validation and split.test' AS problem
WHERE getvariable('held_out_share') > 0 AND (SELECT count(*) FROM chunks) = 0
