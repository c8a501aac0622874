"""What happens to a node in a soak: each fault is a function, chosen at random with its weight, and undone by itself."""

import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from node import Node
from soak.crew import Crew
from soak.keeper import Keeper


class Faults:
    """Strikes about once a second. Owned by the soak's loop, which calls `tend` often."""

    def __init__(self, node: Node, crew: Crew, keeper: Keeper, rng: random.Random) -> None:
        self.struck: Counter[str] = Counter()
        self._node, self._crew, self._keeper, self._rng = node, crew, keeper, rng
        self._later: list[tuple[float, Callable[[], object]]] = []
        self._next_s = 0.0
        self._ballast = node.state.parent / "ballast"
        self._peers: list[socket.socket] = []
        self._weights: dict[Callable[[], None], int] = {
            self.trainer_killed: 6, self.daemon_killed: 4, self.shipper_killed: 4, self.daemon_stopped: 2,
            self.daemon_frozen: 2, self.trainer_frozen: 2, self.daemon_absent: 1, self.both_killed: 2,
            self.disk_filled: 2 if os.path.ismount(node.state.parent) else 0, self.garbage_sent: 2, self.files_planted: 1,
        }  # fmt: skip

    def tend(self) -> None:
        """Undo what is over, and strike if it is time."""
        now_s = time.monotonic()
        due = [undo for when_s, undo in self._later if when_s <= now_s]
        self._later = [entry for entry in self._later if entry[0] > now_s]
        for undo in due:
            undo()
        if now_s >= self._next_s:
            self._next_s = now_s + self._rng.uniform(0.3, 1.7)
            strike = self._rng.choices(list(self._weights), list(self._weights.values()))[0]
            self.struck[strike.__name__] += 1
            strike()

    def end(self) -> None:
        """Undo everything now."""
        for _, undo in self._later:
            undo()
        self._later = []

    def _undo_in(self, seconds: float, undo: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    def trainer_killed(self) -> None:
        _signal(self._crew.victim(), signal.SIGKILL)

    def daemon_killed(self) -> None:
        _signal(self._keeper.daemon, signal.SIGKILL)

    def daemon_stopped(self) -> None:
        _signal(self._keeper.daemon, signal.SIGTERM)

    def both_killed(self) -> None:
        self.daemon_killed()
        self.trainer_killed()

    def shipper_killed(self) -> None:
        for pid in _children(self._keeper.daemon):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def daemon_frozen(self) -> None:
        daemon = self._keeper.daemon
        _signal(daemon, signal.SIGSTOP)
        self._undo_in(self._rng.uniform(0.2, 4), lambda: _signal(daemon, signal.SIGCONT))

    def trainer_frozen(self) -> None:
        trainer = self._crew.victim()
        _signal(trainer, signal.SIGSTOP)
        self._undo_in(self._rng.uniform(0.2, 4), lambda: _signal(trainer, signal.SIGCONT))

    def daemon_absent(self) -> None:
        self._keeper.leave(self._rng.uniform(1, 8))

    def disk_filled(self) -> None:
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        self._undo_in(self._rng.uniform(0.5, 5), lambda: self._ballast.unlink(missing_ok=True))

    def garbage_sent(self) -> None:
        """Peers that talk nonsense, or nothing at all."""
        for _ in range(self._rng.randint(1, 30)):
            peer = socket.socket(socket.AF_UNIX)
            peer.setblocking(False)
            with suppress(OSError):
                peer.connect(str(self._node.settings.runtime_dir / "ranklog.sock"))
                peer.send(self._rng.randbytes(self._rng.randint(0, 200)))
            self._peers.append(peer)
        peers, self._peers = self._peers, []
        self._undo_in(2, lambda: [peer.close() for peer in peers])

    def files_planted(self) -> None:
        """Files that look like spools and are none."""
        name = f"{self._rng.randbytes(16).hex()}.00000000.spool"
        path = self._node.spool / name
        with suppress(OSError):
            self._rng.choice([_garbage, _fifo, _link])(path, self._rng)
        self._undo_in(5, lambda: path.unlink(missing_ok=True))


def _garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(500))


def _fifo(path: Path, _: random.Random) -> None:
    os.mkfifo(path)


def _link(path: Path, _: random.Random) -> None:
    path.symlink_to("/etc/hostname")


def _signal(process: object, number: int) -> None:
    pid = getattr(process, "pid", None)
    if pid is not None and getattr(process, "returncode", 0) is None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _children(process: object) -> list[int]:
    pid = getattr(process, "pid", None)
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
