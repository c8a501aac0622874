"""The shipper process's ties to the world: its parent, its priority, its descriptors, and being woken.

It lives exactly as long as its parent: the kernel kills it when the parent dies (PR_SET_PDEATHSIG), and the end of
stdin tells the same where that came too late. Dying at once is right: another daemon may already own the state
directory, and nothing is lost by it.
"""

import ctypes
import fcntl
import os
import select
import signal
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_CONFIG_SIZE_MAX = 1 << 20


def close_inherited_fds() -> None:
    """Close what this process was born with beyond 0, 1 and 2: everything it opened itself is close-on-exec."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)
        except OSError:
            continue  # The listing's own descriptor, gone by now.


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; if it died before, `watch_stdin` will tell."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def read_line(fd: int) -> str:
    """Return the first line that comes through `fd`, or all of it if it ends before."""
    data = b""
    while b"\n" not in data and len(data) < _CONFIG_SIZE_MAX:
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        data += chunk
    return data.partition(b"\n")[0].decode("utf-8", "replace")


def watch_stdin(told: Callable[[], None]) -> None:
    """End this process at once when stdin ends; call `told`, in a thread of its own, when something comes through."""

    def watch() -> None:
        while os.read(0, 4096):
            told()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class Waker:
    """Ends a wait: from another thread, from a signal handler, or ahead of it."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """End the wait that runs, or the next one. Takes no lock, so a signal handler may call it."""
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout_s: float, *others: int) -> None:
        """Return after `timeout_s`, or as soon as somebody called `wake` or one of `others` is readable."""
        poll = select.poll()
        for fd in (self._fd, *others):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, timeout_s) * 1000)}
        if self._fd in ready:
            os.eventfd_read(self._fd)
