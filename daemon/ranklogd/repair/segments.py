"""One WAL segment, checked: header, entries, frames, lsns and seqs. Pure.

What is found here stands in `troubles`, in words; what that means for the daemon and for a repair is decided in `wal`.
"""

from dataclasses import dataclass, field

from ranklog.errors import FormatError
from ranklog.frame import spans
from ranklogd.wal.segment import (
    BATCH,
    Damage,
    Entry,
    EntryType,
    LaterFormat,
    SegmentHeader,
    decode_header,
    parse_sealed,
    scan,
)

TROUBLES_MAX = 20
"""Told of one segment; a torn disk can make each entry one."""


@dataclass
class Segment:
    """What one segment file holds."""

    name: str
    size_bytes: int
    header: SegmentHeader | None = None
    error: str = ""
    """Why the header cannot be read."""
    first_lsn: int = 0
    last_lsn: int = -1
    """Of its entries, within the range of its name; first - 1 if there is none."""
    records: int = 0
    writers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Writer -> first and last seq in it."""
    tail_bytes: int = 0
    """Behind the last whole entry."""
    damaged_stretches: int = 0
    troubles: list[str] = field(default_factory=list)
    bad_frames: list[str] = field(default_factory=list)
    """Whole entries with content that no converter can read."""

    later_format: bool = False
    """A newer ranklog wrote it."""


def read_segment(name: str, buffer: memoryview) -> Segment:
    """Return what the bytes of a segment say; never raises because of content."""
    found = Segment(name, len(buffer))
    sealed = parse_sealed(name)
    try:
        found.header, offset = decode_header(buffer)
    except FormatError as exc:
        found.error, found.later_format = str(exc), isinstance(exc, LaterFormat)
        return found
    found.first_lsn, found.last_lsn = found.header.first_lsn, found.header.first_lsn - 1
    limit = sealed[1] if sealed else None
    expected: dict[bytes, int] = {mark.writer: mark.last_seq + 1 for mark in found.header.writers}
    end = offset
    for item in scan(buffer, found.header.salt, offset, found.header.first_lsn):
        if isinstance(item, Damage):
            found.damaged_stretches += 1
            _tell(found, f"{item.end - item.offset:,} damaged bytes at offset {item.offset}")
            expected.clear()  # What is missing now was told.
            continue
        if limit is not None and item.lsn > limit:
            break  # Written again in the next segment, after an fsync that failed.
        end = item.end
        if item.type == EntryType.BATCH:
            _batch(found, item, expected)
    found.tail_bytes = len(buffer) - end
    if limit is not None and found.last_lsn < limit:
        _tell(found, f"its name says that it ends with lsn {limit:,}; entries can be read up to {found.last_lsn:,}")
    return found


def _batch(found: Segment, entry: Entry, expected: dict[bytes, int]) -> None:
    writer, first, count = BATCH.unpack_from(entry.payload)
    name, due = writer.hex(), expected.get(writer)
    if entry.lsn != found.last_lsn + 1 and not found.damaged_stretches:
        _tell(found, f"lsns {found.last_lsn + 1:,}..{entry.lsn - 1:,} are missing at offset {entry.offset}")
    if due is not None and first < due:
        _tell(found, f"writer {name}: seq {first:,} once more, where {due:,} is due")
    elif due is not None and first > due:
        _tell(found, f"writer {name}: seqs {due:,}..{first - 1:,} are missing")
    expected[writer] = first + count
    found.last_lsn = max(found.last_lsn, entry.lsn + count - 1)
    found.records += count
    low, high = found.writers.get(name, (first, first))
    found.writers[name] = (min(low, first), max(high, first + count - 1))
    seq, end = first, BATCH.size
    for span in spans(entry.payload, BATCH.size):
        if span.first == seq:
            seq = span.last + 1
        elif span.kind:  # A start frame may stand before any seq.
            break
        end = span.end
    if (seq != first + count or end != len(entry.payload)) and len(found.bad_frames) < TROUBLES_MAX:
        found.bad_frames.append(
            f"lsn {entry.lsn:,}: the frames of writer {name} end with seq {seq - 1:,}, due are {first:,}.."
            f"{first + count - 1:,}"
        )


def _tell(found: Segment, text: str) -> None:
    if len(found.troubles) < TROUBLES_MAX:
        found.troubles.append(text)
