"""The start frame comes from other users' processes and other versions: what is taken, and what is refused."""

from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import FormatError
from ranklog.frame import Kind, encode_frame
from ranklog.start import NAME_SIZE_MAX, START_SIZE_MAX, Start, decode_start, encode_start, start_from_map

WRITER = "00112233445566778899aabbccddeeff"
LEAST = {"writer": WRITER, "project": "p", "run": "r"}
LITERAL = b"\x95\x00\x00\x00\xc0\x83\xa6writer\xd9 00112233445566778899aabbccddeeff\xa7project\xa1p\xa3run\xa1r"
NUMBERS = [f.name for f in fields(Start) if "int" in str(f.type)]
TEXTS = [f.name for f in fields(Start) if "str" in str(f.type) and f.name != "tags"]


def body_of(payload: object, *, kind: int = Kind.START, seq: int = 0) -> bytes:
    packed: bytes = msgpack.packb([kind, seq, 0, None, payload])
    return packed


def test_a_start_of_the_first_version_is_read_with_defaults_for_the_rest() -> None:
    assert decode_start(LITERAL) == Start(writer=WRITER, project="p", run="r")


def test_fields_of_a_later_version_are_ignored() -> None:
    assert start_from_map({**LEAST, "zone": "eu", 7: 8, b"x": 9, "": None}) == Start(**LEAST)


def test_what_is_written_is_read() -> None:
    start = Start(**LEAST, name="ß", tags=["a"], rank=0, attempt=3, pid=(1 << 22), pid_ns=(1 << 32), wall_ns=(1 << 62))
    assert decode_start(encode_start(start)[8:]) == start


def test_half_a_character_in_a_name_is_replaced_and_not_refused() -> None:
    assert decode_start(encode_start(Start(writer=WRITER, project="a\ud800b", run="r"))[8:]).project == "a?b"


@pytest.mark.parametrize("name", ["writer", "project", "run"])
def test_a_start_without_writer_project_or_run_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        start_from_map({key: value for key, value in LEAST.items() if key != name})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, 1.0, "1", b"1", [], -1, 1 << 63, -(1 << 63)])
def test_a_number_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(FormatError, match=f"'{name}'"):
        start_from_map({**LEAST, name: value})


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [None, 1, b"x", [], {}, True])
def test_a_text_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(FormatError, match=f"'{name}'"):
        start_from_map({**LEAST, name: value})


@pytest.mark.parametrize("tags", ["x", [1], [None], [["x"]], {"x": 1}, None])
def test_tags_that_are_no_list_of_texts_are_refused(tags: object) -> None:
    with pytest.raises(FormatError, match="tag"):
        start_from_map({**LEAST, "tags": tags})


@pytest.mark.parametrize(
    "writer", ["", "0" * 31, "0" * 33, "A" * 32, "g" * 32, "ab " * 10 + "ab", "٠" * 32, "0" * 31 + "\n", "0" * 32 + " "]
)
def test_a_writer_that_is_not_32_hex_digits_is_refused(writer: str) -> None:
    with pytest.raises(FormatError, match="32 lower-case hex digits"):
        start_from_map({**LEAST, "writer": writer})


@pytest.mark.parametrize("name", ["rank", "attempt"])
def test_rank_and_attempt_fit_the_columns_of_a_shard(name: str) -> None:
    assert getattr(start_from_map({**LEAST, name: (1 << 31) - 1}), name) == (1 << 31) - 1
    with pytest.raises(FormatError, match=f"'{name}'"):
        start_from_map({**LEAST, name: 1 << 31})


@pytest.mark.parametrize("name", ["project", "run", "name", "group", "job_type", "role", "node"])
def test_a_name_is_bounded_in_bytes(name: str) -> None:
    start_from_map({**LEAST, name: "ß" * (NAME_SIZE_MAX // 2)})
    with pytest.raises(FormatError, match=f"'{name}'"):
        start_from_map({**LEAST, name: "ß" * (NAME_SIZE_MAX // 2) + "x"})


def test_a_start_frame_is_bounded_before_it_is_decoded() -> None:
    with pytest.raises(FormatError, match=str(START_SIZE_MAX)):
        decode_start(body_of({**LEAST, "notes": "x" * START_SIZE_MAX}))


@pytest.mark.parametrize(
    "body",
    [
        b"", body_of([]), body_of(None), body_of(LEAST, kind=Kind.METRICS), body_of(LEAST, seq=1), b"\x91" * 3000,
        b"\x95\x00\x00\x00\xc0\x81\x90\x01", b"\x95\x00\x00\x00\xc0\x81\x80\x01", encode_frame(LITERAL),
    ],
)  # fmt: skip
def test_what_is_no_start_frame_is_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        decode_start(body)


_JUNK = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
_KEYS = st.sampled_from([f.name for f in fields(Start)]) | st.text() | st.integers(0, 9)


@given(st.dictionaries(_KEYS, _JUNK | st.lists(_JUNK, max_size=3)))
def test_no_map_makes_it_raise_anything_but_a_format_error(payload: dict[Any, Any]) -> None:
    try:
        start = decode_start(body_of({**LEAST, **payload}))
    except FormatError:
        return
    assert decode_start(encode_start(start)[8:]) == start
