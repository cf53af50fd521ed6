-- Every epoch, chunk and asked side has exactly one pool of `global_negatives` candidates.
WITH wanted AS (
    SELECT epoch.range AS epoch, chunk, side.side
    FROM range(getvariable('epochs')) epoch, chunk_size, (SELECT unnest(getvariable('sides')) AS side) side
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
