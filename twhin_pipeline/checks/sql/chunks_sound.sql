-- A chunk has one relation, at most `negatives.chunk_size` edges, all in a row; chunks are numbered from 0.
-- Finding: {n} [chunk mixes|chunks mix] relations, [is|are] too large, not in a row, or numbered with gaps
WITH part AS (
    SELECT chunk, rel, filename, count(*) AS edges, max(position) + 1 AS span FROM chunks GROUP BY chunk, rel, filename
),
chunk AS (
    SELECT chunk, count(DISTINCT rel) AS relations, CAST(sum(edges) AS BIGINT) AS edges,
           count(DISTINCT filename) AS files, max(span) AS span
    FROM part
    GROUP BY chunk
)
SELECT chunk, relations, edges, files, span, NULL AS expected_chunk
FROM chunk
WHERE relations > 1 OR edges > getvariable('chunk_size') OR files > 1 OR span > edges
UNION ALL
SELECT chunk, relations, edges, files, span, number
FROM (SELECT *, row_number() OVER (ORDER BY chunk) - 1 AS number FROM chunk)
WHERE chunk <> number
