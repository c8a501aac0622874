"""Frames: one checksummed record as bytes. Pure: no files, no clock.

    frame:  crc u32 | size u32 | body[size]                    little-endian
    body:   msgpack array [kind, seq, wall_ns, step, payload]

The CRC-32 covers size and body, so a damaged length fails like a damaged body. A run of frames ends at the first
header that does not check: zeros end a preallocated file, a torn or stale frame ends a recycled one.

Within one writer the frames' seqs follow each other without holes. A gap frame stands for every seq from its own to
`last` in its payload; each other frame stands for its own seq. So bytes whose first and last frame check always
cover one contiguous range, and a seq that is nowhere proves a loss.

payloads by kind:
    START    the map of `ranklog.start.Start`; seq is always 0
    METRICS  map key -> value; float, int, bool, str, nil, or ext 1 = a JSON text in UTF-8 (exact ints, lists, objects)
    SYSTEM   as METRICS, of the process or node rather than of the training
    CONFIG   as METRICS, one key for each flattened setting; also what define_metric declares, under `_metric/<name>`
    ALERT    map title, text, level
    TEXT     as METRICS: lines of captured output or of logging
    MEDIA    reserved
    GAP      map first, last, reason
    END      map exit_code, last (the last seq of this writer, which is the end frame's own)
"""

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple, NewType

import msgpack

from ranklog.errors import FormatError

Seq = NewType("Seq", int)
"""A writer's record count: from 0 (its start frame), without holes, used up even by a refused record."""

HEADER = struct.Struct("<II")
_SIZE = struct.Struct("<I")

FRAME_SIZE_MAX = 1 << 20
"""Bytes of one frame. A larger record is a mistake upstream: it is refused in `log()`, before it reaches a file."""

JSON_EXT = 1
"""The msgpack ext type of a value that is JSON text already."""


class Kind(IntEnum):
    """What a record is. Values are on disk: never reuse one."""

    START = 0
    METRICS = 1
    SYSTEM = 2
    CONFIG = 3
    ALERT = 4
    TEXT = 5
    MEDIA = 6
    GAP = 7
    END = 8


class Span(NamedTuple):
    """Where one frame lies in its buffer, and the range of seqs it stands for."""

    offset: int
    end: int
    kind: int
    first: Seq
    last: Seq


def encode_frame(body: bytes) -> bytes:
    """Return `body` as one frame."""
    sized = _SIZE.pack(len(body)) + body
    return _SIZE.pack(zlib.crc32(sized)) + sized


def encode_gap(first: int, last: int, reason: str, wall_ns: int) -> bytes:
    """Return the frame that stands for the refused seqs `first`..`last`; a longer reason is cut to 32 bytes."""
    cut = reason.encode("utf-8", "replace")[:GAP_REASON_SIZE_MAX].decode("utf-8", "ignore")
    return encode_frame(msgpack.packb([Kind.GAP, first, wall_ns, None, {"first": first, "last": last, "reason": cut}]))


GAP_REASON_SIZE_MAX = 32
GAP_SIZE_MAX = 128
"""Room for any gap frame: two u64 seqs twice, a clock, and the reason."""


def body_at(buffer: memoryview, offset: int) -> memoryview | None:
    """Return the body of the frame at `offset`, or None where no whole, undamaged frame starts there."""
    start = offset + HEADER.size
    if start > len(buffer):
        return None
    crc, size = HEADER.unpack_from(buffer, offset)
    if size == 0 or size > FRAME_SIZE_MAX or start + size > len(buffer):
        return None
    if zlib.crc32(buffer[offset + 4 : start + size]) != crc:
        return None
    return buffer[start : start + size]


def head(body: memoryview | bytes) -> tuple[int, int]:
    """Return (kind, seq) of a body without decoding the rest; raises FormatError. A seq has 63 bits, as in a shard."""
    if len(body) < 3 or body[0] != 0x95 or body[1] > 0x7F:
        raise FormatError("frame body does not start as a msgpack array [kind, seq, …] of 5")
    tag = body[2]
    if tag <= 0x7F:
        return body[1], tag
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}.get(tag)
    if width is None or len(body) < 3 + width or (width == 8 and body[3] > 0x7F):
        raise FormatError("frame seq is not an unsigned integer of 63 bits")
    return body[1], int.from_bytes(body[3 : 3 + width], "big")


def decode_gap(body: memoryview | bytes) -> tuple[int, int, str]:
    """Return (first, last, reason) of a gap frame's body; raises FormatError."""
    _, seq, _, _, payload = decode_body(body)
    if not isinstance(payload, dict):
        raise FormatError("gap frame without a map")
    first, last, reason = (payload.get(name) for name in ("first", "last", "reason"))
    if type(first) is not int or type(last) is not int or not isinstance(reason, str):
        raise FormatError("gap frame without first, last and reason")
    if not seq == first <= last < 1 << 63:
        raise FormatError(f"gap frame at seq {seq} claims {first}..{last}")
    return first, last, reason


def decode_body(body: memoryview | bytes) -> list[Any]:
    """Return [kind, seq, wall_ns, step, payload] of a small trusted-size body; raises FormatError.

    For tools and for the few frames the ingest process must understand; the shipper decodes with typed structs.
    """
    try:
        fields = msgpack.unpackb(body, strict_map_key=False, max_map_len=1 << 16, max_array_len=1 << 16)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise FormatError(f"frame body is not msgpack: {type(exc).__name__} {exc}") from exc
    if not isinstance(fields, list) or len(fields) != 5:
        raise FormatError("frame body is not an array of 5")
    return fields


def spans(buffer: memoryview, offset: int = 0, *, expected: int | None = None) -> Iterator[Span]:
    """Yield the frames from `offset` on, up to the first that is damaged or whose seq does not follow.

    `expected` is the seq the first frame must have; None takes any. A start frame may stand before any seq, since
    every journal and spool file begins with one.
    """
    while (body := body_at(buffer, offset)) is not None:
        try:
            kind, first = head(body)
            last = decode_gap(body)[1] if kind == Kind.GAP else first
        except FormatError:
            return
        if expected is not None and first != expected:
            return
        end = offset + HEADER.size + len(body)
        yield Span(offset, end, kind, Seq(first), Seq(last))
        expected = None if kind == Kind.START else last + 1
        offset = end
