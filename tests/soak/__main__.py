"""Hours of random faults under load, and the oracle at the end: `python -m tests.soak --minutes N`.

Sixteen trainers with ledgers, a daemon that is started again whenever it ends, and about one fault a second: kills of
every process, kills, errors and delays at random failpoints, frozen processes, full disks, garbage on the socket,
planted files. In rounds of a few minutes the faults stop, everything drains, the oracle judges every record of the
round, and the store is emptied. Memory and disk are sampled all along and drawn into a PNG.

The exit code is 0 if every round passed. `--seed` repeats the order of the faults, not the timing of the machine.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / part) for part in ("client", "daemon", "tests")]

from node import Node  # noqa: E402
from oracle import Verdict, check, ledgers_of  # noqa: E402
from soak.crew import Crew  # noqa: E402
from soak.faults import Faults  # noqa: E402
from soak.gauge import Gauge  # noqa: E402
from soak.keeper import Keeper  # noqa: E402

ROUND_S = 180.0
STATE_DISK_MIB = 192
TICK_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--png", type=Path, default=Path("soak.png"), help="where the picture goes (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the node's directory, whatever comes out")
    options = parser.parse_args(argv)
    path = Path(tempfile.mkdtemp(prefix="ranklog-soak-"))
    done = False
    try:
        with Disk(path / "disk"), Node(path) as node:
            done = soak(node, options)
    finally:
        if done and not options.keep:
            shutil.rmtree(path, ignore_errors=True)
        else:
            say(f"everything is kept in {path}")
    return 0 if done else 1


class Disk:
    """A small disk of its own for the state directory, so that it can be full. Without root: the directory's own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._path.mkdir()
        if os.geteuid() == 0:
            size = f"size={STATE_DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(self._path)], check=True)
        else:
            say("not root: no fault of a full disk in this soak")

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self._path):
            subprocess.run(["umount", "-l", str(self._path)], check=True)


def soak(node: Node, options: argparse.Namespace) -> bool:
    """Go through the rounds; True if the oracle was content with each."""
    rng = random.Random(options.seed)
    node.state = node.path / "disk" / "state"
    node.env["RANKLOG_STATE_DIR"] = str(node.state)
    node.spool.mkdir()
    say(f"seed {options.seed}, {options.writers} writers, {options.minutes:g} minutes")
    crew, keeper, gauge = Crew(node, options.writers, rng), Keeper(node, rng), Gauge(node)
    delivered, rounds, struck = 0, 0, Counter[str]()
    end_s = time.monotonic() + 60 * options.minutes
    try:
        while time.monotonic() < end_s:
            faults = Faults(node, crew, keeper, rng)
            turn_s = min(end_s, time.monotonic() + ROUND_S)
            crew.rehire()
            while time.monotonic() < turn_s:
                for part in (keeper, crew, faults):
                    part.tend()
                gauge.look(keeper.daemon.pid if keeper.daemon else 0)
                time.sleep(TICK_S)
            faults.end()
            struck += faults.struck
            verdict = judge_round(node, crew, keeper)
            delivered, rounds = delivered + verdict.delivered, rounds + 1
            peak = max(sample.ingest_bytes for sample in gauge.samples) >> 20
            say(f"round {rounds}: {verdict.delivered} records of {verdict.writers} writers, ingest peak {peak} MiB")
            empty(node)
    finally:
        crew.close()
        gauge.plot(options.png, f"soak of {options.minutes:g} minutes, seed {options.seed}, {delivered} records")
    reached = Counter(line.split()[0] for line in _lines(node.path / "reached"))
    say(f"faults: {', '.join(f'{name} {count}' for name, count in struck.most_common())}")
    say(f"failpoints that went off: {sum(reached.values())} at {len(reached)} points")
    say(f"daemon: {keeper.starts} starts, exit codes {dict(sorted(keeper.exits.items()))}; trainers: {crew.started}")
    say(f"delivered {delivered} records in {rounds} rounds: none lost, none doubled, none changed; {options.png}")
    return True


def judge_round(node: Node, crew: Crew, keeper: Keeper) -> Verdict:
    """Stop the trainers, let a sound daemon drain, and ask the oracle."""
    keeper.settle()
    crew.dismiss()
    return check(node, timeout_s=120)


def empty(node: Node) -> None:
    """Remove what was judged: rows from the store, and ledgers, so that an hour needs no more memory than a round."""
    for directory in (node.data / "v1", ledgers_of(node)):
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def say(text: str) -> None:
    """Print a line at once: a soak may run for hours."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
