"""WAL segments as literal bytes, and what is found in them after damage."""

import random
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import FormatError
from ranklog.frame import Kind, encode_frame, encode_gap
from ranklog.layout import Lsn
from ranklog.start import Start, encode_start
from ranklogd.wal.segment import (
    BATCH,
    ENTRY_OVERHEAD,
    MAGIC,
    UID_UNKNOWN,
    WRITER,
    Damage,
    Entry,
    EntryType,
    SegmentHeader,
    WriterMark,
    batch_count,
    decode_header,
    encode_entry,
    encode_header,
    entry_at,
    open_name,
    parse_open,
    parse_sealed,
    scan,
    sealed_name,
)

GOLDEN = (Path(__file__).parent.parent / "golden" / "segment_v1.wal").read_bytes()
SALT = 0xA1B2C3D4
RECV_NS = 1_700_000_000_000_000_000
ONE, TWO = bytes(range(16)), bytes(range(16, 32))
HEADER = SegmentHeader(
    node="node-7", store_id="0123456789abcdef", first_lsn=Lsn(101), boot="054b0bd2-49ab-466e-b956-eee60c04d751",
    salt=SALT,
    writers=(WriterMark(1000, ONE, 41, 0, b"k" * 16, 0), WriterMark(UID_UNKNOWN, TWO, 9, 3, b"l" * 16, 1_700_000_000)),
)  # fmt: skip


def metrics(seq: int) -> bytes:
    return encode_frame(msgpack.packb([Kind.METRICS, seq, RECV_NS, seq, {"loss": 0.1}]))


def entry(lsn: int, kind: EntryType, payload: bytes, uid: int = 1000) -> bytes:
    return b"".join(encode_entry(SALT, lsn, RECV_NS + lsn, uid, kind, payload[:5], memoryview(payload)[5:]))


def writer_entry(lsn: int, writer: bytes) -> bytes:
    start = encode_start(Start(writer=writer.hex(), project="llama", run="r01"))
    return entry(lsn, EntryType.WRITER, WRITER.pack(writer, 2) + start)


def batch_entry(lsn: int, writer: bytes, first_seq: int, count: int) -> bytes:
    frames = b"".join(metrics(first_seq + number) for number in range(count))
    return entry(lsn, EntryType.BATCH, BATCH.pack(writer, first_seq, count) + frames)


def golden_entries() -> list[bytes]:
    """The entries of the golden file; the start frames are taken from it, for newer versions write longer ones."""
    gap = BATCH.pack(TWO, 1, 4) + encode_gap(1, 4, "full", RECV_NS)
    return [
        batch_entry(101, ONE, 42, 3), entry(104, EntryType.BATCH, gap, UID_UNKNOWN), batch_entry(108, TWO, 5, 1),
    ]  # fmt: skip


def read(segment: bytes) -> list[Entry | Damage]:
    header, offset = decode_header(memoryview(segment))
    return list(scan(memoryview(segment), header.salt, offset, header.first_lsn))


def build(count: int = 6) -> tuple[bytes, list[int]]:
    """Return a segment of `count` batches of 2 records, and where each entry begins, with the end last."""
    parts = [encode_header(HEADER)]
    parts += [batch_entry(101 + 2 * number, ONE, 42 + 2 * number, 2) for number in range(count)]
    places = [sum(map(len, parts[:number])) for number in range(1, len(parts) + 1)]
    return b"".join(parts), places


def test_an_entry_has_these_bytes() -> None:
    payload = BATCH.pack(ONE, 1, 0)
    expected = (
        b"\xd4\xc3\xb2\xa1" b"\x9c\xa2\xf8\x75" b"\x1c\x00\x00\x00" b"\x07\x00\x00\x00\x00\x00\x00\x00"
        b"\x00\x00\x2a\x36\xfe\x9c\x97\x17" b"\xe8\x03\x00\x00" b"\x02\x00\x00\x00" b"\xb0\x6f\x91\xef"
        + ONE + b"\x01\x00\x00\x00\x00\x00\x00\x00" b"\x00\x00\x00\x00"
    )  # fmt: skip
    written = b"".join(encode_entry(SALT, 7, RECV_NS, 1000, EntryType.BATCH, payload))
    assert written == expected
    assert entry_at(memoryview(written), SALT, 0) == Entry(
        0, len(written), 7, RECV_NS, 1000, EntryType.BATCH, memoryview(payload)
    )


def test_the_golden_segment_is_read_whole() -> None:
    header, _ = decode_header(memoryview(GOLDEN))
    assert header == HEADER
    # The header gains fields over time, and the old one above stays readable; what is written now is read again.
    assert decode_header(memoryview(encode_header(HEADER)))[0] == HEADER
    assert GOLDEN[: len(MAGIC)] == encode_header(HEADER)[: len(MAGIC)]
    found = read(GOLDEN)
    assert all(isinstance(item, Entry) for item in found)
    entries = [item for item in found if isinstance(item, Entry)]
    assert [(item.type, item.lsn, item.uid, item.recv_ns - RECV_NS) for item in entries] == [
        (EntryType.WRITER, 101, 1000, 101), (EntryType.BATCH, 101, 1000, 101), (EntryType.WRITER, 104, 1000, 104),
        (EntryType.BATCH, 104, UID_UNKNOWN, 104), (EntryType.BATCH, 108, 1000, 108),
    ]  # fmt: skip
    assert entries[-1].end == len(GOLDEN)
    assert [batch_count(item) for item in entries if item.type == EntryType.BATCH] == [3, 4, 1]
    assert [GOLDEN[item.offset : item.end] for item in entries if item.type == EntryType.BATCH] == golden_entries()
    assert [WRITER.unpack_from(entries[place].payload) for place in (0, 2)] == [(ONE, 2), (TWO, 2)]


@pytest.mark.parametrize("cut", range(0, 4 * ENTRY_OVERHEAD, 3))
def test_a_torn_tail_ends_the_segment_silently(cut: int) -> None:
    segment, places = build(3)
    end = places[2] + min(cut, places[3] - places[2] - 1)
    found = read(segment[:end])
    assert [item.end for item in found] == places[1:3]
    assert [item.end for item in read(segment[:end] + bytes(5000))] == places[1:3]


def test_every_flipped_byte_of_an_entry_costs_that_entry_and_no_other() -> None:
    segment, places = build(3)
    whole = read(segment)
    for at in range(places[1], places[2]):
        damaged = bytearray(segment)
        damaged[at] ^= 0x20
        found = read(bytes(damaged))
        assert found == [whole[0], Damage(places[1], places[2]), whole[2]], at


def test_every_flipped_byte_of_the_last_entry_is_a_torn_tail() -> None:
    segment, places = build(2)
    for at in range(places[1], places[2]):
        damaged = bytearray(segment)
        damaged[at] ^= 0x20
        assert [item.end for item in read(bytes(damaged))] == [places[1]], at


def test_every_flipped_byte_of_the_header_is_a_damaged_header() -> None:
    size = len(encode_header(HEADER))
    for at in range(size):
        damaged = bytearray(encode_header(HEADER))
        damaged[at] ^= 0x01
        if at < len(MAGIC):
            assert decode_header(memoryview(damaged))[0] == HEADER, "a header that checks is one, whatever its magic"
            continue
        with pytest.raises(FormatError):
            decode_header(memoryview(damaged))


def test_a_header_cut_short_is_refused_at_every_length() -> None:
    header = encode_header(HEADER)
    for cut in range(len(header)):
        with pytest.raises(FormatError, match=r"cut short|damaged|bad magic"):
            decode_header(memoryview(header[:cut]))


def test_a_run_of_damage_is_one_damage() -> None:
    segment, places = build(6)
    damaged = segment[: places[1]] + random.Random(7).randbytes(places[4] - places[1]) + segment[places[4] :]
    found = read(damaged)
    assert [type(item) for item in found] == [Entry, Damage, Entry, Entry]
    assert (found[1].offset, found[1].end) == (places[1], places[4])


def test_bytes_that_were_inserted_or_removed_are_passed_over() -> None:
    segment, places = build(4)
    longer = segment[: places[1]] + b"!" * 33 + segment[places[1] :]
    assert [type(item) for item in read(longer)] == [Entry, Damage, Entry, Entry, Entry]
    shorter = segment[: places[1] + 10] + segment[places[1] + 30 :]
    assert [type(item) for item in read(shorter)] == [Entry, Damage, Entry, Entry]


def test_an_older_entry_that_shows_up_again_is_not_an_entry() -> None:
    segment, places = build(3)
    again = segment + segment[places[0] : places[1]]
    assert read(again) == read(segment)
    assert [type(item) for item in read(again + batch_entry(107, ONE, 48, 1))] == [Entry, Entry, Entry, Damage, Entry]


def test_an_entry_of_another_segment_is_not_an_entry() -> None:
    segment, _ = build(1)
    foreign = b"".join(encode_entry(SALT + 1, 103, RECV_NS, 1000, EntryType.BATCH, BATCH.pack(ONE, 44, 1), metrics(44)))
    assert read(segment + foreign) == read(segment)


def test_a_client_cannot_forge_an_entry_inside_its_batch() -> None:
    forged = b"".join(encode_entry(SALT ^ 1, 900, RECV_NS, 0, EntryType.BATCH, BATCH.pack(TWO, 1, 1), metrics(1)))
    segment = encode_header(HEADER) + entry(101, EntryType.BATCH, BATCH.pack(ONE, 42, 1) + forged)
    damaged = bytearray(segment)
    damaged[len(encode_header(HEADER))] ^= 0xFF
    assert read(bytes(damaged)) == []


@pytest.mark.parametrize("kind", [0, 3, 255, 0xFFFFFFFF])
def test_an_entry_of_an_unknown_type_is_no_entry(kind: Any) -> None:
    written = b"".join(encode_entry(SALT, 1, RECV_NS, 0, kind, bytes(100)))
    assert entry_at(memoryview(written), SALT, 0) is None


@pytest.mark.parametrize(("kind", "least"), [(EntryType.WRITER, WRITER.size), (EntryType.BATCH, BATCH.size)])
def test_an_entry_too_small_for_its_type_is_no_entry(kind: EntryType, least: int) -> None:
    for size in range(least):
        assert entry_at(memoryview(b"".join(encode_entry(SALT, 1, RECV_NS, 0, kind, bytes(size)))), SALT, 0) is None
    assert entry_at(memoryview(b"".join(encode_entry(SALT, 1, RECV_NS, 0, kind, bytes(least)))), SALT, 0) is not None


def raw_header(meta: object) -> memoryview:
    packed = meta if isinstance(meta, bytes) else msgpack.packb(meta)
    sized = len(packed).to_bytes(4, "little") + packed
    return memoryview(MAGIC + zlib.crc32(sized).to_bytes(4, "little") + sized)


META = {
    "version": 1, "node": "n", "store_id": "s", "first_lsn": 1, "boot": "b", "salt": 5,
    "writers": [[1, ONE, 2, 3, b"k", 4]],
}  # fmt: skip


def test_fields_of_a_later_version_of_the_header_are_ignored() -> None:
    mark = WriterMark(1, ONE, 2, 3, b"k", 4)
    header, _ = decode_header(raw_header({**META, "zone": "eu", "writers": [[*mark, "later"]]}))
    assert header.writers == (mark,)


def test_a_writer_of_the_first_version_of_the_header_is_read() -> None:
    assert decode_header(raw_header(META))[0].writers == (WriterMark(1, ONE, 2, 3, b"k", 4),)


@pytest.mark.parametrize(
    "meta",
    [
        {}, [], None, 1, b"\xc1", b"", b"\x91" * 3000,
        *({**META, name: None} for name in ("version", "first_lsn", "salt", "writers")),
        *({key: value for key, value in META.items() if key != name} for name in META), {**META, "writers": [[1, ONE]]},
        {**META, "version": "1"}, {**META, "first_lsn": 1.5}, {**META, "writers": [1]},
    ],
)  # fmt: skip
def test_a_header_that_checks_but_says_nonsense_is_refused(meta: object) -> None:
    with pytest.raises(FormatError):
        decode_header(raw_header(meta))


def test_a_later_format_is_refused_with_the_remedy() -> None:
    with pytest.raises(FormatError, match="format version 2; this version reads 1: upgrade ranklog"):
        decode_header(raw_header({**META, "version": 2}))
    with pytest.raises(FormatError, match=r"later format b'RANKWAL2'.*upgrade ranklog"):
        decode_header(memoryview(b"RANKWAL2" + bytes(100)))
    with pytest.raises(FormatError, match="bad magic"):
        decode_header(memoryview(b"SQLite format 3\0"))


def test_names_and_their_parsers_are_inverses() -> None:
    assert open_name(0x1F) == "000000000000001f.open"
    assert sealed_name(1, 0x1F) == "0000000000000001-000000000000001f.wal"
    for first, last in ((1, 1), (1, 1 << 40), ((1 << 64) - 1, (1 << 64) - 1)):
        assert parse_open(open_name(first)) == first
        assert parse_sealed(sealed_name(first, last)) == (first, last)
        assert parse_open(sealed_name(first, last)) is None
        assert parse_sealed(open_name(first)) is None


@pytest.mark.parametrize(
    "name",
    [
        "", ".open", "1.open", "000000000000001F.open", "000000000000001f.open~", ".000000000000001f.open", "x.wal",
        "000000000000001f.open\n", "0000000000000001-000000000000001f.wal.tmp", "0000000000000001.wal",
    ],
)  # fmt: skip
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_open(name) is None
    assert parse_sealed(name) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12), st.data())
def test_after_any_damage_every_whole_entry_is_found_and_nothing_else(
    plan: list[tuple[int, bool]], data: st.DataObject
) -> None:
    segment, lsn, whole = encode_header(HEADER), 101, []
    for count, is_writer in plan:
        made = writer_entry(lsn, ONE) if is_writer else batch_entry(lsn, ONE, lsn, count)
        if data.draw(st.booleans(), label="damaged"):
            at = data.draw(st.integers(0, len(made) - 1), label="at")
            made = made[:at] + bytes([made[at] ^ 0x41]) + made[at + 1 :]
        else:
            whole.append(len(segment))
        segment += made
        lsn += 0 if is_writer else count
    found = read(segment)
    assert [item.offset for item in found if isinstance(item, Entry)] == whole
    places = [place for item in found for place in (item.offset, item.end)]
    assert places == sorted(places)
    assert all(one.end == other.offset for one, other in pairwise(found))


@given(st.binary(max_size=300))
def test_no_bytes_make_a_scan_raise(junk: bytes) -> None:
    list(scan(memoryview(junk), SALT, 0, 1))
    list(scan(memoryview(SALT.to_bytes(4, "little") + junk), SALT, 0, 1))
