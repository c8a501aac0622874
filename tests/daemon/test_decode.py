import contextlib
import json
import math
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import FormatError
from ranklog.frame import Kind, encode_frame
from ranklog.start import encode_start
from ranklogd.ship.decode import Record, decode_record, gap_record, read_frames, read_start
from segments import frame, start_of


def body(kind: int, payload: object, *, seq: int = 7, wall_ns: int = 5_000, step: int | None = 3) -> bytes:
    return msgpack.packb([int(kind), seq, wall_ns, step, payload])


def cells(record: Record) -> dict[str, tuple[float | None, str | None]]:
    """Key -> (value, text), as a shard shows them."""
    texts = record.texts or {}
    return {
        key: (None, texts[place]) if place in texts else (value, None)
        for place, (key, value) in enumerate(zip(record.keys, record.values, strict=True))
    }


@pytest.mark.parametrize(
    ("item", "value", "text"),
    [
        (0.5, 0.5, None),
        (-math.inf, -math.inf, None),
        (True, 1.0, None),
        (False, 0.0, None),
        (0, 0.0, None),
        (1 << 53, float(1 << 53), None),
        (-(1 << 53), -float(1 << 53), None),
        ((1 << 53) + 1, None, "9007199254740993"),
        (-(1 << 53) - 1, None, "-9007199254740993"),
        ((1 << 64) - 1, None, "18446744073709551615"),
        (None, None, "null"),
        ("", None, '""'),
        ('é "q"\n', None, '"é \\"q\\"\\n"'),
        (msgpack.ExtType(1, b'{"a": [1, 2]}'), None, '{"a": [1, 2]}'),
        (msgpack.ExtType(1, b"18446744073709551617"), None, "18446744073709551617"),
    ],
)
@pytest.mark.parametrize("kind", [Kind.METRICS, Kind.SYSTEM, Kind.CONFIG, Kind.TEXT])
def test_a_value_goes_to_value_if_a_double_holds_it_and_else_to_text(kind, item, value, text):
    record = decode_record(body(kind, {"x": item, "y": 2.0}))
    assert cells(record) == {"x": (value, text), "y": (2.0, None)}
    assert record.kind == kind


def test_a_record_keeps_seq_step_and_time_in_microseconds():
    record = decode_record(body(Kind.METRICS, {"x": 1.0}, seq=9, wall_ns=-1_500, step=-4))
    assert (record.seq, record.last, record.step, record.wall_us) == (9, 9, -4, -2)
    assert decode_record(body(Kind.METRICS, {"x": 1.0}, step=None)).step is None


def test_an_empty_record_has_one_row_with_neither_value_nor_text():
    assert cells(decode_record(body(Kind.METRICS, {}))) == {"": (None, None)}


def test_a_float_with_an_empty_key_is_a_value_all_the_same():
    assert cells(decode_record(body(Kind.METRICS, {"": 1.5}))) == {"": (1.5, None)}


@given(st.binary(min_size=8, max_size=8))
def test_every_double_survives_bit_for_bit(raw):
    record = decode_record(b"\x95\x01\x07\x05\x03\x82\xa1a\xcb" + raw + b"\xa1b\xc0")
    assert struct.pack(">d", next(iter(record.values))) == raw
    record = decode_record(b"\x95\x01\x07\x05\x03\x81\xa1a\xcb" + raw)
    assert struct.pack(">d", next(iter(record.values))) == raw


def test_start_end_gap_and_alert_tell_their_payload_as_json():
    start = start_of(tags=["a", "ü"], notes="x")
    (record,) = read_frames(memoryview(encode_start(start)))
    told = cells(record)[""][1]
    assert json.loads(told)["tags"] == ["a", "ü"]
    assert json.loads(told)["writer"] == start.writer
    assert "ü" in told
    end = decode_record(body(Kind.END, {"exit_code": None, "last": 7}))
    assert cells(end) == {"": (None, '{"exit_code": null, "last": 7}')}
    gap = decode_record(body(Kind.GAP, {"first": 7, "last": 12, "reason": "full"}))
    assert cells(gap) == {"": (None, '{"first": 7, "last": 12, "reason": "full"}')}
    assert (gap.seq, gap.last) == (7, 12)
    alert = decode_record(body(Kind.ALERT, {"title": "NaN!", "text": "loss", "level": "WARN"}))
    assert cells(alert) == {"NaN!": (None, '{"text": "loss", "level": "WARN"}')}


def test_fields_that_a_later_client_adds_do_no_harm():
    assert cells(decode_record(msgpack.packb([1, 7, 5, None, {"x": 1.0}, "later"]))) == {"x": (1.0, None)}
    start = {"writer": "0" * 32, "project": "p", "run": "r", "later": 1.5}
    told = cells(decode_record(body(Kind.START, start, seq=0)))[""][1]
    assert json.loads(told)["later"] == 1.5
    assert read_start(body(Kind.START, start, seq=0)).run == "r"


BOMB = b"\x91" * 100_000
BAD = {
    "kind 6, which is reserved": body(6, {}),
    "a kind nobody knows": body(99, {}),
    "a seq beyond 63 bits": body(1, {}, seq=1 << 63),
    "a negative seq": body(1, {}, seq=-1),
    "a clock beyond 63 bits": body(1, {}, wall_ns=1 << 63),
    "a float as step": body(1, {}, step=1.5),
    "a bool as step": body(1, {}, step=True),
    "a list as value": body(1, {"x": [1.0]}),
    "a map as value": body(1, {"x": {"y": 1.0}}),
    "bytes as value": body(1, {"x": b"raw"}),
    "a number as key": body(1, {1: 1.0}),
    "a list as key": b"\x95\x01\x07\x05\x03\x81\x90\x01",
    "a payload that is no map": body(1, [1.0]),
    "an unknown extension": body(1, {"x": msgpack.ExtType(5, b"1")}),
    "JSON text that is not UTF-8": body(1, {"x": msgpack.ExtType(1, b"\xff")}),
    "a key that is not UTF-8": b"\x95\x01\x07\x05\x03\x81\xa1\xff\x01",
    "a string that is not UTF-8": b"\x95\x01\x07\x05\x03\x81\xa1a\xa1\xff",
    "four fields": msgpack.packb([1, 7, 5, None]),
    "bytes behind the record": body(1, {}) + b"\x00",
    "nothing": b"",
    "a nested bomb": b"\x95\x01\x07\x05\x03" + BOMB,
    "a nested bomb as value": b"\x95\x01\x07\x05\x03\x81\xa1a" + BOMB,
    "a map of 4 billion keys": b"\x95\x01\x07\x05\x03\xdf\xff\xff\xff\xff\xa1a\x01",
    "a list of 4 billion tags": b"\x95\x00\x00\x05\xc0\x81\xa4tags\xdd\xff\xff\xff\xff\xa1a",
    "a gap that ends before it begins": body(Kind.GAP, {"first": 7, "last": 6, "reason": ""}),
    "a gap of another seq": body(Kind.GAP, {"first": 8, "last": 9, "reason": ""}),
    "a start frame without writer": body(Kind.START, {"project": "p", "run": "r"}, seq=0),
    "a start frame later on": body(Kind.START, {"writer": "0" * 32, "project": "p", "run": "r"}, seq=7),
    "a start frame with NaN": body(
        Kind.START, {"writer": "0" * 32, "project": "p", "run": "r", "later": math.nan}, seq=0
    ),
    "an alert without title": body(Kind.ALERT, {"text": "x"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_a_format_error_and_costs_no_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode_record(BAD[name])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\x95\x01\x07\x05\x03" + tail))
def test_no_bytes_raise_anything_but_a_format_error(data):
    for decode in (decode_record, read_start):
        with contextlib.suppress(FormatError):
            decode(data)


def test_frames_behind_one_with_a_bad_checksum_are_found_by_its_size():
    good = [frame(1, seq, {"x": float(seq)}) for seq in (4, 5, 6)]
    broken = bytearray(good[1])
    broken[-1] ^= 1
    items = list(read_frames(memoryview(good[0] + bytes(broken) + good[2])))
    assert [item if isinstance(item, str) else item.seq for item in items] == [4, "checksum of the frame fails", 6]


@pytest.mark.parametrize("tail", [b"\x00", b"\x00" * 40, b"\xff" * 40, encode_frame(b"x" * 50)[:-1]])
def test_bytes_that_are_no_frame_end_a_batch_with_one_reason(tail):
    items = list(read_frames(memoryview(frame(1, 4, {}) + tail)))
    assert len(items) == 2
    assert isinstance(items[1], str)


def test_a_gap_record_keeps_the_truth_in_its_text_where_the_column_cannot_hold_it():
    record = gap_record(1 << 63, (1 << 64) - 1, 'why "so"', 1)
    assert json.loads(cells(record)[""][1]) == {"first": 1 << 63, "last": (1 << 64) - 1, "reason": 'why "so"'}
    assert record.seq == record.last == (1 << 63) - 1
