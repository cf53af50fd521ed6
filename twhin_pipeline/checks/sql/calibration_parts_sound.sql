-- What is said of a calibration holds shares: thresholds, of which a lower one reaches no fewer edges, and bins of reliability, none of them empty.
-- Finding: {n} [threshold or bin is|thresholds or bins are] not sound
SELECT 'thresholds' AS part, relation, probability AS predicted, precision AS observed, recall, edges AS pairs
FROM (
    SELECT *, lag(recall) OVER higher AS reached, lag(edges) OVER higher AS counted
    FROM calibration_thresholds
    WINDOW higher AS (PARTITION BY relation ORDER BY probability DESC)
)
WHERE relation NOT IN (SELECT name FROM relation)
    OR (isfinite(probability + precision + recall) AND probability BETWEEN 0 AND 1 AND precision BETWEEN 0 AND 1
        AND recall > 0 AND recall <= 1 AND edges > 0 AND coalesce(recall >= reached AND edges >= counted, true)) IS NOT TRUE
UNION ALL
SELECT 'reliability', relation, predicted, observed, NULL, pairs
FROM calibration_reliability
WHERE (isfinite(predicted + uncalibrated + observed) AND predicted BETWEEN 0 AND 1 AND uncalibrated BETWEEN 0 AND 1
       AND observed BETWEEN 0 AND 1 AND pairs > 0) IS NOT TRUE
