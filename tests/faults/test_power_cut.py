"""Power cuts of a real kernel: what was acknowledged as durable is there after them, and once. Matrix row 17.

State, spool and store lie on ext4 in loop devices (`loopdisk`), and whatever is in memory, journals too, is gone. Most
cuts hit a node in one process (`cutting`), at a named point of its way or at a random moment, one after the other on
the same state, as a machine with a loose contact has it; a few hit the whole node with its trainers. The negative
controls leave out syncs and must lose records: this tier sees a missing one.
"""

import multiprocessing
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pyarrow.dataset
import pytest

import cutting
import oracle
from cutting import Order, Rooms
from loopdisk import LoopDisk, loop_disk
from node import Node, wait_for
from oracle import May
from ranklog import fs
from witness import Account, read_ledgers

POINTS = (
    "wal.append.after", "wal.sync.after", "ack.before", "recover.cut.after", "recover.seal.mid",
    "seg.sync.after", "seg.create.after", "seg.header.after", "seg.seal.after", "seg.dirsync.after",
    "spool.create.after", "spool.write.after", "spool.sync.after",
    "adopt.copy.after", "adopt.sync.after", "adopt.unlink.mid", "adopt.unlink.after",
    "tries.create.after", "shard.write.mid", "shard.sync.after", "outbox.rename.after", "outbox.dirsync.after",
    "trim.unlink.after", "trim.dirsync.after", "upload.before", "store.put.mid", "store.sync.after",
    "store.publish.after", "upload.sent.before_reply", "upload.verified.before_mark", "mark.rename.after",
    "mark.sync.after",
)  # fmt: skip
"""Where a power cut can find a daemon between two things that it does to a disk."""
DISK_SIZE = 256 << 20
PATIENCE_S = 5.0
"""A point that was not reached by then does not lie on the way of this life: it is cut all the same."""
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["cutting"])


class Machine:
    """A node in one process on disks of its own, and what it has promised so far."""

    def __init__(self, disks: list[LoopDisk]) -> None:
        self._disks = disks
        points = [disk.point for disk in disks]
        self.rooms = Rooms(points[0] / "state", points[-2 % len(points)] / "spool", points[-1] / "store")
        self.accounts: dict[str, Account] = {}
        self.reached: list[str] = []
        self.rounds = 0

    def life(self, rng: Random, point: str = "", blind: str = "", patience_s: float = PATIENCE_S) -> None:
        """Switch it on, cut its power at a failpoint or at a random moment, and let the power come back."""
        self.rounds += 1
        ours, theirs = processes.Pipe(duplex=False)
        order = Order(f"life{self.rounds}", rng.randrange(1 << 32), point, blind)
        process = processes.Process(target=cutting.drive, args=(theirs, self.rooms, order), daemon=True)
        process.start()
        theirs.close()
        if point:
            told = self._read(ours.fileno(), patience_s, point.partition(":")[0], "failed")
        else:
            told = self._read(ours.fileno(), 30.0, "ready", "failed")
            told += self._read(ours.fileno(), rng.uniform(0, 0.15), "failed")
        assert blind or not [line for line in told if line.startswith("failed")], told[-3:]
        assert blind or process.is_alive(), f"it died before its time: {told[-3:]}"
        # No ack may come out of a machine without power: an fsync that is under way when an ext4 is shut down can return
        # as if all were well. The process is in it, or at the next thing it would have done.
        process.kill()
        for disk in self._disks:
            disk.cut()
        process.join()
        told += self._read(ours.fileno(), 30.0, "never")
        ours.close()
        assert not [line for line in told if line.startswith("died")], told[-1]
        assert blind or process.exitcode == -signal.SIGKILL, f"something else than an OSError ended it: {order}"
        for disk in self._disks:
            disk.power_on()

    def _read(self, fd: int, timeout_s: float, *until: str) -> list[str]:
        """Take in what it says, until a line begins with one of `until`, it is gone, or the time is over."""
        deadline, rest, lines = time.monotonic() + timeout_s, b"", []
        while not any(line.startswith(until) for line in lines):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            data = os.read(fd, 1 << 16)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            lines += [line.decode() for line in whole]
        assert not rest, "a line was cut off"
        self._note(lines)
        return lines

    def _note(self, lines: list[str]) -> None:
        for line in lines:
            word, *fields = line.split()
            if word == "account":
                self.accounts[fields[0]] = Account(int(fields[1]), int(fields[2]), 0.0, 0)
            elif word in POINTS:
                self.reached.append(word)

    def judge(self) -> oracle.Verdict:
        """Let a sound node bring everything in, and compare."""
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=cutting.settle, args=(theirs, self.rooms, Order("settled", 0)), daemon=True)
        process.start()
        theirs.close()
        lines = self._read(ours.fileno(), 60.0, "failed")
        assert not [line for line in lines if line.startswith("failed")], lines
        process.join(30)
        assert process.exitcode == 0
        born = [path for path in self.rooms.spool.iterdir() if not path.name.startswith(".")]
        assert born == []
        assert list((self.rooms.state / "wal").glob("*.wal")) == []
        assert not [path for path in (self.rooms.state / "outbox").rglob("*") if path.is_file()]
        shards = self.rooms.store / "v1"
        rows = pyarrow.dataset.dataset(shards, format="parquet").to_table().to_pylist() if shards.exists() else []
        return oracle.judge(rows, self.accounts, May.LOSE_UNACKNOWLEDGED)


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    with ExitStack() as stack:
        names = [f"disk{number}" for number in range(request.param)]
        yield Machine([stack.enter_context(loop_disk(tmp_path, name, DISK_SIZE)) for name in names])


def cut_often(machine: Machine, cuts: int, seed: int) -> None:
    rng = Random(seed)
    points = rng.sample(POINTS, len(POINTS))
    for number in range(cuts):
        point = points[number // 2 % len(points)] if number % 2 else ""
        nth = 1 if point.startswith("recover.") else rng.randrange(1, 3)
        machine.life(rng, f"{point}:{nth}" if point else "")
    verdict = machine.judge()
    promised = sum(account.durable for account in machine.accounts.values())
    assert verdict.delivered >= promised > 5 * cuts
    assert sum(verdict.missing.values()) > 0, "no cut took anything: were there any?"
    assert len(set(machine.reached)) >= min(len(POINTS), cuts // 2) // 2, sorted(machine.reached)


@pytest.mark.parametrize("machine", [1], indirect=True)
def test_sixty_power_cuts_in_a_row_take_nothing_that_was_acknowledged(machine: Machine) -> None:
    cut_often(machine, 60, seed=17)


@pytest.mark.parametrize("machine", [3], indirect=True)
def test_forty_power_cuts_with_a_store_and_a_spool_on_disks_of_their_own_take_nothing(machine: Machine) -> None:
    """Nothing but our own order holds here: what one ext4 does, its journal keeps in order; three do not."""
    cut_often(machine, 40, seed=18)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("machine", [1, 3], indirect=True)
def test_a_hundred_power_cuts_at_other_moments_take_nothing(machine: Machine, seed: int) -> None:
    cut_often(machine, 100, seed)


@pytest.mark.parametrize("blind", ["files and directories", "directories", "the store"])
@pytest.mark.parametrize("machine", [3], indirect=True)
def test_without_a_sync_power_cuts_take_acknowledged_records(machine: Machine, blind: str) -> None:
    """The negative control: this tier can see each of them missing."""
    # Seven batches are in the store, and commits behind them have made it durable that the outbox does not have them.
    machine.life(Random(blind), "upload.before:8", blind, patience_s=30.0)
    with pytest.raises(AssertionError, match=r"I1 .* durable records are missing|I6 writer .* is due"):
        machine.judge()


@pytest.mark.parametrize("blind", [False, True])
def test_a_published_file_outlives_a_power_cut_and_without_the_sync_of_its_directory_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: bool
) -> None:
    with loop_disk(tmp_path, "disk") as disk:
        if blind:
            monkeypatch.setattr(fs, "sync_dir", lambda path: None)
        (disk.point / ".half").write_bytes(b"whole")
        fs.publish(disk.point / ".half", disk.point / "file")
        disk.cut()
        disk.power_on()
        assert (disk.point / "file").exists() == (not blind)
        assert (disk.point / ".half").exists() == blind


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Node, LoopDisk]]:
    with loop_disk(tmp_path, "disk", DISK_SIZE) as disk, Node(tmp_path) as node:
        node.state, node.spool, node.data = disk.point / "state", disk.point / "spool", disk.point / "data"
        node.url = str(node.data)
        node.env |= {
            "RANKLOG_STATE_DIR": str(node.state), "RANKLOG_SPOOL_DIR": str(node.spool), "RANKLOG_TO": node.url,
            "RANKLOG_DISK_FREE_MIN_BYTES": "1M", "RANKLOG_SEAL_SIZE_BYTES": "64K", "RANKLOG_SEAL_AGE_S": "0.3",
            "RANKLOG_RESCAN_INTERVAL_S": "0.3",
        }  # fmt: skip
        yield node, disk


def cut_node(node: Node, disk: LoopDisk, number: int, pause_s: float) -> None:
    """Let four trainers log, one of them before there is a daemon; cut when all have something durable, and later."""
    names = [f"cut{number}-{rank}" for rank in range(4)]
    started = [_trainer(node, name) for name in names[:1]]
    daemon = node.start_daemon()
    started += [_trainer(node, name) for name in names[1:]]

    def durable() -> bool:
        accounts = read_ledgers(oracle.ledgers_of(node))
        return all(accounts.get(name, Account(0, 0, 0, 0)).durable > 100 for name in names)

    wait_for(durable, "each trainer has something durable")
    select.select([], [], [], pause_s)
    for process in (*started, daemon):
        process.kill()
    disk.cut()
    for process in (*started, daemon):
        process.wait()
    for file in node.journal.iterdir():
        file.unlink()  # tmpfs does not survive a power cut.
    disk.power_on()


def _trainer(node: Node, name: str) -> "subprocess.Popen[bytes]":
    command = oracle.witness(name, node, "--flush-every", "20", "--pause", "0.001")
    return subprocess.Popen(command, env=node.env, cwd=node.path, stderr=subprocess.DEVNULL)


def test_power_cuts_of_a_whole_node_take_nothing_that_was_acknowledged(node: tuple[Node, LoopDisk]) -> None:
    rng = Random(5)
    for number in range(5):
        cut_node(*node, number, rng.uniform(0, 0.8))
    node[0].start_daemon()
    verdict = oracle.check(node[0], May.LOSE_UNACKNOWLEDGED)
    assert verdict.writers == 20
    assert verdict.missing, "no cut took anything: were there any?"
