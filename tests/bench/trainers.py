"""The parent's end of a measured process (`bench.trainer`): start it, let it go, hear its figures, end it.

child   ready ──────▶ … measure … {json} ──────▶ … finish … {json} ─▶ exit
parent        go ──▶                     end ──▶
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.node import WAIT_S, Node


class Trainer:
    """One measured process."""

    def __init__(self, node: Node, what: str, *, module: str = "bench.trainer", **arguments: Any) -> None:
        self._node = node
        with (node.root / f"{what}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, what, json.dumps(arguments)],
                env=node.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=node.root,
            )
        self._what = what
        self._rest = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def hear(self, timeout_s: float = WAIT_S) -> Any:
        """Return the next thing it says; raises RuntimeError with its log when it dies or stays silent."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = self.process.stdout.raw.read(65536) if ready else b""  # type: ignore[attr-defined]
            if not part:
                log = (self._node.root / f"{self._what}.log").read_text()[-2000:]
                raise RuntimeError(f"the measured process {self._what!r} {'ended' if ready else 'said nothing'}: {log}")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def go(self) -> None:
        """Wait until it is ready, then let it go."""
        self.hear()
        self.tell()

    def end(self) -> Any:
        """Let it finish; return its last words."""
        self.tell()
        last = self.hear()
        self.process.wait(WAIT_S)
        return last

    def kill(self) -> None:
        """End it as SIGKILL does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def trainers(
    node: Node, what: str, world: int, *, module: str = "bench.trainer", **arguments: Any
) -> Iterator[list[Trainer]]:
    """Give `world` measured processes, ranks 0 to world - 1 of one run; kills what is left of them afterwards."""
    ranks = [Trainer(node, what, module=module, rank=rank, world=world, **arguments) for rank in range(world)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.kill()


def run_all(ranks: Sequence[Trainer]) -> list[dict[str, Any]]:
    """Let all of them go at the same moment, and return what each measured."""
    for rank in ranks:
        rank.hear()
    for rank in ranks:
        rank.tell()
    return [rank.hear() for rank in ranks]
