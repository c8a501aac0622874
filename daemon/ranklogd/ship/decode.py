"""Frame bodies to records with typed values: the typing rule of shards. Pure.

    float, bool, int with |x| <= 2^53     -> value, a double (exact; NaN and infinities bit for bit)
    larger int                            -> text, its decimal digits
    str                                   -> text, as a JSON string
    nil                                   -> text `null`
    ext 1                                 -> text, verbatim: it is JSON already
    no keys at all                        -> one row with key '' and neither value nor text

Start, end and gap records have one row with key '' and their payload as JSON text; an alert's key is its title.

Bodies come from other users' processes. They are decoded by typed structs (msgspec), so a nested bomb, a wrong type or
an oversized count is refused before anything is built for it; whatever is wrong ends in one FormatError for that frame.
A key that stands twice in one payload counts once, with its last value.
"""

import json
from collections.abc import Collection, Iterator
from typing import Annotated, TypeAlias

import msgspec

from ranklog.errors import FormatError
from ranklog.frame import HEADER, JSON_EXT, Kind, body_at
from ranklog.start import START_SIZE_MAX, Start, start_from_map

EXACT_MAX = 1 << 53
"""Beyond this a double cannot hold every integer."""

INT64_MAX = (1 << 63) - 1

_Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=INT64_MAX)]
_Seq: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
_Ext = msgspec.msgpack.Ext
_Scalar: TypeAlias = float | int | bool | str | msgspec.msgpack.Ext | None


class Record(msgspec.Struct, gc=False):
    """One decoded frame. `keys` and `values` run in parallel; `texts` says which positions hold text instead."""

    kind: int
    seq: int
    last: int
    """The last seq it stands for: its own, but for a gap."""
    wall_us: int
    step: int | None
    keys: tuple[str, ...]
    values: Collection[float]
    """A number for each key; what stands at a position of `texts` means nothing."""
    texts: dict[int, str | None] | None
    """Position -> JSON text, or None for neither value nor text. None as a whole: all keys hold numbers."""
    size_bytes: int
    """Size of the body: bounds what a cut holds in memory."""


class _Framed(msgspec.Struct, array_like=True, gc=False):
    seq: _Seq
    wall_ns: _Int64
    step: _Int64 | None


class _Start(_Framed, tag=int(Kind.START)):
    payload: dict[str, float | int | bool | str | list[str] | None]


class _Keyed(_Framed):
    payload: dict[str, _Scalar]


class _Metrics(_Keyed, tag=int(Kind.METRICS)):
    pass


class _System(_Keyed, tag=int(Kind.SYSTEM)):
    pass


class _Config(_Keyed, tag=int(Kind.CONFIG)):
    pass


class _Text(_Keyed, tag=int(Kind.TEXT)):
    pass


class _AlertPayload(msgspec.Struct):
    title: str
    text: str = ""
    level: str | int | None = None


class _Alert(_Framed, tag=int(Kind.ALERT)):
    payload: _AlertPayload


class _GapPayload(msgspec.Struct):
    first: _Seq
    last: _Seq
    reason: str


class _Gap(_Framed, tag=int(Kind.GAP)):
    payload: _GapPayload


class _EndPayload(msgspec.Struct):
    exit_code: int | None = None
    last: int | None = None


class _End(_Framed, tag=int(Kind.END)):
    payload: _EndPayload


_Frame: TypeAlias = _Start | _Metrics | _System | _Config | _Text | _Alert | _Gap | _End
_decode = msgspec.msgpack.Decoder(_Frame).decode
_KINDS: dict[type, int] = {
    _Start: Kind.START, _Metrics: Kind.METRICS, _System: Kind.SYSTEM, _Config: Kind.CONFIG, _Text: Kind.TEXT,
    _Alert: Kind.ALERT, _Gap: Kind.GAP, _End: Kind.END,
}  # fmt: skip
_FLOATS = {float}
_quote = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def read_frames(frames: memoryview) -> Iterator[Record | str]:
    """Yield each frame's record, or the reason why it is none.

    After a frame whose checksum fails its size is taken on trust if a good frame follows there; else nothing behind
    it can be found, and it was the last.
    """
    position = 0
    while position < len(frames):
        body = body_at(frames, position)
        if body is None:
            yield "checksum of the frame fails"
            if position + HEADER.size > len(frames):
                return
            position += HEADER.size + HEADER.unpack_from(frames, position)[1]
            if body_at(frames, position) is None:
                return
            continue
        position += HEADER.size + len(body)
        try:
            yield decode_record(body)
        except FormatError as exc:
            yield str(exc)


def decode_record(body: memoryview | bytes) -> Record:
    """Return the record in one frame's body; raises FormatError saying what is wrong with it."""
    try:
        frame = _decode(body)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"frame does not decode: {exc}") from exc
    kind, seq, last, wall_us, size = _KINDS[type(frame)], frame.seq, frame.seq, frame.wall_ns // 1000, len(body)
    if isinstance(frame, _Keyed):
        payload = frame.payload
        if set(map(type, payload.values())) == _FLOATS:
            floats: Collection[float] = payload.values()  # type: ignore[assignment]  # just checked, all at once
            return Record(kind, seq, last, wall_us, frame.step, tuple(payload), floats, None, size)
        keys, (values, texts) = tuple(payload) or ("",), _typed(payload)
    else:
        key, text = _told(frame, body)
        keys, values, texts = (key,), [0.0], {0: text}
        if isinstance(frame, _Gap):
            last = frame.payload.last
    return Record(kind, seq, last, wall_us, frame.step, keys, values, texts, size)


def gap_record(first: int, last: int, reason: str, wall_us: int) -> Record:
    """Return the record that stands for the seqs `first`..`last`, which could not be read."""
    text = _quote({"first": first, "last": last, "reason": reason})
    # A seq beyond what the column holds comes from a damaged or hostile header: the text still tells the truth.
    first, last = min(first, INT64_MAX), min(last, INT64_MAX)
    return Record(Kind.GAP, first, last, wall_us, None, ("",), [0.0], {0: text}, len(text))


def read_start(body: memoryview | bytes) -> Start:
    """Return the writer that a start frame's body describes; raises FormatError."""
    try:
        frame = _decode(body)
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"start frame does not decode: {exc}") from exc
    if not isinstance(frame, _Start):
        raise FormatError("not a start frame")
    return _start_of(frame, body)


def _start_of(frame: _Start, body: memoryview | bytes) -> Start:
    if frame.seq != 0 or len(body) > START_SIZE_MAX:
        raise FormatError(f"start frame with seq {frame.seq} and {len(body)} bytes")
    return start_from_map(dict(frame.payload))


def _typed(payload: dict[str, _Scalar]) -> tuple[list[float], dict[int, str | None]]:
    """Apply the typing rule one by one; numbers never pass through numpy, which would round them or drop a nil."""
    if not payload:
        return [0.0], {0: None}
    values: list[float] = []
    texts: dict[int, str | None] = {}
    for position, (key, item) in enumerate(payload.items()):
        number = 0.0
        if type(item) is float:
            number = item
        elif isinstance(item, int) and -EXACT_MAX <= item <= EXACT_MAX:
            number = float(item)
        elif isinstance(item, _Ext):
            texts[position] = _json_text(key, item)
        else:
            # str, nil and a big int: their JSON is the text.
            texts[position] = _quote(item)
        values.append(number)
    return values, texts


def _json_text(key: str, ext: msgspec.msgpack.Ext) -> str:
    if ext.code != JSON_EXT:
        raise FormatError(f"key {key[:64]!r} has the unknown extension type {ext.code}")
    try:
        return str(ext.data, "utf-8")
    except UnicodeDecodeError as exc:
        raise FormatError(f"key {key[:64]!r} has JSON text that is not UTF-8") from exc


def _told(frame: _Start | _Alert | _Gap | _End, body: memoryview | bytes) -> tuple[str, str]:
    """Return (key, text) of a record that is not a map of keys; raises FormatError where its payload makes no sense."""
    if isinstance(frame, _Alert):
        return frame.payload.title, _quote({"text": frame.payload.text, "level": frame.payload.level})
    if isinstance(frame, _Gap):
        gap = frame.payload
        if not frame.seq == gap.first <= gap.last:
            raise FormatError(f"gap frame at seq {frame.seq} claims {gap.first}..{gap.last}")
        return "", _quote({"first": gap.first, "last": gap.last, "reason": gap.reason})
    if isinstance(frame, _End):
        return "", _quote({"exit_code": frame.payload.exit_code, "last": frame.payload.last})
    _start_of(frame, body)
    try:
        return "", _quote(frame.payload)
    except ValueError as exc:
        raise FormatError(f"start frame holds a number that is not finite: {exc}") from exc
