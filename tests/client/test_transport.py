"""The client's end of the socket, against a peer that says what a test wants."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness import Peer, wait_for
from ranklog import wire
from ranklog.errors import ProtocolError
from ranklog.transport import PATH_SIZE_MAX, Down, Transport, Up
from ranklog.wire import Type


class Caller:
    """A transport, and what it reported so far."""

    def __init__(self, path: Path, wake_fd: int = -1) -> None:
        self.transport = Transport(path, wake_fd)
        self.events: list[Any] = []

    def until(self, condition: Any, what: str) -> None:
        def look() -> bool:
            self.events += self.transport.events(0.05)
            return bool(condition())

        wait_for(look, what, 10)

    def kinds(self) -> list[type]:
        return [type(event) for event in self.events]


@pytest.fixture
def caller(tmp_path: Path):
    made = Caller(tmp_path / "s")
    yield made
    made.transport.close()


def test_a_daemon_that_comes_goes_and_comes_again_is_told_each_time(caller: Caller, tmp_path: Path):
    caller.events += caller.transport.events(0.1)
    assert caller.events == []
    for turn in (1, 2):
        with Peer(tmp_path / "s"):
            caller.until(lambda turn=turn: caller.kinds().count(Up) == turn, "it is up")
        caller.until(lambda turn=turn: caller.kinds().count(Down) == turn, "it is down")
    assert caller.kinds() == [Up, Down, Up, Down]


def test_a_question_and_its_answer_cross(caller: Caller, tmp_path: Path):
    with Peer(tmp_path / "s") as peer:
        caller.until(lambda: Up in caller.kinds(), "it is up")
        assert caller.transport.send(wire.encode(Type.PING, 7))
        assert peer.expect(Type.PING).fields == [7]
        assert caller.transport.send(wire.encode(Type.PING, 8), b"body")
        assert peer.expect(Type.PING).body == b"body"
        peer.say(Type.PONG, 7, "1.0", 42)
        peer.say(Type.REPORT, 7, body=b"{}")
        caller.until(lambda: len(caller.events) == 3, "both answers")
    assert caller.events[1:] == [(Type.PONG, [7, "1.0", 42], b""), (Type.REPORT, [7], b"{}")]


def test_what_is_no_message_of_ours_is_passed_over(caller: Caller, tmp_path: Path):
    with Peer(tmp_path / "s") as peer:
        caller.until(lambda: Up in caller.kinds(), "it is up")
        caller.transport.send(wire.encode(Type.PING, 7))
        peer.expect(Type.PING)
        for junk in (b"", b"\xc1", b"\x91\xff", os.urandom(100), b"\x91" * 9000):
            peer.say_raw(junk)
        peer.say_raw(b"junk", b"body", b"more")
        peer.say(Type.PONG, 7, "1.0", 42)
        caller.until(lambda: len(caller.events) == 2, "the one good answer")
    assert caller.events[1][0] == Type.PONG


def test_sending_without_a_daemon_never_waits_and_says_when_there_is_no_room_left(caller: Caller):
    began = time.monotonic()
    taken = [caller.transport.send(b"x", bytes(1000)) for _ in range(2000)]
    assert time.monotonic() - began < 1
    assert taken[0]
    assert not taken[-1], "bounded: an outage must not fill the memory"


def test_closing_with_messages_that_nobody_took_does_not_wait(tmp_path: Path):
    transport = Transport(tmp_path / "s")
    for _ in range(10):
        transport.send(b"x", bytes(100_000))
    began = time.monotonic()
    transport.close()
    assert time.monotonic() - began < 0.5


def test_a_wake_up_ends_the_wait_and_is_used_up_by_it(tmp_path: Path):
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    caller = Caller(tmp_path / "s", wake_fd)
    os.eventfd_write(wake_fd, 1)
    began = time.monotonic()
    assert list(caller.transport.events(5)) == []
    assert time.monotonic() - began < 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(wake_fd)
    caller.transport.close()
    os.close(wake_fd)


def test_a_path_longer_than_the_kernel_takes_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ProtocolError, match="longer than 107 bytes; set RANKLOG_SOCKET"):
        Transport(tmp_path / ("x" * PATH_SIZE_MAX))


def test_opening_and_closing_leaves_no_descriptor_open(tmp_path: Path):
    Transport(tmp_path / "s").close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Transport(tmp_path / "s").close()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before, "libzmq's threads have ended")
