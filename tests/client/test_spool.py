"""The spool: chunks moved to disk, within a cap, in the first directory that has room."""

import errno
import os
from pathlib import Path

import pytest

from harness import logged, on_disk, small_tmpfs
from ranklog import fs, spool
from ranklog.backlog import Backlog
from ranklog.frame import Kind
from ranklog.journal import Chunk, Journal
from ranklog.spool import Spool
from ranklog.start import Start, encode_start

WRITER = "cd" * 16
START = encode_start(Start(writer=WRITER, project="p", run="r"))


class Source:
    """A journal that chunks come from."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(WRITER, START, [directory], file_size=64 << 10, size_max=64 << 20, wake=lambda: None)
        self.count = 0

    def chunk(self, records: int = 10, pad: int = 100) -> Chunk:
        for _ in range(records):
            assert self.journal.append(Kind.METRICS, None, {"n": self.count, "pad": "x" * pad})
            self.count += 1
        [chunk] = self.journal.collect()
        return chunk


@pytest.fixture
def source(tmp_path: Path):
    made = Source(tmp_path / "journal")
    yield made
    for file in made.journal.files():
        file.remove()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path / "spool"


def test_what_is_taken_is_on_disk_byte_for_byte(source: Source, disk: Path):
    made = Spool(WRITER, START, [disk], size_max=1 << 20)
    chunks = [source.chunk() for _ in range(3)]
    for chunk in chunks:
        copy = made.take(chunk)
        assert (copy.first_seq, copy.next_seq) == (chunk.first_seq, chunk.next_seq)
        assert copy.end - copy.offset == chunk.end - chunk.offset
        assert os.pread(copy.file.fd, copy.end - copy.offset, copy.offset) == os.pread(
            chunk.file.fd, chunk.end - chunk.offset, chunk.offset
        )
    made.sync()
    assert logged(on_disk(disk)[WRITER], "n") == list(range(30))
    [path] = disk.iterdir()
    assert path.read_bytes().count(START) == 1, "record 0 lies at the head, once"


def test_a_file_goes_when_all_in_it_is_released(source: Source, disk: Path):
    made = Spool(WRITER, START, [disk], size_max=1 << 20)
    copies = [made.take(source.chunk()) for _ in range(3)]
    made.sync()
    for copy in copies[:2]:
        made.release(copy)
    assert len(list(disk.iterdir())) == 1
    made.release(copies[2])
    assert list(disk.iterdir()) == []
    assert made.size == 0
    assert made.files() == []
    later = made.take(source.chunk())
    assert later.offset == len(START), "a new file"
    made.release(later)


def test_files_are_closed_at_a_size_and_given_back_one_by_one(source: Source, disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spool, "FILE_SIZE_MAX", 4096)
    made = Spool(WRITER, START, [disk], size_max=1 << 20)
    copies = [made.take(source.chunk()) for _ in range(12)]
    files = len(list(disk.iterdir()))
    assert files == 6
    for released, copy in enumerate(copies, 1):
        made.release(copy)
        assert len(list(disk.iterdir())) == files - released // 2
    assert made.size == 0


def test_at_the_cap_nothing_is_taken_until_something_is_released(source: Source, disk: Path):
    made = Spool(WRITER, START, [disk], size_max=3000)
    first, second, third = (source.chunk() for _ in range(3))
    copy = made.take(first)
    made.take(second)
    with pytest.raises(OSError, match="spool cap of 3000 bytes") as refused:
        made.take(third)
    assert refused.value.errno in fs.NO_SPACE
    made.release(copy)
    made.take(third)
    assert logged(on_disk(disk)[WRITER], "n") == list(range(30))


def test_a_directory_without_room_is_passed_over(source: Source, disk: Path, tmp_path: Path):
    with small_tmpfs(tmp_path / "small") as small:
        made = Spool(WRITER, START, [small, disk], size_max=1 << 20)
        for _ in range(3):
            made.take(source.chunk())
        made.sync()
        assert list(small.iterdir()) == []
        assert logged(on_disk(disk)[WRITER], "n") == list(range(30))


def test_where_all_are_full_that_is_said_and_the_next_try_begins_anew(source: Source, disk: Path, tmp_path: Path):
    with small_tmpfs(tmp_path / "one") as one, small_tmpfs(tmp_path / "two") as two:
        made = Spool(WRITER, START, [one, two], size_max=1 << 20)
        chunk = source.chunk()
        for _ in range(4):
            with pytest.raises(OSError, match="would stay free") as refused:
                made.take(chunk)
            assert refused.value.errno == errno.ENOSPC
        assert len(made.files()) <= 1, "no file is left open for each try"
        made.prefer(disk)
        made.take(chunk)
        assert len(list(disk.iterdir())) == 1
        assert not list(one.iterdir())
        assert not list(two.iterdir())


def test_a_directory_that_takes_no_file_is_passed_over(source: Source, disk: Path, tmp_path: Path):
    made = Spool(WRITER, START, [tmp_path / "missing", disk], size_max=1 << 20)
    made.take(source.chunk())
    assert logged(on_disk(disk)[WRITER], "n") == list(range(10))


def test_with_no_directory_at_all_take_raises(source: Source):
    with pytest.raises(OSError, match="no spool directory"):
        Spool(WRITER, START, [], size_max=1 << 20).take(source.chunk())


def break_fsync(fd: int) -> int:
    """Make fsync fail on a descriptor: /dev/zero takes every write and has none. Returns a copy of what was there."""
    kept, zero = os.dup(fd), os.open("/dev/zero", os.O_RDWR)
    os.dup2(zero, fd)
    os.close(zero)
    return kept


def test_a_file_whose_fsync_failed_is_not_trusted_again_and_nothing_of_it_is_released(
    source: Source, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(spool, "FREE_SIZE_MIN", 0)
    made = Spool(WRITER, START, [disk], size_max=1 << 20)
    backlog = Backlog(source.journal, made)
    for number in range(20):
        source.journal.append(Kind.METRICS, None, {"n": number})
    backlog.collect()
    backlog.spill()
    [safe] = made.files()
    for number in range(20, 40):
        source.journal.append(Kind.METRICS, None, {"n": number})
    backlog.collect()
    kept = break_fsync(safe.fd)
    with pytest.raises(OSError, match="fsync") as failed:
        backlog.spill()
    assert failed.value.errno not in fs.NO_SPACE
    os.dup2(kept, safe.fd)
    os.close(kept)
    assert backlog.spooled_below() == 21, "what was durable before still is"
    backlog.spill()
    assert len(made.files()) == 2, "later chunks go to a new file"
    assert backlog.spooled_below() == 41
    assert logged(on_disk(disk)[WRITER], "n") == list(range(40))
    backlog.acknowledge(40)
    assert list(disk.iterdir()) == []
    assert made.size == 0


def test_the_directory_that_the_daemon_names_is_used_for_later_files(source: Source, disk: Path, tmp_path: Path):
    (tmp_path / "daemon").mkdir()
    made = Spool(WRITER, START, [disk], size_max=1 << 20)
    made.take(source.chunk())
    made.prefer(tmp_path / "daemon")
    made.seal()
    made.take(source.chunk())
    assert len(list(disk.iterdir())) == len(list((tmp_path / "daemon").iterdir())) == 1
