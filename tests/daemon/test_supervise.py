"""The shipper as a child: a real process, started, killed and stopped."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node import ROOT, wait_for
from ranklogd.config import load_config
from ranklogd.supervise import RESTART_S_MAX, RESTART_S_MIN, SETTLED_S, ShipperProcess

PATHS = os.pathsep.join([str(ROOT / "client"), str(ROOT / "daemon")])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    env = {
        "HOME": str(tmp_path),
        "RANKLOG_STATE_DIR": str(tmp_path / "state"),
        "RANKLOG_TO": str(tmp_path / "secret-store"),
    }
    return load_config({}, env=env).to_json()


@pytest.fixture
def shipper(config: str) -> Iterator[ShipperProcess]:
    shipper = ShipperProcess(config)
    yield shipper
    shipper.kill()


def dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def killed(shipper: ShipperProcess) -> None:
    pid = shipper.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: dead(pid), "it is dead")


def reported(tmp_path: Path, shipper: ShipperProcess) -> bool:
    path = tmp_path / "state" / "shipper.json"
    return path.exists() and f'"pid": {shipper.pid},' in path.read_text()


def test_it_is_started_once_and_works(shipper: ShipperProcess, tmp_path: Path) -> None:
    assert (shipper.pid, shipper.ended()) == (0, True)
    shipper.tend(0.0)
    pid = shipper.pid
    assert pid
    assert not shipper.ended()
    shipper.tend(1.0)
    assert shipper.pid == pid
    wait_for(lambda: reported(tmp_path, shipper), "it reports")
    shipper.stop()
    wait_for(shipper.ended, "it stops when asked to")
    assert shipper._process.poll() == 0
    shipper.tend(100.0)
    assert (shipper.pid, shipper.restarts) == (0, 0), "and is not started again then"


def test_one_that_dies_is_started_again_after_pauses_that_grow_to_a_bound(shipper: ShipperProcess) -> None:
    now_s, pauses = 0.0, []
    shipper.tend(now_s)
    for _ in range(4):
        killed(shipper)
        shipper.tend(now_s)
        died_s = now_s
        while not shipper.pid:
            now_s += 0.25
            shipper.tend(now_s)
        pauses.append(now_s - died_s)
    assert pauses == [RESTART_S_MIN * 2**n for n in range(4)]
    assert shipper.restarts == 4
    assert RESTART_S_MIN * 2**4 < RESTART_S_MAX


def test_one_that_worked_for_a_while_is_started_again_soon(shipper: ShipperProcess) -> None:
    shipper.tend(0.0)
    for now_s in (1.0, 2.0, 4.0):
        killed(shipper)
        shipper.tend(now_s)
        shipper.tend(now_s + RESTART_S_MAX)
    killed(shipper)
    later_s = 4.0 + RESTART_S_MAX + SETTLED_S
    shipper.tend(later_s)
    assert not shipper.pid
    shipper.tend(later_s + RESTART_S_MIN)
    assert shipper.pid


def test_a_machine_without_room_for_a_process_does_not_end_the_daemon(
    shipper: ShipperProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        shipper.tend(0.0)
        assert (shipper.pid, shipper.restarts) == (0, 1)
    shipper.tend(RESTART_S_MIN)
    assert shipper.pid


def test_one_that_cannot_even_read_its_config_is_tried_again(
    shipper: ShipperProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        shipper.tend(0.0)
        wait_for(shipper.ended, "it is gone")
        shipper.tend(0.1)
    shipper.tend(10.0)
    assert shipper.pid


def test_nothing_of_the_config_stands_in_its_command_line_and_no_lock_is_inherited(
    shipper: ShipperProcess, tmp_path: Path
) -> None:
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    leaked = os.open(tmp_path / "leaked", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.set_inheritable(leaked, True)
    shipper.tend(0.0)
    wait_for(lambda: reported(tmp_path, shipper), "it reports")
    proc = Path(f"/proc/{shipper.pid}")
    assert b"secret-store" not in proc.joinpath("cmdline").read_bytes()
    assert b"secret-store" not in proc.joinpath("environ").read_bytes()
    files = {os.readlink(fd) for fd in proc.joinpath("fd").iterdir() if os.path.lexists(fd)}
    assert not files & {str(tmp_path / "lock"), str(tmp_path / "leaked")}
    assert os.getpgid(shipper.pid) != os.getpgid(0), "Ctrl-C on the daemon's terminal is not for it"
    for fd in (lock, leaked):
        os.close(fd)


def test_it_dies_with_its_parent_however_that_dies(config: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ranklogd.supervise import ShipperProcess\n"
        "s = ShipperProcess(sys.argv[1]); s.tend(0.0); print(s.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, config], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    path = tmp_path / "state" / "shipper.json"
    wait_for(lambda: path.exists() and f'"pid": {pid},' in path.read_text(), "it reports")
    parent.kill()
    parent.wait()
    wait_for(lambda: dead(pid), "it is gone")
    parent.stdin.close()
    parent.stdout.close()
