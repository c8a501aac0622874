"""Room on the state disk: when to refuse records, and how to keep deletes working when it is full.

Refusing is not losing: the client keeps what was refused in its journal and spool and asks again.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from ranklog import fs
from ranklog.failpoint import failpoint
from ranklogd.statedir import StateDir

LOOK_ENTRIES = 2000
"""Directory entries counted in one look. After days without the store there are a hundred thousand, and the loop that
looks must go on acknowledging: the sum is then some looks old."""


def full_reason(*, used_bytes: int, free_bytes: int, quota_bytes: int, free_min_bytes: int) -> str:
    """Return why no more records can be taken, or an empty string. Pure."""
    if used_bytes >= quota_bytes:
        return f"the daemon's disk quota is used up ({used_bytes} of {quota_bytes} bytes, disk_quota_bytes)"
    if free_bytes < free_min_bytes:
        return (
            f"only {free_bytes} bytes are free on the daemon's disk; {free_min_bytes} must be "
            "(disk_free_min_bytes, reserve_size_bytes)"
        )
    return ""


class Disk:
    """Watches the state directory's filesystem. Owned by the server loop."""

    def __init__(self, state: StateDir, *, quota_bytes: int, free_min_bytes: int, reserve_bytes: int) -> None:
        self.reason = ""
        """Why records are refused now; empty while they are not."""
        self.used_bytes = 0
        """Bytes of WAL and outbox."""
        self._state = state
        self._quota_bytes = quota_bytes
        self._free_min_bytes = free_min_bytes
        self._reserve_bytes = reserve_bytes
        self._sizes = file_sizes(state.wal, state.outbox)
        self._sum_bytes = 0

    def look(self) -> None:
        """Measure again; raises OSError where the filesystem does not answer."""
        room = os.statvfs(self._state.root)
        free_bytes = room.f_bavail * room.f_frsize
        self._count()
        # Where the reserve was given up, more must be free than that: the records would have it at once.
        wanted_bytes = self._free_min_bytes + (0 if self._state.reserve.exists() else 2 * self._reserve_bytes)
        self.reason = full_reason(
            used_bytes=self.used_bytes,
            free_bytes=free_bytes,
            quota_bytes=self._quota_bytes,
            free_min_bytes=wanted_bytes,
        )
        if not self.reason:
            self._reserve()
        elif free_bytes < self._reserve_bytes:
            fs.unlink(self._state.reserve)

    def _count(self) -> None:
        """Go on adding up, and take the sum over once it is complete."""
        for _ in range(LOOK_ENTRIES):
            size_bytes = next(self._sizes, None)
            if size_bytes is None:
                self.used_bytes, self._sum_bytes = self._sum_bytes, 0
                self._sizes = file_sizes(self._state.wal, self._state.outbox)
                return
            self._sum_bytes += size_bytes

    def mark_full(self, reason: str) -> None:
        """A write met ENOSPC before `look` did: refuse until the next look, and give the reserve to the deletes."""
        self.reason = reason
        fs.unlink(self._state.reserve)

    def _reserve(self) -> None:
        if self._state.reserve.exists() or not self._reserve_bytes:
            return
        fd = os.open(self._state.reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            failpoint("reserve.create.mid")
            fs.preallocate(fd, self._reserve_bytes)
        except OSError:
            fs.unlink(self._state.reserve)
        finally:
            os.close(fd)


class Shares:
    """Bytes that each user has in the WAL or the outbox, counted since this process started. Pure."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._open: Counter[int] = Counter()
        self._sealed: deque[tuple[int, Counter[int]]] = deque()
        self._used: Counter[int] = Counter()

    def add(self, taken: Counter[int]) -> None:
        """Count bytes by uid that are in the open segment now."""
        self._open += taken
        self._used += taken

    def sealed(self, last_lsn: int) -> None:
        """The open segment ends with `last_lsn`."""
        self._sealed.append((last_lsn, self._open))
        self._open = Counter()

    def uploaded(self, lsn: int) -> None:
        """Everything up to `lsn` is in the store."""
        while self._sealed and self._sealed[0][0] <= lsn:
            self._used -= self._sealed.popleft()[1]

    def reason(self, uid: int) -> str:
        """Return why no more records of this user can be taken, or an empty string."""
        if not self._limit_bytes or self._used[uid] < self._limit_bytes:
            return ""
        used = self._used[uid]
        return f"user {uid} has {used} bytes waiting here; quota_per_uid_bytes is {self._limit_bytes}"


def file_sizes(*roots: Path) -> Iterator[int]:
    """Yield the size of every file below `roots`, or 0 for a directory; what vanishes meanwhile counts nothing."""
    waiting = [str(root) for root in roots]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except OSError:
            continue
        with entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        yield 0
                    else:
                        yield entry.stat(follow_symlinks=False).st_size
                except OSError:
                    continue
