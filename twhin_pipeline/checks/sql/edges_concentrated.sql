-- In each relation of 1,000 edges or more, the best connected heads, and the best connected tails (0.1 % of them, and 10 at
-- least), have at most `max_top_gain` more of its edges, as a share of them, than in the snapshot before, or in what this
-- snapshot was before it was made again, if these passed their checks: a burst of edges from few heads or to few tails is
-- rather spam, or a fault upstream, than news. The limit is that of the source that brings the relation, of several the
-- largest.
-- Finding: {n} [end of a relation has|ends of relations have] more of the edges at few ids than max_top_gain allows
WITH edge_end AS (
    SELECT '' AS compared, rel, 'heads' AS side, hash(lhs) AS id FROM raw_edges
    SEMI JOIN (SELECT DISTINCT rel FROM previous_edges) known USING (rel)
    UNION ALL
    SELECT '', rel, 'tails', hash(rhs) FROM raw_edges
    SEMI JOIN (SELECT DISTINCT rel FROM previous_edges) known USING (rel)
    UNION ALL
    SELECT compared, rel, 'heads', lhs FROM previous_edges
    UNION ALL
    SELECT compared, rel, 'tails', rhs FROM previous_edges
),
degree AS (
    SELECT compared, rel, side, edges AS degree, count(*) AS ids
    FROM (SELECT compared, rel, side, id, count(*) AS edges FROM edge_end GROUP BY ALL)
    GROUP BY ALL
),
placed AS (
    SELECT *, sum(ids) OVER (PARTITION BY compared, rel, side ORDER BY degree DESC) - ids AS ahead,
           greatest(10, ceil(0.001 * sum(ids) OVER (PARTITION BY compared, rel, side))) AS top
    FROM degree
),
top_share AS (
    SELECT compared, rel, side, sum(degree * ids) AS edges, any_value(top)::BIGINT AS top,
           sum(degree * greatest(0, least(ids, top - ahead))) / sum(degree * ids) AS share
    FROM placed
    GROUP BY ALL
)
SELECT now.rel AS relation, now.side, now.top AS best_connected, round(before.share, 4) AS share_before,
       round(now.share, 4) AS share_now,
       format('{}: the first {:,} {} have {:.0f} % of {:,} edges, before {:.0f} %',
              now.rel, now.top, now.side, 100 * now.share, now.edges::BIGINT, 100 * before.share) AS problem,
       least(now.edges, before.edges) < 1000
       OR now.share <= before.share + coalesce(s.top_gain, getvariable('max_top_gain')) AS ok
FROM top_share now
JOIN (
    SELECT rel, side, max(share) AS share, max(edges) AS edges FROM top_share WHERE compared <> '' GROUP BY ALL
) before USING (rel, side)
LEFT JOIN kept_share s USING (rel)
WHERE now.compared = ''
ORDER BY now.share - before.share DESC, relation, side
