"""One daemon per state directory, and one per socket: kernel flocks, which no crash can leave behind.

Both are taken before the socket is bound: libzmq lets a second daemon bind over the socket of a first one, whose
clients would then talk to nobody.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from ranklog import fs

EXIT_BUSY = 75  # EX_TEMPFAIL: systemd may try again.


class Busy(Exception):
    """Another daemon is in the way; the text names it."""


def take_lock(path: Path, owned: Path, flag: str, *, wait_s: float, stopped: Callable[[float], bool]) -> int:
    """Lock `path` and write who holds it; return the descriptor, which must stay open. Raises Busy after `wait_s`.

    `owned` is what the lock stands for, and `flag` chooses another. `stopped(seconds)` waits and returns True if the
    wait was called off.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + wait_s
    while not fs.try_lock(fd):
        if time.monotonic() >= deadline or stopped(0.1):
            owner = _owner(fd)
            os.close(fd)
            raise Busy(f"another ranklogd {owner} owns {owned}. Stop it, or choose another with {flag}")
    os.ftruncate(fd, 0)
    fs.write_all(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
    return fd


def _owner(fd: int) -> str:
    try:
        return f"(pid {json.loads(os.pread(fd, 256, 0))['pid']})"
    except (ValueError, KeyError, TypeError):
        return "(pid unknown)"
