"""The cache's end: which uploaded shards are let go, by age and by size. Only verified copies are ever in the cache."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from ranklog import fs
from ranklog.failpoint import failpoint


def expired(files: Iterable[tuple[Path, int, float]], age_max_s: float, size_max: int) -> list[Path]:
    """Return what must go, oldest first, of `files` (path, size in bytes, age in seconds). Pure.

    Everything older than `age_max_s`, and then the oldest until what is left is at most `size_max` bytes.
    """
    newest_first = sorted(files, key=lambda file: (file[2], file[0]))
    gone, kept_bytes, full = [], 0, False
    for path, size_bytes, age_s in newest_first:
        # Once one does not fit, no older one may stay in its place: readers get an unbroken recent past.
        full = full or kept_bytes + size_bytes > size_max
        if full or age_s > age_max_s:
            gone.append(path)
        else:
            kept_bytes += size_bytes
    return gone[::-1]


def retain(cache: Path, *, age_max_s: float, size_max: int, now_s: float | None = None) -> int:
    """Remove what expired from the cache, and the directories left empty; return how many files went.

    Not durable: what comes back after a power cut is found again. Raises OSError.
    """
    now_s = time.time() if now_s is None else now_s
    files = []
    for room, _, names in os.walk(cache):
        for name in names:
            path = Path(room, name)
            try:
                info = path.lstat()
            except FileNotFoundError:
                continue
            files.append((path, info.st_size, now_s - info.st_mtime))
    gone = expired(files, age_max_s, size_max)
    for path in gone:
        fs.unlink(path)
        failpoint("retain.delete.mid")
    if gone:
        for path in cache.iterdir():
            if path.is_dir():
                fs.remove_empty_dirs(path)
    return len(gone)
