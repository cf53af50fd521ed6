-- Every logged loss is a finite number, and there is at least one.
-- Finding: {n} logged [loss is|losses are] not finite, or none was logged
SELECT step, epoch, loss FROM losses WHERE loss IS NULL OR NOT isfinite(loss)
UNION ALL
SELECT NULL, NULL, NULL WHERE (SELECT count(*) FROM losses) = 0
