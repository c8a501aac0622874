"""Room on the state disk: when to refuse records, and how to keep deletes working when it is full.

Refusing is not losing: the client keeps what was refused in its journal and spool and asks again.
"""

import os
from pathlib import Path

from ranklog import fs
from ranklogd.statedir import StateDir


def full_reason(*, used_bytes: int, free_bytes: int, quota_bytes: int, free_min_bytes: int) -> str:
    """Return why no more records can be taken, or an empty string. Pure."""
    if used_bytes >= quota_bytes:
        return f"the daemon's disk quota is used up ({used_bytes} of {quota_bytes} bytes, disk_quota_bytes)"
    if free_bytes < free_min_bytes:
        return (
            f"only {free_bytes} bytes are free on the daemon's disk, less than disk_free_min_bytes ({free_min_bytes})"
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

    def look(self) -> None:
        """Measure again."""
        room = os.statvfs(self._state.root)
        free_bytes = room.f_bavail * room.f_frsize
        self.used_bytes = tree_size(self._state.wal) + tree_size(self._state.outbox)
        self.reason = full_reason(
            used_bytes=self.used_bytes,
            free_bytes=free_bytes,
            quota_bytes=self._quota_bytes,
            free_min_bytes=self._free_min_bytes,
        )
        if not self.reason:
            self._reserve()

    def mark_full(self, reason: str) -> None:
        """A write met ENOSPC before `look` did: refuse until the next look, and give the reserve back to the deletes."""
        self.reason = reason
        fs.unlink(self._state.reserve)

    def _reserve(self) -> None:
        if self._state.reserve.exists() or not self._reserve_bytes:
            return
        fd = os.open(self._state.reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fs.preallocate(fd, self._reserve_bytes)
        except OSError:
            fs.unlink(self._state.reserve)
        finally:
            os.close(fd)


def tree_size(path: Path) -> int:
    """Return the bytes of all files below `path`; files that vanish meanwhile count nothing."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                continue
    return total
