-- Of each source at most `max_rejected_share` of the rows could not be edges; a failure shows the rejected rows, those
-- of the most frequent reason first, with the column to blame and its value.
-- Finding: {n} [row was|rows were] rejected, more than max_rejected_share of a source's
WITH counted AS (
    SELECT source, reason, "column", count(*) AS rows FROM raw_edges_rejected GROUP BY ALL
),
failed AS (
    SELECT c.source
    FROM counted c
    LEFT JOIN source s USING (source)
    GROUP BY c.source, s.read, s.max_rejected_share
    HAVING sum(c.rows) > coalesce(s.max_rejected_share, getvariable('max_rejected_share'))
        * coalesce(s.read, (SELECT count(*) FROM raw_edges) + (SELECT count(*) FROM raw_edges_rejected))
)
SELECT c.rows AS rows_like_it, r.reason, r."column", r.value, r.lhs, r.rel, r.rhs, r.file, r.row, r.source
FROM raw_edges_rejected r
SEMI JOIN failed f ON r.source = f.source
JOIN counted c ON r.source = c.source AND r.reason = c.reason AND r."column" IS NOT DISTINCT FROM c."column"
ORDER BY c.rows DESC, r.source, r.reason, r."column", r.file, r.row
