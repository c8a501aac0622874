"""What can still be told from a stretch of a segment that is no valid entry any more. Pure: no files, no clock.

One flipped bit breaks an entry, and an entry may hold thousands of records; but frames carry checksums of their own.
So the bytes are read once more as if the entry's header were right where it should be: a start frame that checks
gives its writer back, and frames that check give their records back. Nothing is taken that does not check, and no
more records than lsns are missing: those are known from the entries around the stretch.

Recovery and conversion both read a damaged stretch, and must come to the same: what recovery believes a writer has
durable is what the client is not asked for again, and what conversion gives a row.

Behind the last valid entry of an open segment no lsn tells how much there was. A write that was cut short is
dropped, for it was never acknowledged: the file ends within it, or a whole 512-byte sector of it was never written
and reads as zeros. Anything else is rot, and what it holds was acknowledged.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ranklog.errors import FormatError
from ranklog.frame import HEADER, Kind, Span, body_at, spans
from ranklog.start import decode_start
from ranklogd.wal.segment import BATCH, ENTRY_OVERHEAD, WRITER, entry_at, entry_head

_ATTEMPT_CREDIBLE = 1 << 16
"""The attempt is the one field of a writer that no frame's checksum covers; more than this is a flipped bit."""
_FRAME_SIZE_MIN = HEADER.size + 6  # An array of five one-byte fields.
_SECTOR = 512
_ID_BITS_DAMAGED = 8
_LSN_OFFSET = 12  # Of the lsn within an entry.
_LSNS_TRIED = 256  # Each costs a search through the segment.


class RebuiltWriter(NamedTuple):
    """A WRITER entry of which the start frame checks."""

    offset: int
    end: int
    writer: bytes
    attempt: int
    frames: memoryview


class RebuiltBatch(NamedTuple):
    """A BATCH entry of which it can be told whose seqs it held; not all of its frames need check."""

    offset: int
    end: int
    writer: bytes
    first: int
    total: int
    frames: memoryview


def salvage(
    buffer: memoryview, offset: int, end: int, *, room: int | None, expected: dict[bytes, int]
) -> Iterator[RebuiltWriter | RebuiltBatch]:
    """Yield what can be told of the bytes from `offset` to `end`, up to the first that tell nothing.

    `room` is how many lsns are missing here, None where nobody knows. `expected` is the seq with which each known
    writer goes on; the caller brings it up to date with every item it gets.
    """
    while offset < end:
        item = _writer(buffer, offset, end) or _batch(buffer, offset, end, room, expected)
        if item is None:
            return
        if isinstance(item, RebuiltBatch) and room is not None:
            room -= item.total
        offset = item.end
        yield item


def _writer(buffer: memoryview, offset: int, end: int) -> RebuiltWriter | None:
    start = offset + ENTRY_OVERHEAD
    if start + WRITER.size > end:
        return None
    writer, attempt = WRITER.unpack_from(buffer, start)
    frames = buffer[start + WRITER.size : end]
    body = body_at(frames, 0)
    try:
        if body is None or decode_start(body).writer != writer.hex():
            return None
    except FormatError:
        return None
    credible = attempt if attempt < _ATTEMPT_CREDIBLE else 0
    return RebuiltWriter(offset, start + WRITER.size + HEADER.size + len(body), writer, credible, frames)


def _batch(
    buffer: memoryview, offset: int, end: int, room: int | None, expected: dict[bytes, int]
) -> RebuiltBatch | None:
    """Return the batch whose entry began at `offset`, if any. Its fields may be wrong: frames are believed before."""
    start = offset + ENTRY_OVERHEAD
    if start + BATCH.size > end:
        return None
    writer, first, total = BATCH.unpack_from(buffer, start)
    writer = _nearest(writer, expected)
    frames = buffer[start + BATCH.size : end]
    good: Span | None = None
    begin = -1
    for span in spans(frames):
        # A start frame is record 0, but that of a journal or spool file may stand before any seq.
        if good is None or (good.offset == 0 and good.kind == Kind.START and span.first != 1):
            begin = span.first
        good = span
    if good is not None and (good.kind != Kind.START or first != expected.get(writer)):
        first = begin
    if (good is None and first != expected.get(writer)) or (room is None and writer not in expected):
        return None
    covered = max(good.last - first + 1, 0) if good else 0
    if total != room and (total - covered) * _FRAME_SIZE_MIN > len(frames) - (good.end if good else 0):
        total = 0  # The number itself is damaged: so many frames have no place in here.
    total = max(total if room is None or total <= room else 0, covered)
    if total <= 0 or (room is not None and total > room):
        return None
    stop = good.end if good and total == covered else len(frames)
    return RebuiltBatch(offset, start + BATCH.size + stop, writer, first, total, frames[:stop])


def _nearest(writer: bytes, known: dict[bytes, int]) -> bytes:
    """Return the known writer whose id was damaged into this one: ids are random, and no two differ in so few bits."""
    if writer in known:
        return writer
    bits = int.from_bytes(writer)
    return next((other for other in known if (int.from_bytes(other) ^ bits).bit_count() <= _ID_BITS_DAMAGED), writer)


def looks_torn(buffer: memoryview, salt: int, offset: int) -> bool:
    """Return whether the bytes from `offset` to the end are a write that was cut short, rather than damaged later."""
    head = entry_head(buffer, salt, offset)
    end = len(buffer) if head is None else head[0]
    if end > len(buffer) or offset + ENTRY_OVERHEAD > len(buffer):
        return True
    first = offset // _SECTOR * _SECTOR
    return any(
        not any(buffer[max(offset, sector) : min(end, sector + _SECTOR)]) for sector in range(first, end, _SECTOR)
    )


def find_salt(buffer: memoryview, first_lsn: int) -> int | None:
    """Return the salt of a segment whose header is damaged, from one of its first entries; None if none is whole."""
    whole = bytes(buffer)
    for lsn in range(first_lsn, first_lsn + _LSNS_TRIED):
        needle = lsn.to_bytes(8, "little")
        place = whole.find(needle)
        while place >= 0:
            offset = place - _LSN_OFFSET
            salt = int.from_bytes(whole[max(offset, 0) : offset + 4], "little")
            if offset >= 0 and entry_at(buffer, salt, offset) is not None:
                return salt
            place = whole.find(needle, place + 1)
    return None
