"""Trainers whose daemon is absent, dead, frozen or restarted, and disks that are full: nothing waits, nothing is lost
within the caps, and what is beyond them is accounted for by gaps.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Rig, gaps, logged, small_tmpfs, wait_for
from ranklog.frame import Kind

TRAINER = """
import os, sys, time, ranklog
run = ranklog.init(project="p", id="job", rank=int(sys.argv[1]))
i, slowest, ends_s = 0, 0.0, time.monotonic() + float(sys.argv[2])
more = {f"k{n}": n / 7 for n in range(11)}
while time.monotonic() < ends_s and not os.path.exists("enough"):
    began = time.perf_counter()
    ranklog.log({"i": i, **more})
    slowest = max(slowest, time.perf_counter() - began)
    i += 1
    if sys.argv[3] == "paced": time.sleep(0.0005)
refused = run._writer.refused
ranklog.log({"slowest": slowest, "refused": refused, "count": i})
began = time.monotonic()
ranklog.finish(timeout=15)
print(i, refused, slowest, time.monotonic() - began, flush=True)
"""
TINY = {
    "RANKLOG_JOURNAL_FILE_SIZE_BYTES": "16K",
    "RANKLOG_JOURNAL_SIZE_BYTES": "64K",
    "RANKLOG_SPOOL_SIZE_BYTES": "64K",
}
"""Caps that are reached at once."""
SLOW_S = 0.25
"""Longer than any call of log() takes, even beside other work on two cores; shorter than any wait would be."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


class Told:
    """What a trainer printed."""

    def __init__(self, client: "subprocess.Popen[str]") -> None:
        output, self.errors = client.communicate(timeout=60)
        assert client.returncode == 0, self.errors
        count, refused, slowest, finish = output.split()
        self.count, self.refused = int(count), int(refused)
        self.slowest_s, self.finish_s = float(slowest), float(finish)


def pass_s(seconds: float) -> None:
    """Let time go by: the daemon's absence is what is tested."""
    began = time.monotonic()
    wait_for(lambda: time.monotonic() - began >= seconds, "time passes")


# Without a daemon.


def test_without_a_daemon_records_wait_in_the_spool_and_a_later_daemon_takes_them(rig: Rig):
    output = rig.client("""
import ranklog
ranklog.init(project="p")
for i in range(3000): ranklog.log({"i": i})
ranklog.finish()
""")
    assert "ranklog sync" in output
    assert [path.suffix for path in rig.orphans()] == [".spool"], "on disk, and nothing remains in tmpfs"
    rig.start_daemon()
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(3000))
    assert records[-1].kind == Kind.END


def test_a_daemon_that_comes_late_gets_spool_then_journal_from_the_living_writer(rig: Rig, tmp_path: Path):
    client = rig.spawn(TRAINER, 0, 30, "paced")
    wait_for(lambda: list(rig.spool.glob("*.spool")), "the writer spools")
    pass_s(1.5)
    rig.start_daemon()
    wait_for(lambda: not list(rig.spool.glob("*.spool")), "the spool is sent and removed")
    (tmp_path / "enough").touch()
    told = Told(client)
    assert rig.orphans() == []
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(told.count))
    assert told.refused == 0
    assert rig.status()["adopted"] == 0, "the writer sent all by itself"


def test_spool_and_journal_of_a_writer_that_died_without_a_daemon_are_adopted_in_order(rig: Rig):
    client = rig.spawn(TRAINER, 0, 30, "paced")
    wait_for(lambda: list(rig.spool.glob("*.spool")), "the writer spools")
    pass_s(1.3)
    client.kill()
    client.wait()
    assert {path.suffix for path in rig.orphans()} == {".spool", ".journal"}
    rig.start_daemon()
    rig.adopted()
    [records] = rig.written().values()
    counts = logged(records, "i")
    assert counts == list(range(len(counts)))
    assert len(counts) > 500


def test_offline_records_are_left_alone_until_somebody_asks_for_them(rig: Rig):
    from ranklog import control

    rig.start_daemon()
    output = rig.client("""
import ranklog
ranklog.init(project="p", mode="offline")
for i in range(500): ranklog.log({"i": i})
assert ranklog.flush(5), "on this node's disk"
ranklog.finish()
""")
    assert "ranklog sync" in output
    wait_for(lambda: rig.status()["offline_waiting"] == 1, "the daemon has seen them")
    assert rig.written() == {}
    assert control.sync(rig.settings, 20).done
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(500))


# Daemons that come and go.


def test_killing_the_daemon_again_and_again_loses_nothing_and_doubles_nothing(rig: Rig, tmp_path: Path):
    daemon = rig.start_daemon()
    clients = [rig.spawn(TRAINER, rank, 60, "paced") for rank in range(2)]
    for _ in range(4):
        pass_s(0.6)
        rig.kill(daemon)
        daemon = rig.start_daemon()
    pass_s(0.5)
    (tmp_path / "enough").touch()
    told = [Told(client) for client in clients]
    rig.adopted()
    starts, written = rig.starts(), rig.written()
    for writer, records in written.items():
        one = told[starts[writer].rank or 0]
        assert logged(records, "i") == list(range(one.count))
        assert one.refused == 0
        assert one.slowest_s < SLOW_S
        assert one.finish_s < 15
    assert len(written) == 2


@pytest.mark.parametrize("pace", ["paced", "flat out"])
def test_a_daemon_frozen_for_four_seconds_costs_nothing(rig: Rig, tmp_path: Path, pace: str):
    daemon = rig.start_daemon()
    client = rig.spawn(TRAINER, 0, 60, pace)
    wait_for(lambda: rig.status()["records"] > 100, "records arrive")
    daemon.send_signal(signal.SIGSTOP)
    pass_s(4)
    daemon.send_signal(signal.SIGCONT)
    pass_s(0.5)
    (tmp_path / "enough").touch()
    told = Told(client)
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(told.count))
    assert (told.refused, gaps(records)) == (0, [])
    assert told.slowest_s < SLOW_S


def test_records_of_a_daemon_that_dies_before_they_are_durable_are_sent_again(rig: Rig, tmp_path: Path):
    """A WELCOME names what was received, which is not what is safe: only acks let go of records."""
    rig.start_daemon(RANKLOG_FAILPOINT="wal.sync.before:4=kill")
    client = rig.spawn(TRAINER, 0, 60, "paced")
    daemon = rig.daemons[-1]
    assert daemon.wait(20) == -signal.SIGKILL
    for nth in (2, 3, 5):
        rig.kill(rig.start_daemon(RANKLOG_FAILPOINT=f"ack.before:{nth}=kill"))
    rig.start_daemon()
    pass_s(0.5)
    (tmp_path / "enough").touch()
    told = Told(client)
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(told.count))


def test_a_daemon_that_lost_its_state_takes_over_where_the_other_was(rig: Rig, tmp_path: Path):
    """What was acknowledged is the dead one's affair; all the rest comes, and no gap is made up."""
    daemon = rig.start_daemon()
    client = rig.spawn(TRAINER, 0, 60, "paced")
    for turn in range(3):
        wait_for(lambda: rig.status()["records"] > 200, "records arrive")
        rig.kill(daemon)
        rig.state.rename(tmp_path / f"lost {turn}")
        daemon = rig.start_daemon()
    wait_for(lambda: rig.status()["records"] > 200, "records arrive")
    (tmp_path / "enough").touch()
    told = Told(client)
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(told.count))
    assert gaps(records) == []


@pytest.mark.parametrize("case", ["no daemon", "dead daemon", "frozen before", "frozen meanwhile"])
def test_finish_keeps_its_time_limit_whatever_the_daemon_does(rig: Rig, case: str):
    if case != "no daemon":
        daemon = rig.start_daemon()
    if case == "dead daemon":
        rig.kill(daemon)
    if case == "frozen before":
        daemon.send_signal(signal.SIGSTOP)
    client = rig.spawn("""
import sys, time, ranklog
ranklog.init(project="p")
for i in range(2000): ranklog.log({"i": i})
if sys.argv[1] == "frozen meanwhile": assert ranklog.flush(10)
print("ready", flush=True)
sys.stdin.readline()
for i in range(2000, 4000): ranklog.log({"i": i})
began = time.monotonic()
ranklog.finish(timeout=1.5)
print(time.monotonic() - began)
""", case)  # fmt: skip
    assert client.stdout.readline() == "ready\n"
    if case == "frozen meanwhile":
        daemon.send_signal(signal.SIGSTOP)
    output, errors = client.communicate("go\n", timeout=30)
    assert client.returncode == 0, errors
    assert float(output) < 2.5
    assert "ranklog sync" in errors
    assert {path.suffix for path in rig.orphans()} == {".spool"}
    if case.startswith("frozen"):
        daemon.send_signal(signal.SIGCONT)
    else:
        rig.start_daemon()
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(4000))
    assert records[-1].kind == Kind.END


def test_a_frozen_daemon_holds_up_the_exit_of_a_process_by_a_second_at_most(rig: Rig):
    daemon = rig.start_daemon()
    client = rig.spawn("""
import sys, ranklog
ranklog.init(project="p")
for i in range(2000): ranklog.log({"i": i})
ranklog.flush(10)
print("ready", flush=True)
sys.stdin.readline()
for i in range(2000, 4000): ranklog.log({"i": i})
""")
    assert client.stdout.readline() == "ready\n"
    daemon.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    client.communicate("go\n", timeout=30)
    assert time.monotonic() - began < 1.4, "a second, and what Python needs to end"
    daemon.send_signal(signal.SIGCONT)
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(4000))


# No room.


def test_beyond_the_caps_the_newest_records_are_refused_and_gaps_account_for_each(rig: Rig, tmp_path: Path):
    client = rig.spawn("""
import sys, time, ranklog
run = ranklog.init(project="p")
accepted, slowest = [], 0.0
def note(i):
    global slowest
    before = run._writer.refused
    began = time.perf_counter()
    ranklog.log({"i": i, "pad": "x" * 100})
    slowest = max(slowest, time.perf_counter() - began)
    if run._writer.refused == before: accepted.append(i)
for i in range(4000): note(i)
time.sleep(1.2)  # The sender spools.
for i in range(4000, 8000): note(i)
print("full", run._writer.refused, flush=True)
sys.stdin.readline()
ends_s = time.monotonic() + 10
i = 8000
while accepted[-1] < 8000 and time.monotonic() < ends_s:
    note(i); i += 1
    time.sleep(0.01)
for i in range(i, i + 100): note(i)
ranklog.finish()
print(run._finished, slowest, *accepted)
""", **TINY)  # fmt: skip
    word, refused = client.stdout.readline().split()
    assert (word, int(refused) > 1000) == ("full", True)
    rig.start_daemon()
    output, errors = client.communicate("go\n", timeout=40)
    assert client.returncode == 0, errors
    assert errors.count("a record was refused") == 1, "one warning"
    _, slowest, *accepted = output.split()
    assert float(slowest) < SLOW_S
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(map(int, accepted))
    # Each i used up one seq, whether it was taken or not: the gaps are exactly what was refused.
    missing = {seq for first, last in gaps(records) for seq in range(first, last + 1)}
    assert {record.seq for record in records} - {first for first, _ in gaps(records)} == (
        set(range(records[-1].last + 1)) - missing
    )
    taken = {int(i) + 1 for i in accepted}
    assert missing == set(range(1, max(taken) + 1)) - taken
    assert records[-1].kind == Kind.END


def test_refused_records_are_visible_even_if_nothing_is_logged_after_them(rig: Rig):
    """An open gap becomes part of the data when the process ends, with finish() or without."""
    for leave in ("ranklog.finish()", "pass", "os._exit(0)"):
        rig.client(f"""
import os, ranklog
run = ranklog.init(project="p")
for i in range(3000): ranklog.log({{"i": i, "pad": "x" * 100}})
assert run._writer.refused > 1000
{leave}
""", **TINY)  # fmt: skip
    rig.start_daemon()
    rig.adopted()
    written = rig.written()
    assert len(written) == 3
    for records in written.values():
        assert records[-1].last in (3000, 3001), "all 3000, or they and the end record"
        assert sum(last - first + 1 for first, last in gaps(records)) > 1000


def test_a_gap_that_is_still_open_when_all_else_was_taken_is_not_forgotten(rig: Rig):
    client = rig.spawn("""
import sys, ranklog
run = ranklog.init(project="p")
count = before = 0
while count < 3000 or run._writer.refused == before:  # The last one is refused: the gap is open.
    before, count = run._writer.refused, count + 1
    ranklog.log({"i": count, "pad": "x" * 100})
print(run._writer.refused, count, flush=True)
sys.stdin.readline()
assert run._writer.flush(10), "all that was accepted is durable"
""", **TINY)  # fmt: skip
    refused, count = map(int, client.stdout.readline().split())
    rig.start_daemon()
    _, errors = client.communicate("go\n", timeout=20)
    assert client.returncode == 0, errors
    rig.adopted()
    [records] = rig.written().values()
    assert records[-1].kind == Kind.GAP
    assert records[-1].last == count
    assert sum(last - first + 1 for first, last in gaps(records)) == refused > 1000


def test_a_record_larger_than_the_limit_costs_itself_and_one_warning(rig: Rig):
    rig.start_daemon()
    errors = rig.client("""
import ranklog
run = ranklog.init(project="p")
for i in range(10):
    ranklog.log({"i": i})
    if i % 3 == 0: ranklog.log({"big": "x" * (1 << 20)})
    if i % 3 == 1: ranklog.log({"fits": "x" * ((1 << 20) - 100)})
assert run._writer.refused == 4
ranklog.finish()
""")
    assert errors.count("warning:") == 1
    assert "larger than 1 MiB" in errors
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(10))
    assert [len(text) for text in logged(records, "fits")] == [(1 << 20) - 100] * 3
    assert [last - first for first, last in gaps(records)] == [0] * 4


def test_with_no_usable_directory_records_go_to_the_daemon_from_memory_and_that_is_said(rig: Rig, tmp_path: Path):
    rig.start_daemon()
    (tmp_path / "file").touch()
    nowhere = {"RANKLOG_JOURNAL_DIR": str(tmp_path / "file"), "RANKLOG_SPOOL_DIR": str(tmp_path / "file" / "x")}
    errors = rig.client("""
import ranklog
ranklog.init(project="p")
for i in range(20000): ranklog.log({"i": i})
ranklog.finish()
""", **nowhere)  # fmt: skip
    assert errors.count("records are kept in memory") == 1
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(20000))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path / "small") as path:
        yield path


def test_a_full_tmpfs_neither_stops_nor_kills_the_trainer(rig: Rig, small_disk: Path):
    rig.start_daemon()
    errors = rig.client("""
import ranklog
run = ranklog.init(project="p")
for turn in range(20):
    for i in range(1000): ranklog.log({"i": turn * 1000 + i, "pad": "x" * 100})
    assert ranklog.flush(10)
print("refused", run._writer.refused)
ranklog.finish()
""", RANKLOG_JOURNAL_DIR=str(small_disk))  # fmt: skip
    assert "refused 0\n" in errors, "a megabyte is enough while a daemon takes records"
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(20000))


def test_a_journal_directory_without_room_for_one_file_falls_back_to_memory(rig: Rig, small_disk: Path):
    rig.start_daemon()
    (small_disk / "ballast").write_bytes(bytes(900 << 10))
    errors = rig.client("""
import ranklog
ranklog.init(project="p")
for i in range(1000): ranklog.log({"i": i})
ranklog.finish()
""", RANKLOG_JOURNAL_DIR=str(small_disk))  # fmt: skip
    assert errors.count("records are kept in memory") == 1
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(1000))


@pytest.fixture
def freezable_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 256 MiB that can be frozen."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 (apt-get install e2fsprogs), to freeze a disk")
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    image.touch()
    os.truncate(image, 256 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    yield path
    subprocess.run(["fsfreeze", "-u", str(path)], check=False, capture_output=True)
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_spool_disk_that_hangs_holds_up_nobody_but_the_sender(rig: Rig, freezable_disk: Path, tmp_path: Path):
    rig.spool = freezable_disk / "spool"
    client = rig.spawn(TRAINER, 0, 60, "paced", RANKLOG_SPOOL_DIR=str(rig.spool))
    wait_for(lambda: list(rig.spool.glob("*.spool")), "the writer spools")
    subprocess.run(["fsfreeze", "-f", str(freezable_disk)], check=True)
    pass_s(3)
    (tmp_path / "enough").touch()
    line = client.stdout.readline()  # finish() has given up; the process itself cannot end before the disk is back.
    subprocess.run(["fsfreeze", "-u", str(freezable_disk)], check=True)
    count, refused, slowest, finish = line.split()
    assert client.wait(20) == 0
    assert float(slowest) < SLOW_S
    assert float(finish) < 7
    assert refused == "0"
    rig.start_daemon(RANKLOG_SPOOL_DIR=str(rig.spool))
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(int(count)))
    assert records[-1].kind == Kind.END


def test_a_full_spool_disk_is_said_once_and_the_records_stay_in_the_journal(rig: Rig, small_disk: Path):
    client = rig.spawn("""
import sys, ranklog
ranklog.init(project="p")
for i in range(3000): ranklog.log({"i": i})
print("ready", flush=True)
sys.stdin.readline()
ranklog.finish()
""", RANKLOG_SPOOL_DIR=str(small_disk))  # fmt: skip
    assert client.stdout.readline() == "ready\n"
    pass_s(2.5)
    _, errors = client.communicate("go\n", timeout=30)
    assert client.returncode == 0
    assert errors.count("cannot be spooled") == 1
    rig.start_daemon()
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(3000))
