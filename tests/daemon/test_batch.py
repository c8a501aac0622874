import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.frame import Kind, encode_gap
from ranklog.start import encode_start
from ranklogd.ship.batch import Batch, read_batch
from segments import T0_NS, frame, start_of


def read(frames: bytes, first: int, total: int) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    """Return (first seq, last seq, reason or '') of each record, and what was reported."""
    reports: list[tuple[int, int, str]] = []
    batch = Batch(0, 0, 100, T0_NS // 1000, 1000, bytes(16), first, total, memoryview(frames))
    records = []
    for record in read_batch(batch, lambda seq, count, reason: reports.append((seq, count, reason))):
        reason = json.loads((record.texts or {})[0] or "")["reason"] if record.kind == Kind.GAP else ""
        records.append((record.seq, record.last, reason))
    return records, reports


def plain(*seqs: int) -> bytes:
    return b"".join(frame(Kind.METRICS, seq, {"x": 1.0}) for seq in seqs)


def test_a_sound_batch_is_its_records_and_reports_nothing():
    assert read(plain(5, 6, 7), 5, 3) == ([(5, 5, ""), (6, 6, ""), (7, 7, "")], [])


def test_a_gap_frame_covers_its_whole_range():
    frames = plain(5) + encode_gap(6, 1_000_000, "full", T0_NS) + plain(1_000_001)
    assert read(frames, 5, 999_997) == ([(5, 5, ""), (6, 1_000_000, "full"), (1_000_001, 1_000_001, "")], [])


@pytest.mark.parametrize(
    ("frames", "lost"),
    [
        (plain(5, 7), (6, 6, "no frame")),
        (plain(5) + frame(Kind.METRICS, 6, {"x": [1]}) + plain(7), (6, 6, "does not decode")),
        (plain(5) + frame(9, 6, {}) + plain(7), (6, 6, "does not decode")),
        (plain(5, 6), (7, 7, "no frame")),
        (plain(6, 7), (5, 5, "no frame")),
        (b"", (5, 7, "no frame")),
        (b"junk", (5, 7, "checksum")),
        (plain(5, 40, 7), (6, 6, "where 6..7 are due")),
        (plain(5) + encode_gap(6, 9, "reaches too far", T0_NS), (6, 7, "where 6..7 are due")),
    ],
)
def test_what_a_batch_owes_becomes_a_gap_record_and_is_reported(frames, lost):
    records, reports = read(frames, 5, 3)
    gaps = [record for record in records if record[2]]
    assert [gap[:2] for gap in gaps] == [lost[:2]]
    assert lost[2] in gaps[0][2]
    assert reports == [(lost[0], lost[1] - lost[0] + 1, gaps[0][2])]
    assert [seq for first, last, _ in records for seq in range(first, last + 1)] == [5, 6, 7]


def test_a_start_frame_may_stand_before_any_seq():
    start = encode_start(start_of())
    assert read(start + plain(5, 6), 5, 2) == ([(5, 5, ""), (6, 6, "")], [])
    assert read(start + plain(1), 0, 2) == ([(0, 0, ""), (1, 1, "")], [])


def test_a_frame_that_repeats_a_seq_is_reported_and_counts_once():
    records, reports = read(plain(5, 5, 6), 5, 2)
    assert records == [(5, 5, ""), (6, 6, "")]
    assert [count for _, count, _ in reports] == [0]


def test_a_frame_of_a_seq_that_is_not_due_is_reported_apart_from_what_is_lost():
    records, reports = read(plain(5, 40, 6), 5, 3)
    assert records == [(5, 5, ""), (6, 6, ""), (7, 7, "no frame")]
    assert [(seq, count) for seq, count, _ in reports] == [(6, 0), (7, 1)]


def test_bytes_behind_the_last_record_are_reported_and_lose_nothing():
    records, reports = read(plain(5) + b"more", 5, 1)
    assert records == [(5, 5, "")]
    assert [(seq, count) for seq, count, _ in reports] == [(6, 0)]


@given(
    st.lists(
        st.one_of(
            st.integers(0, 12).map(plain),
            st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: encode_gap(*pair, "r", T0_NS)),
            st.integers(0, 12).map(lambda seq: frame(Kind.METRICS, seq, {"x": [1]})),
            st.binary(max_size=12),
        ),
        max_size=12,
    ),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_whatever_the_frames_are_each_seq_of_the_batch_is_accounted_for_once(frames, first, total):
    records, reports = read(b"".join(frames), first, total)
    assert [seq for low, high, _ in records for seq in range(low, high + 1)] == list(range(first, first + total))
    lost = sum(count for _, count, _ in reports)
    assert lost <= total
