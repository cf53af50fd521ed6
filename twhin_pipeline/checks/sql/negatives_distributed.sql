-- The uniform and the degree^alpha part of the pools are drawn as asked: by entity type, in ten bins of degree, within
-- five standard deviations.
-- Finding: {n} [bin|bins] of degree [has|have] more or fewer negatives than chance explains
WITH degree AS (
    SELECT entity, row, count(*) AS degree FROM (
        SELECT r.lhs AS entity, p.lhs AS row FROM positives p JOIN relation r ON p.rel = r.rel
        UNION ALL
        SELECT r.rhs, p.rhs FROM positives p JOIN relation r ON p.rel = r.rel
    ) GROUP BY ALL
),
-- Ids without an edge in the snapshot are not drawn.
present AS (
    SELECT entity, row FROM vocabulary QUALIFY degree > 0 OR max(degree) OVER (PARTITION BY entity) = 0
),
member AS (
    -- Without an edge there is no mass, also where alpha is 0.
    SELECT v.entity, v.row, coalesce(power(d.degree, getvariable('alpha')), 0) AS mass,
           ntile(10) OVER (PARTITION BY v.entity ORDER BY coalesce(d.degree, 0), v.row) AS bin
    FROM present v LEFT JOIN degree d ON v.entity = d.entity AND v.row = d.row
),
bin AS (
    SELECT entity, bin, count(*) / sum(count(*)) OVER (PARTITION BY entity) AS uniform,
           sum(mass) / nullif(sum(sum(mass)) OVER (PARTITION BY entity), 0) AS by_degree
    FROM member GROUP BY entity, bin
),
drawn AS (
    SELECT CASE n.side WHEN 0 THEN r.lhs ELSE r.rhs END AS entity,
           unnest(n.row) AS row, unnest(range(len(n.row))) AS k
    FROM pools n
    SEMI JOIN audited a ON n.epoch = a.epoch AND n.chunk = a.chunk
    JOIN chunk_size c ON n.chunk = c.chunk JOIN relation r ON c.rel = r.rel
),
observed AS (
    SELECT d.entity, CASE WHEN d.k < getvariable('uniform_size') THEN 'uniform' ELSE 'degree' END AS part, m.bin,
           count(*) AS observed
    FROM drawn d JOIN member m ON d.entity = m.entity AND d.row = m.row
    GROUP BY ALL
),
total AS (SELECT entity, part, sum(observed) AS draws FROM observed GROUP BY ALL),
compared AS (
    SELECT t.entity, t.part, b.bin, coalesce(o.observed, 0) AS observed, t.draws,
           -- Where no entity of the type has a training edge, all are drawn uniformly.
           CASE t.part WHEN 'uniform' THEN b.uniform ELSE coalesce(b.by_degree, b.uniform) END AS share
    FROM total t JOIN bin b USING (entity)
    LEFT JOIN observed o ON t.entity = o.entity AND t.part = o.part AND b.bin = o.bin
)
SELECT entity, part, bin AS degree_bin, observed, round(draws * share, 1) AS expected,
       format('bin {} of {}, {}: {:,}, expected {:,}', bin, entity, part, observed, round(draws * share)::BIGINT) AS problem,
       abs(observed - draws * share) <= 5 * sqrt(draws * share * (1 - share)) + 1 AS ok
FROM compared
ORDER BY entity, part, bin
