"""WAL segments: the bytes of one log file. Pure: no files, no clock.

    file:    header | entry | entry | …                                  little-endian
    header:  magic "RANKWAL1" | crc u32 | size u32 | meta[size]          crc over size and meta
    meta:    msgpack map version, node, store_id, first_lsn, boot, salt, writers
    entry:   salt u32 | header_crc u32 | size u32 | lsn u64 | recv_ns u64 | uid u32 | type u32 | crc u32 | bytes[size]
             header_crc over the six fields behind it, crc over bytes
    WRITER:  writer[16] | attempt u32 | start frame       takes no lsn; stands before a writer's first batch
    BATCH:   writer[16] | first_seq u64 | count u32 | frames      takes `count` lsns, from `lsn` on

`writers` in the header says what every known writer has had made durable before this segment, so dedup survives the
deletion of older ones: [uid, writer, last_seq, attempt, run_key, ended_s, start_ns] each (see `sequence`).

The salt is random for each segment. A client's bytes therefore cannot contain what reads as an entry, and after
damage a reader looks for the next salt whose header checks and whose lsn is not smaller: something valid follows =
corruption, keep a copy and go on; nothing follows = torn tail, which was never acknowledged.

    {first_lsn:016x}.open               the one that is written
    {first_lsn:016x}-{last_lsn:016x}.wal      sealed; entries beyond last_lsn do not count (see `log.Wal`)
"""

import operator
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from ranklog.errors import FormatError
from ranklog.layout import Lsn

MAGIC = b"RANKWAL1"
VERSION = 1
_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<IIIQQIII")
_ENTRY_TAIL = struct.Struct("<IQQIII")
WRITER = struct.Struct("<16sI")
BATCH = struct.Struct("<16sQI")
UID_UNKNOWN = 0xFFFFFFFF
_FIND_SIZE = 256 << 10

_OPEN = re.compile(r"([0-9a-f]{16})\.open")
_SEALED = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.wal")


class LaterFormat(FormatError):
    """A later version wrote this: the bytes are sound, and nothing may be done with them but wait for an upgrade."""


class EntryType(IntEnum):
    """What an entry's bytes are."""

    WRITER = 1
    BATCH = 2


class WriterMark(NamedTuple):
    """How far one writer's records are durable: a row of the header's map."""

    uid: int
    writer: bytes
    last_seq: int
    attempt: int
    run_key: bytes
    """Hash of (project, run, role, rank): the daemon counts a run's attempts by it."""
    ended_s: int
    """When its end or adoption became durable, in seconds since the epoch; 0 while it lives."""
    start_ns: int = 0
    """When the writer started, by its own clock: orders the attempts of a rank, whatever order they are adopted in."""


@dataclass(frozen=True)
class SegmentHeader:
    """The head of a segment file."""

    node: str
    store_id: str
    first_lsn: Lsn
    boot: str
    salt: int
    writers: tuple[WriterMark, ...]


class Entry(NamedTuple):
    """One whole, undamaged entry."""

    offset: int
    end: int
    lsn: int
    recv_ns: int
    uid: int
    type: EntryType
    payload: memoryview


class Damage(NamedTuple):
    """Bytes that are no entry although valid entries follow: corruption. The lsns between are lost."""

    offset: int
    end: int


def open_name(first_lsn: int) -> str:
    """Return the file name of the open segment."""
    return f"{first_lsn:016x}.open"


def sealed_name(first_lsn: int, last_lsn: int) -> str:
    """Return the file name of a sealed segment."""
    return f"{first_lsn:016x}-{last_lsn:016x}.wal"


def parse_open(name: str) -> Lsn | None:
    """Return the first lsn of an open segment's file name; None for any other name."""
    match = _OPEN.fullmatch(name)
    return Lsn(int(match[1], 16)) if match else None


def parse_sealed(name: str) -> tuple[Lsn, Lsn] | None:
    """Return (first, last) lsn of a sealed segment's file name; None for any other name."""
    match = _SEALED.fullmatch(name)
    return (Lsn(int(match[1], 16)), Lsn(int(match[2], 16))) if match else None


def encode_header(header: SegmentHeader) -> bytes:
    """Return the bytes of a segment's head."""
    meta: bytes = msgpack.packb(
        {
            "version": VERSION,
            "node": header.node,
            "store_id": header.store_id,
            "first_lsn": header.first_lsn,
            "boot": header.boot,
            "salt": header.salt,
            "writers": [list(mark) for mark in header.writers],
        }
    )
    sized = len(meta).to_bytes(4, "little") + meta
    return MAGIC + zlib.crc32(sized).to_bytes(4, "little") + sized


def header_size(head: bytes) -> int:
    """Return the size of the header that begins with these bytes, as it says itself; 0 if they are too few to say."""
    start = len(MAGIC) + _HEADER.size
    return start + int(_HEADER.unpack_from(head, len(MAGIC))[1]) if len(head) >= start else 0


def decode_header(buffer: memoryview) -> tuple[SegmentHeader, int]:
    """Return (header, offset of the first entry); raises FormatError saying what is wrong."""
    start = len(MAGIC) + _HEADER.size
    crc, size = _HEADER.unpack_from(buffer, len(MAGIC)) if len(buffer) >= start else (0, 0)
    # A header that checks is ours even if the magic does not: one flipped bit there must not stop a daemon.
    if not size or start + size > len(buffer) or zlib.crc32(buffer[start - 4 : start + size]) != crc:
        found = bytes(buffer[: len(MAGIC)])
        if found == MAGIC:
            raise FormatError(f"segment header is {'cut short' if len(buffer) < start else 'damaged'}")
        if found[:7] == MAGIC[:7] and found[7:].isdigit():  # Zeros behind it are a power cut's.
            raise LaterFormat(f"segment of a later format {found!r}; this version reads {MAGIC!r}: upgrade ranklog")
        raise FormatError("not a WAL segment: bad magic")
    try:
        meta: dict[str, Any] = msgpack.unpackb(buffer[start : start + size])
        version, first_lsn, salt = (operator.index(meta[name]) for name in ("version", "first_lsn", "salt"))
        if version > VERSION:
            raise LaterFormat(f"segment has format version {version}; this version reads {VERSION}: upgrade ranklog")
        marks = tuple(WriterMark(*row[: len(WriterMark._fields)]) for row in meta["writers"])
        header = SegmentHeader(meta["node"], meta["store_id"], Lsn(first_lsn), meta["boot"], salt, marks)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as exc:
        raise FormatError(f"segment header is not one of ours: {type(exc).__name__} {exc}") from exc
    return header, start + size


def encode_entry(
    salt: int, lsn: int, recv_ns: int, uid: int, kind: EntryType, *parts: bytes | memoryview
) -> list[bytes | memoryview]:
    """Return an entry as a list of buffers for one writev; `parts` together are its bytes."""
    crc, size = 0, 0
    for part in parts:
        crc, size = zlib.crc32(part, crc), size + len(part)
    tail = _ENTRY_TAIL.pack(size, lsn, recv_ns, uid, kind, crc)
    return [struct.pack("<II", salt, zlib.crc32(tail)) + tail, *parts]


ENTRY_OVERHEAD = _ENTRY.size


def entry_head(buffer: memoryview, salt: int, offset: int) -> tuple[int, int] | None:
    """Return (end, uid) by the header of the entry at `offset`, None where no whole, undamaged header stands there."""
    start = offset + _ENTRY.size
    if start > len(buffer):
        return None
    found, header_crc, size, _, _, uid, _, _ = _ENTRY.unpack_from(buffer, offset)
    return (start + size, uid) if found == salt and zlib.crc32(buffer[offset + 8 : start]) == header_crc else None


def entry_at(buffer: memoryview, salt: int, offset: int) -> Entry | None:
    """Return the entry at `offset`, or None where no whole, undamaged one starts there."""
    start = offset + _ENTRY.size
    if start > len(buffer):
        return None
    found, header_crc, size, lsn, recv_ns, uid, kind, crc = _ENTRY.unpack_from(buffer, offset)
    if found != salt or zlib.crc32(buffer[offset + 8 : start]) != header_crc or start + size > len(buffer):
        return None
    payload = buffer[start : start + size]
    if kind not in (EntryType.WRITER, EntryType.BATCH) or zlib.crc32(payload) != crc:
        return None
    if size < (BATCH.size if kind == EntryType.BATCH else WRITER.size):
        return None
    return Entry(offset, start + size, lsn, recv_ns, uid, EntryType(kind), payload)


def scan(buffer: memoryview, salt: int, offset: int, first_lsn: int) -> Iterator[Entry | Damage]:
    """Yield entries in order, and a Damage for each stretch of bytes between valid ones; a torn tail ends it."""
    lsn = first_lsn
    needle = salt.to_bytes(4, "little")
    while offset < len(buffer):
        entry = entry_at(buffer, salt, offset)
        if entry is not None and entry.lsn >= lsn:
            yield entry
            offset, lsn = entry.end, entry.lsn + (batch_count(entry) if entry.type == EntryType.BATCH else 0)
            continue
        found = _find(buffer, needle, offset + 1)
        while found >= 0:
            later = entry_at(buffer, salt, found)
            if later is not None and later.lsn >= lsn:
                break
            found = _find(buffer, needle, found + 1)
        if found < 0:
            return
        yield Damage(offset, found)
        offset = found


def _find(buffer: memoryview, needle: bytes, start: int) -> int:
    """Return where `needle` stands from `start` on, or -1. Piece by piece: a copy of a whole segment is too large."""
    while start < len(buffer):
        found = bytes(buffer[start : start + _FIND_SIZE + len(needle) - 1]).find(needle)
        if found >= 0:
            return start + found
        start += _FIND_SIZE
    return -1


def batch_count(entry: Entry) -> int:
    """Return how many records, and so lsns, a batch entry holds."""
    _, _, count = BATCH.unpack_from(entry.payload)
    return int(count)
