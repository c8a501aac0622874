"""A sealed segment to its shards, committed in the outbox. A crash anywhere means: call it again.

    1. outbox/<segment>/ exists     the shards are committed: go to 6
    2. remove outbox/<segment>.tmp/, read the segment
    3. write and fsync each cut's shards in outbox/<segment>.tmp/<key>, and the directories
    4. publish what goes to quarantine
    5. rename to outbox/<segment>/, fsync outbox          committed; a segment without records leaves nothing there
    6. take the segment out of wal/, fsync wal

Nothing in a segment's bytes makes this raise: what cannot be read becomes gap rows and goes to quarantine. An OSError
(disk full, I/O error) does go to the caller; the segment is then untouched and is tried again later.

A segment is cut into contiguous ranges of lsns before anything is sorted. That bounds memory, and it keeps the lsn
ranges of one run's shards disjoint, which the containment rule of `ranklog.layout` needs.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from ranklog import fs
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.layout import ShardKey, format_key
from ranklogd.ship.arrange import Cut
from ranklogd.ship.decode import INT64_MAX
from ranklogd.ship.quarantine import discard_segment, keep_evidence, quarantine_segment
from ranklogd.ship.shard import Shard, encode_shard
from ranklogd.ship.walk import Walk
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import SegmentHeader, decode_header, parse_sealed

VALUES_MAX = 600_000
"""Values of one cut; about 100 MB while it is sorted and encoded."""
VALUE_SIZE_MAX = 32
"""A cut also ends at this many bytes of frames for each value it may have: texts are held in memory like values. A
float with its key takes 26 in a record of twelve."""
NAME_VALUES = 8
"""A cut also ends when it has one name for this many values it may have: a new name costs as much memory."""


@dataclass(frozen=True)
class Converted:
    """What became of one segment."""

    shards: tuple[ShardKey, ...] = ()
    """Committed in the outbox by this call."""
    rows: int = 0
    records: int = 0
    """Records with a row of their own, gap records among them."""
    values: int = 0
    """Rows before they were split into shards: the measure of the work."""
    quarantined_records: int = 0
    """Records that could not be read or whose writer is unknown; each is accounted for by a row."""
    damaged_stretches: int = 0
    size_bytes: int = 0
    """Of the shards."""


def convert_segment(path: Path, state: StateDir, *, values_max: int = VALUES_MAX) -> Converted:
    """Convert the sealed segment `path` and remove it; returns once all of it is durable.

    `values_max` bounds a cut, and so memory and the size of a shard. Where the shards were committed by an earlier
    call, and where the segment's header cannot be read (then it goes to quarantine), an empty Converted is returned.
    Raises OSError only.
    """
    target = state.outbox / path.name
    if target.is_dir():
        discard_segment(path, state)
        return Converted()
    temporary = state.outbox / f"{path.name}.tmp"
    fs.remove_tree(temporary)
    buffer = memoryview(path.read_bytes())
    try:
        header, offset, last_lsn = _open(path.name, buffer)
    except FormatError as exc:
        quarantine_segment(path, state, f"The header of this segment cannot be read: {exc}.")
        return Converted(damaged_stretches=1)
    walk = Walk(buffer, header, last_lsn, values_max)
    fs.make_dir(temporary)
    converted = Converted()
    for cut in _cuts(walk, offset, values_max):
        converted = _write_cut(cut, temporary, header, converted)
        del cut
    _sync_dirs(temporary)
    failpoint("shard.sync.after")
    keep_evidence(path, state, buffer, offset, walk.evidence)
    if converted.shards:
        fs.rename(temporary, target)
    else:
        fs.remove_tree(temporary)
    failpoint("outbox.rename.after")
    fs.sync_dir(state.outbox)
    failpoint("outbox.dirsync.after")
    discard_segment(path, state)
    failpoint("trim.unlink.after")
    evidence = walk.evidence
    return replace(converted, quarantined_records=evidence.records, damaged_stretches=evidence.damaged_stretches)


def _open(name: str, buffer: memoryview) -> tuple[SegmentHeader, int, int]:
    """Return header, offset of the first entry, and the last lsn that counts; raises FormatError."""
    lsns = parse_sealed(name)
    if lsns is None:
        raise FormatError(f"{name!r} is not the name of a sealed segment")
    try:
        header, offset = decode_header(buffer)
    except (ValueError, KeyError, TypeError) as exc:
        # The checksum was right, so this is no damage but a header this version does not understand.
        raise FormatError(f"{type(exc).__name__}: {exc}") from exc
    if max(lsns) > INT64_MAX:
        raise FormatError(f"lsns up to {max(lsns)} do not fit 63 bits")
    return header, offset, lsns[1]


def _cuts(walk: Walk, offset: int, values_max: int) -> Iterator[Cut]:
    cut = Cut()
    for portion in walk.portions(offset):
        full = (
            cut.values + portion.values > values_max
            or cut.size_bytes + portion.size_bytes > values_max * VALUE_SIZE_MAX
            or cut.names * NAME_VALUES > values_max
        )
        if cut.values and full:
            yield cut
            cut = Cut()
        cut.add(portion)
    if cut.values:
        yield cut


def _write_cut(cut: Cut, folder: Path, header: SegmentHeader, converted: Converted) -> Converted:
    """Write a cut's shards below `folder`, files synced, and return `converted` with them added."""
    keys, rows, size = [], 0, 0
    for table in cut.tables():
        shard = encode_shard(table, header.node, header.store_id)
        _write_shard(shard, folder)
        keys.append(shard.key)
        rows, size = rows + shard.rows, size + len(shard.data)
    # The next cut's arrays shall find the memory of this one, not come on top of it.
    pa.default_memory_pool().release_unused()
    return replace(
        converted, shards=(*converted.shards, *keys), rows=converted.rows + rows,
        records=converted.records + cut.records, values=converted.values + cut.values,
        size_bytes=converted.size_bytes + size,
    )  # fmt: skip


def _write_shard(shard: Shard, folder: Path) -> None:
    path = folder / format_key(shard.key)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = memoryview(shard.data)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        half = len(data) // 2
        fs.write_all(fd, data[:half], 0)
        failpoint("shard.write.mid")
        fs.write_all(fd, data[half:], half)
        fs.sync_data(fd)
    finally:
        os.close(fd)


def _sync_dirs(folder: Path) -> None:
    """Make every name below `folder` durable, leaves first."""
    for parent, _, _ in os.walk(folder, topdown=False):
        fs.sync_dir(Path(parent))
