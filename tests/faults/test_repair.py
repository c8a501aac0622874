"""The repair tools on the state of real daemons, where the daemon alone gives up. Matrix rows 21 (damage in a WAL
segment: its head is lost), 23 (a shard changed on disk; a lost sector in a spool), 26 (a tool beside a daemon) and 32
(the way back of dead letters), each with a human who runs `ranklog fsck` or `ranklog requeue`.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node import Node, wait_for
from oracle import May, check, expected_cells, judge, ledgers_of, witness
from ranklog.frame import spans
from ranklogd.ship.outbox import set_aside
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import Entry, decode_header, scan
from repairing import flip
from witness import read_ledgers, record


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as made:
        yield made


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ranklog.cli", *arguments]


def tool(node: Node, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a command with --json and return what it prints."""
    done = node.run(command(*arguments, "--json"))
    assert done.returncode == code, done.stderr + done.stdout
    assert done.stdout, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait()


def log(node: Node, name: str, *flags: str, count: int = 60) -> None:
    done = node.run(witness(name, node, "--count", str(count), *flags))
    assert done.returncode == 0, done.stderr


def the_open_segment(node: Node) -> Path:
    [path] = (node.state / "wal").glob("*.open")
    return path


def test_every_look_works_beside_a_daemon_under_load_and_every_change_is_refused(node):
    daemon = node.start_daemon("--seal-age", "50ms")
    trainer = subprocess.Popen(
        witness("busy", node, "--seconds", "60", "--pause", "0.0005"), env=node.env, cwd=node.path, stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        wait_for(lambda: node.ping() and node.status()["watermarks"]["uploaded"] > 10, "records flow")
        for _ in range(2):
            assert tool(node, "fsck", "check", "--store")["damage"] == 0
            assert tool(node, "fsck", "status")["owner_pid"] == daemon.pid
            assert node.run(command("fsck", "export")).returncode == 0
        for refused in (
            ["fsck", "repair"],
            ["fsck", "repair", "--apply"],
            ["requeue"],
            ["requeue", "--all", "--apply"],
        ):
            done = node.run(command(*refused))
            assert done.returncode == 1
            assert f"(pid {daemon.pid})" in done.stderr
            assert f"kill {daemon.pid}" in done.stderr
    finally:
        (node.path / "enough").touch()
        trainer.wait(60)
        (node.path / "enough").unlink()
    check(node)


def test_an_export_of_the_wal_is_what_was_logged(node):
    daemon = node.start_daemon("--seal-age", "1h")
    log(node, "told")
    stop(daemon)
    log(node, "left", "--no-finish", count=20)
    done = node.run(command("fsck", "export"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {
        (line["values"]["by"], round(line["values"]["n"])): line["values"]
        for line in lines
        if line["kind"] == "metrics"
    }
    assert set(found) == {("told", n) for n in range(60)} | {("left", n) for n in range(20)}
    names = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
    for (name, n), values in found.items():
        plain = {key: names.get(value, value) if key == "odd" else value for key, value in values.items()}
        logged = expected_cells(record(name, n))
        for key, (bits, text) in logged.items():
            told = plain[key]
            assert (expected_cells({key: float(told)})[key] == (bits, None)) if bits is not None else told == text, (
                name,
                n,
                key,
            )
    node.start_daemon()
    check(node)


LOST = 300
"""Records that go with the head of a segment: beyond them, the daemon does not look for the next entry."""


def lose_the_head(node: Node) -> bytes:
    """Zero the open segment up to an entry behind LOST records; return what is left of it."""
    path = the_open_segment(node)
    data = path.read_bytes()
    header, offset = decode_header(memoryview(data))
    entries = scan(memoryview(data), header.salt, offset, header.first_lsn)
    cut = next(entry.offset for entry in entries if isinstance(entry, Entry) and entry.lsn > LOST)
    path.write_bytes(bytes(cut) + data[cut:])
    return data[cut:]


def test_a_head_of_the_open_segment_that_is_lost_costs_what_was_in_it(node):
    """The daemon would put the whole segment aside; a repair brings in every entry behind the damage."""
    daemon = node.start_daemon("--seal-age", "1h")
    log(node, "a", "--flush-every", "10", count=500)
    stop(daemon)
    left = lose_the_head(node)
    report = tool(node, "fsck", "check", code=1)
    assert [f["repair"]["step"] for f in report["findings"] if f["severity"] == "damage"] == [
        "rebuild the segment's header"
    ]
    assert the_open_segment(node).exists(), "a check changes nothing"
    tool(node, "fsck", "repair", "--apply")
    assert tool(node, "fsck", "repair", "--apply")["done"] == 0
    node.start_daemon()
    verdict = check(node, May.LOSE_COUNTED)
    assert LOST <= verdict.missing["a"] < 400
    assert any(kept.read_bytes().endswith(left) for kept in (node.state / "quarantine").iterdir())


def test_a_segment_that_the_daemon_gave_up_comes_back_by_requeue(node):
    daemon = node.start_daemon("--seal-age", "1h")
    log(node, "a", "--flush-every", "10", count=500)
    stop(daemon)
    lose_the_head(node)
    second = node.start_daemon()
    log(node, "b", count=10)
    node.upload()
    stop(second)
    [item] = tool(node, "requeue")["items"]
    assert item["way"] == "to wal/, with a new header and a store_id of its own"
    assert tool(node, "requeue", "--all", "--apply")["done"] == 1
    node.start_daemon()
    verdict = check(node, May.LOSE_COUNTED)
    assert LOST <= verdict.missing["a"] < 400
    stop(node.daemons[-1])
    assert tool(node, "requeue", "--all", "--apply")["done"] == 0


@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "left to the daemon"])
def test_a_lost_sector_in_a_spool_costs_its_records_only_if_somebody_repairs(node, repaired):
    """Negative control beside it: without the repair, all that lies behind the sector in that file is one gap."""
    stop(node.start_daemon())  # There is a state directory, and nobody in it.
    small = {
        "RANKLOG_JOURNAL_SIZE_BYTES": "64K",
        "RANKLOG_JOURNAL_FILE_SIZE_BYTES": "16K",
        "RANKLOG_FLUSH_INTERVAL_S": "0.02",
    }
    done = node.run(witness("a", node, "--count", "600", "--pause", "0.003", "--no-finish"), **small)
    assert done.returncode == 0, done.stderr
    [path] = node.spool.glob("*.spool")
    data = bytearray(path.read_bytes())
    frames = list(spans(memoryview(data)))
    victim = frames[len(frames) // 2]
    data[victim.offset : victim.end] = bytes(victim.end - victim.offset)
    path.write_bytes(data)
    if repaired:
        assert tool(node, "fsck", "check", code=1)["damage"] == 1
        assert tool(node, "fsck", "repair", "--apply")["done"] == 1
    node.start_daemon()
    node.upload()
    verdict = judge(node.raw_rows("true"), read_ledgers(ledgers_of(node)), May.LOSE_COUNTED)
    assert verdict.missing["a"] == verdict.in_gaps
    if repaired:
        assert verdict.in_gaps == 1
        check(node, May.LOSE_COUNTED)
    else:
        assert verdict.in_gaps > 10


def test_dead_letters_come_back_once_the_reason_is_gone(node):
    daemon = node.start_daemon("--seal-age", "50ms")
    log(node, "a")
    node.upload()
    stop(daemon)
    state = StateDir(node.state)
    [shard] = (node.data / "v1").rglob("*.parquet")
    key = shard.relative_to(node.data)
    moved = node.path / "moved"
    shutil.move(shard, moved)
    set_aside(moved, state.deadletter / key, "422: not today")
    node.start_daemon()
    assert node.status()["shipper"].get("dead_letters", 0) in (0, 1)
    stop(node.daemons[-1])
    assert tool(node, "requeue", "--deadletter", "--apply")["done"] == 1
    node.start_daemon()
    wait_for(shard.exists, "it was uploaded")
    check(node)


def test_a_repair_that_is_killed_in_the_middle_goes_on_where_it_was(node):
    """SIGKILL on the real process, once it has done some of its forty steps."""
    daemon = node.start_daemon("--seal-age", "1h")
    log(node, "a", "--flush-every", "10", count=500)
    stop(daemon)
    lose_the_head(node)
    wal = node.state / "wal"
    for number in range(40):
        (wal / f"stray-{number}").write_bytes(b"?")
    process = subprocess.Popen(command("fsck", "repair", "--apply"), env=node.env, stdout=subprocess.DEVNULL)
    wait_for(lambda: process.poll() is not None or len(list(wal.glob("stray-*"))) < 40, "its first steps")
    process.send_signal(signal.SIGKILL)
    process.wait()
    tool(node, "fsck", "repair", "--apply")
    assert not list(wal.glob("stray-*"))
    assert len([kept for kept in (node.state / "quarantine").glob("stray-*") if kept.suffix != ".reason"]) == 40
    node.start_daemon()
    assert check(node, May.LOSE_COUNTED).missing["a"] < 400


def test_a_changed_shard_in_the_store_is_named(node):
    node.start_daemon("--seal-age", "50ms")
    log(node, "a")
    node.upload()
    assert tool(node, "fsck", "check", "--store")["damage"] == 0
    [shard] = (node.data / "v1").rglob("*.parquet")
    flip(shard, 200)
    [finding] = tool(node, "fsck", "check", "--store", code=1)["findings"]
    assert finding["file"] == str(shard)
    flip(shard, 200)
    check(node)
