from pathlib import Path

import pytest

from ranklog.frame import Kind
from ranklogd.ship.convert import convert_segment
from ranklogd.ship.quarantine import discard_segment, quarantine_segment
from ranklogd.ship.walk import Walk
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import decode_header, scan
from segments import SegmentBuilder, frame, make_state, read_rows, start_of, writer_id

A, B = writer_id(1), writer_id(2)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


def names(state: StateDir) -> list[str]:
    return sorted(path.name for path in state.quarantine.iterdir())


def metrics(*seqs: int) -> bytes:
    return b"".join(frame(Kind.METRICS, seq, {"x": float(seq)}) for seq in seqs)


def with_a_bad_frame() -> SegmentBuilder:
    segment = SegmentBuilder()
    segment.writer(start_of(1))
    segment.writer(start_of(2))
    segment.batch(A, 1, 2, metrics(1, 2))
    segment.batch(B, 1, 2, metrics(1) + frame(Kind.METRICS, 2, {"x": [1]}))
    return segment


def test_a_bad_frame_leaves_an_excerpt_with_its_batch_its_writer_and_the_reason(state: StateDir):
    segment = with_a_bad_frame()
    path = segment.seal(state)
    converted = convert_segment(path, state)
    assert (converted.records, converted.quarantined_records, converted.damaged_stretches) == (4, 1, 0)
    assert names(state) == [f"{path.name}.excerpt", f"{path.name}.excerpt.reason"]
    reason = (state.quarantine / f"{path.name}.excerpt.reason").read_text()
    assert f"writer={B} seq=2 lsn=4 records=1 reason='frame does not decode: Expected" in reason
    buffer = memoryview((state.quarantine / f"{path.name}.excerpt").read_bytes())
    header, offset = decode_header(buffer)
    assert header == segment.header
    assert [bytes(entry.payload[:16]).hex() for entry in scan(buffer, header.salt, offset, 1)] == [B, B]


def test_an_excerpt_explains_itself_as_any_segment_does(state: StateDir):
    path = with_a_bad_frame().seal(state)
    convert_segment(path, state)
    buffer = memoryview((state.quarantine / f"{path.name}.excerpt").read_bytes())
    header, offset = decode_header(buffer)
    portions = list(Walk(buffer, header, 4, 100).portions(offset))
    assert [record.seq for portion in portions for record in portion.records] == [1, 2]
    assert {portion.source.writer for portion in portions} == {B}


def test_a_whole_segment_moved_back_to_the_wal_is_converted_again(state: StateDir):
    path = with_a_bad_frame().seal(state)
    quarantine_segment(path, state, "a bug, mended since")
    (state.quarantine / path.name).rename(path)
    assert convert_segment(path, state).records == 4
    assert len(read_rows(state.outbox)) == 4
    assert not (state.quarantine / f"{path.name}.reason").exists()


def test_a_damaged_segment_is_kept_whole_and_takes_no_second_place_on_the_disk(state: StateDir):
    segment = with_a_bad_frame()
    segment.data[-5] ^= 1
    path = segment.seal(state)
    inode = path.stat().st_ino
    converted = convert_segment(path, state)
    assert converted.damaged_stretches == 1
    assert names(state) == [path.name, f"{path.name}.reason"]
    assert (state.quarantine / path.name).read_bytes() == segment.data
    assert (state.quarantine / path.name).stat().st_ino == inode
    assert "damaged bytes" in (state.quarantine / f"{path.name}.reason").read_text()
    assert not path.exists()


def test_a_sound_segment_leaves_nothing(state: StateDir):
    segment = SegmentBuilder()
    segment.writer(start_of(1))
    segment.batch(A, 1, 1, metrics(1))
    (state.quarantine / f"{segment.name}.reason").write_text("left from a try before it was mended")
    path = segment.seal(state)
    convert_segment(path, state)
    assert names(state) == []
    assert not path.exists()


def test_a_whole_segment_goes_with_its_reason_and_the_command_that_brings_it_back(state: StateDir):
    path = with_a_bad_frame().seal(state)
    quarantine_segment(path, state, "the converter died three times on it \udcff")
    quarantine_segment(path, state, "again, after a crash")
    assert names(state) == [path.name, f"{path.name}.reason"]
    reason = (state.quarantine / f"{path.name}.reason").read_text()
    assert "died three times" in reason
    command = reason.splitlines()[-1].removeprefix("To try again: ")
    assert command == f"mv {state.quarantine / path.name} {state.wal}/"
    assert list(state.wal.iterdir()) == []


def test_discarding_what_is_gone_is_no_error(state: StateDir):
    path = with_a_bad_frame().seal(state)
    discard_segment(path, state)
    discard_segment(path, state)
    assert list(state.wal.iterdir()) == []
    assert names(state) == []
