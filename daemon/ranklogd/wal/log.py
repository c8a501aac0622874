"""The write-ahead log: append, group commit, roll. One owner, the ingest loop; no thread, no clock of its own.

    append ─▶ pending (memory) ─▶ commit: one write + one fdatasync ─▶ durable, then the caller may acknowledge
    roll:  fdatasync A → create B (header, fsync, rename, fsync dir) → rename A to its sealed name, fsync dir
           → append to B

B's header holds what is durable in A, and B exists before A can be converted and unlinked: otherwise a power cut
could forget the lsn, or what was acknowledged.

A write that fails (ENOSPC) is cut off again and the pending batches are handed back: `Full`. An fdatasync that fails
poisons the segment: it is never synced again, for a retry lies. It counts only up to its last durable lsn (its sealed
name says so), and what was pending is written to a new segment. If that fails too, the error propagates: exit, no ack.

From the moment B has its name, A ends where B begins: that is what a recovery reads from the two names. So any error
behind that point propagates too, for nothing may be appended to A any more.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ranklog import fs
from ranklog.failpoint import failpoint
from ranklog.layout import Lsn
from ranklogd.sequence import WriterState
from ranklogd.wal import segment
from ranklogd.wal.segment import EntryType, SegmentHeader, WriterMark

log = logging.getLogger("ranklogd")

COPY_SIZE = 1 << 20
IOV_MAX = 512  # Buffers of one writev; Linux allows 1024.


class Full(Exception):
    """There is no room for the pending batches; none of them was kept."""


class NoSegment(OSError):
    """A new segment could not be created. Nothing has changed: the open one can still be written."""


@dataclass(frozen=True)
class WalBatch:
    """One batch on its way to disk."""

    state: WriterState
    first_seq: int
    count: int
    frames: bytes
    recv_ns: int


@dataclass(frozen=True)
class WalIdentity:
    """What every segment header repeats."""

    node: str
    store_id: str
    boot: str


class Wal:
    """The open segment and what waits for the next commit."""

    def __init__(
        self, directory: Path, identity: WalIdentity, first_lsn: int, marks: Callable[[], tuple[WriterMark, ...]]
    ) -> None:
        self.next_lsn = first_lsn
        self.pending_bytes = 0
        self.poisoned = 0
        """Segments given up after an fsync error."""
        self._directory = directory
        self._identity = identity
        self._marks = marks
        self._pending: list[WalBatch] = []
        self._fd = -1
        self._introduced: set[bytes] = set()
        self._open(first_lsn)

    @property
    def durable_lsn(self) -> int:
        """The last lsn that a power cut cannot take back."""
        return self._first_lsn + self._synced_count - 1

    @property
    def size(self) -> int:
        """Bytes in the open segment."""
        return self._offset

    @property
    def empty(self) -> bool:
        """True if the open segment holds no entry."""
        return not self._synced_count and not self._pending

    @property
    def first_lsn(self) -> int:
        """First lsn of the open segment."""
        return self._first_lsn

    def append(self, batch: WalBatch) -> None:
        """Take a batch; it is not on disk before `commit` returns."""
        self._pending.append(batch)
        self.pending_bytes += len(batch.frames)
        self.next_lsn += batch.count

    def commit(self) -> None:
        """Make every pending batch durable. Raises Full (nothing kept) or OSError (the caller must exit)."""
        if not self._pending:
            return
        try:
            self._require_name()
            end, introduced = self._write(self._pending)
        except OSError as exc:
            if exc.errno not in fs.NO_SPACE:
                raise
            self._give_back()
            raise Full(f"the disk of {self._directory} is full") from exc
        try:
            failpoint("wal.sync.before")
            fs.sync_data(self._fd)
        except OSError:
            self._replace_poisoned()
        else:
            self._offset, self._introduced = end, introduced
            self._synced_count = self.next_lsn - self._first_lsn
        failpoint("wal.sync.after")
        self._pending.clear()
        self.pending_bytes = 0

    def _give_back(self) -> None:
        os.ftruncate(self._fd, self._offset)
        self.next_lsn -= sum(batch.count for batch in self._pending)
        self._pending.clear()
        self.pending_bytes = 0

    def _write(self, batches: Iterable[WalBatch]) -> tuple[int, set[bytes]]:
        """Write entries behind the last synced one; return the new end and who has a WRITER entry by then."""
        failpoint("wal.append.before")
        offset, introduced = self._offset, set(self._introduced)
        lsn = self._first_lsn + self._synced_count
        buffers: list[bytes | memoryview] = []
        for batch in batches:
            state = batch.state
            if state.writer not in introduced:
                head = segment.WRITER.pack(state.writer, state.attempt)
                buffers += segment.encode_entry(
                    self._salt, lsn, batch.recv_ns, state.uid, EntryType.WRITER, head, state.start_frame
                )
                introduced.add(state.writer)
            head = segment.BATCH.pack(state.writer, batch.first_seq, batch.count)
            buffers += segment.encode_entry(
                self._salt, lsn, batch.recv_ns, state.uid, EntryType.BATCH, head, batch.frames
            )
            lsn += batch.count
        for start in range(0, len(buffers), IOV_MAX):
            part = buffers[start : start + IOV_MAX]
            size = sum(map(len, part))
            written = os.pwritev(self._fd, part, offset)
            if written < size:
                fs.write_all(self._fd, b"".join(part)[written:], offset + written)
            offset += size
        failpoint("wal.append.after")
        return offset, introduced

    def _replace_poisoned(self) -> None:
        self.poisoned += 1
        pending, old, old_first, durable = self._pending, self._fd, self._first_lsn, self.durable_lsn
        log.error("segment_poisoned first_lsn=%d: fdatasync failed; written again to a new segment", old_first)
        with contextlib.suppress(OSError):
            # The kernel calls these pages clean now. Should all else fail, no recovery must find them and believe it.
            os.ftruncate(old, self._offset)
        failpoint("poison.truncate.after")
        self._open(durable + 1)
        end, introduced = self._write(pending)
        fs.sync_data(self._fd)
        failpoint("poison.rewrite.after")
        self._offset, self._introduced = end, introduced
        self._synced_count = self.next_lsn - self._first_lsn
        os.close(old)
        self._retire(old_first, durable)

    def roll(self) -> bool:
        """Seal the open segment and go on in a new one; False if it is empty.

        Raises NoSegment (the old one stays open) or another OSError (the caller must exit).
        """
        assert not self._pending, "roll between commits only"
        if not self._synced_count:
            return False
        self._require_name()
        failpoint("seg.sync.after")
        old, first, last = self._fd, self._first_lsn, self.durable_lsn
        self._open(last + 1)
        os.close(old)
        self._retire(first, last)
        return True

    def _require_name(self) -> None:
        """Write the open segment again if somebody removed its name: what has none dies with this process."""
        if os.fstat(self._fd).st_nlink:
            return
        path = self._directory / segment.open_name(self._first_lsn)
        log.error("segment_removed name=%s: somebody removed it; written again", path.name)
        fs.make_dir(self._directory)
        hidden = self._directory / f".{path.name}"
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for offset in range(0, self._offset, COPY_SIZE):
                fs.write_all(fd, os.pread(self._fd, min(COPY_SIZE, self._offset - offset), offset), offset)
            fs.sync_data(fd)
            fs.rename(hidden, path)
        except OSError:
            os.close(fd)
            raise
        fs.sync_dir(self._directory)
        fs.sync_dir(self._directory.parent)
        os.close(self._fd)
        self._fd = fd

    def _retire(self, first: int, last: int) -> None:
        old = self._directory / segment.open_name(first)
        if last >= first:
            fs.rename(old, self._directory / segment.sealed_name(first, last))
        elif first != self._first_lsn:
            fs.unlink(old)
        failpoint("seg.seal.after")
        fs.sync_dir(self._directory)
        failpoint("seg.dirsync.after")

    def _open(self, first_lsn: int) -> None:
        """Create a segment and write into it from now on. Raises NoSegment or another OSError, see `roll`."""
        salt = secrets.randbits(32)
        head = segment.encode_header(
            SegmentHeader(
                self._identity.node, self._identity.store_id, Lsn(first_lsn), self._identity.boot, salt, self._marks()
            )
        )
        path = self._directory / segment.open_name(first_lsn)
        hidden = self._directory / f".{path.name}"
        fd = -1
        try:
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            failpoint("seg.create.after")
            fs.write_all(fd, head, 0)
            fs.sync_data(fd)
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            fs.unlink(hidden)
            raise NoSegment(exc.errno, f"a new segment cannot be created: {exc.strerror}", str(path)) from exc
        fs.rename(hidden, path)
        fs.sync_dir(self._directory)
        failpoint("seg.header.after")
        self._fd = fd
        self._first_lsn, self._salt, self._offset = first_lsn, salt, len(head)
        self._synced_count = 0
        self._introduced = set()

    def close(self) -> None:
        """Close the open segment; it stays for the next start."""
        os.close(self._fd)
