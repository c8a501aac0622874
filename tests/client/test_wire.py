"""Messages as literal bytes, and what a hostile neighbour may send."""

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import ProtocolError
from ranklog.wire import HEADER_SIZE_MAX, Code, Type, Wait, decode, encode

W = bytes(range(16))
RAW = b"\xc4\x10" + W
MESSAGES: list[tuple[bytes, Type, list[Any]]] = [
    (b"\x95\x01\x01\x02" + RAW + b"\x05", Type.HELLO, [1, 2, W, 5]),
    (b"\x96\x02" + RAW + b"\x07\x03\xce\xde\xad\xbe\xef\xc3", Type.BATCH, [W, 7, 3, 0xDEADBEEF, True]),
    (b"\x92\x03\x2a", Type.PING, [42]),
    (b"\x92\x04\x2a", Type.STATUS, [42]),
    (b"\x94\x05\x2a\x02\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00", Type.FLUSH, [42, Wait.UPLOADED, 1.5]),
    (b"\x94\x05\x2a\x00\x0a", Type.FLUSH, [42, Wait.DURABLE, 10]),
    (b"\x92\x06\x2a", Type.SYNC, [42]),
    (b"\x98\x11\x01" + RAW + b"\x08\xa2/s\xa2/j\xa2/c\x02", Type.WELCOME, [1, W, 8, "/s", "/j", "/c", 2]),
    (b"\x94\x12" + RAW + b"\xff\x02", Type.ACK, [W, -1, 2]),
    (b"\x96\x13" + RAW + b"\x02\xa1x\xc2\x09", Type.REFUSE, [W, Code.SEQUENCE, "x", False, 9]),
    (b"\x94\x14\x2a\xa30.1\xcd\x12\x34", Type.PONG, [42, "0.1", 0x1234]),
    (b"\x92\x15\x2a", Type.REPORT, [42]),
    (b"\x94\x16\x2a\xc3\x00", Type.FLUSHED, [42, True, 0]),
]


@pytest.mark.parametrize(("header", "kind", "fields"), MESSAGES, ids=lambda value: getattr(value, "name", ""))
def test_a_message_has_these_bytes_both_ways(header: bytes, kind: Type, fields: list[Any]) -> None:
    assert encode(kind, *fields) == header
    assert decode(header) == (kind, fields)


def test_every_type_of_message_is_among_the_literal_ones() -> None:
    assert {kind for _, kind, _ in MESSAGES} == set(Type)


@pytest.mark.parametrize(("header", "kind", "fields"), MESSAGES, ids=lambda value: getattr(value, "name", ""))
def test_fields_of_a_later_version_are_ignored(header: bytes, kind: Type, fields: list[Any]) -> None:
    later = bytes([header[0] + 1]) + header[1:] + b"\xa5later"
    assert decode(later) == (kind, fields)


@pytest.mark.parametrize(("header", "kind", "fields"), MESSAGES, ids=lambda value: getattr(value, "name", ""))
def test_a_cut_message_is_refused_at_every_length(header: bytes, kind: Type, fields: list[Any]) -> None:
    for cut in range(len(header)):
        with pytest.raises(ProtocolError):
            decode(header[:cut])


WRONG: dict[type, list[Any]] = {
    int: [None, [], "1", b"1", 1.5, True, 1 << 62, -2],
    bytes: [None, [], "x" * 16, b"", bytes(15), bytes(17), 1],
    str: [None, [], b"x", 1],
    bool: [None, [], 0, 1, "x"],
    float: [None, [], "1", True, -2, 1 << 62],
}


@pytest.mark.parametrize(("header", "kind", "fields"), MESSAGES, ids=lambda value: getattr(value, "name", ""))
def test_a_message_with_a_field_of_another_type_is_refused(header: bytes, kind: Type, fields: list[Any]) -> None:
    for place, right in enumerate(fields):
        number = kind == Type.FLUSH and place == 2
        expected = float if number else next(kind for kind in (bool, int, bytes, str) if isinstance(right, kind))
        for wrong in WRONG[expected]:
            with pytest.raises(ProtocolError, match=f"{kind.name}: field {place + 1}"):
                decode(msgpack.packb([kind, *fields[:place], wrong, *fields[place + 1 :]]))


@pytest.mark.parametrize(
    "header",
    [
        b"", b"\xc1", b"\xc0", b"\x01", b"\x80", b"\x81\x00\x01", b"\x90", b"\xa1\x01", b"\xc4\x02\x01\x01", b"\xc3",
        b"\x92\xc3\x01", b"\x92\xcb@\x08\x00\x00\x00\x00\x00\x00\x01", b"\x92\x90\x01", b"\x92\x80\x01",
        b"\x92\x00\x01", b"\x92\x63\x01", b"\x92\xff\x01", b"\x92\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x92\x03\x2ax", b"\x92\x03\xa1\xff",
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_array_with_a_known_type_is_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(header)


@pytest.mark.parametrize(
    "header",
    [
        b"\x91" * 8000, b"\x92\x03" + b"\x91" * 8000, b"\x81" * 8000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\x92\x03\xc7\x00\xff",
        b"\x92\x03\xd6\xff\x00\x00\x00\x00", b"\xdc\x00\x11\x03" + b"\x01" * 16,
    ],
    ids=lambda header: header[:8].hex(),
)  # fmt: skip
def test_a_bomb_is_refused_before_anything_is_made_of_it(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(header)


def test_a_long_header_is_refused_unread() -> None:
    largest = encode(Type.REFUSE, W, 1, "x" * (HEADER_SIZE_MAX - 26), False, -1)
    assert len(largest) == HEADER_SIZE_MAX
    assert decode(largest)[0] == Type.REFUSE
    with pytest.raises(ProtocolError, match=f"{HEADER_SIZE_MAX + 1} bytes; the limit is {HEADER_SIZE_MAX}"):
        decode(largest + b"x")


def test_only_answers_may_say_minus_one() -> None:
    assert decode(encode(Type.ACK, W, -1, 2))[1] == [W, -1, 2]
    for fields in ([W, -1, 1, 0, False], [W, 1, -1, 0, False], [W, 1, 1, -1, False]):
        with pytest.raises(ProtocolError, match=r"BATCH: field . is out of range"):
            decode(encode(Type.BATCH, *fields))


def test_a_deadline_that_never_passes_is_refused() -> None:
    with pytest.raises(ProtocolError, match="FLUSH: field 3 is not a number"):
        decode(encode(Type.FLUSH, 1, 0, math.nan))


@given(st.binary(max_size=64))
def test_no_bytes_make_decode_raise_anything_but_a_protocol_error(junk: bytes) -> None:
    try:
        kind, fields = decode(junk)
    except ProtocolError:
        return
    assert decode(encode(kind, *fields)) == (kind, fields)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(Type), st.lists(_VALUES, max_size=9))
def test_no_fields_make_decode_raise_anything_but_a_protocol_error(kind: Type, fields: list[Any]) -> None:
    try:
        decode(msgpack.packb([kind, *fields]))
    except ProtocolError:
        return
