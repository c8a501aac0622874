"""What can still be told of damaged stretches, apart from segments: the rules that recovery and conversion share."""

import pytest

from ranklog.frame import Kind
from ranklog.start import encode_start
from ranklogd.wal.salvage import RebuiltBatch, RebuiltWriter, find_salt, looks_torn, salvage
from ranklogd.wal.segment import ENTRY_OVERHEAD, decode_header
from segments import SALT, SegmentBuilder, frame, start_of, writer_id

A = bytes.fromhex(writer_id(1))


def stretch(*batches: tuple[int, int]) -> tuple[bytearray, int]:
    """A segment of writer 1 with these (first seq, count) batches, and where its entries begin."""
    builder = SegmentBuilder(first_lsn=7)
    builder.writer(start_of(1))
    for first, count in batches:
        builder.batch(writer_id(1), first, count, metrics(first, count))
    return builder.data, decode_header(memoryview(bytes(builder.data)))[1]


def metrics(first: int, count: int) -> bytes:
    return b"".join(frame(Kind.METRICS, seq, {"x": float(seq)}) for seq in range(first, first + count))


def told(data: bytes, offset: int, room: int | None, expected: dict[bytes, int]) -> list[RebuiltWriter | RebuiltBatch]:
    found = []
    for item in salvage(memoryview(data), offset, len(data), room=room, expected=expected):
        found.append(item)
        expected[item.writer] = item.first + item.total if isinstance(item, RebuiltBatch) else 0
    return found


def test_entries_whose_headers_are_gone_are_told_by_their_frames() -> None:
    data, offset = stretch((0, 3), (3, 2))
    for at in range(offset, offset + ENTRY_OVERHEAD):
        data[at] = 0xEE
    writer, *batches = told(bytes(data), offset, 5, {})
    assert (type(writer), writer.writer) == (RebuiltWriter, A)
    assert [(item.first, item.total) for item in batches if isinstance(item, RebuiltBatch)] == [(0, 3), (3, 2)]


def test_no_more_records_are_told_than_lsns_are_missing() -> None:
    data, offset = stretch((0, 3), (3, 2))
    assert [item.total for item in told(bytes(data), offset, 4, {}) if isinstance(item, RebuiltBatch)] == [3]


def test_a_flipped_writer_id_is_the_known_one_that_it_nearly_is() -> None:
    data, offset = stretch((5, 3))
    at = bytes(data).rindex(A)
    data[at + 3] ^= 0xFF
    (batch,) = [item for item in told(bytes(data), offset, 3, {A: 5}) if isinstance(item, RebuiltBatch)]
    assert batch.writer == A
    data[at : at + 16] = bytes(16)
    (batch,) = [item for item in told(bytes(data), offset, 3, {A: 5}) if isinstance(item, RebuiltBatch)]
    assert batch.writer == bytes(16), "anything else stays what it says"


def test_a_start_frame_under_another_seq_does_not_move_the_batch() -> None:
    builder = SegmentBuilder()
    builder.batch(writer_id(1), 0, 3, encode_start(start_of(1)) + metrics(1, 2))
    data = bytearray(builder.data)
    offset = decode_header(memoryview(bytes(data)))[1]
    data[offset + ENTRY_OVERHEAD + 16 + 1] ^= 0x04  # Its first seq.
    (batch,) = told(bytes(data), offset, 3, {A: 0})
    assert isinstance(batch, RebuiltBatch)
    assert (batch.first, batch.total) == (0, 3)


@pytest.mark.parametrize("count", [4, 1000, 0xFFFF_FFFF])
def test_behind_the_last_entry_a_count_is_believed_only_if_its_frames_have_a_place(count: int) -> None:
    data, offset = stretch((0, 3))
    place = bytes(data).rindex(A) + 24
    data[place : place + 4] = count.to_bytes(4, "little")
    (batch,) = [item for item in told(bytes(data), offset, None, {A: 0}) if isinstance(item, RebuiltBatch)]
    assert batch.total == 3


def test_a_write_that_was_cut_short_is_told_from_rot() -> None:
    data, offset = stretch((0, 300))
    data[-1] ^= 1
    batch = bytes(data).index(A, bytes(data).index(A) + 1) - ENTRY_OVERHEAD
    assert not looks_torn(memoryview(bytes(data)), SALT, batch)
    assert looks_torn(memoryview(bytes(data[:-1])), SALT, batch), "the file ends within the entry"
    assert looks_torn(memoryview(bytes(data[: batch + 20])), SALT, batch), "or within its header"
    sector = (batch // 512 + 2) * 512
    data[sector : sector + 512] = bytes(512)
    assert looks_torn(memoryview(bytes(data)), SALT, batch), "a sector was never written"


def test_the_salt_is_found_in_the_first_entry_that_is_whole() -> None:
    data, offset = stretch((0, 3), (3, 2))
    data[:offset] = bytes(offset)
    assert find_salt(memoryview(bytes(data)), 7) == SALT
    data[offset : offset + 200] = bytes(200)
    assert find_salt(memoryview(bytes(data)), 7) == SALT
    assert find_salt(memoryview(bytes(data[:-1])), 7) in (SALT, None)
    assert find_salt(memoryview(bytes(4096)), 7) is None
