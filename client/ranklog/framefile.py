"""Files of frames: a writer's journal files (tmpfs, preallocated, recycled) and spool files (disk, growing).

    <writer>.<number:08x>.journal|spool        start frame | frame | frame | … | zeros or stale bytes

The name means "adopt me": whoever finds it takes the frames over if the owner is dead. The owner holds an flock on
each of its files for as long as it lives. A file is created under a dot name, locked, its start frame written, its
mode set whatever the umask says, and only then renamed into view: nobody can see one that is unlocked or empty.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.frame import HEADER, Kind, body_at, spans
from ranklog.start import START_SIZE_MAX, Start, decode_start

MODE = 0o640  # The daemon of a multi-user node reads them by group; nobody else does.
_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{8})\.(journal|spool)")


class FileName(NamedTuple):
    """What the name of a frame file says."""

    writer: str
    number: int
    kind: str
    """`journal` or `spool`."""


def format_name(name: FileName) -> str:
    """Return the file name; the inverse of `parse_name`."""
    return f"{name.writer}.{name.number:08x}.{name.kind}"


def parse_name(name: str) -> FileName | None:
    """Return what a file name says, or None for a file this grammar does not own."""
    match = _NAME.fullmatch(name)
    return FileName(match[1], int(match[2], 16), match[3]) if match else None


@dataclass(eq=False)
class FrameFile:
    """One open frame file of the owner. Not safe for use by two threads, but for `pread` and `pwrite` on `fd`."""

    fd: int
    path: Path | None
    """None for a memfd: it dies with the process."""
    head_end: int
    """Where the frames behind the start frame begin."""
    size: int
    """Preallocated bytes; for a spool file, where the next frame goes."""
    wake_at: int = 0
    """The write position at which the sender is woken before its timer."""
    chunks: int = 0
    """Unacknowledged chunks that lie in this file."""
    sealed: bool = False
    """No more frames will be written: with no chunks left, the file can go."""
    before: "tuple[FrameFile, int, int] | None" = field(default=None, repr=False)
    """The journal's position when it went on in this file, until the sender has seen it."""
    closed: bool = field(default=False, repr=False)

    def close(self) -> None:
        """Close the descriptor and with it the lock; the file stays and asks for adoption."""
        if not self.closed:
            self.closed = True
            os.close(self.fd)

    def remove(self) -> None:
        """Unlink and close: every frame in it is safe elsewhere. One that cannot be unlinked is adopted for nothing."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                fs.unlink(self.path)
        self.close()


def create(directory: Path, name: FileName, start_frame: bytes, size: int) -> FrameFile:
    """Create a frame file in view, locked, with `size` bytes reserved (0: none); raises OSError and leaves nothing."""
    path = directory / format_name(name)
    hidden = directory / f".{path.name}"
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
    done = False
    try:
        locked = fs.try_lock(fd)
        assert locked, "a file created with O_EXCL was locked by somebody else"
        if size:
            fs.preallocate(fd, max(size, len(start_frame)))
        fs.write_all(fd, start_frame, 0)
        os.fchmod(fd, MODE)
        failpoint("journal.create.after")
        fs.rename(hidden, path)
        done = True
    finally:
        if not done:  # Whatever it was, Ctrl-C included: nobody would look for this file again.
            os.close(fd)
            fs.unlink(hidden)
            fs.unlink(path)
    return FrameFile(fd, path, len(start_frame), size or len(start_frame))


def create_anonymous(start_frame: bytes, size: int) -> FrameFile:
    """Create a journal file in memory: the last resort where no directory takes one. It dies with the process."""
    fd = os.memfd_create("ranklog-journal", os.MFD_CLOEXEC)
    try:
        fs.preallocate(fd, size)
        fs.write_all(fd, start_frame, 0)
    except OSError:
        os.close(fd)
        raise
    return FrameFile(fd, None, len(start_frame), size)


class Contents(NamedTuple):
    """What a frame file holds, as far as its bytes check."""

    start: Start
    start_frame: bytes
    first_seq: int
    """Of the first frame behind the start frame; -1 if there is none."""


def read_head(fd: int) -> Contents:
    """Return whose file this is and where its frames begin; raises FormatError or OSError. For adopters."""
    head = memoryview(os.pread(fd, START_SIZE_MAX + HEADER.size, 0))
    body = body_at(head, 0)
    if body is None:
        raise FormatError("no whole start frame at the head of the file")
    start = decode_start(body)
    end = HEADER.size + len(body)
    following = memoryview(os.pread(fd, READ_SIZE, end))
    first = next(spans(following), None)
    return Contents(start, bytes(head[:end]), -1 if first is None else first.first)


READ_SIZE = 2 << 20  # At least one whole frame always fits, so a read that finds none has met the end.


class Piece(NamedTuple):
    """Consecutive frames as bytes."""

    first_seq: int
    next_seq: int
    frames: bytes


def read_pieces(fd: int, offset: int, expected: int) -> Iterator[Piece]:
    """Yield the frames from `offset` on in pieces of at most READ_SIZE bytes, skipping seqs below `expected`.

    Ends at the first frame that is damaged or does not follow. Start frames are yielded like others: seq 0.
    """
    follow: int | None = None
    while True:
        buffer = memoryview(os.pread(fd, READ_SIZE, offset))
        begin, end, first, next_seq = 0, 0, -1, follow
        for span in spans(buffer, 0, expected=follow):
            end = span.end
            restart = span.kind == Kind.START and first >= 0
            if first < 0 or span.last < expected or restart:
                begin, first = (span.offset, span.first) if span.last >= expected else (span.end, -1)
            next_seq = span.last + 1
            follow = None if span.kind == Kind.START else next_seq
        if end == 0:
            return
        offset += end
        if first >= 0 and next_seq is not None and begin < end:
            yield Piece(first, next_seq, bytes(buffer[begin:end]))
