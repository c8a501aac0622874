"""The trainers of a soak: so many at a time, each for a while, each with a ledger; whoever ends is replaced."""

import random
import subprocess
from contextlib import suppress

from node import Node, wait_for
from oracle import witness
from ranklog.failpoint import FAILPOINTS

CLIENT_POINTS = sorted(name for name in FAILPOINTS if name.startswith(("journal.", "spool.", "finish.")))


class Crew:
    """Keeps `size` witnesses running until `dismiss`."""

    def __init__(self, node: Node, size: int, rng: random.Random) -> None:
        self._node = node
        self._rng = rng
        self._count = 0
        self._hiring = True
        self._log = (node.path / "trainers.log").open("ab")
        self.slots: list[subprocess.Popen[bytes] | None] = [None] * size
        self.started = 0

    def tend(self) -> None:
        """Replace those that ended."""
        for slot, process in enumerate(self.slots):
            if self._hiring and (process is None or process.poll() is not None):
                self.slots[slot] = self._start(slot)

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        self.started += 1
        rng, node = self._rng, self._node
        flags = ["--seconds", f"{rng.uniform(2, 30):.1f}", "--pause", str(rng.choice([0.005, 0.02, 0.1]))]
        flags += ["--flush-every", str(rng.choice([0, 50, 200]))]
        flags += rng.choice([[], [], ["--no-finish"]])
        env = node.env
        if rng.random() < 0.15:  # One that will not live to its end.
            env = env | {"RANKLOG_FAILPOINT": f"{rng.choice(CLIENT_POINTS)}:{rng.randint(1, 200)}=kill"}
        command = witness(f"w{slot:02}-{self.started:05}", node, *flags, "--run", f"soak-{slot}")
        return subprocess.Popen(command, env=env, cwd=node.path, stdout=self._log, stderr=self._log)

    def victim(self) -> subprocess.Popen[bytes] | None:
        """Return one that runs."""
        running = [process for process in self.slots if process is not None and process.poll() is None]
        return self._rng.choice(running) if running else None

    def dismiss(self) -> None:
        """Let all of them come to their end, and start no more."""
        self._hiring = False
        (self._node.path / "enough").touch()
        for process in self.slots:
            if process is not None:
                wait_for(lambda process=process: process.poll() is not None, "a trainer comes to its end", 90)
        (self._node.path / "enough").unlink()

    def rehire(self) -> None:
        """Start trainers again."""
        self._hiring = True

    def close(self) -> None:
        """Kill whoever still runs."""
        for process in self.slots:
            if process is not None:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
        self._log.close()
