"""The spool: where records wait on node-local disk while no daemon takes them. One writer's growing files.

The sender thread alone moves chunks here, byte for byte, and makes them durable about once a second; the caller of
`log()` never touches a disk. Bounded by a size cap for each writer and by free space left to others: past either,
`take` raises ENOSPC, the chunk stays in the journal, and when that is full the newest records are refused.
"""

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


class Spool:
    """One writer's spool files. Owned by the sender thread."""

    def __init__(self, writer: str, start_frame: bytes, directories: list[Path], *, size_max: int) -> None:
        self.size = 0
        """Bytes in live files."""
        self._writer = writer
        self._start_frame = start_frame
        self._directories = directories
        self._size_max = size_max
        self._number = 0
        self._file: FrameFile | None = None
        self._unsynced = False

    def prefer(self, directory: Path) -> None:
        """Put later files into `directory` first: the daemon says that it looks there."""
        self._directories = [directory, *(d for d in self._directories if d != directory)]

    def take(self, chunk: Chunk) -> Chunk:
        """Copy a journal chunk to disk and return where it is now; raises OSError (ENOSPC at the cap)."""
        data = os.pread(chunk.file.fd, chunk.end - chunk.offset, chunk.offset)
        if self.size + len(data) > self._size_max:
            raise OSError(errno.ENOSPC, f"spool cap of {self._size_max} bytes reached")
        file = self._file
        if file is None or file.size + len(data) > FILE_SIZE_MAX:
            file = self._roll()
        room = os.fstatvfs(file.fd)
        if room.f_bavail * room.f_frsize < FREE_SIZE_MIN + len(data):
            raise OSError(errno.ENOSPC, f"less than {FREE_SIZE_MIN} bytes would stay free")
        offset = file.size
        fs.write_all(file.fd, data, offset)
        failpoint("spool.write.after")
        file.size += len(data)
        file.chunks += 1
        self.size += len(data)
        self._unsynced = True
        return Chunk(file, offset, file.size, chunk.first_seq, chunk.next_seq)

    def sync(self) -> None:
        """Make everything taken so far durable; on OSError the file is given up: later chunks go to a new one."""
        if self._file is None or not self._unsynced:
            return
        try:
            fs.sync_data(self._file.fd)
        except OSError:
            self.seal()
            raise
        self._unsynced = False
        failpoint("spool.sync.after")

    def release(self, chunk: Chunk) -> None:
        """Note that a chunk of a spool file is acknowledged; a sealed file without any goes."""
        chunk.file.chunks -= 1
        self.size -= chunk.end - chunk.offset
        if chunk.file.chunks == 0:
            if chunk.file is self._file:
                self._file, self._unsynced = None, False
            chunk.file.remove()

    def seal(self) -> None:
        """Write no more into the current file."""
        if self._file is not None:
            self._file.sealed = True
            if self._file.chunks == 0:
                self._file.remove()
        self._file, self._unsynced = None, False

    def files(self) -> list[FrameFile]:
        """Return the file being written, if any."""
        return [self._file] if self._file is not None else []

    def _roll(self) -> FrameFile:
        """Open the next file, in the first directory that takes one; the last one's bytes become durable before."""
        self.sync()
        self.seal()
        error: OSError | None = None
        for directory in self._directories:
            name = FileName(self._writer, self._number, "spool")
            try:
                self._file = framefile.create(directory, name, self._start_frame, 0)
                fs.sync_dir(directory)
            except OSError as exc:
                error = exc
                continue
            self._number += 1
            return self._file
        raise error or OSError(errno.ENOENT, "no spool directory could be used")
