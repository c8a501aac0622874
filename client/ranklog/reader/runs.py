"""Runs as people name them, and their summaries. Imports pyarrow.

A run has an id, which is in its path, and a display name, which is in the start row of each of its writers (field
`name` of the JSON text). An id wins over a display name; a display name may belong to several runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ranklog.errors import FormatError
from ranklog.reader.footer import Footer, count_records, read_footer
from ranklog.reader.listing import Lister, Shard, by_run, list_shards
from ranklog.reader.local import in_place, local_paths, offline_hint
from ranklog.stores import Store


@dataclass(frozen=True)
class RunSummary:
    """One run as `ranklog ls` shows it."""

    project: str
    run: str
    """The id: what `run=` takes, and what all ranks share."""
    name: str
    """Display name; empty if no start row has arrived."""
    ranks: list[int]
    """Ranks whose start row has arrived."""
    writers: int | None
    """Processes that wrote; None if a shard's footer does not tell, or was not fetched."""
    records: int | None
    """Different records (start and end included); None if a shard's footer does not tell, or was not fetched."""
    rows: int | None
    """Rows in the shards, one for each key of a record; counts a row that is in two shards twice. None as above."""
    first_ts_us: int | None
    last_ts_us: int | None
    """Client clocks, microseconds since the epoch."""
    shards: int
    size_bytes: int


class _Start(NamedTuple):
    """What this module needs of a start row."""

    rank: int | None
    name: str


def find_shards(
    store: Store, project: str | None = None, run: str | None = None, *, lister: Lister | None = None
) -> list[Shard]:
    """Return the visible shards of the runs whose id, or else whose display name, is `run`; raises StoreError."""
    with offline_hint(store):
        shards = list_shards(store, project, run, lister=lister)
    if shards or run is None:
        return shards
    groups = by_run(list_shards(store, project, lister=lister))
    # Each daemon's oldest shard is enough: all ranks of a run carry its name from their first record on.
    oldest = {path: list({s.name.store_id: s for s in reversed(group)}.values()) for path, group in groups.items()}
    local_paths(store, [shard for shards in oldest.values() for shard in shards])  # All in one go.
    named = [path for path, shards in oldest.items() if any(start.name == run for start in _starts(store, shards))]
    return [shard for path in named for shard in groups[path]]


def summarize_runs(store: Store, project: str | None = None, run: str | None = None) -> list[RunSummary]:
    """Return a summary of each run, the latest last, from footers and start rows; raises StoreError, FormatError.

    Over a network all shards are fetched of one run only: where none is named, each daemon's first and last shard of a
    run must do. They tell its name, its ranks and its times, and of a longer run not how much it holds.
    """
    groups = by_run(find_shards(store, project, run))
    everything = in_place(store) is not None or run is not None
    chosen = groups if everything else {path: _ends(shards) for path, shards in groups.items()}
    local_paths(store, [shard for shards in chosen.values() for shard in shards])  # All in one go.
    summaries = []
    for path, shards in groups.items():
        footers = [read_footer(file) for file in local_paths(store, chosen[path])]
        starts = _starts(store, chosen[path])
        whole = len(footers) == len(shards)
        known = [footer.writers for footer in footers if footer.writers is not None]
        summaries.append(
            RunSummary(
                project=_first(footers, "project") or path.project_id,
                run=_first(footers, "run") or path.run_id,
                name=next((start.name for start in reversed(starts) if start.name), ""),
                ranks=sorted({start.rank for start in starts if start.rank is not None}),
                writers=len(set().union(*known)) if len(known) == len(shards) else None,
                records=count_records(footers) if whole else None,
                rows=sum(footer.rows for footer in footers) if whole else None,
                first_ts_us=min((f.first_ts_us for f in footers if f.first_ts_us is not None), default=None),
                last_ts_us=max((f.last_ts_us for f in footers if f.last_ts_us is not None), default=None),
                shards=len(shards),
                size_bytes=sum(shard.size_bytes for shard in shards),
            )
        )
    return sorted(summaries, key=lambda summary: (summary.last_ts_us or 0, summary.project, summary.run))


def _ends(shards: Sequence[Shard]) -> list[Shard]:
    """Return the first and the last shard of each daemon."""
    first = {shard.name.store_id: shard for shard in reversed(shards)}
    last = {shard.name.store_id: shard for shard in shards}
    return sorted({*first.values(), *last.values()})


def _first(footers: Sequence[Footer], field: str) -> str | None:
    return next((value for footer in footers if (value := getattr(footer, field)) is not None), None)


def _starts(store: Store, shards: Sequence[Shard]) -> list[_Start]:
    return [start for path in local_paths(store, shards) for start in _starts_in(path)]


@lru_cache(maxsize=1 << 14)
def _starts_in(path: Path) -> tuple[_Start, ...]:
    groups = read_footer(path).start_groups
    if not groups:
        return ()
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read_row_groups(groups, ["kind", "rank", "text"])
    except (pa.ArrowInvalid, OSError) as exc:
        raise FormatError(f"{path} is damaged: {exc}") from exc
    found = rows.filter(pc.equal(rows["kind"], "start")).select(["rank", "text"]).to_pylist()
    return tuple(_Start(row["rank"], _name(row["text"])) for row in found)


def _name(text: str | None) -> str:
    try:
        payload: Any = json.loads(text or "{}")
    except ValueError:
        return ""
    name = payload.get("name") if isinstance(payload, dict) else None
    return name if isinstance(name, str) else ""
