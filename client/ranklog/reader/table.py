"""`ranklog.read`: rows as one Arrow table. Imports duckdb and pyarrow.

Thinning keeps what a plot can show. A series is the rows of one (project, run, kind, key, role, rank), and of one node
where rank is null. One with more than `max_points` rows is cut into max_points / 4 buckets of equal width in step (in
time, if any of its rows has no step), and each keeps its first, last, lowest and highest row, so a spike of one step
survives. NaN is neither lowest nor highest: it would hide the real extreme.
"""

from collections.abc import Iterable

import pyarrow as pa

from ranklog.errors import StoreError, UsageError
from ranklog.reader.damage import shard_errors
from ranklog.reader.fetch import fetch_table
from ranklog.reader.local import open_source
from ranklog.reader.runs import find_shards
from ranklog.reader.sql import among, connect_shards, key_condition, quote
from ranklog.schema import KIND_NAMES, SCHEMA

POINTS_PER_BUCKET = 4
"""First, last, lowest, highest."""

_SELECT = """
SELECT * FROM records {kept} WHERE {where}
ORDER BY key, rank NULLS LAST, step NULLS LAST, seq, project, run, kind, role, writer
"""

_SERIES = """
CREATE TEMP TABLE series AS
SELECT project, run, kind, key, role, rank, if(rank IS NULL, node, '') AS place, count(*) AS points,
       count(step) = count(*) AS stepped,
       if(stepped, min(step), min(epoch_us(ts)))::DOUBLE AS low,
       if(stepped, max(step), max(epoch_us(ts)))::DOUBLE AS high
FROM records WHERE {where} GROUP BY ALL
"""

# A series that is short enough has one bucket for each row, (writer, seq), and so keeps them all.
_KEPT = """
CREATE TEMP TABLE kept AS
WITH placed AS (
    SELECT s.*, {{'writer': r.writer, 'seq': r.seq, 'kind': r.kind, 'key': r.key}} AS row_id,
           if(isnan(r.value), NULL, r.value) AS value,
           (if(stepped, r.step, epoch_us(r.ts)), r.seq) AS x,
           if(points <= {points}, r.writer, '') AS bucket_writer,
           if(points <= {points}, r.seq::DOUBLE,
              coalesce(least(floor((x[1]::DOUBLE - low) / nullif(high - low, 0) * {buckets}), {buckets} - 1), 0)
           ) AS bucket
    FROM (SELECT * FROM records WHERE {where}) AS r JOIN series AS s
      ON r.project = s.project AND r.run = s.run AND r.kind = s.kind AND r.key = s.key
     AND r.role IS NOT DISTINCT FROM s.role AND r.rank IS NOT DISTINCT FROM s.rank
     AND if(r.rank IS NULL, r.node, '') = s.place
)
SELECT DISTINCT writer, seq, kind, key FROM (
    SELECT unnest([min_by(row_id, x), max_by(row_id, x), min_by(row_id, value), max_by(row_id, value)],
                  recursive := true)
    FROM placed GROUP BY project, run, kind, key, role, rank, place, bucket_writer, bucket
)
"""


def read_table(
    url: str,
    project: str | None = None,
    run: str | None = None,
    keys: str | Iterable[str] | None = None,
    ranks: int | Iterable[int] | None = None,
    max_points: int | None = None,
    *,
    kinds: str | Iterable[str] = ("metrics",),
) -> pa.Table:
    """Return the rows asked for; the contract is that of `ranklog.reader.read`."""
    if max_points is not None and max_points < POINTS_PER_BUCKET:
        raise UsageError(
            f"max_points is {max_points}; it must be {POINTS_PER_BUCKET} or more: first, last, lowest, highest"
        )
    where = _where(keys, ranks, kinds)
    try:
        table = _select(url, project, run, where, max_points)
    except StoreError as exc:
        if exc.permanent or exc.held:
            raise
        table = _select(url, project, run, where, max_points)  # With a new listing.
    return table.cast(SCHEMA)


def _select(url: str, project: str | None, run: str | None, where: str, max_points: int | None) -> pa.Table:
    store = open_source(url)
    shards = find_shards(store, project, run)
    with connect_shards(store, shards) as con, shard_errors(store, shards):
        kept = ""
        if max_points is not None:
            fetch_table(con, _SERIES.format(where=where))
            if (fetch_table(con, "SELECT max(points) FROM series").column(0)[0].as_py() or 0) > max_points:
                buckets = max_points // POINTS_PER_BUCKET
                fetch_table(con, _KEPT.format(where=where, points=max_points, buckets=buckets))
                kept = "SEMI JOIN kept USING (writer, seq, kind, key)"
        return fetch_table(con, _SELECT.format(kept=kept, where=where))


def _where(keys: str | Iterable[str] | None, ranks: int | Iterable[int] | None, kinds: str | Iterable[str]) -> str:
    """Return the condition as SQL; raises UsageError for a kind that does not exist."""
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in wanted:
        if kind not in KIND_NAMES:
            raise UsageError(f"kind {kind!r} does not exist; choose from {', '.join(KIND_NAMES)}")
    parts = [among("kind", [quote(kind) for kind in wanted])]
    if keys is not None:
        parts.append(key_condition([keys] if isinstance(keys, str) else list(keys)))
    if ranks is not None:
        parts.append(among("rank", [str(int(rank)) for rank in ([ranks] if isinstance(ranks, int) else ranks)]))
    return " AND ".join(parts)
