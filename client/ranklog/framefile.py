"""Files of frames: a writer's journal files (tmpfs, preallocated, recycled) and spool files (disk, growing).

    <writer>.<number:08x>.journal|spool        start frame | frame | frame | … | zeros or stale bytes

The name means "adopt me": whoever finds it takes the frames over if the owner is dead. The owner holds an flock on
each of its files for as long as it lives. A file is created under a dot name, locked, its start frame written (and
synced, for a spool), its mode set whatever the umask says, and only then renamed into view: nobody can see one that is
unlocked or empty.
"""

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.failpoint import failpoint

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
    poisoned: bool = False
    """An fsync of it failed: what it holds may be gone after a power cut."""
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
    fd, done = -1, False
    try:
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        locked = fs.try_lock(fd)
        assert locked, "a file created with O_EXCL was locked by somebody else"
        if size:
            fs.preallocate(fd, max(size, len(start_frame)))
        fs.write_all(fd, start_frame, 0)
        os.fchmod(fd, MODE)
        if not size:  # On disk: after a power cut a name without a start frame would be a riddle to everybody for ever.
            fs.sync_data(fd)
        failpoint("journal.create.after")
        fs.rename(hidden, path)
        done = True
    finally:
        if not done:  # Whatever it was, Ctrl-C included: nobody would look for this file again.
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
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
