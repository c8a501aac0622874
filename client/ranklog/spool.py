"""The spool: where records wait on node-local disk while no daemon takes them. One writer's growing files.

The sender thread alone moves chunks here, byte for byte, and makes them durable about once a second; the caller of
`log()` never touches a disk. Bounded by a size cap for each writer and by free space left to others: past either,
`take` raises ENOSPC, the chunk stays in the journal, and when that is full the newest records are refused.
"""

import contextlib
import errno
import os
from pathlib import Path

from ranklog import framefile, fs
from ranklog.failpoint import failpoint
from ranklog.framefile import FileName, FrameFile
from ranklog.journal import Chunk

FILE_SIZE_MAX = 64 << 20
"""A spool file is closed at this size, so that disk is given back file by file while a backlog drains."""
FREE_SIZE_MIN = 64 << 20
"""Free bytes that the spool leaves on its filesystem: the checkpoint of the training matters more."""
LOOK_SIZE = 8 << 20
"""Free space is looked at once in so many bytes: beside a busy training, each system call may cost milliseconds."""


class Spool:
    """One writer's spool files. Owned by the sender thread."""

    def __init__(self, writer: str, start_frame: bytes, directories: list[Path], *, size_max: int) -> None:
        self.size = 0
        """Unacknowledged bytes on disk."""
        self._writer = writer
        self._start_frame = start_frame
        self._directories = directories
        self._size_max = size_max
        self._number = 0
        self._room = 0
        """Bytes that may be written before the filesystem is looked at again."""
        self._files: set[FrameFile] = set()
        self._file: FrameFile | None = None
        self._unsynced = False

    def prefer(self, directory: Path) -> None:
        """Put later files into `directory` first: the daemon says that it looks there."""
        self._directories = [directory, *(d for d in self._directories if d != directory)]

    def take(self, chunk: Chunk) -> Chunk:
        """Copy a journal chunk to disk and return where it is now; raises OSError (ENOSPC at the cap).

        A directory that is full is passed over, until the others are full too.
        """
        size = chunk.end - chunk.offset
        if self.size + size > self._size_max:
            raise OSError(errno.ENOSPC, f"spool cap of {self._size_max} bytes reached")
        for _ in self._directories:
            try:
                return self._append(chunk, size)
            except OSError as exc:
                if exc.errno not in fs.NO_SPACE or self._file is None:
                    raise
                full = exc
                self._leave()
        raise full if self._directories else OSError(errno.ENOENT, "no spool directory could be used")

    def _leave(self) -> None:
        """Write no more into the directory of the current file, until the others are full too."""
        assert self._file is not None
        assert self._file.path is not None, "a spool file has a name"
        directory = self._file.path.parent
        self.sync()
        self.seal()
        self._directories = [*(d for d in self._directories if d != directory), directory]

    def _append(self, chunk: Chunk, size: int) -> Chunk:
        file = self._file
        if file is None or file.size + size > FILE_SIZE_MAX:
            file = self._roll()
        self._require_room(file, size)
        # Record 0 is the start frame, which stands at the head of every spool file already.
        there = file.head_end if chunk.first_seq == 0 and file.size == file.head_end else 0
        data = os.pread(chunk.file.fd, size - there, chunk.offset + there)
        offset = file.size - there
        try:
            fs.write_all(file.fd, data, file.size)
        except OSError:
            with contextlib.suppress(OSError):  # Half a frame would look like damage to whoever adopts this file.
                os.ftruncate(file.fd, file.size)
            raise
        failpoint("spool.write.after")
        file.size += len(data)
        file.chunks += 1
        self.size += size
        self._room -= size
        self._unsynced = True
        return Chunk(file, offset, file.size, chunk.first_seq, chunk.next_seq)

    def _require_room(self, file: FrameFile, size: int) -> None:
        if self._room >= size:
            return
        room = os.fstatvfs(file.fd)
        self._room = min(room.f_bavail * room.f_frsize - FREE_SIZE_MIN, LOOK_SIZE)
        if self._room < size:
            raise OSError(errno.ENOSPC, f"less than {FREE_SIZE_MIN} bytes would stay free")

    def sync(self) -> None:
        """Make everything taken so far durable; on OSError the file is given up: later chunks go to a new one.

        The error is never one of `fs.NO_SPACE`, which would mean that what was taken before is safe.
        """
        if self._file is None or not self._unsynced:
            return
        try:
            fs.sync_data(self._file.fd)
        except OSError as exc:
            self._file.poisoned = True
            self.seal()
            raise OSError(errno.EIO, f"fsync of the spool failed: {exc}") from exc
        self._unsynced = False
        failpoint("spool.sync.after")

    def release(self, chunk: Chunk) -> None:
        """Note that a chunk of a spool file is acknowledged; a sealed file without any goes."""
        chunk.file.chunks -= 1
        self.size -= chunk.end - chunk.offset
        if chunk.file.chunks == 0:
            if chunk.file is self._file:
                self._file, self._unsynced = None, False
            self._remove(chunk.file)

    def seal(self) -> None:
        """Write no more into the current file."""
        if self._file is not None:
            self._file.sealed = True
            if self._file.chunks == 0:
                self._remove(self._file)
        self._file, self._unsynced = None, False

    def files(self) -> list[FrameFile]:
        """Return every file that is open: for closing everything."""
        return list(self._files)

    def _remove(self, file: FrameFile) -> None:
        self._files.discard(file)
        file.remove()

    def _roll(self) -> FrameFile:
        """Open the next file, in the first directory that takes one; the last one's bytes become durable before."""
        self._room = 0
        self.sync()
        self.seal()
        error: OSError | None = None
        for directory in self._directories:
            try:
                self._file = self._create(directory)
            except OSError as exc:
                error = exc
                continue
            return self._file
        raise error or OSError(errno.ENOENT, "no spool directory could be used")

    def _create(self, directory: Path) -> FrameFile:
        name = FileName(self._writer, self._number, "spool")
        self._number += 1
        file = framefile.create(directory, name, self._start_frame, 0)
        try:
            failpoint("spool.create.after")
            fs.sync_dir(directory)
        except OSError:
            file.remove()
            raise
        self._files.add(file)
        return file
