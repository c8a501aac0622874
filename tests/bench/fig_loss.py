"""What is lost, raised and stalled when something dies: the trainer, the daemon, the disk.

A call counts as returned once a shared file says so, which the trainer updates after each return; SIGKILL cannot take
that back. Everything is then brought in by the daemon and compared with the rows in the store.
"""

import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.disks import fill, small_tmpfs
from bench.ledger import Account, account
from bench.load import PACE_S
from bench.node import Node, Options, private_node
from bench.rows import Row
from bench.trainers import Trainer, trainers

_DISK_BYTES = 512 << 20
LONGEST_MS = 10


def killed_trainer(options: Options) -> list[Row]:
    """SIGKILL of the trainer at a random moment, paced and flat out; the daemon is up."""
    rows = []
    dice = random.Random(1)
    for name, pace_s in (("paced", PACE_S), ("flat out", 0.0)):
        lost = returned = doubled = 0
        rounds = options.pick(10, 3)
        with private_node(options) as node:
            for number in range(rounds):
                counter = node.shm / f"counter-{number}"
                with trainers(node, "counted", 1, pace_s=pace_s, counter=str(counter), run=f"kill-{number}") as (rank,):
                    rank.go()
                    time.sleep(dice.uniform(0.5, 1.5) if pace_s else dice.uniform(0.05, 0.3))
                    rank.kill()
                count = read_counter(counter)
                node.bring_in()
                found = account(node.store, {0: count}, f"kill-{number}")
                lost, returned, doubled = lost + found.missing, returned + count, doubled + found.doubled
                lost += found.in_gaps if pace_s else 0
        note = f"{returned:,} calls had returned in {rounds} processes; {doubled} rows doubled"
        rows.append(
            Row(figure=f"trainer killed -9 {name}, records lost", unit="records", measured=lost, budget=0, note=note)
        )
    return rows


def read_counter(path: Path) -> int:
    """Return the number of calls that had returned."""
    return int(struct.unpack("=Q", path.read_bytes())[0])


def killed_daemon(options: Options) -> list[Row]:
    """The daemon killed at record 300 of 1,000 and started again 1 s later; then frozen for 2 s instead."""

    def kill(node: Node) -> None:
        node.kill()
        time.sleep(1.0)
        node.start()

    def freeze(node: Node) -> None:
        node.signal(signal.SIGSTOP, shipper=True)
        time.sleep(2.0)
        node.signal(signal.SIGCONT, shipper=True)

    count = options.pick(1000, 600)
    rows = []
    for name, trouble in (("killed mid-run", kill), ("frozen 2 s", freeze)):
        with private_node(options) as node:
            said, found = _interrupted(node, count, 300, trouble)
        rows += _rows(f"daemon {name}", said, found, count)
    return rows


def disk_full(options: Options) -> list[Row]:
    """The disk of state and spool full from call 200 on: until the end, also with a tiny journal; and for 2 s."""
    rows = []
    with small_tmpfs(_DISK_BYTES) as disk:
        small = {"RANKLOG_JOURNAL_SIZE_BYTES": "128K", "RANKLOG_JOURNAL_FILE_SIZE_BYTES": "32K"}
        for name, count, freed, more in (
            ("stays full", 700, False, {}),
            ("stays full, journal of 128 KB", 1000, False, small),
            ("full for 2 s", 1000, True, {}),
        ):
            said, found = _fill_and_count(options, disk, count, freed=freed, **more)
            budget_lost = 0 if "128" not in name else None
            rows += _rows(f"disk {name}", said, found, count, budget_lost=budget_lost)
    return rows


def _fill_and_count(
    options: Options, disk: Path, count: int, *, freed: bool, **variables: str
) -> tuple[dict[str, Any], Account]:
    filler = disk / "filler"
    with private_node(options, disk=disk, RANKLOG_DISK_FREE_MIN_BYTES="16M", **variables) as node:

        def trouble(_: Node) -> None:
            fill(filler)
            if freed:
                time.sleep(2.0)
                filler.unlink()

        said, found = _interrupted(node, count, 200, trouble, repair=lambda: filler.unlink(missing_ok=True))
        node.stop()
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return said, found


def _interrupted(
    node: Node, count: int, at: int, trouble: Callable[[Node], None], repair: Callable[[], object] = lambda: None
) -> tuple[dict[str, Any], Account]:
    """Log `count` records paced, with `trouble` at record `at` and `repair` after the process is gone; then count."""
    counter = node.shm / "counter"
    load = {"pace_s": PACE_S, "count": count, "finish_s": 5}
    with trainers(node, "counted", 1, counter=str(counter), raw_path=str(node.root / "raw"), **load) as (rank,):
        rank.go()
        _await_count(rank, counter, at)
        trouble(node)
        said: dict[str, Any] = rank.hear(60)
        said |= rank.end()
    repair()
    node.bring_in()
    return said, account(node.store, {0: count})


def _await_count(rank: Trainer, counter: Path, at: int) -> None:
    while read_counter(counter) < at and rank.process.poll() is None:
        time.sleep(0.002)


def _rows(what: str, said: dict[str, Any], found: Account, count: int, budget_lost: int | None = 0) -> list[Row]:
    refused = f"{said['refused']} refused in log()" if said["refused"] else "none refused"
    note = (
        f"{count} calls at 200/s, {found.records} records found, {refused}, {found.in_gaps} seqs in gap rows, "
        f"{found.doubled} rows doubled; finish() took {said['finish_s']:.1f} s"
    )
    return [
        Row(figure=f"{what}, log() raised", unit="calls", measured=said["raised"], budget=0, note=note),
        Row(
            figure=f"{what}, silently lost or doubled", unit="records", measured=found.missing + found.doubled, budget=0
        ),
        Row(
            figure=f"{what}, lost and accounted for by a gap",
            unit="records",
            measured=found.in_gaps,
            budget=budget_lost,
        ),
        Row(
            figure=f"{what}, longest call",
            unit="ms",
            measured=said["log"]["max"] / 1000,
            floor=said["raw"]["max"] / 1000,
            floor_name="raw_write",
            budget=LONGEST_MS,
        ),
    ]
