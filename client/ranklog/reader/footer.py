"""What a shard's parquet footer says, so that listings and plans need no rows. Imports pyarrow.

A shard belongs to one run, so the statistics of the name columns hold the true names. Start rows are each writer's
seq 0, so the writers' seq ranges tell which shards hold one, and the statistics of `kind` which row groups.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.errors import FormatError
from ranklog.reader.overlap import Writers
from ranklog.schema import FORMAT


@dataclass(frozen=True)
class Footer:
    """The summary of one shard."""

    rows: int
    project: str | None
    """True name; None if the file has no rows or no statistics."""
    run: str | None
    first_ts_us: int | None
    """Earliest client clock, microseconds since the epoch."""
    last_ts_us: int | None
    writers: Writers | None
    """None where the file does not tell."""

    start_groups: tuple[int, ...]
    """The row groups that may hold start rows."""


class _Bounds(NamedTuple):
    """Lowest and highest value of a column in one row group."""

    low: Any
    high: Any


@lru_cache(maxsize=1 << 14)
def read_footer(path: Path) -> Footer:
    """Return the summary of a shard; raises FormatError for other bytes, FileNotFoundError if it is gone.

    Remembered for good: a shard's name holds its checksum, so the file behind a name never changes.
    """
    try:
        found = pq.read_metadata(path)
    except pa.ArrowInvalid as exc:
        raise FormatError(
            f"{path} is named like a shard but is no parquet file: {exc}. Move it out of the store"
        ) from exc
    metadata = found.metadata or {}
    version = metadata.get(b"ranklog.format", b"")
    if version.isdigit() and int(version) > int(FORMAT):
        raise FormatError(f"{path} has shard format {int(version)}; this ranklog reads {FORMAT}: upgrade ranklog")
    writers = parse_writers(metadata.get(b"ranklog.writers"))
    project, run, kind, ts = (_bounds(found, column) for column in ("project", "run", "kind", "ts"))
    starts_here = writers is None or any(first == 0 for first, _ in writers.values())
    return Footer(
        rows=found.num_rows,
        project=next((group.low for group in project if group), None),
        run=next((group.low for group in run if group), None),
        first_ts_us=min((group.low for group in ts if group), default=None),
        last_ts_us=max((group.high for group in ts if group), default=None),
        writers=writers,
        start_groups=tuple(
            index
            for index, group in enumerate(kind)
            if starts_here and (group is None or group.low <= "start" <= group.high)
        ),
    )


def _bounds(found: Any, column: str) -> list[_Bounds | None]:
    """Return the bounds of a column by row group, None where the file does not tell."""
    index = next((i for i in range(found.num_columns) if found.schema.column(i).path == column), None)
    bounds: list[_Bounds | None] = []
    for group in range(found.num_row_groups):
        statistics = None if index is None else found.row_group(group).column(index).statistics
        if statistics is None or not statistics.has_min_max:
            bounds.append(None)
        elif statistics.physical_type == "INT64":
            # The raw number of a timestamp: microseconds, without a need for a time zone database.
            bounds.append(_Bounds(statistics.min_raw, statistics.max_raw))
        else:
            bounds.append(_Bounds(statistics.min, statistics.max))
    return bounds


def parse_writers(text: bytes | None) -> Writers | None:
    """Return the seq ranges of the metadata entry `ranklog.writers`, or None for anything else than that."""
    try:
        parsed = json.loads(text or b"null")
        return {str(writer): (int(first), int(last)) for writer, (first, last) in parsed.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def count_records(footers: list[Footer]) -> int | None:
    """Return how many seqs the shards cover, each counted once; None if a footer does not tell."""
    ranges: list[tuple[str, int, int]] = []
    for footer in footers:
        if footer.writers is None:
            return None
        ranges += [(writer, first, last) for writer, (first, last) in footer.writers.items()]
    total, reached = 0, ("", -1)
    for writer, first, last in sorted(ranges):
        begin = max(first, reached[1] + 1) if writer == reached[0] else first
        total += max(0, last + 1 - begin)
        reached = (writer, max(last, begin - 1))
    return total
