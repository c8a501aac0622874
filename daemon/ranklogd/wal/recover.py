"""Recovery: what the WAL directory says at start. Everything is read from file names and segment headers.

An `.open` segment may have lost its tail or gained torn bytes; there can be two of them after a crash in the middle
of a roll, and then the older counts only up to where the younger begins. What is left is sealed under the range that
its valid entries cover, after its torn tail was cut off. Damage inside stays where it is: the shipper salvages what
can be told, frame by frame, and keeps the original. What it will find there is counted here by the same rule
(`salvage`), for a client must neither be asked for it again nor told that it is lost.

Only an `.open` segment knows which lsns were given out: where none can be read, the store gets a new id, and what was
sealed before keeps the old one, which is in its own header.
"""

import contextlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ranklog import fs
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.frame import HEADER, Kind, body_at, head
from ranklog.start import decode_start
from ranklogd.sequence import run_key
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.salvage import RebuiltBatch, find_salt, looks_torn, salvage
from ranklogd.wal.segment import Damage, Entry, EntryType, WriterMark


@dataclass
class Recovered:
    """What a start needs to know. `leftovers` are open segments to seal once the new one exists."""

    store_id: str
    next_lsn: int
    marks: dict[bytes, WriterMark]
    leftovers: list[tuple[Path, int, int]] = field(default_factory=list)
    """(path, first lsn, last lsn); last < first: nothing in it."""
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    """Open segments without a sound header, and what is wrong with it."""
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
        _read_open(found, path, first, limit, now_s, state.quarantine)
    if not found.store_id:
        # Counting may begin again at lsn 1: a new id keeps the names of new shards from colliding with old ones.
        found.store_id = secrets.token_hex(8)
    return found


def _after_names(state: StateDir, names: list[str]) -> int:
    """Return the lsn behind everything that names of sealed segments and outbox directories mention."""
    outbox = [entry.name.removesuffix(".tmp") for entry in state.outbox.iterdir()] if state.outbox.is_dir() else []
    ranges = [segment.parse_sealed(name) for name in [*names, *outbox]]
    return max([last + 1 for _, last in filter(None, ranges)], default=1)


def _read_open(found: Recovered, path: Path, first: int, limit: int | None, now_s: int, quarantine: Path) -> None:
    buffer = memoryview(path.read_bytes())
    opened = _open(found, path, first, buffer)
    if opened is None:
        found.next_lsn = max(found.next_lsn, first + 1)  # The new segment must not take its name.
        return
    salt, offset = opened
    last, end = first - 1, len(buffer)
    damage: Damage | None = None
    for item in segment.scan(buffer, salt, offset, first):
        if isinstance(item, Damage):
            found.notes.append(f"{path.name}: {item.end - item.offset} damaged bytes at offset {item.offset}")
            damage = item
            continue
        if limit is not None and item.lsn > limit:
            end = item.offset if damage is None else damage.end
            break
        if damage is not None:
            _salvage(found.marks, buffer, salt, damage.offset, damage.end, item.lsn - 1 - last, now_s)
            damage = None
        last = max(last, _apply(found.marks, item, now_s))
        offset = item.end
    begin = offset if damage is None else damage.offset
    if limit is not None:
        # The younger one's header says that all of this was durable: what cannot be read was lost since.
        _salvage(found.marks, buffer, salt, begin, end, limit - last, now_s)
        offset, last = (len(buffer), limit) if last < limit else (offset, last)
    elif begin < end and not looks_torn(buffer, salt, begin):
        count = _salvage(found.marks, buffer, salt, begin, end, None, now_s)
        offset, last = (end, last + count) if count else (offset, last)
        found.notes.append(f"{path.name}: damaged from offset {begin} on; {count} records are told by their frames")
        if not count:
            _keep_copy(quarantine, path.name, buffer, found.notes[-1])
    if offset < len(buffer):
        found.notes.append(f"{path.name}: cut off {len(buffer) - offset} bytes that were never acknowledged")
    _settle(path, offset)
    found.leftovers.append((path, first, last))
    found.next_lsn = max(found.next_lsn, last + 1, first)


def _open(found: Recovered, path: Path, first: int, buffer: memoryview) -> tuple[int, int] | None:
    """Take what the header says; return (salt, offset of the first entry), None where nothing can be read."""
    try:
        header, offset = segment.decode_header(buffer)
    except segment.LaterFormat:
        raise
    except FormatError as exc:
        salt = find_salt(buffer, first)
        if salt is None:
            found.notes.append(f"{path.name}: {exc}; it goes to quarantine/, and what was only in it is lost")
            found.unreadable.append((path, str(exc)))
        else:
            found.notes.append(f"{path.name}: {exc}; its entries are read without it")
        return None if salt is None else (salt, 0)
    found.store_id = header.store_id
    found.marks = {mark.writer: mark for mark in header.writers}
    return header.salt, offset


def _salvage(
    marks: dict[bytes, WriterMark], buffer: memoryview, salt: int, offset: int, end: int, room: int | None, now_s: int
) -> int:
    """Bring the marks up to what the shipper will find in damaged bytes; return how many lsns that are."""
    expected = {writer: mark.last_seq + 1 for writer, mark in marks.items()}
    count = 0
    for item in salvage(buffer, offset, end, room=room, expected=expected):
        head = segment.entry_head(buffer, salt, item.offset)
        mark = marks.get(item.writer) or WriterMark(head[1] if head else -1, item.writer, -1, 0, b"", 0)
        if isinstance(item, RebuiltBatch):
            ended_s = now_s if _ends(item.frames) else mark.ended_s
            mark = mark._replace(last_seq=item.first + item.total - 1, ended_s=ended_s)
            count += item.total
        elif item.writer not in marks:
            key, start_ns = _origin(item.frames)
            mark = mark._replace(attempt=item.attempt, run_key=key, start_ns=start_ns)
        expected[item.writer] = mark.last_seq + 1
        if mark.uid >= 0:  # A writer that nobody owns could not even come back.
            marks[item.writer] = mark
    return count


def _keep_copy(quarantine: Path, name: str, data: memoryview, reason: str) -> None:
    """Leave a whole segment as evidence before something of it is cut off, if there is room for that."""
    evidence = quarantine / f"{name}.{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):
        evidence.with_name(f"{evidence.name}.reason").write_text(f"{reason}\n")
        evidence.write_bytes(data)


def _apply(marks: dict[bytes, WriterMark], entry: Entry, now_s: int) -> int:
    """Bring the marks up to an entry; return its last lsn."""
    if entry.type == EntryType.WRITER:
        writer, attempt = segment.WRITER.unpack_from(entry.payload)
        if writer not in marks:
            key, start_ns = _origin(entry.payload[segment.WRITER.size :])
            marks[writer] = WriterMark(entry.uid, writer, -1, attempt, key, 0, start_ns)
        return entry.lsn - 1
    writer, first_seq, count = segment.BATCH.unpack_from(entry.payload)
    mark = marks.get(writer) or WriterMark(entry.uid, writer, -1, 0, b"", 0)
    ended = _ends(entry.payload[segment.BATCH.size :])
    marks[writer] = mark._replace(last_seq=first_seq + count - 1, ended_s=now_s if ended else mark.ended_s)
    return int(entry.lsn + count - 1)


def _ends(frames: memoryview) -> bool:
    """Return whether the last of these frames is an end record. The entry's checksum vouches for their sizes."""
    offset, last = 0, -1
    while offset + HEADER.size < len(frames):
        last, offset = offset, offset + HEADER.size + HEADER.unpack_from(frames, offset)[1]
    try:
        return last >= 0 and head(frames[last + HEADER.size :])[0] == Kind.END
    except FormatError:
        return False


def _origin(frames: memoryview) -> tuple[bytes, int]:
    """Return (run key, start time) from a writer's start frame; nothing useful from one that does not decode."""
    body = body_at(frames, 0)
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
        failpoint("recover.cut.after")
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
        else:
            fs.unlink(path)
        failpoint("recover.seal.mid")
    for path, reason in found.unreadable:
        evidence = state.quarantine / f"{path.name}.{secrets.token_hex(4)}"
        fs.rename(path, evidence)
        failpoint("recover.quarantine.mid")
        evidence.with_name(f"{evidence.name}.reason").write_text(f"{reason}\n")
        fs.sync_dir(state.quarantine)
    fs.sync_dir(state.wal)
