"""The daemon's end of the socket: who is there, and what a peer can and cannot do to it."""

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ingesting import RawPeer
from node import wait_for
from ranklog import wire
from ranklog.errors import UsageError
from ranklog.wire import Type
from ranklogd.ingest import Peer, Reply
from ranklogd.socket import QUEUE_MAX, DaemonSocket, peer_uid
from ranklogd.wal.segment import UID_UNKNOWN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def daemon(path: Path) -> Iterator[DaemonSocket]:
    daemon = DaemonSocket(path, 0o600, None)
    yield daemon
    daemon.close()


def received(daemon: DaemonSocket, count: int, timeout_s: float = 10.0) -> list[tuple[Peer, list[bytes]]]:
    found: list[tuple[Peer, list[bytes]]] = []

    def enough() -> bool:
        daemon.wait(0.05)
        found.extend(daemon.receive(100))
        return len(found) >= count

    wait_for(enough, f"{count} messages", timeout_s)
    return found


def test_a_message_comes_with_the_uid_that_the_kernel_reports(daemon: DaemonSocket, path: Path) -> None:
    with RawPeer(path) as peer:
        peer.send(b"header", b"body")
        ((sender, parts),) = received(daemon, 1)
        assert (sender.uid, parts) == (os.geteuid(), [b"header", b"body"])
        daemon.send(Reply(sender.identity, wire.encode(Type.PONG, 1, "v", 2)))
        daemon.send(Reply(sender.identity, wire.encode(Type.REPORT, 1), b"{}"))
        assert peer.receive().kind == Type.PONG
        assert peer.receive().body == b"{}"


def test_the_uid_survives_the_peer(daemon: DaemonSocket, path: Path) -> None:
    with RawPeer(path) as peer:
        peer.send(b"last words")
        wait_for(lambda: daemon.wait(0.05) or peer.silent(0.05), "it is on its way")
    assert received(daemon, 1)[0][0].uid == os.geteuid()


def test_an_answer_to_nobody_is_dropped(daemon: DaemonSocket) -> None:
    daemon.send(Reply(b"gone", b"header"))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_the_mode_it_was_given(path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        daemon = DaemonSocket(path, mode, os.getegid())
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert os.umask(0o077) == 0o077, "the process's own umask is back"
    finally:
        os.umask(before)
    daemon.close()


def test_the_socket_is_closed_to_others_until_its_mode_is_set(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = Path.chmod

    def chmod(self: Path, mode: int) -> None:
        seen.append(stat.S_IMODE(self.stat().st_mode))
        real(self, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    DaemonSocket(path, 0o666, None).close()
    assert seen == [0o600]


def test_the_file_goes_when_the_daemon_does(path: Path) -> None:
    daemon = DaemonSocket(path, 0o600, None)
    assert path.is_socket()
    daemon.close()
    assert not os.path.lexists(path)


def test_a_stale_socket_file_is_no_obstacle(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    daemon = DaemonSocket(path, 0o600, None)
    with RawPeer(path) as peer:
        peer.send(b"hello")
        assert received(daemon, 1)
    daemon.close()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_no_socket_is_never_removed(path: Path, what: str) -> None:
    path.write_bytes(b"somebody's data") if what == "file" else path.mkdir()
    with pytest.raises(UsageError, match="in the way"):
        DaemonSocket(path, 0o600, None)
    assert os.path.lexists(path)


def test_a_directory_that_is_missing_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="socket cannot be bound"):
        DaemonSocket(tmp_path / "missing" / "s", 0o600, None)


def test_a_message_over_the_limit_costs_its_sender_the_connection_and_others_nothing(
    daemon: DaemonSocket, path: Path
) -> None:
    with RawPeer(path) as rude, RawPeer(path) as polite:
        rude.send(bytes(wire.MESSAGE_SIZE_MAX + 1))
        polite.send(bytes(wire.MESSAGE_SIZE_MAX))
        ((_, parts),) = received(daemon, 1)
        assert len(parts[0]) == wire.MESSAGE_SIZE_MAX
        polite.send(b"again")
        assert received(daemon, 1)[0][1] == [b"again"]


def test_what_does_not_speak_the_protocol_is_shut_out_while_others_are_served(daemon: DaemonSocket, path: Path) -> None:
    """libzmq takes some rubbish for the oldest version of its protocol: that arrives, as a message that says nothing."""

    def raw(data: bytes) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.sendall(data)
        sock.settimeout(10)
        return sock

    def arrives(wanted: bytes) -> bool:
        return [wanted] in [parts for _, parts in received(daemon, 1)]

    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
    ready = b"\x04\x29\x05READY\x0bSocket-Type" + struct.pack(">I", 0xFFFFFFFF)
    half_open = [raw(data) for data in (b"", b"\xff", greeting[:20], greeting)]
    rubbish = [raw(data) for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), bytes(500), greeting + ready)]
    with RawPeer(path) as peer:
        peer.send(b"hello")
        wait_for(lambda: arrives(b"hello"), "the one that speaks it")
        for sock in half_open:
            assert _is_shut(sock), "within the time that a handshake may take"
        peer.send(b"again")
        wait_for(lambda: arrives(b"again"), "and again")
    for sock in [*half_open, *rubbish]:
        sock.close()


def _is_shut(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            continue
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_one_peer_cannot_fill_the_daemons_memory(daemon: DaemonSocket, path: Path) -> None:
    """Nobody reads: what libzmq holds for one peer is a few messages, the rest waits with the sender."""
    with RawPeer(path) as flood:
        flood.socket.setsockopt(zmq.SNDTIMEO, 300)
        flood.socket.setsockopt(zmq.SNDHWM, 1)
        sent = 0
        try:
            while sent < 100:
                flood.socket.send(bytes(1 << 20))
                sent += 1
        except zmq.Again:
            pass
        assert QUEUE_MAX <= sent <= QUEUE_MAX + 8
        assert len(received(daemon, sent)) == sent


def test_a_watched_descriptor_wakes_the_wait(daemon: DaemonSocket) -> None:
    fd = os.eventfd(0)
    daemon.watch(fd)
    assert daemon.wait(0.01) == set()
    os.eventfd_write(fd, 1)
    assert daemon.wait(5) == {fd}
    os.close(fd)


class _Frame:
    """A frame whose metadata says `address`."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def get(self, _: str) -> str:
        if self._address is None:
            raise zmq.ZMQError
        return self._address


@pytest.mark.parametrize(
    ("address", "uid"),
    [("localhost:1000:1000:77", 1000), ("localhost:0:0:1", 0), (None, UID_UNKNOWN), ("127.0.0.1", UID_UNKNOWN),
     ("localhost::1:2", UID_UNKNOWN), ("localhost:-1:1:2", UID_UNKNOWN)],
)  # fmt: skip
def test_an_address_without_a_uid_is_nobody(address: str | None, uid: int) -> None:
    assert peer_uid(_Frame(address)) == uid  # type: ignore[arg-type]
