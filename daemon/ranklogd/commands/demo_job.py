"""The demo's launcher: starts the ranks as torchrun does, and does the killing. `ranklog run` runs it as its job.

    a third of the way     SIGKILL for one rank, which is started again and goes on from its checkpoint
    a little past half     SIGKILL for the daemon; `ranklog run` starts another, and no rank waits for it

Both are told on stdout, with the seconds since the start. Arguments: directory, number of ranks, steps.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranklog import control
from ranklog.config import Settings, environment
from ranklog.control import Pong
from ranklog.errors import NoDaemon
from ranklogd.commands.demo_rank import proof_path, read_proof

KILL_RANK_AT = 0.3
KILL_DAEMON_AT = 0.55
LOOK_INTERVAL_S = 0.02
DAEMON_TIMEOUT_S = 60.0


class Job:
    """The ranks, and what becomes of them."""

    def __init__(self, directory: Path, ranks: int, steps: int) -> None:
        self._directory = directory
        self._steps = steps
        self._attempts = [0] * ranks
        self._began_s = time.monotonic()
        self._settings = Settings.from_env()
        self._processes = [self._start(rank) for rank in range(ranks)]

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        size = len(self._attempts)
        world = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "TORCHELASTIC_RESTART_COUNT": self._attempts[rank],
        }  # fmt: skip
        command = [sys.executable, "-m", "ranklogd.commands.demo_rank", str(self._directory), str(self._steps)]
        env = {**environment(), **{name: str(value) for name, value in world.items()}}
        return subprocess.Popen([*command, str(self._attempts[rank])], env=env, stdin=subprocess.DEVNULL)

    def run(self) -> int:
        """Run it to the end; return 0, or 1 if a rank failed by itself."""
        victim = len(self._processes) - 2 if len(self._processes) > 1 else 0
        self._tell(f"{len(self._processes)} ranks train, beside a daemon with pid {control.ping(self._settings).pid}")
        self._until(victim, KILL_RANK_AT)
        self._kill_rank(victim)
        self._until(0, KILL_DAEMON_AT)
        self._kill_daemon()
        codes = [process.wait() for process in self._processes]
        self._tell(f"a rank failed: {codes}" if any(codes) else "the training is over; the last records are brought in")
        return int(any(codes))

    def _until(self, rank: int, share: float) -> None:
        """Wait until a rank has logged that share of its steps, or has ended."""
        while self._logged(rank) < share * self._steps and self._processes[rank].poll() is None:
            time.sleep(LOOK_INTERVAL_S)

    def _logged(self, rank: int) -> int:
        return read_proof(proof_path(self._directory, rank, self._attempts[rank]))[1]

    def _kill_rank(self, rank: int) -> None:
        process = self._processes[rank]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._tell(f"kill -9 rank {rank} (pid {process.pid}) after {self._logged(rank)} records; it is started again")
        self._attempts[rank] += 1
        self._processes[rank] = self._start(rank)

    def _kill_daemon(self) -> None:
        pid, before, killed_s = control.ping(self._settings).pid, self._total(), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._tell(f"kill -9 the daemon (pid {pid}); the ranks go on")
        pong = self._await_other(pid)
        meanwhile, took_s = self._total() - before, time.monotonic() - killed_s
        if pong is None:
            self._tell(f"no other daemon came within {DAEMON_TIMEOUT_S:g} s")
        else:
            self._tell(f"another daemon (pid {pong.pid}) after {took_s:.1f} s; {meanwhile} records logged meanwhile")

    def _total(self) -> int:
        return sum(self._logged(rank) for rank in range(len(self._attempts)))

    def _await_other(self, pid: int) -> Pong | None:
        deadline_s = time.monotonic() + DAEMON_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                pong = control.ping(self._settings, 0.5)
            except NoDaemon:
                pong = None
            if pong is not None and pong.pid != pid:
                return pong
            time.sleep(LOOK_INTERVAL_S)
        return None

    def _tell(self, text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self._began_s:5.1f} s  {text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(Job(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).run())
