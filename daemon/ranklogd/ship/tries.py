"""What a segment's conversion did to us so far: wal/<segment>.tries, a few lines that outlive this process.

    begin oom_kills=17              before each try, with the kernel's count of processes it killed for memory
    raised MemoryError: …           the try failed and we lived on
    Fatal Python error: …           written by faulthandler while a signal such as SIGSEGV was killing us
    (nothing more)                  we died, and nobody knows why

A *strike* is a try that failed through the segment itself: it raised, it crashed the interpreter, or the kernel's
memory killer struck before the next one began. Being killed from outside, or a power cut, is none, however often it
happens: a segment must never end in quarantine because somebody stopped the shipper at a bad moment.
"""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.failpoint import failpoint

SUFFIX = ".tries"
_BEGIN = "begin oom_kills="
_SIZE_MAX = 64 << 10
_VMSTAT = Path("/proc/vmstat")


class Record(NamedTuple):
    """What the file of one segment says."""

    strikes: int = 0
    unexplained: int = 0
    """Tries that ended with this process and left no reason."""
    last: str = ""
    """The last reason, for the quarantine."""


def judge(text: str, oom_kills: int) -> Record:
    """Return what a `.tries` file says, if the kernel has killed `oom_kills` processes for memory by now. Pure."""
    strikes = unexplained = 0
    last, began, reason = "", -1, ""
    for line in (*text.split("\n"), f"{_BEGIN}{oom_kills}"):
        if line.startswith(("raised ", "Fatal Python error")):
            reason = line
        elif line.startswith(_BEGIN):  # The next try's begin is the end of the one before.
            now = _count(line)
            if began >= 0 and not reason and now > began:
                reason = "the kernel killed the converter for lack of memory"
            if began >= 0 and reason:
                strikes, last = strikes + 1, reason
            elif began >= 0:
                unexplained += 1
            began, reason = now, ""
    return Record(strikes, unexplained, last)


def oom_kills() -> int:
    """Return how many processes this kernel has killed for lack of memory; 0 where it does not tell."""
    try:
        lines = _VMSTAT.read_text().split("\n")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class Try:
    """One running try."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._begin = os.fstat(fd).st_size

    def failed(self, reason: str) -> None:
        """Count a strike; raises OSError."""
        os.write(self._fd, f"raised {reason[:1000]!r}\n".encode("utf-8", "replace"))

    def withdrawn(self) -> None:
        """Count nothing: the trouble was not the segment's."""
        os.ftruncate(self._fd, self._begin)


class Tries:
    """The `.tries` file of one segment."""

    def __init__(self, segment: Path) -> None:
        self._path = segment.with_suffix(SUFFIX)

    def read(self) -> Record:
        """Return what is known of the segment. A file that cannot be read counts as a try nobody can explain."""
        try:
            return judge(self._path.read_text(encoding="utf-8", errors="replace")[:_SIZE_MAX], oom_kills())
        except FileNotFoundError:
            return Record()
        except OSError:
            return Record(unexplained=1)

    @contextmanager
    def begun(self) -> Iterator[Try]:
        """Note the begin of a try, and whatever signal crashes this process during it; raises OSError."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            failpoint("tries.create.after")
            attempt = Try(fd)
            os.write(fd, f"{_BEGIN}{oom_kills()}\n".encode())
            faulthandler.enable(fd)
            yield attempt
        finally:
            faulthandler.disable()
            os.close(fd)

    def forget(self) -> None:
        """The segment is out of the WAL."""
        fs.unlink(self._path)


def forget_orphans(wal: Path) -> None:
    """Remove `.tries` files whose segments are gone: we died between the two."""
    for path in wal.glob(f"*{SUFFIX}"):
        if not path.with_suffix(".wal").exists():
            fs.unlink(path)


def _count(line: str) -> int:
    text = line.removeprefix(_BEGIN).strip()
    return int(text) if text.isdecimal() else 0
