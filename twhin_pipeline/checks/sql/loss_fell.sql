-- The last tenth of the logged losses is lower, in the mean, than the first tenth (passes with a single one, and where training
-- started from an earlier model, whose loss is low from the first step on).
-- Finding: the last tenth of the logged losses is not lower than the first
WITH numbered AS (
    SELECT loss, row_number() OVER (ORDER BY step) AS i, count(*) OVER () AS n FROM losses
)
SELECT avg(loss) FILTER (i <= greatest(1, n // 10)) AS first_losses,
       avg(loss) FILTER (i > n - greatest(1, n // 10)) AS last_losses,
       coalesce(max(n) = 1 OR getvariable('warm') OR avg(loss) FILTER (i > n - greatest(1, n // 10))
                              < avg(loss) FILTER (i <= greatest(1, n // 10)), false)  AS ok,
       format('{:.4f}, then {:.4f}', first_losses, last_losses) AS problem
FROM numbered
