"""The backlog: what one writer has logged and nobody has acknowledged, as an ordered chain of chunks.

    acked │ sent, in flight │ not sent yet
           ▲ chain[0]        ▲ chain[cursor]

The chain covers seqs without holes. Chunks lie in journal or spool files; sending reads them back, so a resend is
"put the cursor back" and an outage costs no memory. Owned by the sender thread; no clock and no socket in here.
"""

import errno
import os
from collections import deque
from typing import NamedTuple

from ranklog import fs
from ranklog.frame import spans
from ranklog.framefile import FrameFile
from ranklog.journal import Chunk, Journal
from ranklog.spool import Spool

BATCH_SIZE = 1 << 20
"""Chunks are sent together up to this size: with two batches in flight, size is what makes a backlog drain fast."""
MERGE_SIZE_MAX = 256 << 10
"""Neighbouring chunks are joined up to this size, so that days of outage stay a short chain."""


class Batch(NamedTuple):
    """What goes into one BATCH message."""

    first_seq: int
    records: int
    frames: bytes


class Backlog:
    """Unacknowledged chunks of one writer."""

    def __init__(self, journal: Journal, spool: Spool) -> None:
        self.acked = 0
        """The seq below which everything is acknowledged."""
        self._journal = journal
        self._spool = spool
        self._chain: deque[Chunk] = deque()
        self._cursor = 0
        self._in_flight: deque[int] = deque()
        self._received = 0
        """The seq below which the daemon has everything, durable or not."""
        self._spooled = 0
        """The seq below which everything was on disk durably, or acknowledged, after the last spill."""

    @property
    def base(self) -> int:
        """The oldest seq still held, or the next one if none is."""
        return self._chain[0].first_seq if self._chain else self.acked

    @property
    def in_flight(self) -> int:
        """Batches sent and not acknowledged."""
        return len(self._in_flight)

    @property
    def empty(self) -> bool:
        """True if everything collected is acknowledged."""
        return not self._chain

    def collect(self) -> None:
        """Take in what the caller has logged since. What follows unsent bytes of the same file is joined to them:
        beside a busy training, each read and write of its own may cost milliseconds.
        """
        for chunk in self._journal.collect():
            last = self._chain[-1] if len(self._chain) > self._cursor else None
            if last and chunk.first_seq != self._received and _joinable(last, chunk):
                self._chain[-1] = _joined(last, chunk)
            else:
                self._chain.append(chunk)

    def next_batch(self) -> Batch | None:
        """Return the next unsent batch and count it as in flight; None if all is sent. Raises OSError: rewind then."""
        first = self._cursor
        size = 0
        while self._cursor < len(self._chain):
            chunk = self._chain[self._cursor]
            if size and (size + chunk.end - chunk.offset > BATCH_SIZE or chunk.first_seq == self._received):
                break
            size += chunk.end - chunk.offset
            self._cursor += 1
        if not size:
            return None
        chunks = [self._chain[index] for index in range(first, self._cursor)]
        frames = b"".join(os.pread(c.file.fd, c.end - c.offset, c.offset) for c in chunks)
        if len(frames) != size:
            raise OSError(errno.EIO, f"{chunks[0].file.path} is shorter than what was written to it")
        self._in_flight.append(chunks[-1].next_seq)
        return Batch(chunks[0].first_seq, chunks[-1].next_seq - chunks[0].first_seq, frames)

    def rewind(self) -> None:
        """Forget what is in flight: it will be sent again."""
        self._cursor = 0
        self._in_flight.clear()

    def resume(self, expected: int) -> None:
        """Go on from the seq the daemon asks for. What is older it has, but not yet safely: only an ack releases that.

        The last batch of it is sent once more, never mixed with what is new, and so draws the ack if there is no other.
        """
        self.rewind()
        self._received = expected
        older = sum(chunk.first_seq < expected for chunk in self._chain)
        if older and self._chain[older - 1].next_seq > expected:
            self._split(older - 1, expected)
        self._cursor = max(0, older - 1)

    def _split(self, index: int, seq: int) -> None:
        """Make two chunks of one, so that the second starts at `seq`, if a frame does."""
        chunk = self._chain[index]
        offset = _offset_of(chunk, seq)
        if offset is not None:
            self._chain[index] = chunk._replace(end=offset, next_seq=seq)
            self._chain.insert(index + 1, chunk._replace(offset=offset, first_seq=seq))
            chunk.file.chunks += 1

    def acknowledge(self, durable: int) -> bool:
        """Release what the daemon has on disk: every chunk that ends at or before `durable`. True if any went."""
        released = False
        while self._in_flight and self._in_flight[0] - 1 <= durable:
            self._in_flight.popleft()
        while self._chain and self._chain[0].next_seq - 1 <= durable:
            chunk = self._chain.popleft()
            self.acked = chunk.next_seq
            self._cursor = max(0, self._cursor - 1)
            self._release(chunk)
            released = True
        return released

    def _release(self, chunk: Chunk) -> None:
        if self._in_spool(chunk):
            self._spool.release(chunk)
            return
        chunk.file.chunks -= 1
        if chunk.file.sealed and not chunk.file.chunks:
            self._journal.recycle(chunk.file)

    @staticmethod
    def _in_spool(chunk: Chunk) -> bool:
        return chunk.file.path is not None and chunk.file.path.suffix == ".spool"

    def _on_disk(self, chunk: Chunk) -> bool:
        return self._in_spool(chunk) and (not chunk.file.poisoned or chunk.next_seq <= self._spooled)

    def spill(self) -> None:
        """Move every chunk that is not on disk to the spool, and make that durable; raises OSError.

        What `relieve` put into a file whose fsync failed is moved once more.

        At ENOSPC what was moved before stays moved. After any other error nothing was: a journal chunk is released
        only once its copy is durable, and a file that failed once is not trusted with more.
        """
        moved: list[tuple[int, Chunk]] = []
        full: OSError | None = None
        try:
            for index, chunk in enumerate(self._chain):
                if not self._on_disk(chunk):
                    self._chain[index] = self._spool.take(chunk)
                    moved.append((index, chunk))
        except OSError as exc:
            if exc.errno not in fs.NO_SPACE:
                self._undo(moved)
                raise
            full = exc
        try:
            self._spool.sync()
        except OSError:
            self._undo(moved)
            raise
        for _, chunk in moved:
            self._release(chunk)
        self._spooled = next((c.first_seq for c in self._chain if not self._on_disk(c)), self._end)
        if not self._cursor:
            self._merge()
        if full is not None:
            raise full

    def relieve(self) -> None:
        """Move every chunk to the spool and give its room in the journal back at once; raises OSError.

        For a journal that fills up faster than a disk can sync. The copies survive a kill, as the journal does; the
        next `spill` makes them durable.
        """
        for index, chunk in enumerate(self._chain):
            if not self._in_spool(chunk):
                self._chain[index] = self._spool.take(chunk)
                self._release(chunk)

    @property
    def _end(self) -> int:
        return self._chain[-1].next_seq if self._chain else self.acked

    def _undo(self, moved: list[tuple[int, Chunk]]) -> None:
        self._spool.seal()
        for index, chunk in moved:
            copy, self._chain[index] = self._chain[index], chunk
            self._spool.release(copy)

    def _merge(self) -> None:
        """Join neighbours of one spool file. Not while batches are in flight: acks are counted by chunk."""
        merged: deque[Chunk] = deque()
        for chunk in self._chain:
            if merged and _joinable(merged[-1], chunk):
                merged[-1] = _joined(merged[-1], chunk)
            else:
                merged.append(chunk)
        self._chain = merged

    def files(self) -> set[FrameFile]:
        """Return the files that hold something unacknowledged."""
        return {chunk.file for chunk in self._chain}

    def spooled_below(self) -> int:
        """Return the seq below which everything is acknowledged or durable in the spool."""
        return max(self.acked, self._spooled)


def _joinable(last: Chunk, chunk: Chunk) -> bool:
    return last.file is chunk.file and last.end == chunk.offset and chunk.end - last.offset <= MERGE_SIZE_MAX


def _joined(last: Chunk, chunk: Chunk) -> Chunk:
    """Return two neighbours as one."""
    chunk.file.chunks -= 1
    return last._replace(end=chunk.end, next_seq=chunk.next_seq)


def _offset_of(chunk: Chunk, seq: int) -> int | None:
    """Return where in its file the frame of a chunk begins that starts at `seq`."""
    buffer = memoryview(os.pread(chunk.file.fd, chunk.end - chunk.offset, chunk.offset))
    return next((chunk.offset + span.offset for span in spans(buffer) if span.first == seq), None)
