"""One writer's conversation with the daemon: greet, send, hear acknowledgements.

    CONNECTING ──up──▶ HELLO sent ──WELCOME──▶ ATTACHED ──acks──▶ chunks released
        ▲                                         │ nothing for ACK_TIMEOUT_S, or REFUSE(FULL): SILENT
        └────────────── down ─────────────────────┘ (in flight stays in flight; records are spilled meanwhile)

Two batches at most are unacknowledged. A silent daemon is greeted again now and then; its WELCOME says from where to
go on, so whatever was dropped on the way is sent again. Owned by the sender thread.
"""

import time
import zlib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranklog import wire
from ranklog.backlog import Backlog
from ranklog.errors import ProtocolError
from ranklog.lifecycle import lifecycle
from ranklog.spool import Spool

if TYPE_CHECKING:
    from ranklog.transport import Transport

ACK_TIMEOUT_S = 2.0
"""A daemon that acknowledges nothing for this long is taken for absent until it does."""
ASK_INTERVAL_S = 3.0
"""A silent daemon is greeted again this often."""
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


class Link:
    """One writer's link to whatever daemon there is."""

    def __init__(
        self,
        start_frame: bytes,
        writer: bytes,
        backlog: Backlog,
        spool: Spool,
        find_socket: Callable[[], Path] | None,
        warn: Callable[[str], None],
    ) -> None:
        self.state = State.CONNECTING if find_socket else State.OFFLINE
        self.detached_s = time.monotonic()
        """When the daemon was last seen to go."""
        self.end_seq = 1 << 62
        """The seq of the end record, once there is one."""
        self._start_frame = start_frame
        self._writer = writer
        self._backlog = backlog
        self._spool = spool
        self._find_socket = find_socket
        self._warn = warn
        self._told = ""
        self._transport: Transport | None = None
        self._path: Path | None = None
        self._up = False
        """Somebody is at the other end."""
        self._last_ack_s = self._looked_s = time.monotonic()

    @property
    def reachable(self) -> bool:
        """Whether there is a socket at all."""
        return self._find_socket is not None and self._find_socket().exists()

    def connect(self, wake_fd: int) -> None:
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
            self._transport, self._up = None, False
        try:
            self._transport, self._path = Transport(path, wake_fd), path
        except (OSError, ProtocolError) as exc:
            self._warn(f"the daemon at {path} cannot be reached for now: {exc}; records are kept on this node")

    def poll(self, timeout_s: float) -> bool:
        """Wait for news and take it in; False, at once, without a connection."""
        if self._transport is None:
            return False
        for event in self._transport.events(timeout_s):
            self._on_event(event)
        return True

    def tend(self, now_s: float, wake_fd: int) -> None:
        """Send what may be sent; greet a silent daemon, and look for one elsewhere, when it is time."""
        if self.state == State.ATTACHED:
            self._send(now_s)
        elif self.state == State.SILENT and now_s - self._last_ack_s > ASK_INTERVAL_S:
            self._hello()  # After a refusal for lack of space, or in case the last batch was dropped on the way.
            self._last_ack_s = now_s
        elif self.state == State.CONNECTING and now_s - self._looked_s >= LOOK_INTERVAL_S:
            self._looked_s = now_s
            self.connect(wake_fd)
            if self._up:
                self._hello()  # Who is there has not answered: the HELLO or the WELCOME was dropped on the way.

    def close(self) -> None:
        """Close the connection; nothing is sent any more."""
        if self._transport is not None:
            self._transport.close()

    def _on_event(self, event: Any) -> None:
        from ranklog.transport import Down, Up

        if isinstance(event, Up):
            self._up = True
            self._hello()
        elif isinstance(event, Down):
            self._up = False
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
        self.detached_s = time.monotonic()

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
            if text != self._told:
                self._warn(f"the daemon takes no records for now ({text}); they are kept on this node and sent later")
        else:
            self._detach(State.REJECTED)
            self._warn(
                f"the daemon refused this writer for good: {text}. "
                "Records are spooled on this node; see `ranklog status`"
            )
        self._told = text

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
            self.detached_s = 0.0  # Long enough ago: what waits is spilled at once.
