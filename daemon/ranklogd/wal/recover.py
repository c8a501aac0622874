"""Recovery: what the WAL directory says at start. Everything is read from file names and segment headers.

An `.open` segment may have lost its tail or gained torn bytes; there can be two of them after a crash in the middle
of a roll, and then the older counts only up to where the younger begins. What is left is sealed under the range that
its valid entries cover, after its torn tail was cut off. Damage inside stays where it is: the shipper salvages around
it and keeps the original.
"""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ranklog import fs
from ranklog.errors import FormatError
from ranklog.frame import Kind, body_at, spans
from ranklog.start import decode_start
from ranklogd.sequence import run_key
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.segment import Damage, Entry, EntryType, WriterMark


@dataclass
class Recovered:
    """What a start needs to know. `leftovers` are open segments to seal once the new one exists."""

    store_id: str
    next_lsn: int
    marks: dict[bytes, WriterMark]
    leftovers: list[tuple[Path, int, int]] = field(default_factory=list)
    """(path, first lsn, last lsn); last < first: nothing in it."""
    notes: list[str] = field(default_factory=list)
    """What a person should know, one sentence each."""


def recover(state: StateDir, now_s: int) -> Recovered:
    """Read the WAL directory; raises OSError, and FormatError for a segment of a later version."""
    names = sorted(entry.name for entry in state.wal.iterdir())
    for name in names:
        if name.startswith("."):
            fs.unlink(state.wal / name)
    opens = sorted((first, state.wal / name) for name in names if (first := segment.parse_open(name)) is not None)
    found = Recovered("", _after_names(state, names), {})
    for index, (first, path) in enumerate(opens):
        limit = opens[index + 1][0] - 1 if index + 1 < len(opens) else None
        _read_open(found, path, first, limit, now_s)
    if not found.store_id:
        found.store_id = _store_id_of_sealed(state, names) if not opens else ""
    if not found.store_id:
        # A wiped or foreign directory starts at lsn 1 again: a new id keeps its names from colliding with old ones.
        found.store_id, found.next_lsn = secrets.token_hex(8), max(found.next_lsn, 1)
    return found


def _after_names(state: StateDir, names: list[str]) -> int:
    """Return the lsn behind everything that names of sealed segments and outbox directories mention."""
    outbox = [entry.name.removesuffix(".tmp") for entry in state.outbox.iterdir()] if state.outbox.is_dir() else []
    ranges = [segment.parse_sealed(name) for name in [*names, *outbox]]
    return max([last + 1 for _, last in filter(None, ranges)], default=1)


def _store_id_of_sealed(state: StateDir, names: list[str]) -> str:
    for name in reversed(names):
        if segment.parse_sealed(name):
            try:
                return segment.decode_header(memoryview((state.wal / name).read_bytes()))[0].store_id
            except FormatError:
                continue
    return ""


def _read_open(found: Recovered, path: Path, first: int, limit: int | None, now_s: int) -> None:
    buffer = memoryview(path.read_bytes())
    try:
        header, offset = segment.decode_header(buffer)
    except FormatError as exc:
        if "upgrade ranklog" in str(exc):
            raise
        found.notes.append(f"{path.name}: {exc}; set aside as evidence, its records are lost")
        found.leftovers.append((path, first, -1))
        return
    found.store_id = header.store_id
    found.marks = {mark.writer: mark for mark in header.writers}
    last = header.first_lsn - 1
    for item in segment.scan(buffer, header.salt, offset, header.first_lsn):
        if isinstance(item, Damage):
            found.notes.append(f"{path.name}: {item.end - item.offset} damaged bytes at offset {item.offset}")
            continue
        if limit is not None and item.lsn > limit:
            break
        last = max(last, _apply(found.marks, item, now_s))
        offset = item.end
    _settle(path, offset)
    found.leftovers.append((path, first, last))
    found.next_lsn = max(found.next_lsn, last + 1, first)


def _apply(marks: dict[bytes, WriterMark], entry: Entry, now_s: int) -> int:
    """Bring the marks up to an entry; return its last lsn."""
    if entry.type == EntryType.WRITER:
        writer, attempt = segment.WRITER.unpack_from(entry.payload)
        if writer not in marks:
            key, start_ns = _origin(entry)
            marks[writer] = WriterMark(entry.uid, writer, -1, attempt, key, 0, start_ns)
        return entry.lsn - 1
    writer, first_seq, count = segment.BATCH.unpack_from(entry.payload)
    mark = marks.get(writer) or WriterMark(entry.uid, writer, -1, 0, b"", 0)
    ended = any(span.kind == Kind.END for span in spans(entry.payload, segment.BATCH.size))
    marks[writer] = mark._replace(last_seq=first_seq + count - 1, ended_s=now_s if ended else mark.ended_s)
    return int(entry.lsn + count - 1)


def _origin(entry: Entry) -> tuple[bytes, int]:
    """Return (run key, start time) from a WRITER entry; nothing useful from one that does not decode."""
    body = body_at(entry.payload, segment.WRITER.size)
    try:
        start = decode_start(body) if body is not None else None
    except FormatError:
        start = None
    return (run_key(start), start.wall_ns) if start is not None else (b"", 0)


def _settle(path: Path, size: int) -> None:
    """Cut off a torn tail, which was never acknowledged, and sync the rest.

    The sync is needed even without a tail: after a kill, valid entries may exist in the page cache only, and the next
    header is about to call them durable.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        fs.sync_data(fd)
    finally:
        os.close(fd)


def seal_leftovers(state: StateDir, found: Recovered, new_first: int) -> None:
    """Give every old open segment its sealed name, or remove it if nothing is in it. After the new one exists."""
    for path, first, last in found.leftovers:
        if first == new_first:
            continue  # The new segment took its name.
        if last >= first:
            fs.rename(path, state.wal / segment.sealed_name(first, last))
        elif last == -1:
            fs.rename(path, state.quarantine / path.name)
        else:
            fs.unlink(path)
    fs.sync_dir(state.wal)
