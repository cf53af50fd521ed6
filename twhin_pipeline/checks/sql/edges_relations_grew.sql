-- Each relation has at most `max_growth` times the edges that it had in the snapshot before, or in what this snapshot was
-- before it was made again, where these had 100 of it or more and passed their checks; the limit is that of the source
-- that brings the relation, of several the largest.
-- Finding: {n} [relation has|relations have] more edges than max_growth allows
SELECT before.rel AS relation, before.edges AS edges_before, coalesce(now.edges, 0) AS edges_now,
       round(coalesce(now.edges, 0) / before.edges, 2) AS times,
       format('{}: {:,} edges, before {:,}', before.rel, edges_now, before.edges) AS problem,
       before.edges < 100
       OR coalesce(now.edges, 0) <= coalesce(s.growth, getvariable('max_growth')) * before.edges AS ok
FROM (
    SELECT rel, max(edges) AS edges
    FROM (SELECT compared, rel, count(*) AS edges FROM previous_edges GROUP BY ALL)
    GROUP BY rel
) before
LEFT JOIN (SELECT rel, count(*) AS edges FROM raw_edges GROUP BY rel) now USING (rel)
LEFT JOIN kept_share s USING (rel)
ORDER BY times DESC, relation
