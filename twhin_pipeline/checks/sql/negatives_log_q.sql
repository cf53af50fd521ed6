-- Each candidate's log_q is the log of its expected number in the list [window | pool]: of uniform draws, of draws by
-- degree^alpha, and of the window, which has its share of the relation's edges (of large sets an even sample of pools);
-- null where `loss.log_q` is off.
-- Finding: {n} [candidate has|candidates have] a log_q that is not that of [its|their] expected number
WITH degree AS (
    SELECT entity, row, power(count(*), getvariable('alpha')) AS mass FROM (
        SELECT r.lhs AS entity, p.lhs AS row FROM positives p JOIN relation r ON p.rel = r.rel
        UNION ALL
        SELECT r.rhs, p.rhs FROM positives p JOIN relation r ON p.rel = r.rel
    ) GROUP BY ALL
),
total AS (SELECT entity, sum(mass) AS mass FROM degree GROUP BY entity),
edge_end AS (SELECT rel, 0 AS side, lhs AS row FROM truth UNION ALL SELECT rel, 1, rhs FROM truth),
share AS (
    SELECT rel, side, row, count(*) / sum(count(*)) OVER (PARTITION BY rel, side) AS share
    FROM edge_end GROUP BY rel, side, row
),
-- Ids without an edge in the snapshot are not drawn.
present AS MATERIALIZED (
    SELECT entity, row FROM vocabulary QUALIFY degree > 0 OR max(degree) OVER (PARTITION BY entity) = 0
),
drawable AS (SELECT entity, count(*) AS size FROM present GROUP BY entity),
pool AS MATERIALIZED (
    SELECT n.epoch, n.chunk, n.side, n.row, n.log_q, c.rel, c.edges, e.entity, e.size,
           least(getvariable('in_batch'), c.edges) AS in_batch
    FROM pools n
    SEMI JOIN audited a ON n.epoch = a.epoch AND n.chunk = a.chunk
    JOIN chunk_size c ON n.chunk = c.chunk
    JOIN relation r ON c.rel = r.rel
    JOIN drawable e ON e.entity = CASE n.side WHEN 0 THEN r.lhs ELSE r.rhs END
),
window_candidate AS (
    SELECT epoch, chunk, side, rel, entity, size, in_batch, unnest(log_q[1:in_batch]) AS log_q,
           unnest(range(in_batch)) AS candidate,
           (epoch * getvariable('in_batch') + unnest(range(in_batch))) % edges AS position
    FROM pool
),
candidate AS (
    SELECT w.* EXCLUDE (position, log_q), CASE w.side WHEN 0 THEN c.lhs ELSE c.rhs END AS row, w.log_q
    FROM window_candidate w JOIN audited_chunks c ON w.chunk = c.chunk AND w.position = c.position
    UNION ALL
    SELECT epoch, chunk, side, rel, entity, size, in_batch, in_batch + unnest(range(len(row))), unnest(row),
           unnest(log_q[in_batch + 1:in_batch + len(row)])
    FROM pool
),
expected AS (
    SELECT c.epoch, c.chunk, c.side, c.candidate, c.row, c.log_q,
           CASE WHEN t.mass IS NULL THEN getvariable('pool_size') / c.size * (p.row IS NOT NULL)::INT
                ELSE getvariable('uniform_size') / c.size * (p.row IS NOT NULL)::INT
                     + (getvariable('pool_size') - getvariable('uniform_size')) * coalesce(d.mass, 0) / t.mass
           END + c.in_batch * coalesce(s.share, 0) AS number
    FROM candidate c
    LEFT JOIN total t ON c.entity = t.entity
    LEFT JOIN degree d ON c.entity = d.entity AND c.row = d.row
    LEFT JOIN present p ON c.entity = p.entity AND c.row = p.row
    LEFT JOIN share s ON c.rel = s.rel AND c.side = s.side AND c.row = s.row
)
-- float32 keeps seven digits.
SELECT epoch, chunk, side, candidate, row, log_q, ln(number) AS expected_log_q
FROM expected
WHERE getvariable('log_q') AND NOT coalesce(abs(log_q - ln(number)) <= 1e-6 * greatest(1, abs(ln(number))), false)
UNION ALL
SELECT epoch, chunk, side, NULL, NULL, NULL, NULL
FROM pool
WHERE CASE WHEN getvariable('log_q') THEN len(log_q) IS DISTINCT FROM in_batch + len(row) ELSE log_q IS NOT NULL END
