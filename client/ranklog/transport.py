"""The client's end of the socket: a DEALER that says when the daemon comes and goes. Imports zmq.

A send that returned proves nothing, so nothing here promises delivery: `sender` counts only acknowledgements. What
this module takes care of is that nothing can hang: linger is always 0, every send is non-blocking, and the monitor
socket is closed before the context. A context belongs to one process and one thread; after a fork the child makes
its own and never touches this one, for a message sent on an inherited socket returns OK and vanishes.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from ranklog import wire
from ranklog.errors import ProtocolError

RECONNECT_MS = 50
RECONNECT_MS_MAX = 500  # At 5 s, acks were still absent 2.3 s after the daemon was back.
DESCRIPTORS = 16
"""A context with its sockets takes 10 descriptors. Where there are none, libzmq aborts the whole process."""
PATH_SIZE_MAX = 107  # sun_path; libzmq says only "invalid argument".


class Up:
    """The daemon's end of the socket is there: say HELLO."""


class Down:
    """The connection is gone: whatever was in flight is not acknowledged any more."""


Event = Up | Down | tuple[wire.Type, list[Any], bytes]


class Transport:
    """One connection of one process. Used by the thread that created it. Raises ProtocolError and OSError when made."""

    def __init__(self, path: Path, wake_fd: int = -1) -> None:
        if len(os.fsencode(path)) > PATH_SIZE_MAX:
            raise ProtocolError(
                f"socket path {path} is longer than {PATH_SIZE_MAX} bytes; set RANKLOG_SOCKET to a shorter one"
            )
        _require_descriptors()
        self._wake_fd = wake_fd
        self._context = zmq.Context(io_threads=1)
        try:
            self._open(f"ipc://{path}")
        except zmq.ZMQError as exc:
            self._context.destroy(0)
            raise OSError(exc.errno, f"ZeroMQ: {exc}") from exc

    def _open(self, address: str) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 64)
        self._socket.setsockopt(zmq.RCVHWM, 1000)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        self._socket.setsockopt(zmq.IDENTITY, b"\0" + os.urandom(15))
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MESSAGE_SIZE_MAX)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        if self._wake_fd >= 0:
            self._poller.register(self._wake_fd, zmq.POLLIN)

    def send(self, header: bytes, body: bytes | None = None) -> bool:
        """Hand a message to libzmq; False if it has no room for it now."""
        try:
            if body is None:
                self._socket.send(header, zmq.NOBLOCK)
            else:
                self._socket.send(header, zmq.NOBLOCK | zmq.SNDMORE)
                # Copied: without that, pyzmq keeps the bytes alive by a thread and a context of its own.
                self._socket.send(body, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def events(self, timeout_s: float) -> Iterator[Event]:
        """Wait until something happens or the time is over; yield what came, connection changes first."""
        ready = dict(self._poller.poll(round(timeout_s * 1000)))
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._monitor in ready:
            while self._monitor.poll(0):
                # `zmq.utils.monitor` would load asyncio, ssl and socket: 3.4 MB for two bytes.
                event = int.from_bytes(self._monitor.recv_multipart()[0][:2], sys.byteorder)
                yield Up() if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else Down()
        if self._socket in ready:
            yield from self._received()

    def _received(self) -> Iterator[Event]:
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                kind, fields = wire.decode(parts[0])
            except ProtocolError:
                continue  # A daemon of another version may say things that this one does not know.
            yield kind, fields, parts[1] if len(parts) > 1 else b""

    def close(self) -> None:
        """Close everything at once; what was not acknowledged stays in the journal."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.destroy(0)


def _require_descriptors() -> None:
    """Raise OSError if this process cannot open as many descriptors as a context needs."""
    spare: list[int] = []
    try:
        while len(spare) < DESCRIPTORS:
            spare += os.pipe()
    finally:
        for fd in spare:
            os.close(fd)
