"""A node of its own: a daemon with all its directories in a temporary place, and what can be done to it.

    <root>/state, data, spool, run     on the disk that is measured        <shm>/…   journals, in tmpfs

Everything is removed at the end, processes first. Nothing outside these two directories is touched.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ranklog import control
from ranklog.config import Settings
from ranklog.errors import NoDaemon
from ranklog.wire import Wait
from ranklogd.statedir import StateDir

ROOT = Path(__file__).resolve().parents[2]
SHM = Path("/dev/shm")
START_TIMEOUT_S = 30.0
WAIT_S = 300.0
_POLL_S = 0.01
_LOG_SIZE = 3000


@dataclass(frozen=True)
class Options:
    """What the person at the terminal asked for."""

    quick: bool = False
    directory: Path = Path("/var/tmp")
    """On the disk to measure: state, spool, store and the checkpoint go below it."""
    checkpoint_bytes: int = 10_000_000_000

    def pick(self, full: int, quick: int) -> int:
        """Return the size of a measurement."""
        return quick if self.quick else full


class Node:
    """One private node. Use `private_node`."""

    def __init__(self, root: Path, shm: Path, *, disk: Path | None = None, **variables: str) -> None:
        disk = disk or root
        self.root = root
        self.shm = shm
        self.store = root / "data"
        self.log = root / "log"
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("RANKLOG_", "SLURM_", "OMPI_", "TORCHELASTIC_"))
        }
        self.env = (
            keep
            | {
                "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("client", "daemon", "tests")),
                "RANKLOG_RUNTIME_DIR": str(root / "run"),
                "RANKLOG_STATE_DIR": str(disk / "state"),
                "RANKLOG_SPOOL_DIR": str(disk / "spool"),
                "RANKLOG_JOURNAL_DIR": str(shm),
                "RANKLOG_TO": str(self.store),
                "RANKLOG_PROJECT": "bench",
                "RANKLOG_LOG_LEVEL": "warning",
            }
            | variables
        )
        self.settings = Settings.from_env(self.env)
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers; raises NoDaemon if it does not."""
        with self.log.open("ab") as out:
            self._daemon = subprocess.Popen(
                [sys.executable, "-m", "ranklogd"], env=self.env, stderr=out, stdout=out, cwd=self.root
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                control.ping(self.settings, 1.0)
            except NoDaemon as exc:
                if self._daemon.poll() is not None or time.monotonic() > deadline:
                    raise NoDaemon("the daemon did not start") from exc
                time.sleep(_POLL_S)
            else:
                return

    def await_shipper(self) -> None:
        """Wait until the shipper has loaded what it needs and converts: its start is not what is measured."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not StateDir(self.settings.state_dir).shipper_report.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    @property
    def ingest_pid(self) -> int:
        """The daemon's main process."""
        assert self._daemon is not None, "start() comes first"
        return self._daemon.pid

    @property
    def shipper_pid(self) -> int:
        """The daemon's child, 0 while there is none."""
        children = psutil.Process(self.ingest_pid).children()
        return children[0].pid if children else 0

    def signal(self, number: int, *, shipper: bool = False) -> None:
        """Send a signal to the ingest process, and to the shipper too if asked."""
        pids = [self.ingest_pid, self.shipper_pid] if shipper else [self.ingest_pid]
        for pid in filter(None, pids):
            os.kill(pid, number)

    def kill(self) -> None:
        """End the ingest process as SIGKILL does; the shipper follows it."""
        self.signal(signal.SIGKILL)
        assert self._daemon is not None
        self._daemon.wait()

    def flush(self, wait: Wait = Wait.UPLOADED, timeout_s: float = WAIT_S) -> float:
        """Wait until everything has come that far; return the monotonic time of the answer."""
        done = control.flush(self.settings, wait, timeout_s)
        if not done.done:
            raise RuntimeError(f"{done.pending} records are still not {wait.name} after {timeout_s:g} s")
        return time.monotonic()

    def bring_in(self, timeout_s: float = WAIT_S) -> None:
        """Have everything adopted that lies on this node, then uploaded."""
        deadline = time.monotonic() + timeout_s
        while self.left_behind() and time.monotonic() < deadline:
            control.sync(self.settings, timeout_s)
            time.sleep(_POLL_S)
        self.flush(timeout_s=timeout_s)

    def left_behind(self) -> list[Path]:
        """Return journal and spool files that nobody has taken yet."""
        rooms = [self.shm, Path(self.env["RANKLOG_SPOOL_DIR"])]
        return [
            path for room in rooms if room.is_dir() for path in room.iterdir() if path.suffix in (".journal", ".spool")
        ]

    def stop(self) -> None:
        """End the daemon whatever state it is in."""
        if self._daemon is None:
            return
        if self._daemon.poll() is None:
            self.signal(signal.SIGCONT, shipper=True)
            self._daemon.terminate()
            try:
                self._daemon.wait(30)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        self._daemon = None


@contextmanager
def private_node(options: Options, *, start: bool = True, disk: Path | None = None, **variables: str) -> Iterator[Node]:
    """Give a node with a running daemon, and remove all of it afterwards. `disk`: where state and spool go instead."""
    root = Path(tempfile.mkdtemp(prefix="rlbench-", dir=options.directory))
    shm = Path(tempfile.mkdtemp(prefix="rlbench-", dir=SHM))
    node = Node(root, shm, disk=disk, **variables)
    try:
        if start:
            node.start()
            node.await_shipper()
        yield node
    except Exception:
        # The directory is gone before anybody can look: the daemon's own words go out with the error.
        sys.stderr.write(node.log.read_text()[-_LOG_SIZE:] if node.log.exists() else "")
        raise
    finally:
        node.stop()
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(shm, ignore_errors=True)
