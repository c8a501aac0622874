"""The write-ahead log over real files: what is durable when, and what a failing disk may do to it."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingesting import Half, frames, kept, seqs
from ranklog import failpoint, fs
from ranklog.start import encode_start
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.log import Full, NoSegment
from segments import make_state, start_of

ONE, TWO = start_of(1), start_of(2)
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root: run the tests with sudo")


@pytest.fixture
def half(tmp_path: Path) -> Half:
    return Half(make_state(tmp_path / "state"))


def arm(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """Arm failpoints in this process."""
    monkeypatch.setattr(failpoint, "_armed", failpoint._parse(spec))
    monkeypatch.setattr(failpoint, "_passes", {})


def names(state: StateDir) -> list[str]:
    return sorted(path.name for path in state.wal.iterdir())


def test_a_new_wal_is_one_open_segment_that_begins_at_lsn_1(half: Half) -> None:
    assert names(half.state) == ["0000000000000001.open"]
    assert (half.wal.durable_lsn, half.wal.next_lsn, half.wal.empty) == (0, 1, True)


def test_what_is_appended_is_durable_only_after_the_commit(half: Half) -> None:
    half.hello(ONE)
    half.batch(ONE, 0, encode_start(ONE) + frames(1, 4), 5)
    assert (half.wal.next_lsn, half.wal.durable_lsn) == (6, 0)
    assert kept(half.state) == []
    half.commit()
    assert half.wal.durable_lsn == 5
    assert [(r.lsn, r.seq) for r in kept(half.state)] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]


def test_a_commit_is_one_fdatasync_for_all_writers(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(fs, "sync_data", lambda fd: (synced.append(fd), os.fdatasync(fd)))
    for number in range(20):
        start = start_of(number)
        half.hello(start)
        half.batch(start, 0, encode_start(start) + frames(1, 9), 10)
    assert len(half.commit()) == 20
    assert len(synced) == 1
    half.commit()
    assert len(synced) == 1, "nothing pending, nothing to sync"


def test_each_segment_names_a_writer_before_its_first_batch(half: Half) -> None:
    half.log(ONE, 0, 3)
    half.log(TWO, 0, 2)
    half.wal.roll()
    half.log(TWO, 2, 2)
    for path in half.state.wal.iterdir():
        buffer = memoryview(path.read_bytes())
        header, offset = segment.decode_header(buffer)
        known: set[bytes] = set()
        for entry in segment.scan(buffer, header.salt, offset, header.first_lsn):
            assert isinstance(entry, segment.Entry)
            if entry.type == segment.EntryType.WRITER:
                assert bytes(entry.payload[:16]) not in known, "once in a segment"
                known.add(bytes(entry.payload[:16]))
            else:
                assert bytes(entry.payload[:16]) in known


def test_a_roll_seals_the_range_and_the_next_header_holds_what_is_durable(half: Half) -> None:
    half.log(ONE, 0, 3)
    half.log(TWO, 0, 2)
    assert half.wal.roll()
    assert names(half.state) == ["0000000000000001-0000000000000005.wal", "0000000000000006.open"]
    header, _ = segment.decode_header(memoryview((half.state.wal / "0000000000000006.open").read_bytes()))
    assert {mark.writer.hex(): mark.last_seq for mark in header.writers} == {ONE.writer: 2, TWO.writer: 1}
    assert header.first_lsn == 6


def test_an_empty_segment_is_never_sealed(half: Half) -> None:
    assert not half.wal.roll()
    assert names(half.state) == ["0000000000000001.open"]


def test_the_next_segment_exists_durably_before_the_old_one_is_sealed(tmp_path: Path) -> None:
    """The golden order of operations of a commit and a roll, as the kernel saw it."""
    if not Path("/usr/bin/strace").exists():
        pytest.skip("strace is not installed. Run: apt-get install strace")
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from ingesting import Half\nfrom segments import make_state, start_of\n"
        "half = Half(make_state(Path(sys.argv[1])))\nimport os; os.getpgid(0)\n"
        "half.log(start_of(1), 0, 3); os.getpgid(0); half.wal.roll(); os.getpgid(0)"
    )
    trace = tmp_path / "trace"
    calls = "getpgid,openat,pwritev,pwrite64,pwritev2,fdatasync,fsync,rename,unlink,ftruncate"
    subprocess.run(
        ["strace", "-f", "-y", "-o", trace, "-e", f"trace={calls}", sys.executable, "-c", script, tmp_path / "s", *sys.path],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    parts = trace.read_text().split("getpgid(0")
    assert list(_steps(parts[1])) == ["write 1.open", "fdatasync 1.open"]
    assert list(_steps(parts[2])) == [
        "create .4.open", "write .4.open", "fdatasync .4.open", "rename .4.open 4.open", "fsync wal",
        "rename 1.open 1-3.wal", "fsync wal",
    ]  # fmt: skip


def _steps(trace: str) -> Iterator[str]:
    words = {"pwritev2": "write", "pwritev": "write", "pwrite64": "write", "openat": "create"}
    for line in trace.splitlines():
        call, _, rest = line.partition("(")
        call = call.split()[-1] if call.split() else ""
        paths = [part for part in rest.replace("<", '"').replace(">", '"').split('"') if "/wal" in part]
        if not paths or (call == "openat" and "O_CREAT" not in rest):
            continue
        short = [Path(path).name.replace("000000000000000", "") for path in dict.fromkeys(paths)]
        yield " ".join([words.get(call, call), *(short if call == "rename" else short[:1])])


@given(cuts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=25)
def test_whatever_is_appended_committed_and_rolled_is_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int, bool]]
) -> None:
    half = Half(make_state(tmp_path_factory.mktemp("state")))
    next_seq = dict.fromkeys((1, 2, 3), 0)
    for number, count, rolls in cuts:
        half.log(start_of(number), next_seq[number], count)
        next_seq[number] += count
        if rolls:
            half.wal.roll()
    found = kept(half.state)
    assert [r.lsn for r in found] == list(range(1, len(found) + 1))
    for number, count in next_seq.items():
        assert seqs(found, start_of(number)) == list(range(count))
    half.wal.close()


# A full disk.


def test_a_full_disk_hands_everything_back_and_the_wal_goes_on(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    half.log(ONE, 0, 3)
    size = half.wal.size
    half.hello(TWO)
    half.batch(ONE, 3, frames(3, 10), 10)
    half.batch(TWO, 0, encode_start(TWO) + frames(1, 5), 6)

    def no_room(fd: int, buffers: list[bytes], offset: int) -> int:
        os.pwrite(fd, b"".join(buffers)[:700], offset)  # Some of it was written before the disk was full.
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", no_room)
        refused = half.commit()
    assert [(answer.code, answer.fields[3]) for answer in refused] == [("FULL", True)] * 2, "and may be sent again"
    assert (half.state.wal / "0000000000000001.open").stat().st_size == size
    assert (half.wal.next_lsn, half.wal.pending_bytes, half.ingest.pending) == (4, 0, False)
    half.log(ONE, 3, 10)
    half.log(TWO, 0, 6)
    found = kept(half.state)
    assert [r.lsn for r in found] == list(range(1, 20))
    assert (seqs(found, ONE), seqs(found, TWO)) == (list(range(13)), list(range(6)))


@NEEDS_ROOT
def test_a_disk_that_is_really_full_costs_no_record_once_there_is_room_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=True)
    try:
        half = Half(make_state(disk / "state"))
        half.log(ONE, 0, 10)
        half.batch(ONE, 10, frames(10, 8000), 8000)
        assert [answer.code for answer in half.commit()] == ["FULL"]
        assert "full" in half.ingest.met_full
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(NoSegment, match="No space"):
            half.wal.roll()
        assert names(half.state) == ["0000000000000001.open"], "a roll that found no room has changed nothing"
        ballast.unlink()
        half.log(ONE, 10, 100)
        assert half.wal.roll()
        assert half.ingest.met_full == ""
        half.crash()
        assert seqs(kept(half.state), ONE) == list(range(110))
        half.wal.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# A failing disk.


def test_after_a_failed_fdatasync_everything_is_written_again_to_a_new_segment(
    half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    half.log(ONE, 0, 3)
    first = half.state.wal / "0000000000000001.open"
    size = half.wal.size
    half.batch(ONE, 3, frames(3, 5), 5)
    arm(monkeypatch, "wal.sync.before=err")
    assert [answer.durable for answer in half.commit()] == [7]
    assert half.wal.poisoned == 1
    assert names(half.state) == ["0000000000000001-0000000000000003.wal", "0000000000000004.open"]
    assert not first.exists()
    assert (half.state.wal / "0000000000000001-0000000000000003.wal").stat().st_size == size, (
        "what is in doubt was cut off"
    )
    found = kept(half.state)
    assert [(r.lsn, r.seq) for r in found] == [(n + 1, n) for n in range(8)]
    half.log(ONE, 8, 2)
    assert half.wal.durable_lsn == 10


def test_the_poisoned_file_is_never_synced_again(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    half.log(ONE, 0, 3)
    poisoned = (half.state.wal / "0000000000000001.open").stat().st_ino
    half.batch(ONE, 3, frames(3, 5), 5)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    arm(monkeypatch, "wal.sync.before=err")
    half.commit()
    half.log(ONE, 8, 5)
    half.wal.roll()
    assert synced
    assert poisoned not in synced


def test_a_poisoned_segment_without_anything_durable_gives_its_name_to_the_new_one(
    half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    half.hello(ONE)
    half.batch(ONE, 0, encode_start(ONE) + frames(1, 4), 5)
    arm(monkeypatch, "wal.sync.before=err")
    assert [answer.durable for answer in half.commit()] == [4]
    assert names(half.state) == ["0000000000000001.open"]
    half.crash()
    assert seqs(kept(half.state), ONE) == [0, 1, 2, 3, 4]


def test_a_second_failing_segment_ends_the_process_without_an_ack(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    half.log(ONE, 0, 3)
    half.batch(ONE, 3, frames(3, 5), 5)
    fails = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "fdatasync", lambda _fd: (_ for _ in ()).throw(fails))
    with pytest.raises(OSError, match="Input/output"):
        half.commit()
    monkeypatch.undo()
    half.crash()
    assert seqs(kept(half.state), ONE) == [0, 1, 2], "what may never have reached the disk is not taken for durable"
    assert half.hello(ONE, 3)[0].fields[2] == 3, "the client is asked for it again"


@pytest.mark.parametrize("where", ["seg.header.after", "seg.seal.after", "seg.dirsync.after"])
def test_an_error_behind_the_birth_of_the_next_segment_ends_the_process(
    half: Half, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Were the old segment written on, a recovery would cut off what was acknowledged: it ends where the next begins."""
    half.log(ONE, 0, 3)
    arm(monkeypatch, f"{where}=err")
    with pytest.raises(OSError, match="failpoint") as caught:
        half.wal.roll()
    assert not isinstance(caught.value, NoSegment)
    half.crash()
    assert seqs(kept(half.state), ONE) == [0, 1, 2]
    assert half.hello(ONE, 3)[0].fields[2] == 3
    assert half.batch(ONE, 3, frames(3, 2), 2) == []
    half.commit()
    half.crash()
    assert [(r.lsn, r.seq) for r in kept(half.state)] == [(n + 1, n) for n in range(5)]


def test_a_next_segment_that_cannot_be_created_leaves_the_old_one_open(
    half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    half.log(ONE, 0, 3)
    arm(monkeypatch, "seg.create.after=err")
    with pytest.raises(NoSegment):
        half.wal.roll()
    half.log(ONE, 3, 2)
    assert names(half.state) == ["0000000000000001.open"]
    assert half.wal.roll()
    half.crash()
    assert seqs(kept(half.state), ONE) == [0, 1, 2, 3, 4]


def test_a_write_error_that_is_no_lack_of_room_ends_the_process(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    half.log(ONE, 0, 3)
    half.batch(ONE, 3, frames(3, 5), 5)
    arm(monkeypatch, "wal.append.before=err")
    with pytest.raises(OSError, match="failpoint"):
        half.wal.commit()


def test_full_says_which_disk(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    half.hello(ONE)
    half.batch(ONE, 0, encode_start(ONE), 1)

    def no_room(*_: object) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "pwritev", no_room)
    with pytest.raises(Full, match=str(half.state.wal)):
        half.wal.commit()
