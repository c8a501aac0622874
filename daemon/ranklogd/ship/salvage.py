"""What can still be told from a stretch of a segment that is no valid entry any more. Pure.

One flipped bit breaks an entry, and an entry may hold thousands of records; but frames carry checksums of their own.
So the bytes are read once more as if the entry's header were right where it should be: a start frame that checks
gives its writer back, and frames that check give their records back. Nothing is taken that does not check, and no
more records than lsns are missing: those are known from the entries around the stretch.
"""

from ranklog.errors import FormatError
from ranklog.frame import Kind, Span, spans
from ranklogd.ship.batch import Batch
from ranklogd.ship.source import Source, read_source
from ranklogd.wal.segment import BATCH, ENTRY_OVERHEAD, WRITER

_ATTEMPT_CREDIBLE = 1 << 16
"""The attempt is the one field of a writer that no frame's checksum covers; more than this is a flipped bit."""


def rebuild_source(buffer: memoryview, offset: int, end: int, node: str) -> tuple[Source, int] | None:
    """Return the writer whose WRITER entry began at `offset`, and where it ended, or None if nothing there checks."""
    start = offset + ENTRY_OVERHEAD
    if start + WRITER.size > end:
        return None
    writer, attempt = WRITER.unpack_from(buffer, start)
    frames = buffer[start + WRITER.size : end]
    frame = next(spans(frames), None)
    if frame is None:
        return None
    try:
        source = read_source(writer, attempt if attempt < _ATTEMPT_CREDIBLE else 0, frames, node)
    except FormatError:
        return None
    return source, start + WRITER.size + frame.end


def rebuild_batch(
    buffer: memoryview, offset: int, end: int, *, lsn: int, room: int, recv_us: int, expected: dict[bytes, int]
) -> Batch | None:
    """Return the batch whose entry began at `offset`, or None if it cannot be told whose seqs it held.

    `room` is how many lsns are missing here; `expected` the seq with which each known writer goes on. The fields
    may be wrong themselves: frames that check are believed before them.
    """
    start = offset + ENTRY_OVERHEAD
    if start + BATCH.size > end:
        return None
    writer, first, total = BATCH.unpack_from(buffer, start)
    frames = buffer[start + BATCH.size : end]
    good: Span | None = None
    for span in spans(frames):
        # The start frame of a journal or spool file may stand before any seq.
        if good is None and not (span.kind == Kind.START and first):
            first = span.first
        good = span
    if good is None and first != expected.get(writer):
        return None
    covered = good.last - first + 1 if good else 0
    total = max(total if total <= room else 0, covered)
    if not 0 < total <= room:
        return None
    stop = good.end if good and total == covered else len(frames)
    return Batch(offset, start + BATCH.size + stop, lsn, recv_us, None, writer, first, total, frames[:stop])
