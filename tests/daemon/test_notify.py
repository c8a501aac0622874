"""sd_notify over real sockets."""

import secrets
import socket
import time
from pathlib import Path

import pytest

from ranklogd.notify import Notifier


def listening(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(5)
    return sock


def test_lines_go_to_the_socket_as_one_datagram(tmp_path: Path) -> None:
    with listening(str(tmp_path / "n")) as manager:
        Notifier(str(tmp_path / "n"))("READY=1", "STATUS=all is well")
        assert manager.recv(1000) == b"READY=1\nSTATUS=all is well"


def test_an_at_sign_means_an_abstract_socket() -> None:
    name = f"ranklog-test-{secrets.token_hex(8)}"
    with listening(f"\0{name}") as manager:
        Notifier(f"@{name}")("WATCHDOG=1")
        assert manager.recv(1000) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@ranklog-nobody-listens", "/" + "x" * 200])
def test_a_manager_that_is_not_there_is_no_error(address: str) -> None:
    Notifier(address)("READY=1")


def test_a_manager_that_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    with listening(str(tmp_path / "n")):
        notify = Notifier(str(tmp_path / "n"))
        began = time.monotonic()
        for _ in range(5000):
            notify("WATCHDOG=1" + "x" * 1000)
        assert time.monotonic() - began < 5
