-- Each relation has one row, whose map from scores to log-odds is finite and strictly increasing, if it has one.
-- Finding: {n} [map of a relation is|maps of relations are] missing, there twice, or not sound
SELECT r.name AS relation, c.method, c.edges, c.scores, c.log_odds,
    count(c.relation) OVER (PARTITION BY r.name) AS rows, r.name AS problem
FROM relation r
LEFT JOIN calibration c ON c.relation = r.name
QUALIFY rows <> 1
    OR negatives < 1
    OR CASE method
        WHEN 'none' THEN len(scores) + len(log_odds) > 0
        ELSE len(scores) < 2 OR len(scores) <> len(log_odds)
            OR len(list_filter(list_concat(scores, log_odds), lambda x: NOT isfinite(x))) > 0
            OR len(list_filter(range(2, len(scores) + 1), lambda i: scores[i] <= scores[i - 1])) > 0
            OR len(list_filter(range(2, len(scores) + 1), lambda i: log_odds[i] <= log_odds[i - 1])) > 0
    END IS NOT FALSE
UNION ALL
SELECT c.relation, c.method, c.edges, c.scores, c.log_odds, 1, c.relation
FROM calibration c
ANTI JOIN relation r ON r.name = c.relation
