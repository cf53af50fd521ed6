-- Every epoch, every chunk and every side that the chunk's relation corrupts has exactly one pool of `global_negatives`
-- candidates, and no other side has one.
-- Finding: {n} [pool is|pools are] missing, there twice, of a wrong size, or for a side that is not corrupted
WITH wanted AS (
    SELECT epoch.range AS epoch, c.chunk, unnest(r.sides) AS side
    FROM range(getvariable('epochs')) epoch, chunk_size c JOIN relation r ON c.rel = r.rel
    WHERE NOT getvariable('every_entity')
),
found AS (
    SELECT epoch, chunk, side, count(*) AS pools, min(len(row)) AS least, max(len(row)) AS most
    FROM pools GROUP BY epoch, chunk, side
)
SELECT epoch, chunk, side, coalesce(pools, 0) AS pools, least AS candidates, getvariable('pool_size') AS wanted_candidates
FROM wanted
FULL JOIN found USING (epoch, chunk, side)
WHERE wanted.chunk IS NULL OR pools IS DISTINCT FROM 1
   OR least IS DISTINCT FROM getvariable('pool_size') OR most IS DISTINCT FROM getvariable('pool_size')
ORDER BY epoch, chunk, side
