"""The daemon killed, failing or out of room at every named point of its way: what was acknowledged is there once.

Each round lets a real client log while a real daemon meets the failpoint; a line in RANKLOG_FAILPOINT_LOG proves that
it was reached. Then a sound daemon starts, and the shards must hold every record of every round exactly once.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from node import Node, wait_for
from ranklog import control
from ranklog.failpoint import FAILPOINTS
from ranklog.wire import Wait
from ranklogd.wal import segment

LIVE = {
    "recv.after", "wal.append.before", "wal.append.after", "wal.sync.before", "wal.sync.after", "ack.before", "ack.after",
}  # fmt: skip
"""Reached when a client sends a batch."""
SEAL = {"seg.sync.after", "seg.create.after", "seg.header.after", "seg.seal.after", "seg.dirsync.after"}
"""Reached when a segment is sealed, and two of them when a daemon starts."""
ADOPT = {"adopt.copy.after", "adopt.sync.after", "adopt.unlink.after"}
"""Reached when a dead writer's files are found."""
STOP = {"shutdown.seal.after"}
INGEST = LIVE | SEAL | ADOPT | STOP
OTHERS = (
    "journal.",
    "spool.",
    "finish.",
    "shard.",
    "outbox.",
    "trim.",
    "upload.",
    "store.",
    "mark.",
    "retain.",
    "delete.",
)
"""The points of the client and of the shipper, whose suites loop over them."""

RECORDS = 200
CLIENT = """
import ranklog, sys
run = ranklog.init('p', id=sys.argv[1])
run._writer.connects(20)  # Else a short script on a busy machine is over before its sender has met the daemon.
for i in range(int(sys.argv[2])):
    run.log({'i': float(i)})
    if i % 50 == 25:
        run.flush(0.3)
run.finish(wait=None)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


def test_every_failpoint_of_the_ingest_process_is_tested_here() -> None:
    assert INGEST <= FAILPOINTS
    assert {point for point in FAILPOINTS if not point.startswith(OTHERS)} == INGEST


def client(node: Node, run: str) -> None:
    done = node.python(CLIENT, run, str(RECORDS))
    assert done.returncode == 0, done.stderr


def armed(node: Node, spec: str) -> "subprocess.Popen[bytes]":
    """Start a daemon that will meet a failpoint, perhaps before it answers."""
    log = (node.path / "daemon.log").open("ab")
    env = node.env | {
        "RANKLOG_FAILPOINT": spec, "RANKLOG_FAILPOINT_LOG": str(node.path / "reached"), "RANKLOG_SEAL_AGE_S": "0.3",
    }  # fmt: skip
    daemon = subprocess.Popen([sys.executable, "-m", "ranklogd"], env=env, cwd=node.path, stdout=log, stderr=log)
    log.close()
    node.daemons.append(daemon)
    return daemon


def one_round(node: Node, point: str, action: str, number: int) -> "subprocess.Popen[bytes]":
    """Bring a daemon to the point while a client logs; return the daemon."""
    run = f"round-{number}"
    if point in ADOPT:
        client(node, run)
    at_start = point in {"seg.create.after", "seg.header.after"} and number % 2 == 0
    nth = 2 if point in {"seg.create.after", "seg.header.after"} and not at_start else 1
    daemon = armed(node, f"{point}:{nth}={action}")
    if point not in ADOPT:
        if not at_start:
            wait_for(lambda: node.ping() == daemon.pid or daemon.poll() is not None, "it answers")
        client(node, run)
    if point in STOP:
        daemon.terminate()
    wait_for(lambda: len(reached(node)) > number, f"{point} is reached")
    return daemon


def reached(node: Node) -> list[str]:
    path = node.path / "reached"
    return path.read_text().splitlines() if path.exists() else []


def check_everything(node: Node, rounds: int) -> None:
    """A sound daemon brings in what is left; then each record is in the shards once, under an lsn of its own."""
    node.start_daemon(RANKLOG_SEAL_AGE_S="0.3")
    node.upload()
    assert node.leftovers() == []
    rows = node.raw_rows("true")
    lsns = {(row["writer"], row["seq"]): row["lsn"] for row in rows}
    assert len(set(lsns.values())) == len(lsns), "an lsn was used twice"
    logged = [row for row in rows if row["kind"] == "metrics" and row["key"] == "i"]
    assert not [row for row in rows if row["kind"] == "gap"]
    doubled = [key for key, count in Counter((row["writer"], row["seq"]) for row in logged).items() if count > 1]
    assert not doubled
    for number in range(rounds):
        values = sorted(row["value"] for row in logged if row["run"] == f"round-{number}")
        assert values == [float(i) for i in range(RECORDS)]
    assert node.status()["refused"] == {}


@pytest.mark.parametrize("point", sorted(INGEST))
def test_a_kill_at_any_point_loses_and_doubles_nothing(node: Node, point: str) -> None:
    daemon = one_round(node, point, "kill", 0)
    assert daemon.wait(20) == -signal.SIGKILL
    assert reached(node) == [f"{point} kill {daemon.pid}"]
    check_everything(node, 1)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            point,
            marks=() if point in {"wal.sync.before", "seg.header.after", "adopt.sync.after"} else pytest.mark.full,
        )
        for point in sorted(INGEST)
    ],
)
def test_three_kills_in_a_row_lose_and_double_nothing(node: Node, point: str) -> None:
    for number in range(3):
        daemon = one_round(node, point, "kill", number)
        assert daemon.wait(20) == -signal.SIGKILL
    assert len(reached(node)) == 3
    check_everything(node, 3)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            point,
            marks=() if point in {"wal.sync.before", "seg.header.after", "wal.append.after"} else pytest.mark.full,
        )
        for point in sorted(INGEST)
    ],
)
def test_an_error_at_any_point_is_survived_or_ends_the_process_without_a_loss(node: Node, point: str) -> None:
    daemon = one_round(node, point, "err", 0)
    survives = {"recv.after", "wal.sync.before", *ADOPT}
    if point in survives:
        wait_for(lambda: node.ping() == daemon.pid, "it goes on")
        if point == "wal.sync.before":
            assert node.status()["poisoned_segments"] == 1
        daemon.kill()
        daemon.wait()
    else:
        assert daemon.wait(20) == 1, "and not by a bug: in words"
    assert reached(node) == [f"{point} err {daemon.pid}"]
    told = (node.path / "daemon.log").read_text()
    assert ("Traceback" in told) == (point in {"recv.after", "adopt.sync.after", "adopt.unlink.after"})
    check_everything(node, 1)


@pytest.mark.parametrize("point", ["seg.create.after"])
def test_a_segment_that_cannot_be_sealed_for_now_is_sealed_later(node: Node, point: str) -> None:
    daemon = armed(node, f"{point}:2=err")
    wait_for(lambda: node.ping() == daemon.pid, "it answers")
    client(node, "round-0")
    wait_for(lambda: reached(node), "the seal fails")
    wait_for(lambda: list(node.data.rglob("*.parquet")), "another one does not")
    daemon.kill()
    daemon.wait()
    check_everything(node, 1)


def test_a_crash_between_the_two_opens_of_a_poisoned_segment_takes_no_doubtful_record_for_durable(node: Node) -> None:
    """The fdatasync fails, the new segment is born, and then: nothing of the old one beyond its last sync counts."""
    daemon = armed(node, "wal.sync.before:3=err,seg.header.after:2=kill")
    wait_for(lambda: node.ping() == daemon.pid, "it answers")
    client(node, "round-0")
    assert daemon.wait(20) == -signal.SIGKILL
    opens = sorted((node.state / "wal").glob("*.open"))
    assert len(opens) == 2
    younger = segment.parse_open(opens[1].name)
    header, offset = segment.decode_header(memoryview(opens[0].read_bytes()))
    entries = segment.scan(memoryview(opens[0].read_bytes()), header.salt, offset, header.first_lsn)
    assert all(entry.lsn < younger for entry in entries if isinstance(entry, segment.Entry))
    check_everything(node, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root: run the tests with sudo")
def test_a_state_disk_that_is_really_full_refuses_for_now_and_recovers_by_itself(node: Node) -> None:
    disk = node.path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    small = {
        "RANKLOG_STATE_DIR": str(disk / "state"), "RANKLOG_DISK_FREE_MIN_BYTES": "0", "RANKLOG_RESERVE_SIZE_BYTES": "64K",
        "RANKLOG_SEAL_AGE_S": "0.3", "RANKLOG_RESCAN_INTERVAL_S": "0.3",
    }  # fmt: skip
    try:
        daemon = node.start_daemon(**small)
        client(node, "round-0")
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        client(node, "round-1")
        wait_for(lambda: node.status()["full"], "it says that it is full")
        assert node.status()["refused"].get("full", 0) or node.status()["adoption_stuck"]
        client(node, "round-2")
        assert not control.sync(node.settings, 5).done, "sync says that files had to stay"
        ballast.unlink()
        wait_for(lambda: not node.status()["full"], "it finds that there is room again")
        node.upload()
        assert control.flush(node.settings, Wait.UPLOADED, 10).done
        assert node.leftovers() == []
        rows = node.raw_rows("kind = 'metrics'")
        assert sorted((row["run"], row["value"]) for row in rows) == sorted(
            (f"round-{number}", float(i)) for number in range(3) for i in range(RECORDS)
        )
        assert node.status()["full"] == ""
        daemon.terminate()
        assert daemon.wait(20) == 0
    finally:
        for daemon in node.daemons:
            daemon.kill()
            daemon.wait()
        subprocess.run(["umount", "-l", disk], check=True)
