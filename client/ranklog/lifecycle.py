"""What happens to runs when their process forks or ends: hooks set once.

exit, sys.exit, exception, Ctrl-C    atexit: send what can be sent within a second, the rest is adopted
fork                                 the child lets go of the parent's files; it opens its own at its first record
multiprocessing child                leaves by os._exit, which skips atexit: a Finalize does the same work
SIGTERM, os._exit, SIGKILL           nothing runs: the daemon adopts
"""

import atexit
import os
import sys
import threading
from typing import Any, Protocol

from ranklog.shield import warn

IMPORT_TIMEOUT_S = 5.0  # An import takes 50 ms; on a hung filesystem it must not take the training's fork with it.


class Mortal(Protocol):
    """Something that must hear of forks and exits."""

    def at_exit(self) -> None:
        """Finish in a second what can be finished."""

    def after_fork(self) -> None:
        """Let go of what belongs to the parent."""


class Lifecycle:
    """The runs of this process that are not finished."""

    def __init__(self) -> None:
        self.importing = threading.Lock()
        """Held by a sender thread while it imports: a child forked meanwhile could never import the same itself."""
        self._live: list[Mortal] = []
        self._finalized_pid = 0
        self._watching = self._held = False
        # Exit hooks run last in, first out: set at import, ours comes after all that a script registers.
        atexit.register(self._at_exit)

    def watch_forks(self) -> None:
        """Set the hooks around forks. Once, before the first thread of ours is started."""
        if self._watching:
            return
        self._watching = True
        # The thread imports zmq, and that imports logging, which sets fork hooks and needs its lock. Hooks before a
        # fork run last in, first out: ours has to wait for that import before logging's takes the lock.
        import logging  # noqa: F401

        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_in_parent, after_in_child=self._after_fork
        )

    def add(self, run: Mortal) -> None:
        """Watch over `run` until `remove`."""
        self._live.append(run)
        self.watch_multiprocessing()

    def remove(self, run: Mortal) -> None:
        """Forget a finished run."""
        if run in self._live:
            self._live.remove(run)

    def watch_multiprocessing(self) -> None:
        """In a multiprocessing child, whose exit skips atexit: have its own finalizer call us. Once a process."""
        process: Any = sys.modules.get("multiprocessing.process")
        if process is None or process.parent_process() is None or self._finalized_pid == os.getpid():
            return
        self._finalized_pid = os.getpid()
        from multiprocessing.util import Finalize

        Finalize(self, self._at_exit, exitpriority=-100)

    def _at_exit(self) -> None:
        for run in [*self._live]:
            run.at_exit()

    def _before_fork(self) -> None:
        self._held = self.importing.acquire(timeout=IMPORT_TIMEOUT_S)

    def _after_in_parent(self) -> None:
        if self._held:
            self.importing.release()

    def _after_fork(self) -> None:
        self.importing = threading.Lock()
        warn.after_fork()
        for run in self._live:
            run.after_fork()


lifecycle = Lifecycle()
