"""A training node for tests: its directories, its daemon and its processes, all under one temporary path."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pyarrow.dataset

from ranklog import control
from ranklog.config import Settings
from ranklog.errors import NoDaemon
from ranklog.wire import Wait

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 30.0


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = DEADLINE_S) -> Any:
    """Return the first true value of `condition`; fail with `what` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        with suppress(InterruptedError):
            time.sleep(0.01)  # The pause of a poll, not a wait that hopes: the deadline decides.
    raise AssertionError(f"after {timeout_s:g} s still not: {what if isinstance(what, str) else what()}")


class Node:
    """One node. A context manager that kills what it started."""

    def __init__(self, path: Path) -> None:
        # Sockets have room for 107 bytes of path, and pytest's directories are long.
        self._short = Path(tempfile.mkdtemp(prefix="rl-"))
        self.journal = Path(tempfile.mkdtemp(prefix="rl-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.path = path
        self.spool, self.state, self.data = path / "spool", path / "state", path / "data"
        self.url = str(self.data)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.wrapper: list[str] = []
        """A command that becomes the daemon (exec), after it has prepared its surroundings."""
        base = {
            k: v for k, v in os.environ.items() if not k.startswith(("RANKLOG_", "XDG_", "TORCHELASTIC_", "SLURM_"))
        }
        self.env = base | {
            "HOME": str(path),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), str(ROOT / "daemon"), str(ROOT / "tests")]),
            "RANKLOG_RUNTIME_DIR": str(self._short),
            "RANKLOG_STATE_DIR": str(self.state),
            "RANKLOG_JOURNAL_DIR": str(self.journal),
            "RANKLOG_SPOOL_DIR": str(self.spool),
            "RANKLOG_TO": self.url,
            "RANKLOG_NODE_METRICS_INTERVAL_S": "0",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            with suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGCONT)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self._short, ignore_errors=True)
        shutil.rmtree(self.journal, ignore_errors=True)

    @property
    def settings(self) -> Settings:
        """What a client on this node finds in its environment."""
        return Settings.from_env(self.env)

    def start_daemon(self, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a daemon and wait until it answers."""
        log = (self.path / "daemon.log").open("ab")
        command = [*self.wrapper, sys.executable, "-m", "ranklogd", *flags]
        daemon = subprocess.Popen(command, env=self.env | env, stdout=log, stderr=log, cwd=self.path)
        log.close()
        self.daemons.append(daemon)
        wait_for(lambda: self.ping() == daemon.pid or daemon.poll() is not None, "the daemon answers")
        assert daemon.poll() is None, (self.path / "daemon.log").read_text()
        return daemon

    def ping(self) -> int:
        """Return the pid of the daemon that answers, or 0."""
        try:
            return control.ping(self.settings, 1.0).pid
        except NoDaemon:
            return 0

    def run(self, command: list[str], timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this node and return what became of it."""
        return subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=timeout_s, cwd=self.path, check=False
        )

    def python(self, source: str, *args: str, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a client script given as text."""
        return self.run([sys.executable, "-c", source, *args], timeout_s, **env)

    def status(self) -> dict[str, Any]:
        """Return the daemon's status."""
        return control.status(self.settings)

    def upload(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait until every dead writer is adopted and everything is uploaded."""
        assert control.sync(self.settings, timeout_s).done
        flushed = control.flush(self.settings, Wait.UPLOADED, timeout_s)
        assert flushed.done, f"{flushed.pending} records are not uploaded: {self.status()}"

    def raw_rows(self, where: str) -> list[dict[str, Any]]:
        """Return rows of the shards as any parquet reader sees them, without deduplication."""
        import duckdb

        shards = pyarrow.dataset.dataset(self.data / "v1", format="parquet")
        return duckdb.sql(f"select * from shards where {where}").arrow().read_all().to_pylist() if shards else []

    def leftovers(self) -> list[Path]:
        """Return journal and spool files that nobody has adopted.

        One under a dot name has no record in it yet: where its writer was killed, it is removed once it is old.
        """
        found = [*self.journal.glob("*.journal"), *self.spool.glob("*.spool")]
        return [path for path in found if not path.name.startswith(".")]
