-- No ranked edge was a training edge of a model that this one started from: those were left out, and none is unknown.
-- Finding: a model that this one started from is unknown, so its training edges may be among the ranked ones
SELECT
    max(value) FILTER (key = 'ancestors') AS ancestors,
    max(value) FILTER (key = 'ancestors_unknown') AS unknown,
    max(value) FILTER (key = 'edges_left_out') AS edges_left_out,
    coalesce(max(value) FILTER (key = 'ancestors_unknown'), 0) = 0 AS ok
FROM detail
