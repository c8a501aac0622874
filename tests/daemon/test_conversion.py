import errno
import resource
from pathlib import Path

import pytest

from ranklog.frame import Kind
from ranklogd.config import Config
from ranklogd.ship.conversion import VALUES_MAX, Conversion
from ranklogd.ship.tries import Tries
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import parse_sealed
from segments import SegmentBuilder, frame, make_state, read_rows, start_of


class Clock:
    """Time that passes only when told."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(state: StateDir, clock: Clock) -> Conversion:
    return make(state, clock)


def make(state: StateDir, clock: Clock) -> Conversion:
    conversion = Conversion(state, Config(state_dir=state.root), clock=clock, dice=lambda: 1.0)
    conversion.start()
    return conversion


def seal(state: StateDir, number: int, records: int = 3, keys: int = 2) -> Path:
    """Write sealed segment `number` with that many records of one writer."""
    start = start_of(number)
    builder = SegmentBuilder(first_lsn=number * 1000)
    builder.writer(start)
    frames = b"".join(frame(Kind.METRICS, 1 + i, {f"k{j}": i / 2 for j in range(keys)}) for i in range(records))
    builder.batch(start.writer, 1, records, frames)
    return builder.seal(state)


def block(state: StateDir, segment: Path) -> Path:
    """Make the conversion of one segment fail through nobody else's fault: a file stands where it must build."""
    path = state.outbox / f"{segment.name}.tmp"
    path.write_text("in the way")
    return path


def test_segments_are_converted_oldest_first_and_leave_the_wal(line, state):
    names = [seal(state, number).name for number in (3, 1, 2)]
    done = []
    while (converted := line.step()) is not None:
        assert converted.rows == 6
        done.append(next(name for name in names if not (state.wal / name).exists() and name not in done))
    assert done == sorted(names)
    assert list(state.wal.iterdir()) == []
    assert len(read_rows(state.outbox)) == 18
    assert line.last_error == ""


def test_what_is_no_sealed_segment_is_left_alone(line, state):
    (state.wal / "0000000000000001.open").write_bytes(b"RANKWAL1")
    (state.wal / "notes.txt").write_text("hello")
    assert line.step() is None
    assert len(list(state.wal.iterdir())) == 2


def test_one_bad_segment_does_not_stop_the_line_is_tried_again_and_goes_to_quarantine_in_the_end(line, state, clock):
    bad, good = seal(state, 1), seal(state, 2)
    block(state, bad)
    assert line.step() is not None
    assert not good.exists()
    assert bad.name in line.last_error
    for strikes in range(1, len(VALUES_MAX)):
        assert Tries(bad).read().strikes == strikes
        assert line.step() is None, "not before its time"
        clock.now_s += 1000
        assert line.step() is None
    assert bad.exists()
    clock.now_s += 1000
    converted = line.step()
    assert converted is not None
    assert converted.damaged_stretches == 1
    assert not bad.exists()
    assert parse_sealed(bad.name) is not None
    assert (state.quarantine / bad.name).stat().st_size > 100
    reason = (state.quarantine / f"{bad.name}.reason").read_text()
    assert "3 tries to convert it failed" in reason
    assert "FileExistsError" in reason
    assert list(state.wal.iterdir()) == []
    assert line.step() is None
    assert line.last_error == ""


def test_a_segment_whose_trouble_passes_is_converted_and_its_strikes_are_forgotten(line, state, clock):
    bad = seal(state, 1)
    in_the_way = block(state, bad)
    assert line.step() is None
    in_the_way.unlink()
    clock.now_s += 1000
    assert line.step() is not None
    assert list(state.wal.iterdir()) == []


def test_after_a_strike_the_cuts_are_smaller(line, state, clock):
    bad = seal(state, 1, records=1000, keys=70)
    in_the_way = block(state, bad)
    assert line.step() is None
    in_the_way.unlink()
    clock.now_s += 1000
    converted = line.step()
    assert converted is not None
    assert converted.values == 70_000
    assert len(converted.shards) >= 2
    assert len({(row["lsn"], row["key"]) for row in read_rows(state.outbox)}) == 70_000


def test_a_full_disk_is_no_strike_however_often_it_is_met(line, state, clock):
    seal(state, 1, records=1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for _ in range(10):
            assert line.step() is None
            clock.now_s += 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(errno.EFBIG) in line.last_error
    assert list(state.quarantine.iterdir()) == []
    assert line.step() is not None
    assert len(read_rows(state.outbox)) == 2000


def test_a_segment_that_died_on_us_goes_behind_the_others_and_is_converted_all_the_same(line, state):
    first, second = seal(state, 1), seal(state, 2)
    Tries(first)._path.write_text("begin oom_kills=99999999\n" * 50)
    assert line.sealed() == [second, first]
    assert line.step() is not None
    assert not second.exists()
    assert line.step() is not None
    assert list(state.wal.iterdir()) == []
    assert list(state.quarantine.iterdir()) == []


def test_a_new_process_removes_what_the_last_one_left_unfinished(line, state, clock):
    segment = seal(state, 1)
    (state.outbox / f"{segment.name}.tmp" / "v1").mkdir(parents=True)
    (state.outbox / f"{segment.name}.tmp" / "v1" / "half").write_bytes(b"x")
    (state.wal / "0000000000000007-0000000000000008.tries").write_text("begin oom_kills=0\n")
    again = make(state, clock)
    assert list(state.outbox.iterdir()) == []
    assert [path.name for path in state.wal.iterdir()] == [segment.name]
    assert again.step() is not None


def test_hurry_ends_every_wait(line, state):
    in_the_way = block(state, seal(state, 1))
    assert line.step() is None
    in_the_way.unlink()
    assert line.step() is None
    line.hurry()
    assert line.step() is not None
