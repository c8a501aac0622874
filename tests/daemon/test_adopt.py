"""Adoption over real files and real processes: every record of a dead writer once, a live one's files untouched."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingesting import NOW_NS, Half, end_frame, frames, kept, seqs
from node import Node, wait_for
from ranklog import fs
from ranklog.frame import Kind, encode_gap
from ranklog.framefile import FileName, format_name
from ranklog.identity import boot_id, pid_namespace, process_start
from ranklog.start import Start, encode_start
from ranklogd.adopt import Adopter
from ranklogd.sequence import GAP_MAX
from segments import frame, make_state, start_of, writer_id

ONE, TWO = start_of(1), start_of(2)
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests with sudo")


class Place:
    """A daemon's ingest half with a journal and a spool directory to look into."""

    def __init__(self, root: Path) -> None:
        self.half = Half(make_state(root / "state"))
        self.journal, self.spool = root / "journal", root / "spool"
        self.journal.mkdir()
        self.spool.mkdir()
        self.restart()

    def restart(self) -> None:
        """A new adopter, as after a crash of the daemon."""
        self.adopter = Adopter(self.half.ingest, lambda: [self.journal, self.spool], self.half.state.quarantine)

    def crash(self) -> None:
        if self.adopter._current is not None:
            self.adopter._current.close()  # type: ignore[attr-defined]  # A dead process holds no lock.
        self.half.crash()
        self.restart()

    def write(
        self, start: Start, kind: str, number: int, data: bytes, *, tail: bytes | None = None, size: int = 64 << 10
    ) -> Path:
        """Leave a file: a journal is preallocated, a spool ends with its last frame, unless `tail` follows."""
        path = (self.journal if kind == "journal" else self.spool) / format_name(FileName(start.writer, number, kind))
        content = encode_start(start) + data
        default = bytes(max(0, size - len(content))) if kind == "journal" else b""
        path.write_bytes(content + (default if tail is None else tail))
        return path

    def adopt(self, *, include_offline: bool = False, commit_every: int = 1) -> None:
        """Scan and work until nothing is left to do, committing now and then as the server does."""
        self.adopter.scan(include_offline=include_offline)
        for turn in range(100_000):
            if not self.adopter.step():
                break
            if turn % commit_every == commit_every - 1:
                self.half.commit()
        self.half.commit()
        assert not self.adopter.busy

    def files(self) -> list[str]:
        return sorted(path.name for room in (self.journal, self.spool) for path in room.iterdir())

    def seqs(self, start: Start = ONE) -> list[int]:
        return seqs(kept(self.half.state), start)

    def gaps(self, start: Start = ONE) -> list[tuple[int, int]]:
        return [(r.seq, r.last) for r in kept(self.half.state) if r.writer == start.writer and r.kind == Kind.GAP]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody holds the file's lock."""
    fd = os.open(path, os.O_RDWR)
    assert fs.try_lock(fd)
    yield
    os.close(fd)


def test_a_dead_writers_journal_is_taken_over_and_removed_once_durable(place: Place) -> None:
    place.write(ONE, "journal", 0, frames(1, 10))
    place.adopter.scan()
    place.adopter.step()
    assert place.files(), "not before the commit"
    place.adopt()
    assert place.files() == []
    assert place.seqs() == list(range(11))
    state = place.half.writers.get(bytes.fromhex(ONE.writer))
    assert state.ended_s
    assert not state.finished
    assert place.adopter.adopted == 1


def test_what_was_acknowledged_already_is_not_taken_again(place: Place) -> None:
    place.half.log(ONE, 0, 6)
    place.write(ONE, "journal", 0, frames(1, 10))
    place.adopt()
    assert place.seqs() == list(range(11))
    assert place.gaps() == []


def test_files_are_replayed_in_seq_order_and_what_overlaps_is_taken_once(place: Place) -> None:
    place.write(ONE, "journal", 0, frames(40, 20))
    place.write(ONE, "journal", 1, frames(25, 20))
    place.write(ONE, "spool", 0, frames(1, 30))
    place.write(ONE, "spool", 1, frames(20, 8))
    place.adopt()
    assert place.seqs() == list(range(60))
    assert place.files() == []


def test_stale_frames_behind_the_last_one_of_a_recycled_journal_do_not_come_back(place: Place) -> None:
    place.write(ONE, "journal", 0, frames(50, 3) + frames(4, 20))
    place.write(ONE, "journal", 1, frames(30, 20))
    place.half.log(ONE, 0, 40)
    place.adopt()
    assert place.seqs() == list(range(53))


def test_a_hole_between_files_is_recorded_as_a_gap(place: Place) -> None:
    place.half.log(ONE, 0, 3)
    place.write(ONE, "spool", 0, frames(5, 5))
    place.write(ONE, "journal", 0, frames(20, 5))
    place.adopt()
    assert place.seqs() == list(range(25))
    assert place.gaps() == [(3, 4), (10, 19)]


def test_nothing_is_lost_below_the_first_frame_of_a_writer_that_nobody_here_knows(place: Place) -> None:
    """Another daemon, or this one before its state was wiped, has taken it."""
    place.write(ONE, "journal", 0, frames(500, 5))
    place.adopt()
    assert place.seqs() == list(range(500, 505))
    assert place.gaps() == []


def test_empty_files_of_a_known_writer_just_go(place: Place) -> None:
    place.half.log(ONE, 0, 7)
    place.write(ONE, "journal", 0, b"")
    place.write(ONE, "journal", 1, b"")
    place.adopt()
    assert (place.files(), place.gaps(), place.seqs()) == ([], [], list(range(7)))


def test_the_start_frame_alone_makes_a_run_that_logged_nothing_known(place: Place) -> None:
    place.write(ONE, "journal", 0, b"")
    place.adopt()
    assert place.seqs() == [0]
    assert place.files() == []


def test_an_end_record_in_adopted_files_finishes_the_writer(place: Place) -> None:
    place.write(ONE, "spool", 0, frames(1, 3) + end_frame(4))
    place.write(TWO, "spool", 0, frames(1, 3))
    place.adopt()
    finished = [place.half.writers.get(bytes.fromhex(start.writer)).finished for start in (ONE, TWO)]
    assert finished == [True, False]


def test_an_end_record_that_is_durable_already_still_finishes_the_writer(place: Place) -> None:
    place.half.log(ONE, 0, 4)
    place.half.batch(ONE, 4, end_frame(4), 1, last=True)
    place.half.commit()
    place.crash()
    place.write(ONE, "journal", 0, frames(1, 3) + end_frame(4))
    place.adopt()
    assert place.half.writers.get(bytes.fromhex(ONE.writer)).finished
    assert place.seqs() == list(range(5))


# Who is dead.


def living(**fields: object) -> Start:
    """A start frame that names this very process."""
    pid = os.getpid()
    return replace(
        ONE,
        pid=pid,
        pid_start=process_start(pid),
        pid_ns=pid_namespace(),
        boot=boot_id(),
        **fields,  # type: ignore[arg-type]
    )


def test_a_live_owners_files_are_not_touched(place: Place) -> None:
    path = place.write(living(), "journal", 0, frames(1, 5))
    spool = place.write(living(), "spool", 0, frames(6, 5))
    with locked(path):
        place.adopt()
        assert place.files() == [path.name, spool.name], "nor any other of its files"
        assert place.seqs() == []
        assert place.adopter.refused == {}
    place.adopt()
    assert place.seqs() == list(range(11))


def test_a_free_lock_means_that_the_owner_has_let_go_even_if_it_lives(place: Place) -> None:
    place.write(living(), "journal", 0, frames(1, 5))
    place.adopt()
    assert place.seqs() == list(range(6))


def test_a_process_that_is_gone_is_dead_though_a_forked_child_holds_its_lock(place: Place) -> None:
    """A data-loading worker inherits the lock and outlives the rank."""
    script = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\nfcntl.flock(fd, fcntl.LOCK_EX)\n"
        "if os.fork():\n    print(os.getpid(), flush=True)\n    sys.stdin.readline()\n    os._exit(0)\n"
        "os.close(0); os.close(1); time.sleep(60)"
    )
    path = place.write(ONE, "journal", 0, b"")
    owner = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        owner.stdout.readline()
        start = replace(ONE, pid=owner.pid, pid_start=process_start(owner.pid), pid_ns=pid_namespace(), boot=boot_id())
        with path.open("r+b") as file:
            file.write(encode_start(start) + frames(1, 5))
        place.adopt()
        assert place.seqs() == [], "it lives"
        owner.stdin.write(b"\n")
        owner.stdin.close()
        owner.wait()
        fd = os.open(path, os.O_RDONLY)
        assert not fs.try_lock(fd), "the child holds the lock"
        os.close(fd)
        place.adopt()
        assert place.seqs() == list(range(6))
        assert place.files() == []
    finally:
        for name in os.listdir("/proc"):
            if name.isdigit() and str(path).encode() in _cmdline(name):
                os.kill(int(name), 9)
        owner.stdout.close()


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_pid_that_belongs_to_another_process_by_now_is_gone(place: Place) -> None:
    path = place.write(replace(living(), pid_start=1), "journal", 0, frames(1, 5))
    with locked(path):
        place.adopt()
    assert place.seqs() == list(range(6))


def test_a_writer_of_another_boot_is_dead(place: Place) -> None:
    path = place.write(replace(living(), boot="0" * 36), "journal", 0, frames(1, 5))
    with locked(path):
        place.adopt()
    assert place.seqs() == list(range(6))


@pytest.mark.parametrize(
    "start", [replace(ONE, pid=0), replace(ONE, pid=1 << 22, pid_ns=12345)], ids=["no pid", "another namespace"]
)
def test_a_process_that_cannot_be_seen_lives_as_long_as_its_lock_is_held(place: Place, start: Start) -> None:
    path = place.write(start, "journal", 0, frames(1, 5))
    with locked(path):
        place.adopt()
        assert place.files() == [path.name]
    place.adopt()
    assert place.files() == []


def test_offline_writers_come_in_on_request_only(place: Place) -> None:
    start = replace(ONE, mode="offline")
    place.write(start, "spool", 0, frames(1, 5))
    place.write(TWO, "spool", 0, frames(1, 5))
    place.adopt()
    assert (place.seqs(ONE), place.seqs(TWO)) == ([], list(range(6)))
    assert place.adopter.waiting_offline == {ONE.writer}
    place.adopt(include_offline=True)
    assert place.seqs(ONE) == list(range(6))
    assert place.adopter.waiting_offline == set()
    place.write(replace(start, writer=writer_id(3)), "spool", 0, frames(1, 5))
    place.adopt()
    assert place.adopter.waiting_offline == {writer_id(3)}, "the request was for that moment only"


# Hostile files.


def test_a_hostile_file_is_left_alone_reported_once_and_its_neighbours_are_adopted(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "ranklogd")
    name = format_name(FileName(writer_id(9), 0, "journal"))

    def named(number: int) -> Path:
        return place.journal / name.replace("00000000.", f"{number:08x}.")

    outside = place.journal.parent / "outside"
    outside.write_bytes(encode_start(start_of(9)) + frames(1, 5))
    named(0).symlink_to(outside)
    os.mkfifo(named(1))
    os.link(outside, named(2))
    named(3).mkdir()
    named(4).write_bytes(bytes(100) + b"1")
    named(5).write_bytes(b"#!/bin/sh\nrm -rf /\n" * 100)
    named(6).write_bytes(encode_start(start_of(9))[:-1])
    named(7).write_bytes(encode_start(ONE) + frames(1, 5))
    named(8).symlink_to("/dev/zero")
    named(9).symlink_to(place.journal / "nowhere")
    for extra in ("notes.txt", "x.00000000.journal", f"{writer_id(9)}.0.journal"):
        (place.journal / extra).write_bytes(b"mine")
    place.write(start_of(9), "spool", 20, frames(1, 3))
    place.write(TWO, "journal", 0, frames(1, 5))
    for _ in range(3):
        place.adopt()
    assert set(place.adopter.refused) == {str(named(number)) for number in range(10)}
    assert "hard link" in place.adopter.refused[str(named(2))]
    assert "regular" in place.adopter.refused[str(named(1))]
    assert ONE.writer in place.adopter.refused[str(named(7))]
    assert sum("adoption_refused" in record.message for record in caplog.records) == 10
    assert place.seqs(TWO) == list(range(6))
    assert place.seqs(start_of(9)) == list(range(4)), "the one sound file of that writer"
    assert outside.read_bytes().startswith(encode_start(start_of(9)))
    for number in range(10):
        assert os.path.lexists(named(number))
    named(1).unlink()
    place.adopt()
    assert len(place.adopter.refused) == 9, "what is gone is not reported any more"


@NEEDS_ROOT
def test_a_file_of_another_user_under_a_writers_name_is_not_that_writers(place: Place) -> None:
    place.half.hello(ONE, uid=0)
    place.half.batch(ONE, 0, encode_start(ONE) + frames(1, 2), 3, uid=0)
    place.half.commit()
    forged = place.write(ONE, "spool", 7, frames(3, 5))
    os.chown(forged, 4242, 4242)
    mine = place.write(ONE, "journal", 0, frames(3, 2))
    with locked(forged):
        place.adopt()
    assert place.seqs() == list(range(5))
    assert "user 4242" in place.adopter.refused[str(forged)]
    assert not mine.exists()


@given(
    files=st.lists(
        st.lists(
            st.one_of(
                st.tuples(st.just("frames"), st.integers(0, 60), st.integers(1, 20)),
                st.tuples(st.just("gap"), st.integers(0, 60), st.integers(0, 1 << 40)),
                st.tuples(st.just("start"), st.just(0), st.just(0)),
                st.tuples(st.just("end"), st.integers(0, 60), st.just(0)),
                st.tuples(st.just("rubbish"), st.integers(0, 255), st.integers(1, 30)),
            ),
            max_size=5,
        ),
        max_size=4,
    ),
    known=st.integers(0, 30),
)
@settings(max_examples=200)
def test_no_content_at_all_raises_or_breaks_the_order_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[str, int, int]]], known: int
) -> None:
    place = Place(tmp_path_factory.mktemp("place"))
    if known:
        place.half.log(ONE, 0, known)
    for number, parts in enumerate(files):
        data = b""
        for what, first, count in parts:
            if what == "frames":
                data += frames(first, count)
            elif what == "gap":
                data += encode_gap(first, first + count, "full", NOW_NS)
            elif what == "start":
                data += encode_start(ONE)
            elif what == "end":
                data += end_frame(first)
            else:
                data += bytes([first]) * count
        place.write(ONE, "spool" if number % 2 else "journal", number, data)
    place.write(TWO, "journal", 0, frames(1, 5))
    place.adopt()
    assert place.seqs(TWO) == list(range(6))
    found = [(r.seq, r.last) for r in kept(place.half.state) if r.writer == ONE.writer]
    for (_, last), (first, _) in pairwise(found):
        assert first == last + 1
    place.half.crash()
    place.half.wal.close()


def test_a_gap_frame_that_began_before_what_is_known_is_taken_from_there(place: Place) -> None:
    place.half.log(ONE, 0, 10)
    place.write(ONE, "spool", 0, encode_gap(5, 20, "spool full", NOW_NS) + frames(21, 3))
    place.adopt()
    assert place.seqs() == list(range(24))
    assert place.gaps() == [(10, 20)]


@pytest.mark.parametrize(
    "data",
    [encode_gap(3, 3 + GAP_MAX, "x", NOW_NS), frames(3, 2) + encode_gap(5, (1 << 62), "x", NOW_NS), frames(1 << 40, 3)],
    ids=["alone", "behind others", "a jump"],
)
def test_a_file_with_an_impossible_gap_is_refused_and_the_daemon_goes_on(place: Place, data: bytes) -> None:
    place.half.log(ONE, 0, 3)
    path = place.write(ONE, "spool", 0, data)
    place.write(TWO, "spool", 0, frames(1, 5))
    place.adopt()
    assert place.adopter.refused[str(path)]
    assert path.exists()
    assert place.seqs(TWO) == list(range(6))


def test_many_large_gaps_in_a_row_are_as_many_batches(place: Place) -> None:
    """Together they stand for more records than one WAL entry can count."""
    gaps = [(3 + n * GAP_MAX, 2 + (n + 1) * GAP_MAX) for n in range(5)]
    place.half.log(ONE, 0, 3)
    place.write(ONE, "spool", 0, b"".join(encode_gap(first, last, "spool full", NOW_NS) for first, last in gaps))
    place.adopt()
    assert place.files() == []
    assert place.gaps() == gaps
    assert place.half.wal.next_lsn == 4 + 5 * GAP_MAX
    place.crash()
    assert place.half.writers.get(bytes.fromhex(ONE.writer)).next_seq == 3 + 5 * GAP_MAX


def test_a_second_start_frame_ends_what_is_believed_of_a_file(place: Place) -> None:
    place.write(ONE, "spool", 0, encode_start(ONE) + frames(9, 3))
    place.write(TWO, "spool", 0, frames(1, 3) + encode_start(TWO) + frames(4, 3))
    place.adopt()
    assert (place.seqs(ONE), place.seqs(TWO)) == ([0], [0, 1, 2, 3])
    assert place.adopter.quarantined == 2


def test_a_file_that_gets_a_second_name_while_it_is_opened_is_left_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.write(ONE, "journal", 0, frames(1, 3))
    real = fs.try_lock

    def lock_and_link(fd: int) -> bool:
        os.link(path, path.with_name("second-name"))
        return real(fd)

    monkeypatch.setattr(fs, "try_lock", lock_and_link)
    place.adopt()
    assert "exchanged" in place.adopter.refused[str(path)]
    assert place.seqs() == []


def test_a_file_that_cannot_be_read_is_reported_and_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = place.write(ONE, "spool", 0, frames(1, 100_000))
    place.write(TWO, "spool", 0, frames(1, 5))
    inode, real = bad.stat().st_ino, os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode and offset > 1 << 20:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    place.adopt()
    assert "Input/output" in place.adopter.refused[str(bad)]
    assert bad.exists()
    assert place.seqs(TWO) == list(range(6))
    monkeypatch.undo()
    place.adopt()
    assert place.seqs() == list(range(100_001)), "nothing is lost once it can be read"


def test_a_file_that_cannot_be_removed_is_reported_and_not_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.write(ONE, "journal", 0, frames(1, 10))

    def refused(_: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fs, "unlink", refused)
    place.adopt()
    assert "its records are safe" in place.adopter.refused[str(path)]
    adopted = place.adopter.adopted
    place.adopt()
    assert (place.adopter.adopted, place.seqs()) == (adopted, list(range(11)))
    assert place.adopter.stuck == set()


# Room.


def test_a_disk_that_is_full_in_the_middle_keeps_the_files_and_the_next_scan_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit that holds the last piece may be the one without room: until it is durable no file may go."""
    place.write(ONE, "spool", 0, frames(1, 20_000))
    place.write(ONE, "journal", 0, frames(20_001, 10))
    before = place.files()
    real = os.pwritev

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for full_at in (1, 3, 1 << 30):
        monkeypatch.setattr(os, "pwritev", real)
        place.adopter.scan()
        turns = 0
        while place.adopter.step():
            turns += 1
            if turns == full_at or (full_at == 1 << 30 and turns >= 10):
                monkeypatch.setattr(os, "pwritev", no_room)
                place.half.commit()
        monkeypatch.setattr(os, "pwritev", real)
        place.half.commit()
        assert place.files() == before
        assert place.adopter.stuck == {ONE.writer}
    place.adopt()
    assert place.seqs() == list(range(20_011))
    assert (place.files(), place.adopter.stuck, place.gaps()) == ([], set(), [])


def test_a_daemon_without_room_does_not_even_begin(place: Place) -> None:
    place.half.full = "quota"
    place.write(ONE, "spool", 0, frames(1, 10))
    place.adopt()
    assert (place.seqs(), place.adopter.stuck) == ([], {ONE.writer})
    place.half.full = ""
    place.adopt()
    assert (place.seqs(), place.adopter.stuck) == (list(range(11)), set())


def test_a_quota_that_is_reached_in_the_middle_stops_the_replay_there(place: Place) -> None:
    place.write(ONE, "spool", 0, frames(1, 30_000))
    place.adopter.scan()
    for _ in range(3):
        place.adopter.step()
    place.half.full = "quota"
    while place.adopter.step():
        place.half.commit()
    assert 0 < place.half.wal.durable_lsn < 30_000
    assert place.adopter.stuck == {ONE.writer}
    place.half.full = ""
    place.adopt()
    assert place.seqs() == list(range(30_001))


def test_more_writers_than_can_be_known_wait(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.half.ingest._writers_max = 2
    for number in (1, 2, 3):
        place.write(start_of(number), "spool", 0, frames(1, 3))
    place.adopt()
    assert len(place.files()) == 1
    assert len(place.adopter.stuck) == 1


# Damage.


@pytest.mark.parametrize(
    "tail", [b"\0", frames(11, 1)[:-1], b"\xff" * 300, bytes(5000)], ids=["a byte", "torn", "rubbish", "zeros"]
)
def test_a_spool_whose_frames_end_before_it_does_is_kept_as_evidence(place: Place, tail: bytes) -> None:
    path = place.write(ONE, "spool", 0, frames(1, 10), tail=tail)
    content = path.read_bytes()
    place.write(ONE, "spool", 1, frames(20, 5))
    place.write(ONE, "journal", 0, frames(25, 5), tail=b"\xff" * 300)
    place.adopt()
    assert place.files() == []
    assert place.seqs() == list(range(30))
    assert place.gaps() == [(11, 19)]
    assert sorted(p.name for p in place.half.state.quarantine.iterdir()) == [path.name, f"{path.name}.reason"]
    assert (place.half.state.quarantine / path.name).read_bytes() == content
    assert str(len(content) - len(tail)) in (place.half.state.quarantine / f"{path.name}.reason").read_text()
    assert place.adopter.quarantined == 1


def test_damage_in_the_middle_of_a_spool_costs_the_record_it_hit_and_is_kept(place: Place) -> None:
    data = bytearray(frames(1, 100))
    data[len(data) // 2] ^= 0xFF
    place.write(ONE, "spool", 0, bytes(data))
    place.write(ONE, "spool", 1, frames(101, 10))
    place.adopt()
    (gap,) = place.gaps()
    assert gap[0] == gap[1]
    assert 45 <= gap[0] <= 55
    assert place.seqs() == list(range(111))
    assert place.adopter.quarantined == 1


def test_evidence_crosses_filesystems(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.write(ONE, "spool", 0, frames(1, 10), tail=b"torn")
    content, real = path.read_bytes(), os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    place.adopt()
    assert place.files() == []
    assert (place.half.state.quarantine / path.name).read_bytes() == content


def test_evidence_that_finds_no_room_stays_where_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.write(ONE, "spool", 0, frames(1, 10), tail=b"torn")

    def rename(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        place.adopt()
    assert path.exists()
    assert "its records are safe" in place.adopter.refused[str(path)]
    place.adopt()
    assert place.files() == []
    assert place.seqs() == list(range(11))


# Crashes, order, leftovers.


@pytest.mark.parametrize("turns", range(8))
def test_a_crash_at_any_turn_takes_every_record_once(place: Place, turns: int) -> None:
    place.write(ONE, "spool", 0, frames(1, 15_000))
    place.write(ONE, "spool", 1, frames(15_001, 5_000))
    place.write(ONE, "journal", 0, frames(20_001, 10) + end_frame(20_011))
    place.adopter.scan()
    for _ in range(turns):
        place.adopter.step()
        place.half.commit()
    place.crash()
    place.adopt()
    assert place.files() == []
    assert place.seqs() == list(range(20_012))


def test_an_earlier_attempt_is_adopted_first(place: Place) -> None:
    attempts = [replace(start_of(number), wall_ns=number) for number in (5, 1, 3, 2, 4)]
    for start in attempts:
        path = place.write(start, "spool", 0, frames(1, 2))
        os.utime(path, ns=(start.wall_ns, start.wall_ns))
    place.adopt()
    found = {start.wall_ns: place.half.writers.get(bytes.fromhex(start.writer)).attempt for start in attempts}
    assert found == {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}


def test_a_message_that_was_still_on_the_way_from_the_dead_writer_is_no_trouble(place: Place) -> None:
    place.half.log(ONE, 0, 5)
    place.write(ONE, "spool", 0, frames(1, 20_000))
    place.adopter.scan()
    place.adopter.step()
    place.half.batch(ONE, 5, frames(5, 10), 10)  # What the socket's queue still held.
    state = place.half.writers.get(bytes.fromhex(ONE.writer))
    place.half.batch(ONE, state.next_seq, frames(state.next_seq, 7), 7)
    place.adopt()
    assert place.seqs() == list(range(20_001))
    assert place.gaps() == []


def test_a_file_whose_writer_was_killed_before_it_came_into_view_is_removed(place: Place) -> None:
    unborn = place.journal / f".{format_name(FileName(ONE.writer, 0, 'journal'))}"
    fresh = place.journal / f".{format_name(FileName(TWO.writer, 0, 'journal'))}"
    held = place.journal / f".{format_name(FileName(writer_id(3), 0, 'journal'))}"
    other = place.journal / ".notes.journal"
    for path in (unborn, fresh, held, other):
        path.write_bytes(b"")
    for path in (unborn, held, other):
        os.utime(path, (1, 1))
    with locked(held):
        place.adopt()
    assert [path.exists() for path in (unborn, fresh, held, other)] == [False, True, True, True]


@pytest.mark.parametrize("size", [0, 1, 512 << 10])
@pytest.mark.parametrize("kind", ["journal", "spool"])
def test_a_file_of_which_a_power_cut_left_the_name_only_is_removed(place: Place, kind: str, size: int) -> None:
    path = place.journal / format_name(FileName(ONE.writer, 0, kind))
    path.write_bytes(bytes(size))
    with locked(path):
        place.adopt()
        assert place.files() == [path.name], "its writer may live"
    place.adopt()
    assert place.files() == []
    place.adopter.scan()
    assert place.adopter.refused == {}


def test_held_names_every_writer_with_a_file_whoever_owns_it(place: Place) -> None:
    path = place.write(living(), "journal", 0, b"")
    with locked(path):
        place.adopt()
        assert place.adopter.held == {bytes.fromhex(ONE.writer)}
    place.adopt()
    place.adopter.scan()
    assert place.adopter.held == set()


def test_directories_that_appear_later_are_looked_into(place: Place) -> None:
    later = place.journal.parent / "later"
    directories = [place.journal]
    place.adopter = Adopter(place.half.ingest, lambda: directories, place.half.state.quarantine)
    place.adopt()
    later.mkdir()
    place.write(ONE, "journal", 0, frames(1, 3)).rename(later / format_name(FileName(ONE.writer, 0, "journal")))
    directories.append(later)
    place.adopt()
    assert place.seqs() == list(range(4))


def test_a_spool_of_200_mb_is_replayed_in_little_memory(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        daemon = node.start_daemon(
            RANKLOG_SEAL_AGE_S="3600", RANKLOG_SEAL_SIZE_BYTES="1G", RANKLOG_RESCAN_INTERVAL_S="0.5"
        )
        before_mb = _peak_mb(daemon.pid)
        path = node.spool / format_name(FileName(ONE.writer, 0, "spool"))
        hidden = path.with_name("being written")
        with hidden.open("wb") as file:
            file.write(encode_start(ONE))
            for seq in range(1, 25_001):
                file.write(frame(Kind.TEXT, seq, {"text": "x" * 8400}))
        assert hidden.stat().st_size > 200 << 20
        hidden.rename(path)
        wait_for(lambda: not path.exists(), "it is taken over")
        assert node.status()["records"] == 25_001
        grown_mb = _peak_mb(daemon.pid) - before_mb
        assert grown_mb < 30, f"{grown_mb:.0f} MB"


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
