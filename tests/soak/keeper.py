"""The supervisor of a soak: starts the daemon again whenever it ends, as systemd's Restart=always does."""

import random
import subprocess
import sys
import time
from contextlib import suppress

from node import Node, wait_for
from ranklog.failpoint import FAILPOINTS
from soak.crew import CLIENT_POINTS

DAEMON_POINTS = sorted(FAILPOINTS - set(CLIENT_POINTS))
POINTS_ARMED = 5
TUNING = {
    "RANKLOG_SEAL_AGE_S": "1", "RANKLOG_RESCAN_INTERVAL_S": "0.5", "RANKLOG_RETRY_BASE_S": "0.1",
    "RANKLOG_RETRY_MAX_S": "1", "RANKLOG_STOP_DEADLINE_S": "2", "RANKLOG_DISK_FREE_MIN_BYTES": "1M",
    "RANKLOG_RESERVE_SIZE_BYTES": "64K",
}  # fmt: skip


class Keeper:
    """Keeps a daemon running; most of them carry failpoints, one of which goes off one day."""

    def __init__(self, node: Node, rng: random.Random) -> None:
        self._node = node
        self._rng = rng
        self._absent_until_s = 0.0
        self.daemon: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.exits: dict[int, int] = {}
        """Exit code -> how often."""

    @property
    def running(self) -> bool:
        """Whether a daemon process is there now."""
        return self.daemon is not None and self.daemon.poll() is None

    def tend(self) -> None:
        """Start a daemon if there is none, and its absence is over."""
        if self.running or time.monotonic() < self._absent_until_s:
            return
        self._count_exit()
        spec = ""
        if self._rng.random() < 0.8:
            spec = ",".join(map(self._arm, self._rng.sample(DAEMON_POINTS, POINTS_ARMED)))
        self._start(spec)

    def _arm(self, point: str) -> str:
        action = self._rng.choice(["kill", "kill", "err", "sleep", "exit"])
        return f"{point}:{self._rng.choice([1, 2, 3, 10, 40])}={action}"

    def _start(self, spec: str) -> None:
        node = self._node
        with (node.path / "daemon.log").open("ab") as log:
            env = node.env | TUNING | {"RANKLOG_FAILPOINT": spec, "RANKLOG_FAILPOINT_LOG": str(node.path / "reached")}
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "ranklogd"], env=env, cwd=node.path, stdout=log, stderr=log
            )
        node.daemons[:] = [self.daemon]
        self.starts += 1

    def _count_exit(self) -> None:
        if self.daemon is not None and self.daemon.returncode is not None:
            self.exits[self.daemon.returncode] = self.exits.get(self.daemon.returncode, 0) + 1

    def leave(self, seconds: float) -> None:
        """Kill the daemon and keep it away for a while."""
        if self.running and self.daemon is not None:
            with suppress(ProcessLookupError):
                self.daemon.kill()
            self.daemon.wait()
        self._absent_until_s = time.monotonic() + seconds

    def settle(self) -> None:
        """Replace whatever runs by a sound daemon."""
        if self.running and self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait(60)
        self._count_exit()
        self._start("")
        daemon = self.daemon
        assert daemon is not None
        wait_for(lambda: self._node.ping() == daemon.pid, "the sound daemon answers", 60)
