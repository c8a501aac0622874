"""The shipper as a child: a real process, started, killed, stopped, and hung."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.server import Hub
from node import ROOT, Node, wait_for
from ranklog.frame import Kind
from ranklogd.config import Config, load_config
from ranklogd.supervise import EXIT_HUNG, RESTART_S_MAX, RESTART_S_MIN, SETTLED_S, ShipperProcess
from segments import SegmentBuilder, frame, make_state, start_of

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


def test_one_that_ended_itself_over_a_hung_store_is_started_again_soon_however_often(
    shipper: ShipperProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = tmp_path / "hung"
    hung.write_text(f"#!/bin/sh\nexit {EXIT_HUNG}\n")
    hung.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hung))
    for number in range(8):
        shipper.tend(float(number))
        wait_for(shipper.ended, "it is gone")
        shipper.tend(number + 0.25)
        assert (shipper.pid, shipper.restarts) == (0, number + 1)
    monkeypatch.undo()
    shipper.tend(8.0)
    assert shipper.pid


def test_it_can_be_told_to_hurry_while_it_runs_before_and_after_and_more_often_than_it_listens(
    shipper: ShipperProcess,
) -> None:
    shipper.hurry()
    shipper.tend(0.0)
    os.kill(shipper.pid, signal.SIGSTOP)
    for _ in range(20_000):
        shipper.hurry()
    killed(shipper)
    shipper.hurry()


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


# With a Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


def test_it_logs_in_with_a_token_that_stands_in_no_environment_no_argument_no_log_and_no_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = hub.token()
    theirs = {
        "PYTHONPATH": PATHS, "HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home/hf"),
        "HF_ENDPOINT": hub.url, "SSL_CERT_FILE": "", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    for name, value in {**theirs, "HF_TOKEN": token, "AWS_SECRET_ACCESS_KEY": "aws-very-secret"}.items():
        monkeypatch.setenv(name, value)
    state = make_state(tmp_path / "state")
    config = Config(state_dir=state.root, to="hf://buckets/user/b", create_bucket="private", log_level="debug")
    stale = state.xet / "logs" / "old"
    stale.parent.mkdir(parents=True)
    stale.write_text("left by an earlier one")
    builder = SegmentBuilder()
    start = start_of(1)
    builder.writer(start)
    builder.batch(start.writer, 1, 1, frame(Kind.METRICS, 1, {"loss": 0.5}))
    (state.wal / builder.name).write_bytes(builder.data)
    shipper = ShipperProcess(config.to_json())
    try:
        shipper.tend(0.0)
        wait_for(lambda: state.shipper_report.exists() and not list(state.wal.glob("*.wal")), "it works")
        wait_for(lambda: '"uploaded_shards": 1,' in state.shipper_report.read_text(), "it uploads", 60)
        proc = Path(f"/proc/{shipper.pid}")
        born_with = dict(entry.split("=", 1) for entry in proc.joinpath("environ").read_text().split("\0") if entry)
        assert born_with.items() >= theirs.items()
        assert born_with["HF_XET_CACHE"] == str(state.xet)
        for part in ("environ", "cmdline"):
            assert token not in proc.joinpath(part).read_text()
            assert "aws-very-secret" not in proc.joinpath(part).read_text()
        shipper.stop()
        wait_for(shipper.ended, "it stops", 60)
    finally:
        shipper.kill()
    assert len(hub.buckets.get("user/b").files) == 1
    assert not stale.exists(), "what an earlier process left in the cache is gone"
    assert list(state.xet.rglob("*.mdb")), "and the cache is ours"
    assert not list(tmp_path.rglob("*.log")), "no log file grows anywhere"
    said = "".join(capfd.readouterr())
    assert "shipper_stopped" in said
    assert "HTTP Request" not in said
    assert "X-Xet-Access-Token" not in said
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "hub" not in path.parents]
    assert not [path for path in kept if token.encode() in path.read_bytes()]
    assert token not in said


HANGING = """
import ctypes, os, sys
if "ranklogd" in " ".join(sys.orig_argv):
    from pathlib import Path
    from types import SimpleNamespace
    from ranklog.stores import base
    from ranklog.stores.dir import DirStore
    class Hanging(DirStore):
        def put(self, uploads):
            if os.path.exists({flag!r}):
                ctypes.CDLL(None).pause()
            return super().put(uploads)
    sys.modules["hanging"] = SimpleNamespace(open_url=lambda url, options: Hanging(Path({data!r})))
    base._MODULES["mem"] = "hanging"
"""


def test_while_every_call_to_the_store_hangs_for_ever_records_are_acknowledged_and_the_watchdog_is_fed(
    tmp_path: Path,
) -> None:
    flag, site = tmp_path / "store-hangs", tmp_path / "site"
    flag.touch()
    site.mkdir()
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "n"))
    systemd.settimeout(60)
    with Node(tmp_path) as node, systemd:
        (site / "sitecustomize.py").write_text(HANGING.format(flag=str(flag), data=str(node.data)))
        node.env |= {
            "PYTHONPATH": os.pathsep.join([str(site), node.env["PYTHONPATH"]]),
            "RANKLOG_TO": "mem://x", "NOTIFY_SOCKET": str(tmp_path / "n"),
            "RANKLOG_SEAL_AGE_S": "0.2", "RANKLOG_UPLOAD_DEADLINE_S": "2",
        }  # fmt: skip
        daemon = node.start_daemon()
        logged = 0
        for restarts in range(3):
            code = (
                "import sys, ranklog\n"
                "run = ranklog.init('p', id='r')\n"
                "for i in range(100): run.log({'x': int(sys.argv[1]) + i})\n"
                "assert run.flush(20), 'not acknowledged'\n"
                "run.finish()\n"
            )
            done = node.python(code, str(logged))
            assert done.returncode == 0, done.stderr
            logged += 100
            wait_for(lambda: node.status()["shipper"].get("last_error_class") == "hung", "it says that it hangs", 60)
            drained(systemd)
            assert b"WATCHDOG=1" in systemd.recv(4096)
            wait_for(lambda least=restarts: node.status()["shipper_restarts"] > least, "a new one begins anew", 60)
        assert node.ping() == daemon.pid
        log = (tmp_path / "daemon.log").read_text()
        assert log.count("store_hung") == log.count(f"shipper_down reason='exit code {EXIT_HUNG}' pause_s=0.5")
        flag.unlink()
        node.upload(120)
        values = [row["value"] for row in node.raw_rows("key = 'x'")]
        assert sorted(values) == [float(i) for i in range(logged)], "each record is there, and once"


def drained(sock: socket.socket) -> None:
    """Read what has come, so that what comes next is new."""
    with_timeout = sock.gettimeout()
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            continue
    except BlockingIOError:
        sock.settimeout(with_timeout)
