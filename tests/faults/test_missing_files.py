"""Matrix row 24: files and directories removed, copied or renamed, before a start and while the daemon runs.

What is gone is gone: no ledger says what was in a segment that somebody removed, but its seqs are missing in the data,
which proves the loss. Everything else must go on: nothing is taken twice, no lsn is given out twice within one store,
no file is tried for ever, and no daemon stops.
"""

import itertools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from node import Node, wait_for
from oracle import May, witness
from ranklog.framefile import FileName, format_name
from ranklog.layout import parse_key
from ranklogd.ship.shipper import Shipper
from rot import Yard, memory_dir
from segments import writer_id


@pytest.fixture
def yard() -> Iterator[Yard]:
    one = Yard(memory_dir("yard") / "yard")
    yield one
    one.close()
    one.root.parent.rmdir()


def filled(yard: Yard) -> Path:
    """Three sealed segments and an open one; return the second."""
    for _ in range(3):
        for name in yard.trainers:
            yard.log(name, 2)
        yard.half.wal.roll()
    yard.log("a", 1)
    return sorted(yard.state.wal.glob("*.wal"))[1]


def check_names(yard: Yard) -> None:
    """No two shards of one store and run share an lsn: none was given out twice."""
    keys = [parse_key(str(path.relative_to(yard.store))) for path in yard.store.rglob("*.parquet")]
    ranges = sorted((key.store_id, key.run_id, key.first_lsn, key.last_lsn) for key in keys if key is not None)
    for before, after in itertools.pairwise(ranges):
        assert before[:2] != after[:2] or before[3] < after[2], (before, after)


def delivered(yard: Yard) -> dict[str, list[int]]:
    """The seqs of every trainer's records in the store, each once."""
    found = Counter((row["writer"], row["seq"]) for row in yard.rows() if row["kind"] == "metrics" and row["key"] == "n")
    assert max(found.values(), default=1) == 1, "twice"
    return {
        name: sorted(seq for writer, seq in found if writer == trainer.start.writer)
        for name, trainer in yard.trainers.items()
    }


# In this process


@pytest.mark.parametrize("which", ["sealed", "open", "all", "outbox"])
def test_what_was_removed_before_a_start_is_missing_and_all_else_goes_on(yard: Yard, which: str) -> None:
    path = filled(yard)
    yard.down()
    if which == "outbox":
        shutil.rmtree(yard.state.outbox)
    for file in {"sealed": [path], "open": yard.state.wal.glob("*.open"), "all": yard.state.wal.iterdir()}.get(which, []):
        file.unlink()
    yard.up()
    for name in yard.trainers:
        yard.log(name, 2)
    report = yard.ship()
    assert (report.last_error, report.backlog_segments, report.backlog_shards) == ("", 0, 0)
    missing = {"sealed": {"a": {3, 4}, "b": {3, 4}}, "open": {"a": {7}}, "all": {"a": {*range(8)}, "b": {*range(7)}}}
    for name, seqs in delivered(yard).items():
        every = set(range(1, yard.trainers[name].next_seq))
        assert every - set(seqs) == missing.get(which, {}).get(name, set()) & every
    check_names(yard)


def test_a_copy_of_a_segment_under_another_range_is_set_aside(yard: Yard) -> None:
    path = filled(yard)
    first, last = 0x4000, 0x4010
    copy = path.with_name(f"{first:016x}-{last:016x}.wal")
    shutil.copy(path, copy)
    shutil.copy(path, path.with_name(f"{path.name}.bak"))
    shutil.copy(path, path.with_name(f"copy of {path.name}"))
    verdict, report = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == 15
    assert [name for name in os.listdir(yard.state.quarantine) if not name.endswith(".reason")] == [copy.name]
    assert "somebody renamed it" in (yard.state.quarantine / f"{copy.name}.reason").read_text()
    assert report.quarantined_files == 1


def test_a_renamed_segment_is_set_aside_and_comes_in_under_its_own_name(yard: Yard) -> None:
    path = filled(yard)
    wrong = path.with_name(f"{0x4000:016x}-{0x4010:016x}.wal")
    path.rename(wrong)
    Shipper(yard.config).step()
    (yard.state.quarantine / wrong.name).rename(path)
    verdict, _ = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == 15


def test_a_converted_segment_that_is_put_back_gives_the_same_shard_again(yard: Yard) -> None:
    path = filled(yard)
    content = path.read_bytes()
    yard.ship()
    shards = set(yard.store.rglob("*.parquet"))
    path.write_bytes(content)
    yard.ship()
    assert set(yard.store.rglob("*.parquet")) == shards
    yard.finish(May.LOSE_NOTHING)


def test_copies_of_journal_and_spool_files_are_taken_once(yard: Yard) -> None:
    spool, journal = yard.leave("a", "spool", 0, 5), yard.leave("a", "journal", 0, 3, room=4096)
    writer = yard.trainers["a"].start.writer
    shutil.copy(spool, spool.with_name(format_name(FileName(writer, 7, "spool"))))
    shutil.copy(spool, yard.journal / spool.name)
    shutil.copy(journal, yard.spool / journal.name)
    shutil.copy(journal, journal.with_name(f"{journal.name}.bak"))
    yard.adopt()
    yard.log("b", 1)
    yard.ship()
    verdict = yard.judged(May.LOSE_NOTHING)
    assert verdict.delivered == 9
    assert [path.name for room in (yard.journal, yard.spool) for path in room.iterdir()] == [f"{journal.name}.bak"]


def test_a_file_under_another_writers_name_is_nobodys_and_waits(yard: Yard) -> None:
    path = yard.leave("a", "spool", 0, 5)
    renamed = path.rename(path.with_name(format_name(FileName(writer_id(99), 0, "spool"))))
    adopter = yard.adopt()
    assert "its name says" in adopter.refused[str(renamed)]
    assert renamed.exists()
    renamed.rename(path)
    yard.adopt()
    yard.ship()
    assert yard.judged(May.LOSE_NOTHING).delivered == 5


def test_a_link_to_nowhere_is_no_segment_and_not_tried_for_ever(yard: Yard) -> None:
    filled(yard)
    link = yard.state.wal / f"{0x200:016x}-{0x201:016x}.wal"
    link.symlink_to("/nowhere")
    clock = [0.0]
    shipper = Shipper(yard.config, clock=lambda: clock[0])
    for _ in range(8):
        shipper.step()
        clock[0] += 1000.0
    assert os.readlink(yard.state.quarantine / link.name) == "/nowhere"
    assert yard.finish(May.LOSE_NOTHING)[0].delivered == 15


def test_a_shard_that_waits_twice_is_uploaded_once_and_stops_nobody(yard: Yard) -> None:
    filled(yard)
    shipper = Shipper(yard.config)
    while shipper.convert_one() is not None:
        continue
    first = min(yard.state.outbox.iterdir())
    shutil.copytree(first, yard.state.outbox / f"{0x300:016x}-{0x301:016x}.wal")
    verdict, _ = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == 15
    assert not list(yard.state.outbox.iterdir())


@pytest.mark.parametrize("room", ["outbox", "quarantine", "deadletter", "wal"])
def test_strange_files_in_a_room_are_left_where_they_do_no_harm(yard: Yard, room: str) -> None:
    filled(yard)
    place: Path = getattr(yard.state, room)
    (place / "notes.txt").write_text("mine")
    (place / "0000000000000001-0000000000000002.wal.tmp").mkdir()
    (place / "a directory").mkdir()
    (place / "a directory" / "x.parquet").write_bytes(b"not parquet")
    shipper_report = yard.finish(May.LOSE_NOTHING)[1]
    assert shipper_report.backlog_shards == 0
    assert (place / "notes.txt").exists()


def test_an_open_segment_that_loses_its_name_is_written_again_before_anything_more_is_acknowledged(yard: Yard) -> None:
    yard.log("a", 3)
    shutil.rmtree(yard.state.wal)
    yard.log("b", 2)
    (path,) = yard.state.wal.glob("*.open")
    yard.log("a", 1)
    path.unlink()
    yard.half.wal.roll()
    yard.down()
    yard.up()
    verdict, _ = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == 8


# A whole node


def lines_of(node: Node) -> list[str]:
    return (node.path / "daemon.log").read_text().splitlines()


def log_some(node: Node, name: str) -> None:
    done = node.run(witness(name, node, "--count", "20", "--flush-every", "5", "--run", name))
    assert done.returncode == 0, done.stderr


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_running_daemon_survives_the_removal_of_anything_and_does_not_spin(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.env |= {"RANKLOG_SEAL_AGE_S": "0.3", "RANKLOG_RESCAN_INTERVAL_S": "0.3"}
        daemon = node.start_daemon()
        log_some(node, "before")
        node.upload()
        shipper = node.status()["shipper"]["pid"]
        os.kill(shipper, signal.SIGSTOP)
        log_some(node, "removed")
        doomed = wait_for(lambda: list((node.state / "wal").glob("*.wal")), "a segment is sealed")
        for path in doomed:
            path.unlink()
        os.kill(shipper, signal.SIGCONT)
        for place in (node.state / "outbox", node.state / "wal", node.state / "quarantine", node.spool, node.journal):
            shutil.rmtree(place)
            log_some(node, f"after-{place.name}")
            node.upload()
        for name in ("shipper.json", "reserve", "lock"):
            (node.state / name).unlink(missing_ok=True)
        log_some(node, "last")
        node.upload()
        assert daemon.poll() is None
        report = wait_for(lambda: node.status()["shipper"], "the shipper reports again")
        assert report["pid"] == shipper, "nor did the shipper die"
        rows = node.raw_rows("key = 'n'")
        found = Counter(row["run"] for row in rows)
        assert {name: count for name, count in found.items() if count != 20 and name != "removed"} == {}
        assert len(found) >= 7
        oracle.check_bounds(node)
        oracle.check_fresh(node)
        assert len(lines_of(node)) < 300, "each trouble is told once"
        assert cpu_s(daemon.pid) < 60
        assert cpu_s(shipper) < 60


def test_a_daemon_starts_over_a_state_directory_in_which_everything_is_wrong(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.env |= {"RANKLOG_SEAL_AGE_S": "0.3", "RANKLOG_RESCAN_INTERVAL_S": "0.3"}
        daemon = node.start_daemon()
        log_some(node, "before")
        node.upload()
        daemon.kill()
        daemon.wait()
        wal = node.state / "wal"
        for number in range(8):
            (wal / f"{0x9000 + number:016x}-{0x9000 + number:016x}.wal").write_bytes(os.urandom(500 * number))
            (wal / f"{0x9000 + number:016x}-{0x9000 + number:016x}.tries").write_bytes(os.urandom(100))
        (wal / f"{0x9100:016x}-{0x90ff:016x}.wal").write_bytes(b"RANKWAL1")
        (wal / f"{0x9200:016x}-{0x9201:016x}.wal").symlink_to("/nowhere")
        for name in ("shipper.json", "reserve", "lock"):
            (node.state / name).write_bytes(os.urandom(64))
        shutil.rmtree(node.state / "outbox")
        shutil.rmtree(node.state / "cache")
        (node.spool / f"{'ab' * 16}.00000000.spool").write_bytes(os.urandom(3000))
        daemon = node.start_daemon()
        log_some(node, "after")
        status = wait_for(
            lambda: (s := node.status())["shipper"].get("quarantined_files", 0) >= 9 and s, "what is no segment is set aside"
        )
        assert any("abab" in path for path in status["adoption_refused"])
        assert daemon.poll() is None
        oracle.check_fresh(node)
        assert Counter(row["run"] for row in node.raw_rows("key = 'n'"))["after"] == 20
        tries = [line for line in lines_of(node) if "conversion_failed" in line]
        assert len(tries) <= 40, "tried three times, with growing pauses"
