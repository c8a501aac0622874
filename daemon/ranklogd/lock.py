"""One daemon per state directory: a kernel flock, which no crash can leave behind. Taken before the socket is bound."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from ranklog import fs

EXIT_BUSY = 75  # EX_TEMPFAIL: systemd may try again.


class Busy(Exception):
    """Another daemon owns the state directory; the text names it."""


def take_lock(path: Path, *, wait_s: float, stopped: Callable[[float], bool]) -> int:
    """Lock `path` and write who holds it; return the descriptor, which must stay open. Raises Busy after `wait_s`.

    `stopped(seconds)` waits and returns True if the wait was called off.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + wait_s
    while not fs.try_lock(fd):
        if time.monotonic() >= deadline or stopped(0.1):
            owner = _owner(fd)
            os.close(fd)
            raise Busy(
                f"another ranklogd {owner} owns {path.parent}. Stop it, or choose another state directory with --state-dir"
            )
    os.ftruncate(fd, 0)
    fs.write_all(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
    return fd


def _owner(fd: int) -> str:
    try:
        return f"(pid {json.loads(os.pread(fd, 256, 0))['pid']})"
    except (ValueError, KeyError, TypeError):
        return "(pid unknown)"
