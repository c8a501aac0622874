"""A writer: one client incarnation, from `init()` to `finish()`. Ties journal, spool and sender together.

`write` is the caller's path. seq, offset and pwrite happen under one re-entrant lock. A signal handler that logs
while its own thread is inside `write` gets in through the re-entrancy, finds the writer busy and hands its record to
the holder, who writes it before it returns: nothing deadlocks, and the handed record is the one documented exception
to "returned = safe".
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from ranklog.config import Settings
from ranklog.failpoint import failpoint
from ranklog.frame import Kind
from ranklog.journal import Journal
from ranklog.link import State
from ranklog.sender import Sender
from ranklog.spool import Spool
from ranklog.start import Start, encode_start

HANDED_MAX = 1000  # Records that one interrupted write can be handed; a handler that logs more is a loop.


class _Record(NamedTuple):
    """The arguments of `write`."""

    kind: int
    payload: Any
    step: int | None
    counted: bool


class Places(NamedTuple):
    """Where this writer may put its files, and where it finds a daemon."""

    journal_dirs: list[Path]
    spool_dirs: list[Path]
    find_socket: Callable[[], Path] | None
    """None in offline mode."""


class Writer:
    """One writer's way for records. Raises OSError from the constructor only."""

    def __init__(self, start: Start, settings: Settings, places: Places, warn: Callable[[str], None]) -> None:
        self.start = start
        self._lock = threading.RLock()
        self._busy = False
        self._closed = False
        self._handed: deque[_Record] = deque()
        self._step = -1
        frame = encode_start(start)
        self._journal = Journal(
            start.writer, frame, places.journal_dirs,
            file_size=settings.journal_file_size_bytes, size_max=settings.journal_size_bytes, wake=self._wake,
        )  # fmt: skip
        if self._journal.anonymous:
            warn(
                "no directory for the journal could be used; records are kept in memory, "
                "and a kill loses what no daemon has acknowledged"
            )
        spool = Spool(start.writer, frame, places.spool_dirs, size_max=settings.spool_size_bytes)
        self._sender = Sender(
            frame,
            bytes.fromhex(start.writer),
            self._journal,
            spool,
            places.find_socket,
            warn,
            settings.flush_interval_s,
        )
        try:
            self._sender.start()
        except RuntimeError as exc:
            warn(f"no thread could be started to send records ({exc}); they are kept on this node and adopted later")

    def _wake(self) -> None:
        self._sender.wake()

    def write(self, kind: int, payload: Any, step: int | None = None, counted: bool = False) -> bool:  # noqa: FBT001, FBT002
        """Write one record; False if there was no room for it. `counted`: of the step after the last.

        When this returns, the record is in the journal, or its seq is part of a gap there. Raises what msgpack
        raises for a payload it cannot pack; nothing is used up then. After `close` nothing is: False, too.
        """
        with self._lock:
            if self._busy:
                return self._hand(_Record(kind, payload, step, counted))
            if self._handed:  # This call came just before the one that it interrupted could write them.
                self._write_handed()
            try:
                self._busy = True
                if counted:
                    if step is None:
                        step = self._step + 1
                    accepted = self._journal.append(kind, step, payload)
                    self._step = step
                else:
                    accepted = self._journal.append(kind, step, payload)
            finally:
                self._busy = False
                if self._handed:
                    self._write_handed()
            return accepted

    def _hand(self, record: _Record) -> bool:
        """Leave a record to the write that this one interrupted. Packed once here, so that it cannot fail there."""
        if self._closed or len(self._handed) >= HANDED_MAX:
            return False
        msgpack.packb(record.payload)
        self._handed.append(record._replace(payload=dict(record.payload)))
        return True

    def _write_handed(self) -> None:
        """Write what was handed over, in order: whoever interrupts this hands over as well."""
        while self._handed:  # Again, for one may come when the last was written, and before it is nobody's turn.
            try:
                self._busy = True
                while self._handed:
                    kind, payload, step, counted = self._handed.popleft()
                    if kind == Kind.END:
                        self._write_end(payload)
                        self._handed.clear()
                    else:
                        step = self._step + 1 if counted and step is None else step
                        self._journal.append(kind, step, payload)
                        self._step = step if counted and step is not None else self._step
            finally:
                self._busy = self._closed

    @property
    def written(self) -> int:
        """Records so far, refused ones included, without the start frame."""
        return self._journal.next_seq - 1

    @property
    def refused(self) -> int:
        """Records for which there was no room."""
        return self._journal.refused

    @property
    def closed(self) -> bool:
        """True once no more records are taken."""
        return self._closed

    @property
    def state(self) -> State:
        """What the sender knows of the daemon."""
        return self._sender.state

    def flush(self, timeout_s: float, *, spooled: bool = False) -> bool:
        """Wait until everything written so far is durable at the daemon (`spooled`: or on this node's disk).

        What was refused just now is not waited for: its gap closes with the next record.
        """
        return self._sender.wait(self._journal.closed_seq, timeout_s, spooled=spooled)

    def connects(self, timeout_s: float) -> bool:
        """Wait for a daemon to answer, if its socket is there at all; True once it does."""
        return self._sender.connects(timeout_s)

    def end(self, exit_code: int | None) -> None:
        """Write the end record; nothing is taken after it."""
        payload = {"exit_code": exit_code}
        with self._lock:
            if self._busy:
                self._hand(_Record(Kind.END, payload, None, counted=False))
                return
            self._write_handed()
            try:
                self._busy = True
                self._write_end(payload)
            finally:
                self._busy = self._closed

    def _write_end(self, payload: dict[str, Any]) -> None:
        self._sender.expect_end(self._journal.next_seq)
        self._journal.append(Kind.END, None, {**payload, "last": self._journal.next_seq})
        self._seal()

    def _seal(self) -> None:
        """Take no more records: the files may go at any moment, and their descriptors to somebody else."""
        self._busy = self._closed = True
        with contextlib.suppress(OSError):  # Then the seqs of the last gap are missing instead, and show it as well.
            self._journal.close_gap()
        failpoint("finish.end.after")

    def close(self, timeout_s: float) -> bool:
        """Spill what is unacknowledged to disk and let go of every file; True if all of that was done in time.

        Called from a signal handler that interrupted `write`, it does nothing: that write goes on afterwards.
        """
        with self._lock:
            if self._busy and not self._closed:
                return False
            self._seal()
        return self._sender.stop(timeout_s)

    @property
    def acknowledged(self) -> bool:
        """True if the daemon has everything."""
        return self._sender.acked >= self._journal.next_seq

    def abandon(self) -> None:
        """In a forked child: let go of the parent's files without touching them."""
        self._sender.abandon()
