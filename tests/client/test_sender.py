"""The sender thread as other threads see it: waiting, waking, stopping, with and without a daemon."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Peer, Sending, wait_for
from ranklog import link
from ranklog.frame import Kind
from ranklog.link import State
from ranklog.wire import Type


def test_stopping_spills_what_is_not_acknowledged_and_removes_the_journal(tmp_path: Path):
    client = Sending(tmp_path, lambda: tmp_path / "s")
    client.log(*range(100))
    assert client.sender.stop(5)
    assert list((tmp_path / "journal").iterdir()) == []
    assert client.spooled() == list(range(100))
    assert client.sender.stop(5), "once more does nothing"


def test_offline_everything_is_spooled_and_nobody_is_called(tmp_path: Path):
    client = Sending(tmp_path, None)
    client.log(1, 2)
    assert client.sender.wait(3, 5, spooled=True)
    assert client.sender.state == State.OFFLINE
    assert not client.sender.connects(1)
    assert client.spooled() == [1, 2]
    client.sender.stop(5)


def test_waiting_for_a_daemon_that_is_not_there_does_not_wait(tmp_path: Path):
    client = Sending(tmp_path, lambda: tmp_path / "s")
    began = time.monotonic()
    assert not client.sender.connects(5)
    assert time.monotonic() - began < 1
    client.sender.stop(5)


def test_wakers_and_waiters_of_other_threads_survive_the_stop(tmp_path: Path):
    """The descriptor they would wake is closed under them, and belongs to somebody else soon."""
    for turn in range(20):
        (tmp_path / str(turn)).mkdir()
        client = Sending(tmp_path / str(turn), None)
        client.log(1)
        failures = []

        def wait(client: Sending = client, failures: list[Exception] = failures) -> None:
            try:
                client.sender.wait(1000, 5)
            except OSError as exc:
                failures.append(exc)

        waiters = [threading.Thread(target=wait) for _ in range(3)]
        for waiter in waiters:
            waiter.start()
        assert client.sender.stop(5)
        for waiter in waiters:
            waiter.join(5)
            assert not waiter.is_alive()
        assert failures == []


def test_descriptors_beyond_1024_are_no_trouble(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        client = Sending(tmp_path, None)
        client.log(1, 2)
        assert client.sender.wait(3, 5, spooled=True)
        assert client.sender.stop(5)
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client.told == []


def test_a_journal_that_is_half_full_is_spilled_although_the_daemon_is_there(tmp_path: Path, monkeypatch):
    """A daemon that is merely slow must not cost a record."""
    monkeypatch.setattr("ranklog.link.ACK_TIMEOUT_S", 600.0)  # However busy this machine is, the daemon is not absent.
    with Peer(tmp_path / "s") as peer:
        client = Sending(tmp_path, lambda: tmp_path / "s")
        peer.expect(Type.HELLO)
        peer.welcome(bytes.fromhex(Sending.WRITER))
        wait_for(lambda: client.sender.state == State.ATTACHED, "the daemon is there")
        for number in range(60):
            assert client.journal.append(Kind.METRICS, None, {"n": number, "pad": "x" * 80_000})
        wait_for(lambda: len(client.spooled()) > 20, "the oldest are moved to disk")
        wait_for(lambda: not client.journal.crowded, "there is room again")
        assert client.sender.state == State.ATTACHED
        spooled = client.spooled()
        assert spooled == list(range(len(spooled)))
        client.sender.stop(5)


def all_descriptors() -> Iterator[int]:
    """Open descriptors up to the limit."""
    with contextlib.suppress(OSError):
        while True:
            yield os.open(os.devnull, os.O_RDONLY)


def test_a_thread_that_cannot_connect_for_lack_of_descriptors_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "LOOK_INTERVAL_S", 0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Peer(tmp_path / "s") as peer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
        many = list(all_descriptors())
        for _ in range(8):  # Enough for a journal, not for a socket.
            os.close(many.pop())
        try:
            client = Sending(tmp_path, lambda: tmp_path / "s")
            wait_for(lambda: client.told, "it says so")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in many:
                os.close(fd)
        peer.expect(Type.HELLO)
    client.sender.stop(5)
    [text] = set(client.told)
    assert "cannot be reached for now" in text
