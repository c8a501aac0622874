"""The journal: where a record is when `log()` returns. One writer's preallocated files in tmpfs.

Writing into reserved pages of a tmpfs file costs a `pwrite` and nothing else: no disk, no daemon, no wake-up, and the
bytes outlive the process. Two roles meet here without a lock between them:

  the caller   `append`, under the writer's lock: frame -> pwrite -> publish the new position, one attribute store;
               a new file knows the position before it, so that one store publishes a rotation, too
  the sender   `collect`: what was appended since the last look, as chunks; `recycle` and `refill`: room for more

Room ends when neither a spare file is left nor a new one may be created. Then the record is refused: its seq stays
used, and a gap frame, for which room is always reserved, is written at the position and rewritten in place as the gap
grows. The next record that fits closes it. So no seq is ever without a frame.

A recycled file is overwritten from the front; what remains behind is stale. A reader stops there, for the seqs of
stale frames do not follow (see `frame.spans`).
"""

import contextlib
import itertools
import os
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from ranklog import framefile, fs
from ranklog.failpoint import ARMED, failpoint
from ranklog.frame import FRAME_SIZE_MAX, GAP_SIZE_MAX, HEADER, Kind, encode_gap
from ranklog.framefile import FileName, FrameFile

_pack_u32 = struct.Struct("<I").pack

WAKE_SIZE = 64 << 10
"""Unsent bytes at which the sender is woken before its timer: large enough for one wake-up in hundreds of records."""
RETRY_S = 0.1  # A full journal is not asked for room again before this: each try costs system calls.


class Chunk(NamedTuple):
    """Consecutive whole frames in one file: `first_seq` up to, not including, `next_seq`."""

    file: FrameFile
    offset: int
    end: int
    first_seq: int
    next_seq: int


class Journal:
    """One writer's journal files. `append` belongs to the holder of the writer's lock, the rest to the sender."""

    def __init__(
        self,
        writer: str,
        start_frame: bytes,
        directories: list[Path],
        *,
        file_size: int,
        size_max: int,
        wake: Callable[[], None],
    ) -> None:
        self.refused = 0
        """Records for which there was no room, so far."""
        self.anonymous = False
        """True where only memory could be had: a kill then loses what was not acknowledged."""
        self._writer = writer
        self._start_frame = start_frame
        self._directories = directories
        self._file_size = file_size
        self._size_max = size_max
        self._wake = wake
        self._numbers = itertools.count()
        self._files: set[FrameFile] = set()
        self._spares: deque[FrameFile] = deque()
        self._retry_at = 0.0
        self._gap_last = -1
        self._gap_reason = ""
        self._pack = msgpack.Packer(unicode_errors="strict").pack
        first = self._create(file_size)
        # (file, offset, seq): the next frame goes to `offset` and starts at `seq`. Replaced whole, so that an
        # exception from a signal handler between two statements cannot leave half of a step behind.
        self._position = (first, first.head_end, 1)
        self._collected = (first, 0, 0)  # The start frame at the head of the first file is record 0.

    @property
    def next_seq(self) -> int:
        """The seq the next record will use."""
        seq = self._position[2]
        return max(seq, self._gap_last + 1)

    @property
    def closed_seq(self) -> int:
        """The seq below which everything can be collected: `next_seq`, unless a gap is open."""
        return self._position[2]

    @property
    def crowded(self) -> bool:
        """True when unacknowledged records take up more than half of what the journal may have."""
        return 2 * (self._size - len(self._spares) * self._file_size) > self._size_max

    def append(self, kind: int, step: int | None, payload: Any) -> bool:
        """Write one record; False if it was refused and became part of a gap.

        Raises what msgpack raises for values it cannot pack (TypeError, ValueError, OverflowError); nothing is used up.
        """
        file, offset, seq = self._position
        if self._gap_last >= seq:
            return self._append_behind_gap(kind, step, payload)
        # `encode_frame`, written out: a call would cost a tenth of the whole.
        body = self._pack((kind, seq, time_ns(), step, payload))
        sized = _pack_u32(len(body)) + body
        frame = _pack_u32(crc32(sized)) + sized
        end = offset + len(frame)
        if end > file.size - GAP_SIZE_MAX or len(frame) > FRAME_SIZE_MAX:
            return self._append_slow(kind, step, payload, len(frame))
        try:
            if ARMED:
                failpoint("journal.write.before")
            written = os.pwrite(file.fd, frame, offset)
            if ARMED:
                failpoint("journal.write.after")
        except OSError:
            written = 0
        if written != len(frame):
            return self._refuse("io")
        self._position = (file, end, seq + 1)
        if end >= file.wake_at:
            file.wake_at = end + WAKE_SIZE
            self._wake()
        return True

    def _append_slow(self, kind: int, step: int | None, payload: Any, size: int) -> bool:
        if size > FRAME_SIZE_MAX:
            seq = self.next_seq
            gap = {"first": seq, "last": seq, "reason": f"record of {size} bytes"[:32]}
            if self.append(Kind.GAP, None, gap):
                self.refused += 1  # Otherwise that was counted already.
            return False
        if not self._rotate(size):
            return self._refuse("journal full")
        return self.append(kind, step, payload)

    def _append_behind_gap(self, kind: int, step: int | None, payload: Any) -> bool:
        """Close the open gap if a record fits again, and write it; else let the gap grow."""
        size = len(self._pack((kind, self._gap_last + 1, time.time_ns(), step, payload))) + HEADER.size
        if size > FRAME_SIZE_MAX or not self._rotate(size):
            return self._refuse("journal full")
        return self.append(kind, step, payload)

    def _refuse(self, reason: str) -> bool:
        """Use up a seq without a record: open a gap at the position, or let the open one grow."""
        file, offset, seq = self._position
        last = max(seq, self._gap_last + 1)
        reason = self._gap_reason if last > seq else reason  # What began it counts.
        self.refused += 1
        with contextlib.suppress(OSError):  # The seq is used up all the same: whoever reads on sees that it is missing.
            fs.write_all(file.fd, encode_gap(seq, last, reason, time.time_ns()), offset)
            failpoint("journal.gap.after")
        self._gap_last, self._gap_reason = last, reason
        return False

    def close_gap(self) -> None:
        """Make an open gap part of what `collect` returns. For the end of a writer. After an OSError it stays open."""
        file, offset, seq = self._position
        if self._gap_last >= seq:
            gap = encode_gap(seq, self._gap_last, self._gap_reason, time.time_ns())
            fs.write_all(file.fd, gap, offset)
            self._position = (file, offset + len(gap), self._gap_last + 1)

    def _rotate(self, size: int) -> bool:
        """Go on in another file with room for a frame of `size` bytes; False if there is none."""
        now_s = time.monotonic()
        need = len(self._start_frame) + size + 2 * GAP_SIZE_MAX
        fresh = None
        if need <= self._file_size and self._spares:
            fresh = self._spares.popleft()
        elif now_s >= self._retry_at and self._size + need <= self._size_max:
            with contextlib.suppress(OSError):
                fresh = self._create(max(self._file_size, need))
        if fresh is None:
            self._retry_at = now_s + RETRY_S if now_s >= self._retry_at else self._retry_at
            return False
        try:
            self.close_gap()
            failpoint("journal.rotate.mid")
        except OSError:
            self._spares.append(fresh)
            return False
        fresh.before = self._position
        self._position = (fresh, fresh.head_end, fresh.before[2])
        self._wake()
        return True

    def _create(self, size: int) -> FrameFile:
        """Create a file in the first directory that has room; raises OSError if none has."""
        for directory in self._directories:
            name = FileName(self._writer, next(self._numbers), "journal")
            try:
                file = framefile.create(directory, name, self._start_frame, size)
            except OSError:
                if directory is self._directories[-1] and self._files:
                    raise
                continue
            # From now on here or nowhere: trying the others later could make `log()` wait for a disk.
            self._directories = [directory]
            break
        else:
            # Not one file could be made: memory is better than nothing, and `anonymous` says so.
            file = framefile.create_anonymous(self._start_frame, size)
            self.anonymous = True
            self._directories = []
        self._files.add(file)
        file.wake_at = file.head_end + WAKE_SIZE
        return file

    @property
    def _size(self) -> int:
        # A copy, for the other side may add a file meanwhile. No lock and no sum kept: Ctrl-C would find a way between.
        return sum(file.size for file in list(self._files))

    # The sender's side.

    def collect(self) -> list[Chunk]:
        """Return what was appended since the last call, in order."""
        ends = [self._position]
        while ends[-1][0] is not self._collected[0]:
            before, ends[-1][0].before = ends[-1][0].before, None
            assert before is not None, "each file knows the one before until it is collected"
            before[0].sealed = True
            ends.append(before)
        chunks = [self._chunk(*end) for end in reversed(ends)]
        return [chunk for chunk in chunks if chunk is not None]

    def _chunk(self, file: FrameFile, end: int, seq: int) -> Chunk | None:
        seen, offset, first = self._collected
        if seen is not file:
            offset = file.head_end
        self._collected = (file, end, seq)
        if first == seq:
            if file.sealed and not file.chunks:
                self.recycle(file)
            return None
        file.chunks += 1
        return Chunk(file, offset, end, first, seq)

    def recycle(self, file: FrameFile) -> None:
        """Take back a sealed file of which every frame is safe elsewhere."""
        if file.size != self._file_size or len(self._spares) >= SPARES_MAX:
            self._give_up(file)
            return
        try:
            fs.write_all(file.fd, bytes(HEADER.size), file.head_end)  # Reads as empty from here on.
            failpoint("journal.recycle.after")
        except OSError:
            self._give_up(file)
            return
        file.sealed, file.wake_at = False, file.head_end + WAKE_SIZE
        self._spares.append(file)

    def _give_up(self, file: FrameFile) -> None:
        self._files.discard(file)
        file.remove()

    def refill(self) -> None:
        """Keep one spare ready, so that `append` need not create it: that spare is also the grace of a full disk."""
        if not self._spares and self._size + self._file_size <= self._size_max:
            try:
                self._spares.append(self._create(self._file_size))
            except OSError:
                return  # `append` finds out by itself; a full tmpfs is its business to report.

    def files(self) -> list[FrameFile]:
        """Return every file that is open: for closing everything."""
        return list(self._files)


SPARES_MAX = 4  # Beyond these, tmpfs goes back to the node.
