"""The sender thread: moves what `log()` wrote to the daemon, or to the spool while there is none.

    CONNECTING ──up──▶ HELLO sent ──WELCOME──▶ ATTACHED ──acks──▶ chunks released
        ▲                                         │ nothing for ACK_TIMEOUT_S, or REFUSE(FULL): SILENT
        └────────────── down ─────────────────────┘ (in flight stays in flight; records are spilled meanwhile)

It wakes on a timer, or earlier when the caller wrote more than a mark: never once per record. Two batches at most
are unacknowledged. While not attached, what the journal holds is moved to the spool about once a second. The thread
may hang on a frozen disk for as long as it likes: the caller of `log()` never waits for it.
"""

import os
import select
import threading
import time
import zlib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranklog import wire
from ranklog.backlog import Backlog
from ranklog.errors import ProtocolError
from ranklog.journal import Journal
from ranklog.lifecycle import lifecycle
from ranklog.spool import Spool

if TYPE_CHECKING:
    from ranklog.transport import Transport

WAIT_INTERVAL_S = 0.1
"""How often a waiting thread looks by itself, besides being told."""
SPILL_INTERVAL_S = 1.0
ACK_TIMEOUT_S = 2.0
"""A daemon that acknowledges nothing for this long is taken for absent until it does."""
ASK_INTERVAL_S = 3.0
"""A silent daemon is greeted again this often; its WELCOME says from where to go on."""
LOOK_INTERVAL_S = 5.0
"""How often a client without a daemon looks whether one has appeared at another place."""


class State(Enum):
    """What the sender knows of the daemon."""

    CONNECTING = "connecting"
    ATTACHED = "attached"
    SILENT = "silent"
    REJECTED = "rejected"
    """The daemon will not take this writer at all (version, foreign uid): spool only."""
    OFFLINE = "offline"


class Sender:
    """One writer's sender. `request`, `wait` and `stop` are for other threads; the rest runs in its own."""

    def __init__(
        self,
        start_frame: bytes,
        writer: bytes,
        journal: Journal,
        spool: Spool,
        find_socket: Callable[[], Path] | None,
        warn: Callable[[str], None],
        flush_interval_s: float = 0.1,
    ) -> None:
        self.state = State.CONNECTING if find_socket else State.OFFLINE
        self.last_refusal = ""
        """The daemon's words at its last refusal."""
        self.end_seq = 1 << 62
        """The seq of the end record, once there is one."""
        self._start_frame = start_frame
        self._writer = writer
        self._journal = journal
        self._spool = spool
        self._backlog = Backlog(journal, spool)
        self._find_socket = find_socket
        self._warn = warn
        self._flush_interval_s = flush_interval_s
        self._transport: Transport | None = None
        self._path: Path | None = None
        self._looked_s = time.monotonic()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()  # Not select: a trainer may well have descriptors beyond 1024.
        self._poll.register(self._wake_fd, select.POLLIN)
        self._woken = self._closed = False
        self._condition = threading.Condition()
        self._acked = self._safe = 0
        self._stopping = threading.Event()
        self._last_ack_s = self._last_spill_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ranklog-sender", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Make the thread look now. Costs one system call at most. For the writer's lock holder, and within `wait`."""
        if not self._woken and not self._closed:
            self._woken = True
            os.eventfd_write(self._wake_fd, 1)

    def wait(self, seq: int, timeout_s: float, *, spooled: bool = False) -> bool:
        """Wait until every record below `seq` is acknowledged; with `spooled`, a copy on disk will do."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while (self._safe if spooled else self._acked) < seq:
                left = deadline - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self.wake()
                self._condition.wait(min(left, WAIT_INTERVAL_S))
        return True

    def connects(self, timeout_s: float) -> bool:
        """Wait until the daemon answers; False at once where there is no socket, or when it refused this writer."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self.state == State.CONNECTING:
                left = deadline - time.monotonic()
                if (
                    left <= 0
                    or self._find_socket is None
                    or not self._find_socket().exists()
                    or not self._thread.is_alive()
                ):
                    return False
                self._condition.wait(min(left, WAIT_INTERVAL_S / 4))
        return self.state == State.ATTACHED

    @property
    def acked(self) -> int:
        """The seq below which everything is durable at the daemon."""
        return self._acked

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to spill what is unacknowledged, close everything and end; True if it did so in time.

        No other thread may be in `log()` from here on.
        """
        self._stopping.set()
        with self._condition:
            self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        with self._condition:  # Whoever is in `wait` must not wake a descriptor that is somebody else's by now.
            if not self._thread.is_alive():
                self._close_wake_fd()
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without a word to the daemon. The parent's is untouched."""
        for file in (*self._journal.files(), *self._spool.files()):
            file.close()
        self._close_wake_fd()

    def _close_wake_fd(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._wake_fd)

    # In the thread.

    def _run(self) -> None:
        try:
            self._connect()
            while not self._stopping.is_set():
                self.step(self._flush_interval_s)
            self._close()
        except Exception as exc:  # noqa: BLE001 - a loop top: training goes on, the journal keeps the records
            self._warn(
                f"the sender thread stopped: {exc!r}. Records stay in the journal and are adopted after this process ends."
            )

    def _connect(self) -> None:
        """Connect to where a daemon's socket is, or would be; again if that place changed meanwhile."""
        if self._find_socket is None:
            return
        with lifecycle.importing:
            from ranklog.transport import Transport  # zmq loads here: 40 ms that neither import nor init() pays

        path = self._find_socket()
        if self._transport is not None:
            if path == self._path:
                return
            self._transport.close()
            self._transport = None
        try:
            self._transport, self._path = Transport(path, self._wake_fd), path
        except (OSError, ProtocolError) as exc:
            self._warn(f"the daemon at {path} cannot be reached for now: {exc}; records are kept on this node")

    def step(self, timeout_s: float) -> None:
        """Wait for news or the timer, then do everything there is to do once."""
        if self._transport is not None:
            for event in self._transport.events(timeout_s):
                self._on_event(event)
        else:
            self._wait_offline(timeout_s)
        self._woken = False  # Before looking: a wake-up that comes later is not lost.
        self._backlog.collect()
        self._journal.refill()
        now_s = time.monotonic()
        if self.state == State.ATTACHED:
            self._send(now_s)
        if self._journal.crowded or (self.state != State.ATTACHED and now_s - self._last_spill_s >= SPILL_INTERVAL_S):
            self._spill(now_s)
        if self.state == State.CONNECTING and now_s - self._looked_s >= LOOK_INTERVAL_S:
            self._looked_s = now_s
            self._connect()
        self._publish()

    def _wait_offline(self, timeout_s: float) -> None:
        if self._poll.poll(round(timeout_s * 1000)):
            os.eventfd_read(self._wake_fd)

    def _on_event(self, event: Any) -> None:
        from ranklog.transport import Down, Up

        if isinstance(event, Up):
            self._hello()
        elif isinstance(event, Down):
            self._detach(State.CONNECTING)
        else:
            self._on_message(*event)

    def _hello(self) -> None:
        assert self._transport is not None
        self._backlog.collect()
        header = wire.encode(wire.Type.HELLO, wire.VERSION_MIN, wire.VERSION, self._writer, self._backlog.base)
        self._transport.send(header, self._start_frame)

    def _detach(self, state: State) -> None:
        self.state = state
        self._backlog.rewind()
        self._last_spill_s = time.monotonic()

    def _on_message(self, kind: wire.Type, fields: list[Any], _body: bytes) -> None:
        now_s = time.monotonic()
        if kind == wire.Type.ACK and fields[0] == self._writer:
            self._last_ack_s = now_s
            self._backlog.acknowledge(fields[1])
            if self.state == State.SILENT:
                self.state = State.ATTACHED
        elif kind == wire.Type.WELCOME and fields[1] == self._writer:
            self._on_welcome(fields)
        elif kind == wire.Type.REFUSE and fields[0] == self._writer:
            self._on_refusal(*fields[1:])

    def _on_welcome(self, fields: list[Any]) -> None:
        _, _, expected, spool_dir, _, cookie, _ = fields
        self.state = State.ATTACHED
        self._last_ack_s = time.monotonic()
        self._backlog.resume(expected)
        if spool_dir and cookie and Path(cookie).exists():
            self._spool.prefer(Path(spool_dir))

    def _on_refusal(self, code: int, text: str, retryable: bool, expected: int) -> None:  # noqa: FBT001 - a wire field
        if code == wire.Code.UNKNOWN_WRITER:
            self._backlog.rewind()
            self._hello()
        elif code == wire.Code.SEQUENCE and expected >= 0:
            self._backlog.resume(expected)
        elif retryable:
            self._detach(State.SILENT)
            self._last_ack_s = time.monotonic()
            if text != self.last_refusal:
                self._warn(f"the daemon takes no records for now ({text}); they are kept on this node and sent later")
        else:
            self._detach(State.REJECTED)
            self._warn(
                f"the daemon refused this writer for good: {text}. Records are spooled on this node; see `ranklog status`"
            )
        self.last_refusal = text

    def _send(self, now_s: float) -> None:
        assert self._transport is not None
        while self._backlog.in_flight < wire.CREDIT:
            try:
                batch = self._backlog.next_batch()
            except OSError as exc:
                self._detach(State.SILENT)
                self._warn(f"records cannot be read back ({exc}); this is tried again, and after this process ends")
                break
            if batch is None:
                break
            if self._backlog.in_flight == 1:
                self._last_ack_s = now_s  # The clock for its ack starts when it is sent.
            crc = zlib.crc32(batch.frames)
            header = wire.encode(
                wire.Type.BATCH,
                self._writer,
                batch.first_seq,
                batch.records,
                crc,
                batch.first_seq + batch.records > self.end_seq,
            )
            if not self._transport.send(header, batch.frames):
                self._backlog.rewind()
                break
        if self._backlog.in_flight and now_s - self._last_ack_s > ACK_TIMEOUT_S:
            self.state = State.SILENT
            self._last_spill_s = 0.0

    def _spill(self, now_s: float) -> None:
        self._last_spill_s = now_s
        try:
            self._backlog.spill()
        except OSError as exc:
            if str(exc) != self.last_refusal:
                self._warn(
                    f"records cannot be spooled to disk ({exc}); they stay in memory (tmpfs) until there is room"
                )
            self.last_refusal = str(exc)
        if self.state == State.SILENT and now_s - self._last_ack_s > ASK_INTERVAL_S:
            self._hello()  # After a refusal for lack of space, or in case the last batch was dropped on the way.
            self._last_ack_s = now_s

    def _publish(self) -> None:
        with self._condition:
            self._acked = self._backlog.acked
            self._safe = self._backlog.spooled_below()
            self._condition.notify_all()

    def _close(self) -> None:
        """Leave nothing in tmpfs that could be on disk, then close, which unlocks what remains for adoption."""
        self._backlog.collect()
        if not self._backlog.empty:
            self._spill(time.monotonic())
        self._publish()
        self._spool.seal()
        held = self._backlog.files()
        for file in (*self._journal.files(), *self._spool.files()):
            if file in held:
                file.close()
            else:
                file.remove()
        if self._transport is not None:
            self._transport.close()
