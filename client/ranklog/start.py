"""The start frame's payload: who a writer is. Written once at `init()`, repeated at the head of every journal and
spool file, sent in HELLO, and kept in the WAL before the writer's first batch of each segment, so that any of these
files explains itself alone. Pure.

The payload is a msgpack map; the fields of `Start` are its keys. Fields are only ever added, with a default: a reader
ignores keys it does not know and fills those it misses.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import msgpack

from ranklog.errors import FormatError
from ranklog.frame import Kind, decode_body, encode_frame

START_SIZE_MAX = 64 << 10
"""Bytes of a start frame: it is repeated in every file and segment, so notes and tags are cut to fit in `init()`."""

NAME_SIZE_MAX = 512
"""UTF-8 bytes of a project, run, group, node or role name. Longer ones are cut, with a hash, in `init()`."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One writer: a process between `init()` and `finish()`."""

    writer: str
    """32 hex digits, random: the writer's identity everywhere."""
    project: str
    run: str
    """The run's id: shared by all ranks of a job; a restart of the same job keeps it."""
    name: str = ""
    """The run's display name."""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    rank: int | None = None
    """Global rank; None for the daemon's own node metrics."""
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    role: str = ""
    """Empty for the training itself; otherwise tells several worlds of one run apart (rollout, `worker/3`, …)."""
    node: str = ""
    attempt: int = 0
    """Restarts of the job as far as the environment knows; the daemon raises it by what it saw itself."""
    parent: str = ""
    """The writer this process was forked from, if it was: a data-loading worker is not a new attempt."""
    pid: int = 0
    pid_start: int = 0
    """Start time of the process in clock ticks since boot (/proc/PID/stat, field 22): tells a reused pid apart."""
    pid_ns: int = 0
    """Inode of the pid namespace: only within the same one does the pid mean anything to a reader."""
    boot: str = ""
    """Kernel boot id: a writer of another boot is dead."""
    mode: str = "online"
    """`offline`: adopted only on request (`ranklog sync`)."""
    client: str = ""
    """Version of the client."""
    wall_ns: int = 0
    """When the writer started, nanoseconds since the epoch."""
    protocol: int = 1
    """The oldest version of the protocol that can read this writer's frames. An older daemon leaves its files alone."""


_WRITER = re.compile(r"[0-9a-f]{32}")
_KINDS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), int | None: (int, type(None)), list[str]: (list,)}
_TYPES = {f.name: _KINDS[f.type] for f in fields(Start)}


def encode_start(start: Start) -> bytes:
    """Return the start frame (seq 0)."""
    return encode_frame(msgpack.packb([Kind.START, 0, start.wall_ns, None, asdict(start)], unicode_errors="replace"))


def decode_start(body: memoryview | bytes) -> Start:
    """Return the writer a start frame's body describes; raises FormatError, for it comes from another user."""
    if len(body) > START_SIZE_MAX:
        raise FormatError(f"start frame of {len(body)} bytes; the limit is {START_SIZE_MAX}")
    kind, seq, _, _, payload = decode_body(body)
    if kind != Kind.START or seq != 0 or not isinstance(payload, dict):
        raise FormatError("not a start frame")
    return start_from_map(payload)


def start_from_map(payload: dict[Any, Any]) -> Start:
    """Return the writer a start payload describes; raises FormatError naming the field."""
    known = {key: value for key, value in payload.items() if key in _TYPES}
    for key, value in known.items():
        # bool is an int to isinstance, and no field is one.
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise FormatError(f"start frame: field {key!r} is a {type(value).__name__}")
        if isinstance(value, int) and not 0 <= value < 1 << 63:
            raise FormatError(f"start frame: field {key!r} is {value}, out of range")
    if not all(isinstance(tag, str) for tag in known.get("tags", [])):
        raise FormatError("start frame: a tag is not text")
    for key in ("rank", "attempt"):
        if (known.get(key) or 0) >= 1 << 31:
            raise FormatError(f"start frame: field {key!r} is {known[key]}, not a 32-bit count")
    for key in ("project", "run", "name", "group", "job_type", "role", "node"):
        if len(known.get(key, "").encode("utf-8", "surrogatepass")) > NAME_SIZE_MAX:
            raise FormatError(f"start frame: field {key!r} is longer than {NAME_SIZE_MAX} bytes")
    try:
        start = Start(**known)
    except TypeError as exc:
        raise FormatError(f"start frame: {exc}") from exc
    if not _WRITER.fullmatch(start.writer):
        raise FormatError(f"start frame: writer id {start.writer!r} is not 32 lower-case hex digits")
    return start
