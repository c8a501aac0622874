"""Starting a daemon from a process that is not one: exactly one at a time, whoever tries.

    <socket>.starter            flock held by the daemon itself, through a descriptor it inherits, for as long as it
                                lives; the JSON in it says who started it: {"by", "pid", "start", "pid_ns"}
    <runtime dir>/ranklogd.log  what such a daemon writes to stdout and stderr; begun anew above 1 MiB

Whoever gets the lock starts the daemon and passes the lock on. So the lock is held from before the start until the
daemon is gone, whichever of the processes involved is killed at which moment. A daemon that was started by hand or by
systemd holds none.

`start_if_absent` is for trainers (RANKLOG_AUTOSTART=1); `ranklogd.commands.launcher` uses the rest. Imports no zmq.
"""

import importlib.util
import json
import os
import socket as sockets
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ranklog import fs, places
from ranklog.config import Settings, environment
from ranklog.errors import MissingExtra, RanklogError
from ranklog.shield import warn

IDLE_EXIT = "10m"
"""A daemon that was started by a trainer goes when nobody has needed it for so long."""
LOG_NAME = "ranklogd.log"
LOG_SIZE_MAX = 1 << 20  # The runtime directory is memory.

_PACKAGES = ("ranklogd", "pyarrow", "numpy", "msgspec", "watchdog", "huggingface_hub", "psutil")
# Told for a service or a socket unit that is not the daemon's.
_NOT_FOR_THE_DAEMON = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
# Forks, lets the first process end, and becomes the daemon in the second, which then belongs to init.
_DETACH = "import os, sys; os.fork() and os._exit(0); os.execv(sys.argv[1], sys.argv[1:])"
_DETACH_TIMEOUT_S = 10.0


class Starter(NamedTuple):
    """Who started the daemon that holds the lock."""

    by: str
    """run or autostart."""
    pid: int = 0
    """The daemon's process id; 0 if the starter does not know it."""
    start: int = 0
    pid_ns: int = 0
    """Start time and pid namespace of that process, for a pid alone comes again."""


def start_if_absent(settings: Settings) -> bool:
    """Start a detached daemon with `--idle-exit 10m` if no socket answers; True if this very call started one.

    Never raises and does not wait for the daemon. Of many processes that call it at once, one starts a daemon. What
    keeps it from starting one is told once.
    """
    try:
        return _start_detached(settings)
    except (OSError, RanklogError, subprocess.SubprocessError) as exc:
        warn(f"RANKLOG_AUTOSTART=1: no daemon could be started: {exc}. Records are kept on this node. Run: ranklogd")
        return False


def _start_detached(settings: Settings) -> bool:
    if is_listening(places.find_socket(settings)):
        return False
    package = missing_package()
    if package:
        raise MissingExtra("a daemon", "daemon", package)
    socket = places.socket_candidates(settings)[0]
    places.ensure_private_dir(settings.runtime_dir)
    lock = lock_starter(socket)
    if lock is None:
        return False
    log = open_log(settings.runtime_dir / LOG_NAME)
    try:
        if is_listening(socket):
            return False  # Somebody was faster and has no lock.
        note_starter(lock, Starter("autostart"))
        # The client's words for socket and journals, so that a config file cannot lead the daemon elsewhere.
        places_flags = ["--socket", str(socket), "--runtime-dir", str(settings.runtime_dir)]
        command = [*daemon_command(), "--idle-exit", IDLE_EXIT, *places_flags]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _DETACH, *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=daemon_environment(),
            pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip
        return process.wait(_DETACH_TIMEOUT_S) == 0
    finally:
        os.close(log)
        os.close(lock)


def missing_package() -> str:
    """Return the first package that a daemon needs and that is not installed; "" if none. Imports none of them."""
    return next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), "")


def daemon_command() -> list[str]:
    """Return the command that runs `ranklogd` with this interpreter; raises RanklogError where there is none."""
    if not sys.executable:
        raise RanklogError("this Python is embedded and does not know its interpreter; start `ranklogd` by hand")
    return [sys.executable, "-m", "ranklogd"]


def daemon_environment() -> dict[str, str]:
    """Return the environment for a daemon that is started from here."""
    env = {name: value for name, value in environment().items() if name not in _NOT_FOR_THE_DAEMON}
    # `-m` puts the working directory first, and a training directory is full of files named as modules are.
    return {**env, "PYTHONSAFEPATH": "1"}


def open_log(path: Path) -> int:
    """Open a started daemon's log for appending; a long one is begun anew. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    if os.fstat(fd).st_size > LOG_SIZE_MAX:
        os.ftruncate(fd, 0)
    return fd


def is_listening(socket: Path) -> bool:
    """Return whether a process holds this unix socket open, even one that hangs; False for a dead one's leftover."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(os.fsencode(socket))
        except BlockingIOError:
            return True  # Its queue is full.
        except OSError:
            return False
    return True


def starter_path(socket: Path) -> Path:
    """Return where the starter's lock for a socket is."""
    return Path(f"{socket}.starter")


def lock_starter(socket: Path) -> int | None:
    """Take the starter's lock; None while a started daemon lives. Pass the descriptor on to the daemon, then close it.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(starter_path(socket), flags, 0o600)
    if fs.try_lock(fd):
        return fd
    os.close(fd)
    return None


def note_starter(fd: int, starter: Starter) -> None:
    """Write who started the daemon; raises OSError."""
    os.ftruncate(fd, 0)
    fs.write_all(fd, json.dumps(starter._asdict()).encode(), 0)


def read_starter(socket: Path) -> Starter | None:
    """Return who started the daemon that lives, or None if none does or this one was started otherwise."""
    try:
        fd = lock_starter(socket)
        if fd is not None:
            os.close(fd)
            return None
        found = json.loads(starter_path(socket).read_bytes())
        return Starter(str(found["by"]), int(found["pid"]), int(found["start"]), int(found["pid_ns"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
