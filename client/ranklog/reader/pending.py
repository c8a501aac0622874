"""What a reader cannot see yet: records that wait in this node's journals and spools.

A spool file means that no daemon answered; a journal file without an owner means that its writer is dead and nobody
has adopted it. The journal of a living writer means nothing: that is where its records pass through.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ranklog import fs
from ranklog.config import Settings
from ranklog.framefile import parse_name
from ranklog.places import adoption_dirs


def waiting_writers(directories: Iterable[Path]) -> set[str]:
    """Return the writers with records in these directories that no daemon has taken; skips what it may not read."""
    writers = set()
    for directory in directories:
        try:
            names = [path.name for path in directory.iterdir()]
        except OSError:
            continue
        for name in names:
            file = parse_name(name)
            if file is None or file.writer in writers:
                continue
            if file.kind == "spool" or _is_orphan(directory / name):
                writers.add(file.writer)
    return writers


def warn_pending() -> None:
    """Say on stderr how many writers of this node still hold records, and how to bring them in; silent if none."""
    count = len(waiting_writers(adoption_dirs(Settings.from_env())))
    if count:
        subject = "1 writer on this node holds" if count == 1 else f"{count} writers on this node hold"
        sys.stderr.write(f"{subject} records that no daemon has taken yet. Run: ranklog sync\n")


def _is_orphan(path: Path) -> bool:
    """Tell whether nobody owns the file: neither its writer nor an adopter at work."""
    try:
        fd = fs.open_untrusted(path)
    except OSError:
        return False  # Adopted this moment, or another user's: their reader will say so.
    try:
        return fs.try_lock(fd)
    finally:
        os.close(fd)  # Gives the lock back at once; an adopter that came meanwhile tries again.
