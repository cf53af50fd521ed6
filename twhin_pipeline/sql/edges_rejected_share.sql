-- The share of rows that could not be edges is at most `source.max_rejected_share`; the rejected rows are shown.
SELECT reason, lhs, rel, rhs, file, row
FROM raw_edges_rejected
WHERE (SELECT count(*) FROM raw_edges_rejected)
    > getvariable('max_rejected_share')
      * coalesce((SELECT value::DOUBLE FROM detail WHERE key = 'read'),
                 (SELECT count(*) FROM raw_edges) + (SELECT count(*) FROM raw_edges_rejected))
ORDER BY reason, file, row
