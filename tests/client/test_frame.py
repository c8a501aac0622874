"""Frames as literal bytes: what a version wrote once, every later one must read."""

from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import FormatError
from ranklog.frame import (
    FRAME_SIZE_MAX,
    GAP_SIZE_MAX,
    HEADER,
    JSON_EXT,
    Kind,
    Span,
    body_at,
    decode_body,
    decode_gap,
    encode_frame,
    encode_gap,
    head,
    spans,
)
from ranklog.start import Start, decode_start, encode_start

WALL_NS = 1_700_000_000_000_000_000
METRICS = (
    b"\x14G\xf7T\x1f\x00\x00\x00"  # crc, size 31
    b"\x95\x01\x01\xcf\x17\x97\x9c\xfe6*\x00\x00\x07\x82\xa4loss\xcb?\xe0\x00\x00\x00\x00\x00\x00\xa1n\x03"
)
GAP = (
    b"\xbc\x1a[A'\x00\x00\x00"
    b"\x95\x07\x02\xcf\x17\x97\x9c\xfe6*\x00\x00\xc0\x83\xa5first\x02\xa4last\x05\xa6reason\xa4full"
)
GOLDEN = (Path(__file__).parent.parent / "golden" / "frames_v1.bin").read_bytes()
START = Start(
    writer="00112233445566778899aabbccddeeff", project="llama 3", run="r01", name="brave-river-1", tags=["a", "ß"],
    rank=3, local_rank=1, world_size=8, local_world_size=2, node_rank=1, role="rollout", node="node-7", attempt=2,
    pid=4711, pid_start=123456, pid_ns=4026531836, boot="054b0bd2-49ab-466e-b956-eee60c04d751", client="0.1",
    wall_ns=WALL_NS,
)  # fmt: skip
BODIES = [
    [Kind.METRICS, 1, WALL_NS, 0, {"loss": 0.5, "n": 3, "ok": True, "none": None, "word": "ß"}],
    [Kind.SYSTEM, 2, WALL_NS, None, {"gpu/0/power": float("inf")}],
    [Kind.CONFIG, 3, WALL_NS, None, {"layers": msgpack.ExtType(JSON_EXT, b"[1,2]")}],
    [Kind.ALERT, 4, WALL_NS, None, {"title": "t", "text": "x", "level": "WARN"}],
    [Kind.TEXT, 5, WALL_NS, -1, {"stdout": "hello"}],
]


def golden_frames() -> list[bytes]:
    frames = [encode_start(START), *(encode_frame(msgpack.packb(body)) for body in BODIES)]
    frames.append(encode_gap(6, 9, "full", WALL_NS))
    frames.append(encode_frame(msgpack.packb([Kind.END, 10, WALL_NS, None, {"exit_code": 0, "last": 10}])))
    return frames


def test_a_metrics_frame_has_these_bytes() -> None:
    body = msgpack.packb([Kind.METRICS, 1, WALL_NS, 7, {"loss": 0.5, "n": 3}])
    assert encode_frame(body) == METRICS
    assert body_at(memoryview(METRICS), 0) == body


def test_a_gap_frame_has_these_bytes() -> None:
    assert encode_gap(2, 5, "full", WALL_NS) == GAP
    assert decode_gap(GAP[8:]) == (2, 5, "full")


def test_the_golden_file_is_what_this_version_writes_and_reads() -> None:
    frames = golden_frames()
    # The start frame gains fields over time, and old ones stay readable; all others stay as they are, byte by byte.
    assert GOLDEN.endswith(b"".join(frames[1:]) + bytes(64))
    found = list(spans(memoryview(GOLDEN)))
    assert [(span.kind, span.first, span.last) for span in found] == [
        (Kind.START, 0, 0), (Kind.METRICS, 1, 1), (Kind.SYSTEM, 2, 2), (Kind.CONFIG, 3, 3), (Kind.ALERT, 4, 4),
        (Kind.TEXT, 5, 5), (Kind.GAP, 6, 9), (Kind.END, 10, 10),
    ]  # fmt: skip
    assert found[-1].end == len(GOLDEN) - 64
    assert decode_start(GOLDEN[8 : found[0].end]) == START
    assert [decode_body(GOLDEN[span.offset + 8 : span.end]) for span in found[1:6]] == BODIES


@pytest.mark.parametrize("cut", range(len(METRICS)))
def test_a_cut_frame_is_no_frame_at_every_length(cut: int) -> None:
    assert body_at(memoryview(METRICS[:cut]), 0) is None
    assert body_at(memoryview(METRICS[:cut] + bytes(64)), 0) is None


@pytest.mark.parametrize("at", range(len(METRICS)))
def test_a_flipped_bit_is_no_frame_at_every_place(at: int) -> None:
    for bit in range(8):
        damaged = bytearray(METRICS)
        damaged[at] ^= 1 << bit
        assert body_at(memoryview(bytes(damaged) + bytes(64)), 0) is None


@pytest.mark.parametrize("at", range(0, len(GOLDEN) - 64, 7))
def test_frames_before_the_damage_are_read_and_none_behind_it(at: int) -> None:
    whole = list(spans(memoryview(GOLDEN)))
    damaged = bytearray(GOLDEN)
    damaged[at] ^= 0x10
    assert list(spans(memoryview(damaged))) == [span for span in whole if span.end <= at]


def test_zeros_end_a_preallocated_file() -> None:
    assert list(spans(memoryview(bytes(4096)))) == []
    assert body_at(memoryview(b""), 0) is None
    assert body_at(memoryview(METRICS), len(METRICS)) is None


def test_a_stale_frame_of_equal_size_does_not_come_back() -> None:
    def frame(seq: int) -> bytes:
        return encode_frame(msgpack.packb([Kind.METRICS, seq, WALL_NS, 0, {"x": 0.5}]))

    file = frame(100) + frame(101) + frame(50) + frame(51)
    assert [span.first for span in spans(memoryview(file))] == [100, 101]
    assert [span.first for span in spans(memoryview(file), expected=100)] == [100, 101]
    assert list(spans(memoryview(file), expected=99)) == []


def test_a_gap_frame_stands_for_its_whole_range() -> None:
    after = encode_frame(msgpack.packb([Kind.METRICS, 6, WALL_NS, 0, {}]))
    wrong = encode_frame(msgpack.packb([Kind.METRICS, 3, WALL_NS, 0, {}]))
    assert list(spans(memoryview(GAP + after))) == [
        Span(0, len(GAP), Kind.GAP, 2, 5), Span(len(GAP), len(GAP + after), Kind.METRICS, 6, 6),
    ]  # fmt: skip
    assert len(list(spans(memoryview(GAP + wrong)))) == 1


def test_a_start_frame_may_stand_before_any_seq() -> None:
    file = encode_start(START) + GAP
    assert [(span.first, span.last) for span in spans(memoryview(file))] == [(0, 0), (2, 5)]


@pytest.mark.parametrize("size", [FRAME_SIZE_MAX + 1, 0xFFFFFFFF, 0x7FFFFFFF])
def test_a_huge_length_is_refused_before_anything_is_read(size: int) -> None:
    assert body_at(memoryview(HEADER.pack(0, size) + bytes(64)), 0) is None


def test_the_largest_frame_is_read_and_one_byte_more_is_not() -> None:
    assert body_at(memoryview(encode_frame(bytes(FRAME_SIZE_MAX))), 0) is not None
    assert body_at(memoryview(encode_frame(bytes(FRAME_SIZE_MAX + 1))), 0) is None


def test_there_is_room_for_any_gap_frame() -> None:
    largest = (1 << 63) - 1
    assert len(encode_gap(largest - 1, largest, "r" * 32, largest)) <= GAP_SIZE_MAX
    assert len(encode_gap(largest - 1, largest, "ß" * 300, largest)) <= GAP_SIZE_MAX
    assert decode_gap(encode_gap(1, 2, "r" * 40, 0)[8:]) == (1, 2, "r" * 32)


@given(st.integers(0, (1 << 63) - 1), st.sampled_from(Kind))
def test_the_head_is_found_without_decoding(seq: int, kind: Kind) -> None:
    body = msgpack.packb([kind, seq, WALL_NS, None, {"x": 1}])
    assert head(body) == (kind, seq)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\x95", b"\x95\x01", b"\x94\x01\x01\x00\xc0", b"\x95\xcc\x01\x00", b"\x95\x01\xcf\x00",
        b"\x95\x01\xc0\x00",
        b"\x95\x01\xff\x00\xc0\x80", b"\x95\x01\xcb" + bytes(8), b"\x95\x01\xcf\x80" + bytes(7),
    ],
)  # fmt: skip
def test_a_body_without_kind_and_seq_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        head(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xc1", b"\x95\x01", b"\x80", b"\xc0", b"\x95\x01\x01\x00\xc0", b"\x91" * 5000, b"\x81" * 5000,
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\x95\x01\x01\x00\xc0\x81\x90\x01", b"\x95\x01\x01\x00\xc0\x81\xa1\xff\x01", METRICS[8:] + b"x",
    ],
)  # fmt: skip
def test_a_body_that_is_no_array_of_five_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        decode_body(body)


@pytest.mark.parametrize(
    "payload",
    [
        {}, [], None, "x", {"first": 2}, {"first": 2, "last": 1, "reason": "x"}, {"first": 3, "last": 3, "reason": "x"},
        {"first": 2, "last": float("inf"), "reason": "x"}, {"first": 2, "last": float("nan"), "reason": "x"},
        {"first": 2, "last": "9", "reason": "x"}, {"first": 2, "last": True, "reason": "x"},
        {"first": 2, "last": 9, "reason": None}, {"first": 2, "last": 1 << 63, "reason": "x"},
        {"first": -1, "last": 2, "reason": ""},
    ],
)  # fmt: skip
def test_a_gap_that_does_not_say_what_it_stands_for_is_refused(payload: object) -> None:
    body = msgpack.packb([Kind.GAP, 2, WALL_NS, None, payload])
    with pytest.raises(FormatError):
        decode_gap(body)
    assert list(spans(memoryview(encode_frame(body)))) == []


@given(st.binary(max_size=200))
def test_no_bytes_make_the_readers_raise_anything_but_format_errors(junk: bytes) -> None:
    list(spans(memoryview(junk)))
    list(spans(memoryview(encode_frame(junk))))
    for read in (head, decode_body, decode_gap):
        try:
            read(junk)
        except FormatError:
            continue
