"""Recovery: whatever a crash leaves in the WAL directory, what was acknowledged comes back and no lsn is used twice."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingesting import NOW_S, UID, Half, end_frame, frames, kept, kept_in, seqs
from ranklog.errors import FormatError
from ranklog.start import encode_start
from ranklogd.sequence import run_key
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.recover import recover
from segments import NODE, SegmentBuilder, frame, make_state, start_of, writer_id

ONE, TWO = start_of(1), start_of(2)
OPEN = "0000000000000001.open"


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


def built(*batches: tuple[int, int], first_lsn: int = 1) -> SegmentBuilder:
    """A segment of writer 1 with these (first seq, count) batches."""
    builder = SegmentBuilder(first_lsn)
    builder.writer(ONE, attempt=2)
    for first, count in batches:
        builder.batch(ONE.writer, first, count, frames(first, count))
    return builder


def store_id(path: Path) -> str:
    return segment.decode_header(memoryview(path.read_bytes()))[0].store_id


def test_an_empty_directory_is_a_new_store_that_begins_at_lsn_1(state: StateDir) -> None:
    one, other = recover(state, NOW_S), recover(state, NOW_S)
    assert (one.next_lsn, one.marks, one.leftovers, one.notes) == (1, {}, [], [])
    assert len(one.store_id) == 16
    assert one.store_id != other.store_id


def test_a_clean_segment_gives_back_marks_lsn_and_store(state: StateDir) -> None:
    builder = built((1, 3), (4, 2))
    (state.wal / OPEN).write_bytes(builder.data)
    found = recover(state, NOW_S)
    assert (found.next_lsn, found.store_id, found.notes) == (6, builder.header.store_id, [])
    mark = found.marks[bytes.fromhex(ONE.writer)]
    assert (mark.uid, mark.last_seq, mark.attempt, mark.ended_s) == (1000, 5, 2, 0)
    assert (mark.run_key, mark.start_ns) == (run_key(ONE), ONE.wall_ns)


def test_the_header_speaks_for_writers_that_wrote_nothing_since(state: StateDir) -> None:
    mark = segment.WriterMark(7, bytes.fromhex(TWO.writer), 41, 1, b"k" * 8, 0, 5)
    builder = SegmentBuilder(100, [mark])
    builder.writer(ONE)
    builder.batch(ONE.writer, 1, 1, frames(1, 1))
    (state.wal / segment.open_name(100)).write_bytes(builder.data)
    found = recover(state, NOW_S)
    assert found.marks[bytes.fromhex(TWO.writer)] == mark
    assert found.next_lsn == 101


def test_an_end_record_is_found_whether_it_stands_alone_or_behind_others(state: StateDir) -> None:
    builder = SegmentBuilder()
    for number in (1, 2, 3):
        builder.writer(start_of(number))
    builder.batch(writer_id(1), 1, 3, frames(1, 2) + end_frame(3))
    builder.batch(writer_id(2), 1, 1, end_frame(1))
    builder.batch(writer_id(3), 1, 2, frames(1, 2))
    (state.wal / OPEN).write_bytes(builder.data)
    marks = recover(state, NOW_S).marks
    assert [marks[bytes.fromhex(writer_id(n))].ended_s for n in (1, 2, 3)] == [NOW_S, NOW_S, 0]


@pytest.mark.parametrize("payload", [b"", b"\0" * 40, b"\xff" * 40, b"\x01\0\0\0\x00\0\0\0rest"])
def test_frames_that_are_none_do_not_stop_a_recovery(state: StateDir, payload: bytes) -> None:
    builder = SegmentBuilder()
    builder.writer(ONE)
    builder.batch(ONE.writer, 1, 3, payload)
    (state.wal / OPEN).write_bytes(builder.data)
    assert recover(state, NOW_S).next_lsn == 4


def test_a_torn_tail_of_every_length_loses_only_the_torn_entry(state: StateDir) -> None:
    whole = built((1, 3))
    size = len(whole.data)
    data = bytes(built((1, 3), (4, 4)).data)
    for cut in range(size, len(data)):
        (state.wal / OPEN).write_bytes(data[:cut])
        found = recover(state, NOW_S)
        assert found.next_lsn == 4, cut
        assert found.marks[bytes.fromhex(ONE.writer)].last_seq == 3
        assert (state.wal / OPEN).stat().st_size == size, "the tail is cut off"
        assert bool(found.notes) == (cut > size)


@given(at=st.integers(0, 1 << 30), flip=st.integers(1, 255))
@settings(max_examples=300)
def test_a_flipped_byte_anywhere_never_raises_and_never_invents_a_record(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    state = make_state(tmp_path_factory.mktemp("state"))
    data = bytearray(built((1, 3), (4, 2), (6, 5)).data)
    true = {(r.lsn, r.seq) for r in kept_in(_written(state, bytes(data)))}
    at %= len(data)
    data[at] ^= flip
    _written(state, bytes(data))
    found = recover(state, NOW_S)
    assert found.marks[bytes.fromhex(ONE.writer)].last_seq == found.next_lsn - 1
    if any("read without it" in note for note in found.notes):
        assert found.next_lsn == 11, "the header is damaged, and no entry"
        return
    left = {(r.lsn, r.seq) for r in kept_in(state.wal / OPEN)}
    assert left <= true
    assert len(left) >= len(true) - 5, "one entry at most is lost"
    # What the shipper will find frame by frame counts, too: nobody is asked for it again.
    assert 10 <= found.next_lsn <= 11, "one record at most is lost"


def _written(state: StateDir, data: bytes) -> Path:
    (state.wal / OPEN).write_bytes(data)
    return state.wal / OPEN


def test_damage_before_valid_entries_is_told_and_stays_for_the_shipper(state: StateDir) -> None:
    data = bytearray(built((1, 3), (4, 2), (6, 5)).data)
    size_before = len(built((1, 3)).data)
    data[size_before + 60] ^= 0xFF
    (state.wal / OPEN).write_bytes(data)
    found = recover(state, NOW_S)
    assert found.next_lsn == 11
    assert found.marks[bytes.fromhex(ONE.writer)].last_seq == 10
    assert "damaged bytes" in found.notes[0]
    assert (state.wal / OPEN).read_bytes() == data


def test_of_two_open_segments_the_older_counts_up_to_where_the_younger_begins(state: StateDir) -> None:
    """As after a poisoned segment: what was in doubt was written again under the same lsns."""
    older, younger = built((1, 3), (4, 4)), built((4, 2), first_lsn=4)
    (state.wal / OPEN).write_bytes(older.data)
    (state.wal / segment.open_name(4)).write_bytes(younger.data)
    half = Half(state)
    assert half.recovered.next_lsn == 6
    assert [(r.lsn, r.seq) for r in kept(state)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert sorted(path.name for path in state.wal.iterdir()) == [
        "0000000000000001-0000000000000003.wal", "0000000000000004-0000000000000005.wal", "0000000000000006.open",
    ]  # fmt: skip


def test_a_younger_segment_without_entries_takes_the_doubtful_ones_back(state: StateDir) -> None:
    """The crash came between the two opens: no ack was sent for what only the poisoned file holds."""
    (state.wal / OPEN).write_bytes(built((1, 3), (4, 4)).data)
    mark = segment.WriterMark(UID, bytes.fromhex(ONE.writer), 3, 2, run_key(ONE), 0, 0)
    (state.wal / segment.open_name(4)).write_bytes(SegmentBuilder(4, [mark]).data)
    half = Half(state)
    assert half.recovered.next_lsn == 4
    assert half.hello(ONE, 1)[0].fields[2] == 4, "the client is asked for seq 4 again"
    assert sorted(path.name for path in state.wal.iterdir()) == [
        "0000000000000001-0000000000000003.wal", "0000000000000004.open",
    ]  # fmt: skip


def test_an_open_segment_without_entries_gives_its_place_to_the_new_one(state: StateDir) -> None:
    (state.wal / segment.open_name(9)).write_bytes(SegmentBuilder(9).data)
    half = Half(state)
    assert (half.recovered.next_lsn, half.recovered.notes) == (9, [])
    assert [path.name for path in state.wal.iterdir()] == [segment.open_name(9)]


@pytest.mark.parametrize(
    "data", [b"", b"RANK", bytes(4096), bytes(SegmentBuilder().data)[:-1]], ids=["empty", "cut", "zeros", "torn"]
)
def test_an_open_segment_without_a_header_goes_to_quarantine_and_the_store_gets_a_new_id(
    state: StateDir, data: bytes
) -> None:
    (state.wal / segment.open_name(50)).write_bytes(data)
    half = Half(state)
    (kept_file,) = [path for path in state.quarantine.iterdir() if path.suffix != ".reason"]
    assert kept_file.read_bytes() == data
    assert kept_file.name.startswith(segment.open_name(50))
    assert (state.quarantine / f"{kept_file.name}.reason").read_text().strip()
    assert half.recovered.next_lsn == 51
    assert "quarantine" in half.recovered.notes[0]
    half.log(ONE, 0, 3)
    assert half.recovered.store_id != SegmentBuilder().header.store_id


def test_without_an_open_segment_no_lsn_is_used_twice_within_one_store(state: StateDir) -> None:
    """Somebody removed it: which lsns it gave out nobody knows, so what comes now belongs to another store."""
    built((1, 9)).seal(state)
    half = Half(state)
    half.log(TWO, 0, 3)
    half.wal.roll()
    sealed = sorted(path for path in state.wal.iterdir() if path.suffix == ".wal")
    assert [path.name for path in sealed] == [
        "0000000000000001-0000000000000009.wal", "000000000000000a-000000000000000c.wal",
    ]  # fmt: skip
    assert store_id(sealed[0]) != store_id(sealed[1])


def test_the_outbox_counts_where_the_wal_is_empty(state: StateDir) -> None:
    (state.outbox / "0000000000000001-0000000000000040.wal.tmp").mkdir()
    (state.outbox / "0000000000000041-0000000000000050.wal").mkdir()
    assert recover(state, NOW_S).next_lsn == 0x51


@pytest.mark.parametrize("how", ["magic", "version"])
def test_a_segment_of_a_later_format_is_refused_in_words_and_not_touched(state: StateDir, how: str) -> None:
    data = bytes(SegmentBuilder().data)
    if how == "magic":
        data = data[:7] + b"2" + bytes(8) + data[16:]
    else:
        data = _with_version(2)
    (state.wal / OPEN).write_bytes(data)
    with pytest.raises(FormatError, match="upgrade ranklog"):
        recover(state, NOW_S)
    assert (state.wal / OPEN).read_bytes() == data


def _with_version(version: int) -> bytes:
    import zlib

    import msgpack

    meta = msgpack.packb({
        "version": version, "node": NODE, "store_id": "0" * 16, "first_lsn": 1, "boot": "", "salt": 1, "writers": [],
    })  # fmt: skip
    sized = len(meta).to_bytes(4, "little") + meta
    return segment.MAGIC + zlib.crc32(sized).to_bytes(4, "little") + sized


def test_what_was_never_given_a_name_is_removed(state: StateDir) -> None:
    (state.wal / f".{OPEN}").write_bytes(b"half a header")
    recover(state, NOW_S)
    assert list(state.wal.iterdir()) == []


def test_files_of_others_are_left_alone(state: StateDir) -> None:
    for name in ("notes.txt", "0000000000000001-0000000000000003.tries", "1.open", "g000000000000001.open"):
        (state.wal / name).write_bytes(b"mine")
    Half(state)
    assert {"notes.txt", "0000000000000001-0000000000000003.tries", "1.open"} <= {p.name for p in state.wal.iterdir()}


def test_a_batch_whose_writer_is_not_explained_still_counts(state: StateDir) -> None:
    builder = SegmentBuilder()
    builder.batch(ONE.writer, 7, 2, frames(7, 2), uid=33)
    (state.wal / OPEN).write_bytes(builder.data)
    mark = recover(state, NOW_S).marks[bytes.fromhex(ONE.writer)]
    assert (mark.uid, mark.last_seq) == (33, 8)


def test_a_start_frame_that_does_not_decode_costs_the_writer_its_attempts_only(state: StateDir) -> None:
    builder = SegmentBuilder()
    builder._entry(segment.EntryType.WRITER, 1000, segment.WRITER.pack(bytes.fromhex(ONE.writer), 3), frame(0, 0, 5))
    builder.batch(ONE.writer, 1, 2, frames(1, 2))
    (state.wal / OPEN).write_bytes(builder.data)
    mark = recover(state, NOW_S).marks[bytes.fromhex(ONE.writer)]
    assert (mark.last_seq, mark.attempt, mark.run_key) == (2, 3, b"")


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("log"), st.integers(1, 3), st.integers(1, 9)),
            st.tuples(st.just("lost"), st.integers(1, 3), st.integers(1, 9)),
            st.tuples(st.just("roll"), st.just(0), st.just(0)),
            st.tuples(st.just("crash"), st.just(0), st.just(0)),
            st.tuples(st.just("torn"), st.integers(1, 60), st.just(0)),
        ),
        max_size=25,
    )
)
@settings(max_examples=60)
def test_any_sequence_of_logging_rolling_and_crashing_keeps_each_acknowledged_record_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """`lost` is written but never committed; `torn` is a crash with rubbish behind the last entry."""
    state = make_state(tmp_path_factory.mktemp("state"))
    half = Half(state)
    acked = dict.fromkeys((1, 2, 3), 0)
    stores = set()
    for what, number, count in steps:
        if what == "log":
            start = start_of(number)
            expected = half.hello(start, 0)[0].fields[2]
            assert expected == acked[number]
            data = frames(expected, count) if expected else encode_start(start) + frames(1, count - 1)
            assert half.batch(start, expected, data, count) == []
            half.commit()
            acked[number] = expected + count
        elif what == "lost" and acked[number]:
            start = start_of(number)
            half.hello(start, 0)
            half.batch(start, acked[number], frames(acked[number], count), count)
            half.crash()
        elif what == "roll":
            half.wal.roll()
        elif what == "crash":
            half.crash()
        elif what == "torn":
            path = max(state.wal.glob("*.open"))
            path.write_bytes(path.read_bytes() + bytes(range(number)))
            half.crash()
        stores.add(half.recovered.store_id)
    half.crash()
    found = kept(state)
    assert len({r.lsn for r in found}) == len(found), "no lsn twice"
    assert [r.lsn for r in found] == sorted(r.lsn for r in found)
    for number, count in acked.items():
        assert seqs(found, start_of(number)) == list(range(count))
    assert len(stores) <= 1
    half.wal.close()
