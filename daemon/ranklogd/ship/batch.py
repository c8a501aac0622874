"""One batch's frames to records that account for each of its seqs. Pure.

A batch says which seqs it covers; its frames must cover exactly these. What does not check, does not decode or does
not follow becomes a gap record, so that each seq has a record or lies within a gap, and is told to the caller, who
keeps the bytes. A start frame with seq 0 may stand anywhere: every journal and spool file begins with one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ranklog.frame import Kind
from ranklogd.ship.decode import Record, gap_record, read_frames
from ranklogd.wal.segment import BATCH, UID_UNKNOWN, Entry


class Batch(NamedTuple):
    """A BATCH entry: where it lies in the segment, what it claims, and its frames."""

    offset: int
    end: int
    lsn: int
    recv_us: int
    uid: int | None
    writer: bytes
    first: int
    total: int
    """How many seqs, and so lsns, it covers from `first` on."""
    frames: memoryview


Report = Callable[[int, int, str], None]
"""Takes first seq, number of seqs lost, and the reason; what is reported with 0 lost is only strange."""


def batch_of(entry: Entry) -> Batch:
    """Return what a BATCH entry says."""
    writer, first, count = BATCH.unpack_from(entry.payload)
    uid = None if entry.uid == UID_UNKNOWN else entry.uid
    frames = entry.payload[BATCH.size :]
    return Batch(entry.offset, entry.end, entry.lsn, entry.recv_ns // 1000, uid, writer, first, count, frames)


def read_batch(batch: Batch, report: Report) -> Iterator[Record]:
    """Yield records that cover exactly the batch's seqs, in order, with gaps where its frames do not."""
    expected, end, trouble = batch.first, batch.first + batch.total, ""

    def lost(last: int) -> Record:
        report(expected, last - expected + 1, trouble)
        return gap_record(expected, last, trouble, batch.recv_us)

    for item in read_frames(batch.frames):
        if isinstance(item, str):
            trouble = trouble or item
            continue
        if item.seq != expected or item.last >= end:
            if item.kind == Kind.START:
                continue
            if not expected <= item.seq <= item.last < end:
                trouble = trouble or f"frame of seqs {item.seq}..{item.last} where {expected}..{end - 1} are due"
                continue
            trouble = trouble or "no frame"
            yield lost(item.seq - 1)
            trouble = ""
        elif trouble:
            report(expected, 0, trouble)
            trouble = ""
        yield item
        expected = item.last + 1
    if expected < end:
        trouble = trouble or "no frame"
        yield lost(end - 1)
    elif trouble:
        report(expected, 0, trouble)
