"""The whole of reading a segment, in memory: walk, salvage and source together, with damage at every byte."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from ranklog.frame import Kind, encode_gap
from ranklog.start import encode_start
from ranklogd.ship.walk import REASONS_MAX, Portion, Walk
from ranklogd.wal.segment import UID_UNKNOWN, WriterMark, decode_header, parse_sealed
from segments import NODE, STORE_ID, T0_NS, SegmentBuilder, frame, start_of, writer_id

A, B = writer_id(0xA), writer_id(0xB)


class Row(NamedTuple):
    project: str
    run: str
    writer: str
    lsn: int
    first: int
    last: int
    kind: int
    told: object


def walk(data: bytes, name: str, values_max: int = 600_000) -> tuple[list[Row], Walk]:
    buffer = memoryview(data)
    header, offset = decode_header(buffer)
    lsns = parse_sealed(name)
    assert lsns is not None
    walked = Walk(buffer, header, lsns[1], values_max)
    return [row for portion in walked.portions(offset) for row in rows(portion)], walked


def rows(portion: Portion) -> Iterator[Row]:
    source = portion.source
    assert portion.values == sum(len(record.keys) for record in portion.records)
    for record in portion.records:
        lsn = max(record.seq + portion.lsn_offset, portion.lsn_min)
        told = (record.keys, tuple(record.values), record.texts)
        yield Row(source.project, source.run, source.writer, lsn, record.seq, record.last, record.kind, told)


def metrics(first: int, count: int, tag: float = 0.0) -> bytes:
    return b"".join(frame(Kind.METRICS, first + i, {"x": first + i + tag, "y": -1.0}, step=i) for i in range(count))


def small_segment() -> SegmentBuilder:
    """Two writers, A known from before (5 is due), B new; four batches."""
    segment = SegmentBuilder(first_lsn=100, marks=[WriterMark(1000, bytes.fromhex(A), 4, 0, b"k" * 8, 0)])
    segment.writer(start_of(0xA))
    segment.batch(A, 5, 3, metrics(5, 3))
    segment.writer(start_of(0xB, run="run-2", rank=1))
    segment.batch(B, 0, 2, encode_start(start_of(0xB, run="run-2", rank=1)) + metrics(1, 1, 0.5))
    segment.batch(A, 8, 2, metrics(8, 2))
    segment.batch(B, 2, 2, metrics(2, 2, 0.5))
    return segment


def test_records_get_consecutive_lsns_and_their_writers_columns():
    segment = small_segment()
    found, walked = walk(bytes(segment.data), segment.name)
    assert [(row.writer, row.first, row.lsn) for row in found] == [
        (A, 5, 100), (A, 6, 101), (A, 7, 102), (B, 0, 103), (B, 1, 104),
        (A, 8, 105), (A, 9, 106), (B, 2, 107), (B, 3, 108),
    ]  # fmt: skip
    assert {row.run for row in found if row.writer == B} == {"run-2"}
    assert walked.evidence.reasons == []


def test_entries_beyond_the_last_lsn_of_the_name_do_not_count():
    segment = small_segment()
    for last in range(99, 109):
        found, walked = walk(bytes(segment.data), f"{100:016x}-{last:016x}.wal")
        whole = [end for end in (102, 104, 106, 108) if end <= last]
        if last in (99, 102, 104, 106, 108):
            assert max((row.lsn for row in found), default=99) == (whole[-1] if whole else 99)
            assert walked.evidence.damaged_stretches == 0
        else:
            # No daemon names a segment so; still no row may lie beyond its name.
            assert all(row.lsn <= last for row in found)
            assert walked.evidence.reasons_count > 0


def test_an_entry_beyond_the_last_lsn_does_not_count_where_the_last_ones_are_damaged_either():
    segment = small_segment()
    data = bytearray(segment.data)
    place = data.index(metrics(8, 2))
    data[place - 60 : place + len(metrics(8, 2))] = bytes(60 + len(metrics(8, 2)))
    found, _ = walk(bytes(data), f"{100:016x}-{106:016x}.wal")
    assert [(row.writer, row.first, row.last) for row in found][5:] == [(bytes(16).hex(), 105, 106)]


def test_records_among_damaged_bytes_are_not_taken_where_no_lsn_is_missing():
    segment = small_segment()
    whole = bytes(segment.data)
    place = whole.index(metrics(8, 2)) - 68  # Where the entry of A's second batch begins.
    stale = bytearray(whole[place : place + 68 + len(metrics(8, 2))])
    stale[4] ^= 1
    found, walked = walk(whole[:place] + bytes(stale) + whole[place:], segment.name)
    assert [row.lsn for row in found] == list(range(100, 109))
    assert walked.evidence.damaged_stretches == 1


def test_garbage_behind_the_last_lsn_is_no_damage():
    segment = small_segment()
    found, walked = walk(bytes(segment.data) + b"\xff" * 500 + bytes(segment.data[-200:]), segment.name)
    assert len(found) == 9
    assert walked.evidence.damaged_stretches == 0


def test_attempt_is_the_larger_of_environment_and_daemon_and_missing_fields_are_filled():
    segment = SegmentBuilder()
    segment.writer(start_of(0xA, attempt=2, node="", rank=None), attempt=1)
    segment.batch(A, 1, 1, metrics(1, 1))
    segment.writer(start_of(0xB, attempt=2, role="rollout"), attempt=0xFFFF_FFFF)
    segment.batch(B, 1, 1, metrics(1, 1), uid=UID_UNKNOWN)
    buffer = memoryview(bytes(segment.data))
    header, offset = decode_header(buffer)
    one, two = Walk(buffer, header, 2, 100).portions(offset)
    assert one.source[3:] == (None, None, NODE, 2)
    assert one.uid == 1000
    assert (two.source.attempt, two.source.role, two.uid) == ((1 << 31) - 1, "rollout", None)
    assert one.recv_us == (T0_NS + 1_000_000) // 1000


def test_records_of_a_writer_without_a_writer_entry_are_kept_under_lost():
    segment = SegmentBuilder()
    segment.batch(A, 5, 2, metrics(5, 2))
    found, walked = walk(bytes(segment.data), segment.name)
    assert {(row.project, row.run, row.writer) for row in found} == {("_lost", f"writer-{A}", A)}
    assert [row.first for row in found] == [5, 6]
    assert walked.evidence.records == 2
    assert "no WRITER entry" in walked.evidence.reasons[0]


def test_a_start_frame_in_its_first_batch_explains_a_writer_too():
    segment = SegmentBuilder()
    segment.batch(A, 0, 2, encode_start(start_of(0xA)) + metrics(1, 1))
    found, walked = walk(bytes(segment.data), segment.name)
    assert {(row.project, row.run) for row in found} == {("demo", "run-1")}
    assert walked.evidence.records == 0


def test_a_start_frame_of_another_writer_explains_nobody():
    segment = SegmentBuilder(marks=[WriterMark(1000, bytes.fromhex(A), 4, 0, b"k" * 8, 0)])
    segment.writer(start_of(0xA))
    segment.data[-(len(encode_start(start_of(0xA))) + 20)] ^= 1  # Reached by no checksum but the entry's.
    segment.batch(A, 5, 1, metrics(5, 1))
    found, walked = walk(bytes(segment.data), segment.name)
    assert [row.project for row in found] == ["_lost"]
    assert walked.evidence.damaged_stretches == 1


@pytest.mark.parametrize(
    ("first", "count", "name"),
    [(1 << 63, 2, None), ((1 << 64) - 1, 1, None), (5, 0xFFFF_FFFF, f"{1:016x}-{9:016x}.wal")],
)
def test_numbers_that_cannot_be_become_one_gap_within_the_segments_lsns(first, count, name):
    segment = SegmentBuilder()
    segment.writer(start_of(0xA))
    segment.batch(A, first, count, metrics(5, 2))
    found, walked = walk(bytes(segment.data), name or segment.name)
    (gap,) = found
    assert (gap.kind, gap.lsn, gap.run) == (Kind.GAP, 1, "run-1")
    assert walked.evidence.records == count


def test_portions_are_small_whatever_a_batch_holds():
    segment = SegmentBuilder()
    segment.writer(start_of(0xA))
    ten = {f"k{k}": 1.0 for k in range(10)}
    segment.batch(A, 0, 5_000, b"".join(frame(Kind.METRICS, i, ten) for i in range(5_000)))
    segment.batch(A, 5_000, 20, b"".join(frame(Kind.TEXT, 5_000 + i, {"t": "x" * 200_000}) for i in range(20)))
    buffer = memoryview(bytes(segment.data))
    header, offset = decode_header(buffer)
    sizes = [(p.values, p.size_bytes) for p in Walk(buffer, header, 5_020, 1_000).portions(offset)]
    assert max(values for values, _ in sizes) <= 1_009
    assert max(size for _, size in sizes) < 1_300_000
    assert sum(values for values, _ in sizes) == 50_020


def test_reasons_are_bounded_and_all_counted():
    segment = SegmentBuilder()
    segment.writer(start_of(0xA))
    bad = b"".join(frame(99, i, {}) if i % 2 else metrics(i, 1) for i in range(4_000))
    segment.batch(A, 0, 4_000, bad)
    found, walked = walk(bytes(segment.data), segment.name)
    assert len(found) == 4_000
    assert len(walked.evidence.reasons) == REASONS_MAX
    assert (walked.evidence.reasons_count, walked.evidence.records) == (2_000, 2_000)


def account(found: list[Row], original: list[Row]) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Check that nothing is invented and nothing unaccounted for; return (records lost, records in the wrong run)."""
    known = {(row.writer, row.first): row for row in original}
    by_seq_and_told = {(row.first, row.last, row.kind, str(row.told)) for row in original}
    seen, misfiled = set(), set()
    for row in found:
        if row.kind == Kind.GAP:
            continue
        if row.project == "_lost":
            # The bytes of a writer's id have no checksum of their own: whose record it is cannot be told any more.
            assert (row.first, row.last, row.kind, str(row.told)) in by_seq_and_told
            misfiled.add(row.lsn)
        else:
            assert known[row.writer, row.first][5:] == row[5:]
            assert (row.writer, row.first) not in seen, "twice"
            seen.add((row.writer, row.first))
    lost = {key for key in known if key not in seen}
    for writer, seq in lost:
        lsn = known[writer, seq].lsn
        gaps = [row for row in found if row.kind == Kind.GAP]
        assert (
            lsn in misfiled
            or any(gap.writer == writer and gap.first <= seq <= gap.last for gap in gaps)
            or any(gap.project == "_lost" and gap.first <= lsn <= gap.last for gap in gaps)
        ), (writer, seq, lsn)
    return lost, {key for key in lost if known[key].lsn in misfiled}


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_a_flipped_bit_anywhere_loses_one_record_or_the_fields_around_it(bit):
    segment = small_segment()
    original, _ = walk(bytes(segment.data), segment.name)
    _, start = decode_header(memoryview(bytes(segment.data)))
    costs: dict[int, int] = {}
    for offset in range(start, len(segment.data)):
        data = bytearray(segment.data)
        data[offset] ^= bit
        found, walked = walk(bytes(data), segment.name)
        lost, misfiled = account(found, original)
        assert walked.evidence.damaged_stretches == 1
        cost = len(lost - misfiled)
        costs[cost] = costs.get(cost, 0) + 1
    # Most of a segment is frames and headers: there one flipped bit costs one record, or none at all.
    assert max(costs) <= 3, "more than one entry"
    assert costs.get(2, 0) + costs.get(3, 0) < 0.02 * sum(costs.values()), costs


def test_a_segment_cut_at_any_length_keeps_what_is_whole_and_accounts_for_the_rest():
    segment = small_segment()
    original, _ = walk(bytes(segment.data), segment.name)
    _, start = decode_header(memoryview(bytes(segment.data)))
    kept = []
    for size in range(start, len(segment.data)):
        found, walked = walk(bytes(segment.data[:size]), segment.name)
        lost, _ = account(found, original)
        kept.append(len(original) - len(lost))
        assert walked.evidence.damaged_stretches == 1
    assert kept == sorted(kept)
    assert set(kept) == set(range(9))


@pytest.mark.parametrize("size", [16, 200, 512])
def test_a_hole_of_zeros_anywhere_is_accounted_for(size):
    segment = small_segment()
    original, _ = walk(bytes(segment.data), segment.name)
    _, start = decode_header(memoryview(bytes(segment.data)))
    for offset in range(start, len(segment.data) - size, 7):
        data = bytearray(segment.data)
        data[offset : offset + size] = bytes(size)
        account(walk(bytes(data), segment.name)[0], original)


def test_what_damage_took_from_a_writer_shows_as_its_gap_once_it_goes_on():
    segment = small_segment()
    whole = bytes(segment.data)
    second = whole.index(metrics(5, 1)) - 28  # Where the payload of A's first batch begins.
    data = bytearray(whole)
    data[second : second + 28 + len(metrics(5, 3))] = bytes(28 + len(metrics(5, 3)))
    found, _ = walk(bytes(data), segment.name)
    gaps = [row for row in found if row.kind == Kind.GAP]
    assert [(gap.project, gap.writer, gap.first, gap.last) for gap in gaps] == [
        ("_lost", bytes(16).hex(), 100, 102),
        ("demo", A, 5, 7),
    ]
    assert gaps[0].run == f"store-{STORE_ID}"
    assert json.loads(gaps[1].told[2][0])["reason"] == "damaged WAL segment"
    assert gaps[1].lsn == 105, "the lsn of the batch that shows it, never one of an earlier cut"


def test_a_healthy_segment_that_begins_behind_the_expected_seq_claims_no_loss():
    segment = SegmentBuilder()
    segment.writer(start_of(0xA))
    segment.batch(A, 500, 2, metrics(500, 2))
    found, walked = walk(bytes(segment.data), segment.name)
    assert [row.kind for row in found] == [Kind.METRICS, Kind.METRICS]
    assert walked.evidence.reasons == []


def test_gap_frames_of_the_client_are_no_evidence():
    segment = SegmentBuilder()
    segment.writer(start_of(0xA))
    segment.batch(A, 5, 100, encode_gap(5, 104, "full", T0_NS))
    segment.batch(A, 105, 1, metrics(105, 1))
    found, walked = walk(bytes(segment.data), segment.name)
    assert [(row.first, row.last, row.lsn) for row in found] == [(5, 104, 1), (105, 105, 101)]
    assert walked.evidence.reasons == []
