"""`ranklogd` as a command: what it takes, what it prints, how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from node import Node, wait_for
from ranklogd.lock import EXIT_BUSY


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


def ranklogd(node: Node, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return node.run([sys.executable, "-m", "ranklogd", *flags], **env)


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (["--seal-age=-3s"], {}, ["seal"]),
        ([], {"RANKLOG_COMMIT_INTERVAL_S": "soon"}, ["RANKLOG_COMMIT_INTERVAL_S", "soon"]),
        (["--config", "/no/such/file.toml"], {}, ["/no/such/file.toml"]),
        (["--socket", "/" + "x" * 120], {}, ["107"]),
        (["--socket-group", "no-such-group"], {}, ["no-such-group", "getent"]),
        (["--to", "ftp://host/x"], {}, ["ftp"]),
    ],
    ids=["negative", "no number", "no file", "long socket", "no group", "no store"],
)
def test_a_bad_configuration_is_told_in_words_and_a_restart_cannot_help(
    node: Node, flags: list[str], env: dict[str, str], words: list[str]
) -> None:
    done = ranklogd(node, *flags, **env)
    assert done.returncode == 78
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_state_directory_of_somebody_elses_is_refused(node: Node) -> None:
    (node.path / "state").symlink_to("/etc")
    done = ranklogd(node)
    assert done.returncode == 78
    assert "symbolic link" in done.stderr


def test_a_busy_state_directory_is_waited_for_and_then_left_to_its_owner(node: Node) -> None:
    first = node.start_daemon()
    began = time.monotonic()
    done = ranklogd(node, "--lock-wait", "0.5", RANKLOG_RUNTIME_DIR=str(node.path / "other"))
    assert done.returncode == EXIT_BUSY == 75
    assert time.monotonic() - began > 0.5
    assert f"pid {first.pid}" in done.stderr
    assert "--state-dir" in done.stderr
    assert node.ping() == first.pid


def test_a_second_daemon_with_other_state_does_not_take_the_socket(node: Node) -> None:
    first = node.start_daemon()
    done = ranklogd(node, "--lock-wait", "0", RANKLOG_STATE_DIR=str(node.path / "other"))
    assert done.returncode == EXIT_BUSY
    assert node.ping() == first.pid


def test_a_signal_ends_the_wait_for_the_lock(node: Node) -> None:
    node.start_daemon()
    second = subprocess.Popen([sys.executable, "-m", "ranklogd"], env=node.env, stderr=subprocess.PIPE)
    wait_for(lambda: "SigCgt" in _status(second.pid) and _catches_term(second.pid), "it waits")
    second.terminate()
    _, told = second.communicate(timeout=10)
    assert second.returncode == EXIT_BUSY, told


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _catches_term(pid: int) -> bool:
    caught = next(line for line in _status(pid).splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def test_a_successor_waits_until_the_lock_is_free(node: Node) -> None:
    first = node.start_daemon()
    second = subprocess.Popen([sys.executable, "-m", "ranklogd"], env=node.env, stderr=subprocess.DEVNULL)
    node.daemons.append(second)
    first.kill()
    first.wait()
    wait_for(lambda: node.ping() == second.pid, "it takes over")


def test_the_configuration_can_be_checked_without_starting_anything(node: Node) -> None:
    done = ranklogd(node, "--check-config", "--seal-age", "3s")
    assert done.returncode == 0
    assert json.loads(done.stdout)["seal_age_s"] == 3.0
    assert not node.state.exists()


def test_version_help_and_usage(node: Node) -> None:
    assert ranklogd(node, "--version").stdout.startswith("ranklogd ")
    told = ranklogd(node, "--help").stdout
    assert "Exit codes" in told
    assert "--seal-age" in told
    assert ranklogd(node, "--no-such-flag").returncode == 2


def test_an_unusable_wal_ends_with_1_in_words(node: Node) -> None:
    (node.path / "state").mkdir()
    (node.path / "state" / "wal").write_bytes(b"no directory")
    done = ranklogd(node)
    assert done.returncode == 1
    assert "wal" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stale_socket_and_a_stale_lock_file_are_no_obstacle(node: Node) -> None:
    daemon = node.start_daemon()
    daemon.kill()
    daemon.wait()
    path = Path(node.env["RANKLOG_RUNTIME_DIR"]) / "ranklog.sock"
    assert path.is_socket()
    assert node.start_daemon().poll() is None


def test_the_service_manager_hears_of_each_step(node: Node) -> None:
    address = node.path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(20)
        daemon = node.start_daemon(NOTIFY_SOCKET=str(address))
        assert manager.recv(1000) == b"READY=1"
        assert manager.recv(1000).startswith(b"WATCHDOG=1\nSTATUS=")
        daemon.terminate()
        heard = b""
        while heard != b"STOPPING=1":
            heard = manager.recv(1000)
    assert daemon.wait(20) == 0


def test_an_error_of_the_wal_while_running_ends_the_process_without_an_ack(node: Node) -> None:
    """What the client was not told is durable it keeps, and the next daemon gets it."""
    daemon = node.start_daemon(RANKLOG_FAILPOINT="wal.append.after:2=err")
    done = node.python("import ranklog\nrun = ranklog.init('p', id='r')\nrun.log({'a': 1.0})\nrun.finish(timeout=3)\n"
                       "run = ranklog.init('p', id='r2')\nrun.log({'a': 2.0})\nrun.finish(timeout=3)")  # fmt: skip
    assert done.returncode == 0
    assert daemon.wait(20) == 1
    node.start_daemon()
    node.upload()
    assert len(node.raw_rows("kind = 'metrics'")) == 2
