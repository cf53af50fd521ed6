-- Each relation of 100 edges or more kept `min_kept_share` of them against the snapshot before, and against what this
-- snapshot was before it was made again, if they are there and passed their checks; the share is that of the source that
-- brings the relation, of several the largest.
-- Finding: {n} [relation|relations] lost more edges than min_kept_share allows
SELECT before.compared AS compared_with, before.rel AS relation, before.edges AS edges_before,
       coalesce(now.edges, 0) AS edges_now, round(coalesce(now.edges, 0) / before.edges, 4) AS kept,
       format('{}: {:,} of {:,} edges are left', before.rel, edges_now, before.edges) AS problem,
       before.edges < 100
       OR coalesce(now.edges, 0) >= coalesce(s.share, getvariable('min_kept_share')) * before.edges AS ok
FROM (
    SELECT rel, max(edges) AS edges, arg_max(compared, edges) AS compared
    FROM (SELECT compared, rel, count(*) AS edges FROM previous_edges GROUP BY ALL)
    GROUP BY rel
) before
LEFT JOIN (SELECT rel, count(*) AS edges FROM raw_edges GROUP BY rel) now USING (rel)
LEFT JOIN kept_share s USING (rel)
ORDER BY kept, relation
