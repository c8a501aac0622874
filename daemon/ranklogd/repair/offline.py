"""The daemon's own lock: who holds it, and holding it while something is changed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ranklog import fs
from ranklog.errors import RanklogError
from ranklogd.lock import Busy, take_lock
from ranklogd.statedir import StateDir


def owner_pid(state: StateDir) -> int | None:
    """Return the pid of the daemon that owns a state directory, 0 if it does not say; None if nobody does."""
    try:
        fd = os.open(state.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if fs.try_lock(fd):
            return None  # Given back at once; a daemon that starts this moment waits for longer than that.
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(os.pread(fd, 256, 0))["pid"])
    finally:
        os.close(fd)
    return 0


@contextmanager
def alone(state: StateDir, command: str) -> Iterator[None]:
    """Own a state directory as a daemon would; raises RanklogError that names the daemon and how to stop it."""
    require(state)
    try:
        fd = take_lock(state.lock, state.root, "--state-dir", wait_s=0, stopped=lambda _: False)
    except Busy as exc:
        pid = owner_pid(state)
        who, stop = (f"a daemon (pid {pid})", f"kill {pid}") if pid else ("a daemon", "ranklog ping says its pid")
        raise RanklogError(
            f"{who} owns {state.root}, and {command} works without one only: nothing was read or changed. Stop it "
            f"({stop}; as a service: systemctl stop ranklogd), then run the same command again"
        ) from exc
    try:
        yield
    finally:
        os.close(fd)


def require(state: StateDir) -> None:
    """Raise RanklogError if there is no state directory."""
    if not state.wal.is_dir():
        raise RanklogError(
            f"{state.root} is no state directory of a daemon: it has no wal/. Name one with --state-dir "
            "(ranklog status --json says where the running one has it)"
        )
