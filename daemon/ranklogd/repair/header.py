"""A segment header that is lost, told from the entries behind it. Pure.

The daemon reads a segment without its header where the first entry is sound, for that one has a known lsn. Where both
are damaged it gives up. But an entry's own header carries a checksum, so any that checks gives the salt away: a search
too slow for a start of the daemon, and not for a repair.

The new header gets a store_id of its own, made from the damaged bytes. Under the old one, lsns might be given out
again: where no header can be read, the daemon starts a new store_id as well. Between store_ids readers compare the
records themselves, so one that comes in twice is still read once.

Its map says that each writer went on where the first batch found here begins: whatever is missing before that is told
by lsns (`_lost`), and no gap is claimed for records that other segments hold.
"""

import hashlib
import re
import struct
import zlib
from typing import NamedTuple

from ranklog.layout import Lsn
from ranklogd.wal.segment import (
    BATCH,
    ENTRY_OVERHEAD,
    Damage,
    Entry,
    EntryType,
    SegmentHeader,
    WriterMark,
    batch_count,
    encode_header,
    entry_at,
    scan,
)

_SALT_AND_CRC = struct.Struct("<II")
_TYPE = re.compile(rb"[\x01\x02]\x00\x00\x00")
_TYPE_OFFSET = 32
"""Where the type stands in an entry: a rare pattern, and so a search of seconds, not of minutes."""


class Rebuilt(NamedTuple):
    """A segment with a new header."""

    data: bytes
    first_lsn: int
    last_lsn: int
    """Of the entries that can be read."""
    records: int


def rebuild(buffer: memoryview, first_lsn: int, node: str) -> Rebuilt | None:
    """Return the segment with a header made up from its entries, or None if there is no entry that checks.

    `first_lsn` is that of the file's name: what is missing behind it becomes a gap.
    """
    found = first_entry(buffer)
    if found is None:
        return None
    entry, salt = found
    marks: dict[bytes, WriterMark] = {}
    last, records = entry.lsn - 1, 0
    for item in scan(buffer, salt, entry.offset, entry.lsn):
        if isinstance(item, Damage) or item.type != EntryType.BATCH:
            continue
        writer, first_seq, _ = BATCH.unpack_from(item.payload)
        marks.setdefault(writer, WriterMark(item.uid, writer, first_seq - 1, 0, b"", 0))
        last, records = max(last, item.lsn + batch_count(item) - 1), records + batch_count(item)
    first = min(first_lsn, entry.lsn)
    store_id = hashlib.sha256(buffer).hexdigest()[:16]
    head = encode_header(SegmentHeader(node, store_id, Lsn(first), "", salt, tuple(marks.values())))
    # A byte that is no entry makes the converter account for the lsns before the first one that can be read.
    filler = b"\0" if entry.lsn > first else b""
    return Rebuilt(head + filler + bytes(buffer[entry.offset :]), first, last, records)


def first_entry(buffer: memoryview) -> tuple[Entry, int] | None:
    """Return the first entry that checks with its salt, whatever stands before it; None if there is none."""
    for found in _TYPE.finditer(buffer):
        offset = found.start() - _TYPE_OFFSET
        if offset < 0 or offset + ENTRY_OVERHEAD > len(buffer):
            continue
        salt, crc = _SALT_AND_CRC.unpack_from(buffer, offset)
        if zlib.crc32(buffer[offset + 8 : offset + ENTRY_OVERHEAD]) != crc:
            continue
        entry = entry_at(buffer, salt, offset)
        if entry is not None:
            return entry, salt
    return None
