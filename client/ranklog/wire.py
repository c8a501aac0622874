"""The messages between a client (DEALER) and the daemon (ROUTER) on one node. Pure: no sockets.

A message is one or two parts: a header, which is a msgpack array [type, …], and for some types a body of bytes that
nobody on the way decodes.

    to the daemon                                                      body
    [1, version_min, version_max, writer, base]            HELLO       the start frame
    [2, writer, first_seq, count, crc32, last]             BATCH       frames first_seq … first_seq + count - 1;
                                                                       last: the end record is among them
    [3, token]                                             PING
    [4, token]                                             STATUS
    [5, token, wait, deadline_s]                           FLUSH       wait: 0 durable, 1 sealed, 2 uploaded
    [6, token]                                             SYNC        adopt offline writers too

    to the client
    [17, version, writer, expected, spool_dir, journal_dir, cookie, credit]   WELCOME
    [18, writer, durable, credit]                          ACK         durable: every seq ≤ it is on disk
    [19, writer, code, text, retryable, expected]          REFUSE      expected: -1, or the seq to go on from
    [20, token, version, pid]                              PONG
    [21, token]                                            REPORT      JSON
    [22, token, done, pending]                             FLUSHED     pending: records not there yet

`writer` is 16 raw bytes. A daemon speaks its version and the one before; a client offers a range. Header fields are
only ever appended: a receiver ignores fields it does not know. The sizes of strings, arrays and the header are
limited before anything is allocated for them, for any local user may write to the socket.
"""

import math
from enum import IntEnum
from typing import Any

import msgpack

from ranklog.errors import ProtocolError
from ranklog.frame import FRAME_SIZE_MAX

VERSION = 1
VERSION_MIN = 1

HEADER_SIZE_MAX = 8 << 10
MESSAGE_SIZE_MAX = 16 << 20
"""Set as ZMQ_MAXMSGSIZE: libzmq drops the connection at a larger message, and tells the sender nothing."""
BATCH_SIZE_MAX = 4 << 20
"""What a client puts into one batch at most; one frame always fits."""
CREDIT = 2
"""Unacknowledged batches a writer may have in flight: an outage's backlog must not fill the daemon's memory."""

assert FRAME_SIZE_MAX < BATCH_SIZE_MAX < MESSAGE_SIZE_MAX


class Type(IntEnum):
    """The first element of every header."""

    HELLO = 1
    BATCH = 2
    PING = 3
    STATUS = 4
    FLUSH = 5
    SYNC = 6
    WELCOME = 17
    ACK = 18
    REFUSE = 19
    PONG = 20
    REPORT = 21
    FLUSHED = 22


class Wait(IntEnum):
    """How far records must have come before a FLUSH is answered."""

    DURABLE = 0
    SEALED = 1
    UPLOADED = 2


class Code(IntEnum):
    """Why a message was refused."""

    UNKNOWN_WRITER = 1
    """Say HELLO first (the daemon was restarted)."""
    SEQUENCE = 2
    """Go on from `expected`."""
    DAMAGED = 3
    """The body does not match its checksum or is not what the header says."""
    VERSION = 4
    """No protocol version in common."""
    FULL = 5
    """No room: keep the records and try again later."""
    FOREIGN = 6
    """The writer belongs to another user."""
    MALFORMED = 7
    """Not a message of this protocol, or over one of its limits."""
    STOPPING = 8
    """The daemon is going down."""


_ID = bytes
_FIELDS: dict[Type, tuple[type | tuple[type, ...], ...]] = {
    Type.HELLO: (int, int, _ID, int),
    Type.BATCH: (_ID, int, int, int, bool),
    Type.PING: (int,),
    Type.STATUS: (int,),
    Type.FLUSH: (int, int, (int, float)),
    Type.SYNC: (int,),
    Type.WELCOME: (int, _ID, int, str, str, str, int),
    Type.ACK: (_ID, int, int),
    Type.REFUSE: (_ID, int, str, bool, int),
    Type.PONG: (int, str, int),
    Type.REPORT: (int,),
    Type.FLUSHED: (int, bool, int),
}


def encode(kind: Type, *fields: Any) -> bytes:
    """Return a header; the fields are those of the table above."""
    assert len(fields) == len(_FIELDS[kind]), (kind, fields)
    header: bytes = msgpack.packb([int(kind), *fields])
    return header


def decode(header: bytes) -> tuple[Type, list[Any]]:
    """Return (type, fields) of a header; raises ProtocolError naming what is wrong with it."""
    if len(header) > HEADER_SIZE_MAX:
        raise ProtocolError(f"header of {len(header)} bytes; the limit is {HEADER_SIZE_MAX}")
    try:
        parts = msgpack.unpackb(header, max_array_len=16, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise ProtocolError(f"not a ranklog message: {type(exc).__name__}") from exc
    if not isinstance(parts, list) or not parts or type(parts[0]) is not int:
        raise ProtocolError("header is not an array that starts with a message type")
    try:
        kind = Type(parts[0])
    except ValueError as exc:
        raise ProtocolError(f"message type {parts[0]} is not known") from exc
    kinds = _FIELDS[kind]
    fields = parts[1:]
    if len(fields) < len(kinds):
        raise ProtocolError(f"{kind.name} has {len(fields)} fields; {len(kinds)} are needed")
    for number, (value, wanted) in enumerate(zip(fields, kinds, strict=False), 1):
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ProtocolError(f"{kind.name}: field {number} is a {type(value).__name__}")
        if isinstance(value, bytes) and len(value) != 16:
            raise ProtocolError(f"{kind.name}: field {number} has {len(value)} bytes, not 16")
        lowest = -1 if kind > Type.SYNC else 0  # Only answers say -1: "none yet".
        if isinstance(value, int) and not lowest <= value < 1 << 62:
            raise ProtocolError(f"{kind.name}: field {number} is out of range")
        if isinstance(value, float) and math.isnan(value):
            raise ProtocolError(f"{kind.name}: field {number} is not a number")  # A deadline that never passes.
    return kind, fields[: len(kinds)]
