"""Files that writers left behind: which of them may be taken over, and the frames in them. No WAL in here.

    opened as untrusted ─▶ locked ─▶ start frame read ─▶ name, writer and links checked again ─▶ pieces

The owner is dead if its flock is free, or if its process is gone although somebody holds the lock: a forked worker
inherits its parent's. What stands in a file comes from another process, perhaps from another user: nothing in it may
raise anything but `Refused`, and no claim of it is believed beyond its bounds.

Evidence goes to quarantine/<file name> with a .reason beside it; nothing there is ever deleted by the daemon.
"""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ranklog import fs, wire
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.frame import FRAME_SIZE_MAX, HEADER, Kind, body_at, decode_gap, encode_gap, spans
from ranklog.identity import boot_id, pid_namespace, process_start, time_namespace
from ranklog.start import START_SIZE_MAX, Start, decode_start
from ranklogd.sequence import GAP_MAX

READ_SIZE = 256 << 10
"""Bytes looked at in one step of the server loop: some thousand frames, a few milliseconds."""
UNBORN_AGE_S = 60.0
_PASSING = frozenset({errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE})
"""Troubles of the disk or this process, not of the file: links, FIFOs and the like are refused with others."""
BLANK_SIZE_MAX = 4 << 20


class Refused(Exception):
    """A file is left alone; the text says why."""


class Unreadable(Refused):
    """The file could not be read: nothing is known of what it holds, and a later scan may have more luck."""


class Orphan(NamedTuple):
    """One open file of a writer. Whoever opened it closes `fd`, which gives back the lock."""

    path: Path
    fd: int
    uid: int
    size: int
    start: Start
    start_frame: bytes
    first_seq: int
    """Of the first frame behind the start frame; -1 if there is none."""
    alive: bool
    """Its owner lives: not to be touched, and `first_seq` was not looked for."""

    @property
    def is_spool(self) -> bool:
        """Whether its frames should reach to its end: a journal file is preallocated and recycled."""
        return self.path.suffix == ".spool"


class Piece(NamedTuple):
    """Consecutive frames of one file."""

    first_seq: int
    next_seq: int
    frames: bytes
    """Empty where all of them are older than what was asked for."""
    ended: bool
    """The end record is among them."""
    end: int
    """Offset behind them in the file."""
    damaged_at: int = -1
    """Offset of the first damaged frame before them; -1 if all before them is sound."""


def open_orphan(path: Path, writer: str) -> Orphan | None:
    """Open a file that is named for `writer`, and lock it if it is free; None if it is gone. Raises Refused."""
    try:
        fd = fs.open_untrusted(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _refusal(exc) from exc
    kept = False
    try:
        orphan = _judge(path, fd, writer)
        kept = True
    except FileNotFoundError:
        return None
    except FormatError as exc:
        raise Refused(str(exc)) from exc
    except OSError as exc:
        raise _refusal(exc) from exc
    finally:
        if not kept:
            os.close(fd)
    return orphan


def _refusal(exc: OSError) -> Refused:
    return (Unreadable if exc.errno in _PASSING else Refused)(exc.strerror or str(exc))


def _judge(path: Path, fd: int, writer: str) -> Orphan:
    info = os.fstat(fd)
    free = fs.try_lock(fd)
    head = memoryview(os.pread(fd, START_SIZE_MAX + HEADER.size, 0))
    body = body_at(head, 0)
    if body is None and free and not any(head) and _same_file(path, info) and not _has_bytes(fd):
        # Born just before a power cut: the disk kept the name, and not one of the bytes that were there before it.
        fs.unlink(path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if body is None:
        raise FormatError("no whole start frame at the head of the file")
    start = decode_start(body)
    if start.writer != writer:
        raise FormatError(f"the file says writer {start.writer}, its name says {writer}")
    if not _same_file(path, info):
        raise FormatError("it was exchanged while it was opened")
    head_end = HEADER.size + len(body)
    alive = not free and not owner_gone(start)
    if not alive and start.protocol > wire.VERSION:
        # Its frames would read as damage, and a journal's damaged end is thrown away.
        text = f"its frames need protocol {start.protocol}, this daemon speaks {wire.VERSION_MIN}..{wire.VERSION}"
        raise FormatError(f"{text}: upgrade ranklog. The records are safe in it")
    first_seq = -1 if alive else _first_seq(_window(fd, head_end), is_spool=path.suffix == ".spool")
    return Orphan(path, fd, info.st_uid, info.st_size, start, bytes(head[:head_end]), first_seq, alive)


def _same_file(path: Path, info: os.stat_result) -> bool:
    named = os.stat(path, follow_symlinks=False)
    return (named.st_ino, named.st_dev, named.st_nlink) == (info.st_ino, info.st_dev, 1)


def _has_bytes(fd: int) -> bool:
    """Return whether anything but zeros is in a file. One too large for a journal is not looked through."""
    offset = 0
    while offset < BLANK_SIZE_MAX and (piece := os.pread(fd, READ_SIZE, offset)):
        if piece.strip(b"\0"):
            return True
        offset += len(piece)
    return offset >= BLANK_SIZE_MAX


def _first_seq(buffer: memoryview, *, is_spool: bool) -> int:
    """Return the seq of the first frame, -1 if there is none; a damaged one stood for one seq at least."""
    skipped = behind_damage(buffer, 0) if is_spool and body_at(buffer, 0) is None else 0
    first = next(spans(buffer, skipped or 0), None)
    if first is None or first.kind == Kind.START:
        return -1
    return first.first if not skipped else max(first.first - 1, 1)


def behind_damage(buffer: memoryview, follow: int) -> int | None:
    """Return where the frames go on behind the damaged one at the head of `buffer`, None if that cannot be told.

    Its size is taken on trust if a frame that checks follows there, of a seq above `follow`: in a recycled journal
    what comes behind the last frame is older.
    """
    if len(buffer) < HEADER.size:
        return None
    skipped = HEADER.size + HEADER.unpack_from(buffer)[1]
    later = next(spans(buffer, skipped), None) if HEADER.size < skipped < len(buffer) else None
    return skipped if later is not None and later.kind != Kind.START and later.first > follow else None


def owner_gone(start: Start) -> bool:
    """Return whether the process that a start frame names is surely dead, whoever holds its lock."""
    if start.boot and start.boot != boot_id():
        return True
    if not start.pid or start.pid_ns != pid_namespace():
        return False
    now = process_start(start.pid)
    if now is None:
        return True
    # In a time namespace of its own a process counts from another boot, and its start is another number there.
    return start.pid_start not in (0, now) and time_namespace(start.pid) in (None, time_namespace())


def pieces(orphan: Orphan, after_seq: int) -> Iterator[Piece]:
    """Yield the frames behind the start frame, up to the first that does not follow; damaged ones are passed over.

    What lies below `after_seq` is yielded without its bytes. Raises Unreadable, and Refused for impossible claims.
    """
    offset, follow, damaged_at = len(orphan.start_frame), None, -1
    while True:
        buffer = _window(orphan.fd, offset)
        begin, end, first, ended = -1, 0, -1, False
        for span in spans(buffer, 0, expected=follow):
            if span.kind == Kind.START:
                break  # A second writer in one file: nobody writes that.
            if span.last - span.first >= GAP_MAX:
                raise Refused(f"a gap frame of {span.last - span.first + 1} records at offset {offset + span.offset}")
            if begin >= 0 and span.last - first >= GAP_MAX:
                break  # One piece is one batch, which stands for no more than one gap may.
            if begin < 0 and span.last >= after_seq:
                begin, first = span.offset, span.first
            end, follow, ended = span.end, span.last + 1, span.kind == Kind.END
        if not end or follow is None:
            # Where not even the first frame of a recycled file is sound, all that follows may be older than anything.
            known = follow is not None or orphan.is_spool
            skipped = behind_damage(buffer, follow or 0) if known and body_at(buffer, 0) is None else None
            if skipped is None:
                return
            damaged_at = offset if damaged_at < 0 else damaged_at
            offset, follow = offset + skipped, None
            continue
        offset += end
        frames = bytes(buffer[begin:end]) if begin >= 0 else b""
        yield Piece(first if frames else follow, follow, frames, ended, offset, damaged_at)


def behind(piece: Piece, seq: int) -> Piece:
    """Return the part of a piece from `seq` on; a gap frame that began earlier is told anew from there."""
    buffer = memoryview(piece.frames)
    for span in spans(buffer):
        if span.first >= seq:
            return piece._replace(first_seq=span.first, frames=bytes(buffer[span.offset :]))
        if span.last >= seq:
            body = body_at(buffer, span.offset)
            assert body is not None, "spans yields whole frames"
            gap = encode_gap(seq, span.last, decode_gap(body)[2], time.time_ns())
            return piece._replace(first_seq=seq, frames=gap + bytes(buffer[span.end :]))
    return piece._replace(first_seq=piece.next_seq, frames=b"")


def _window(fd: int, offset: int) -> memoryview:
    """Return bytes from `offset` on, with a whole frame at their head if there is one."""
    try:
        buffer = memoryview(os.pread(fd, READ_SIZE, offset))
        if len(buffer) == READ_SIZE and body_at(buffer, 0) is None:
            return memoryview(os.pread(fd, FRAME_SIZE_MAX + HEADER.size, offset))
    except OSError as exc:
        raise Unreadable(exc.strerror or str(exc)) from exc
    return buffer


def remove_unborn(path: Path, now_s: float) -> None:
    """Remove a file whose writer was killed before it came into view: no record was ever in it. Raises OSError."""
    if now_s - path.lstat().st_mtime < UNBORN_AGE_S:
        return
    fd = fs.open_untrusted(path)
    try:
        if fs.try_lock(fd):
            fs.unlink(path)
    finally:
        os.close(fd)


def keep_evidence(orphan: Orphan, end: int, quarantine: Path) -> None:
    """Move a file to quarantine/, durably, with a reason beside it; raises OSError."""
    target = quarantine / orphan.path.name
    text = f"{orphan.path}: what follows offset {end} of {orphan.size} is no frame. All before it was taken over.\n"
    target.with_name(f"{target.name}.reason").write_text(text)
    failpoint("adopt.quarantine.mid")
    try:
        fs.rename(orphan.path, target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        _copy(orphan, target)
        fs.unlink(orphan.path)
    fs.sync_dir(quarantine)


def _next_data(fd: int, offset: int) -> int | None:
    """Return where the next bytes are that are no hole; None behind the last."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        return None


def _copy(orphan: Orphan, target: Path) -> None:
    """Copy a file of which only the bytes take time, not its holes: anybody can make one of a terabyte."""
    temporary = target.with_name(f".{target.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        end = 0
        while (begin := _next_data(orphan.fd, end)) is not None:
            chunk = os.pread(orphan.fd, 64 << 10, begin)
            fs.write_all(fd, chunk, begin)
            end = begin + len(chunk)
        os.ftruncate(fd, orphan.size)
    finally:
        os.close(fd)
    fs.publish(temporary, target)
