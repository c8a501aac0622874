"""The daemon's end of the socket: a ROUTER on an ipc path, and who the kernel says is at the other end. Imports zmq.

A second bind on a live ipc path succeeds and silently steals it, so the caller holds the state lock before. The
socket's mode is set before anybody can connect. The peer's uid comes from SO_PEERCRED with every message, never from
what the message says, for with ROUTER_HANDOVER an identity can change hands.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import zmq

from ranklog import fs, wire
from ranklog.errors import UsageError
from ranklogd.ingest import Peer, Reply
from ranklogd.wal.segment import UID_UNKNOWN

HANDSHAKE_MS = 1000  # Closes peers that connect and say nothing, before they use up the descriptors.
QUEUE_MAX = 4
"""Messages that libzmq holds for one peer: no honest client has more than two batches in flight. Those behind wait in
the kernel's buffers and the sender's, so this times MESSAGE_SIZE_MAX is what a hostile one can make the daemon hold."""


class DaemonSocket:
    """The bound ROUTER. Owned by the server loop. Raises UsageError or OSError where it cannot be bound."""

    def __init__(self, path: Path, mode: int, group: int | None) -> None:
        if path.exists() and not path.is_socket():
            raise UsageError(f"{path} is in the way of the socket and is none. Remove it, or choose another: --socket")
        self._path = path
        self._context = zmq.Context(io_threads=1)
        self._context.setsockopt(zmq.MAX_SOCKETS, 64)
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.MAXMSGSIZE, wire.MESSAGE_SIZE_MAX),
            (zmq.RCVHWM, QUEUE_MAX),
            (zmq.SNDHWM, 1000),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.BACKLOG, 4096),
        ):
            self._socket.setsockopt(option, value)
        before = os.umask(0o177)
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as exc:
            raise OSError(exc.errno, f"the socket cannot be bound: {exc.strerror}", str(path)) from exc
        finally:
            os.umask(before)
        if group is not None:
            shutil.chown(path, group=group)
        path.chmod(mode)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, fd: int) -> None:
        """Wake `wait` when `fd` can be read, too."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout_s: float) -> set[int]:
        """Wait for a message, a watched descriptor or the timeout; return the descriptors that can be read."""
        return {ready for ready, _ in self._poller.poll(max(0, round(timeout_s * 1000))) if isinstance(ready, int)}

    def receive(self, limit: int) -> Iterator[tuple[Peer, list[bytes]]]:
        """Yield at most `limit` messages that are there already."""
        for _ in range(limit):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            yield Peer(frames[0].bytes, peer_uid(frames[-1])), [frame.bytes for frame in frames[1:]]

    def send(self, reply: Reply) -> None:
        """Send without waiting; a peer that is gone or reads nothing misses it and asks again."""
        parts = [reply.identity, reply.header] if reply.body is None else [reply.identity, reply.header, reply.body]
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return

    def close(self) -> None:
        """Close and remove the socket file, so that clients see at once that nobody listens."""
        self._socket.close(0)
        self._context.destroy(0)
        fs.unlink(self._path)


def peer_uid(frame: zmq.Frame) -> int:
    """Return the uid of the process that sent a frame, by the kernel's word."""
    try:
        address = str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return UID_UNKNOWN
    parts = address.split(":")
    return int(parts[1]) if len(parts) == 4 and parts[1].isdigit() else UID_UNKNOWN
