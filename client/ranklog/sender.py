"""The sender thread: moves what `log()` wrote to the daemon, or to the spool while there is none.

It wakes on a timer, or earlier when the caller wrote more than a mark: never once per record. While the link is not
attached, what the journal holds is moved to the spool about once a second. The thread may hang on a frozen disk for
as long as it likes: the caller of `log()` never waits for it.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ranklog.backlog import Backlog
from ranklog.failpoint import failpoint
from ranklog.journal import Journal
from ranklog.lifecycle import lifecycle
from ranklog.link import Link, State
from ranklog.spool import Spool

WAIT_INTERVAL_S = 0.1
"""How often a waiting thread looks by itself, besides being told."""
SPILL_INTERVAL_S = 1.0


class Sender:
    """One writer's sender. Public methods are for other threads, but for `step`; the rest runs in its own."""

    def __init__(
        self,
        start_frame: bytes,
        writer: bytes,
        journal: Journal,
        spool: Spool,
        find_socket: Callable[[], Path] | None,
        warn: Callable[[str], None],
        flush_interval_s: float = 0.1,
    ) -> None:
        self._journal = journal
        self._spool = spool
        self._backlog = Backlog(journal, spool)
        self._link = Link(start_frame, writer, self._backlog, spool, find_socket, warn)
        self._warn = warn
        self._told = ""
        self._flush_interval_s = flush_interval_s
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()  # Not select: a trainer may well have descriptors beyond 1024.
        self._poll.register(self._wake_fd, select.POLLIN)
        self._woken = self._closed = False
        self._due_s = 0.0
        self._hurry = False
        """Somebody waits for the spool."""
        self._condition = threading.Condition()
        self._acked = self._safe = 0
        self._stopping = threading.Event()
        self._last_spill_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ranklog-sender", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        lifecycle.watch_forks()
        self._thread.start()

    def wake(self) -> None:
        """Make the thread look now. Costs one system call at most. For the writer's lock holder, and within `wait`."""
        if not self._woken and not self._closed:
            self._woken = True
            os.eventfd_write(self._wake_fd, 1)

    def wait(self, seq: int, timeout_s: float, *, spooled: bool = False) -> bool:
        """Wait until every record below `seq` is acknowledged; with `spooled`, a copy on disk will do."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            self.wake()  # Once: the thread notifies at every step, and waking it for each of those is a busy loop.
            while (self._safe if spooled else self._acked) < seq:
                left = deadline - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self._hurry = self._hurry or spooled
                self._condition.wait(min(left, WAIT_INTERVAL_S))
        return True

    def connects(self, timeout_s: float) -> bool:
        """Wait until the daemon answers; False at once where there is no socket, or when it refused this writer."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self._link.state == State.CONNECTING:
                left = deadline - time.monotonic()
                if left <= 0 or not self._link.reachable or not self._thread.is_alive():
                    return False
                self._condition.wait(min(left, WAIT_INTERVAL_S / 4))
        return self._link.state == State.ATTACHED

    @property
    def state(self) -> State:
        """What is known of the daemon."""
        return self._link.state

    def expect_end(self, seq: int) -> None:
        """Say which seq the end record has, before it is written."""
        self._link.end_seq = seq

    @property
    def acked(self) -> int:
        """The seq below which everything is durable at the daemon."""
        return self._acked

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to spill what is unacknowledged, close everything and end; True if it did so in time.

        No other thread may be in `log()` from here on.
        """
        self._stopping.set()
        with self._condition:
            self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        with self._condition:  # Whoever is in `wait` must not wake a descriptor that is somebody else's by now.
            if not self._thread.is_alive():
                self._close_wake_fd()
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without a word to the daemon. The parent's is untouched."""
        with contextlib.suppress(OSError):  # Whoever closed all descriptors before was faster.
            for file in (*self._journal.files(), *self._spool.files()):
                file.close()
            self._close_wake_fd()

    def _close_wake_fd(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._wake_fd)

    # In the thread.

    def _run(self) -> None:
        try:
            self._link.connect(self._wake_fd)
            while not self._stopping.is_set():
                self.step(self._flush_interval_s)
            self._close()
        except Exception as exc:  # noqa: BLE001 - a loop top: training goes on, the journal keeps the records
            self._warn(
                f"the sender thread stopped: {exc!r}. "
                "Records stay in the journal and are adopted after this process ends."
            )

    def step(self, timeout_s: float) -> None:
        """Wait for news or the timer, then do everything there is to do once."""
        wait_s = max(0.0, min(timeout_s, self._due_s - time.monotonic()))
        if not self._link.poll(wait_s) and self._poll.poll(round(wait_s * 1000)):
            os.eventfd_read(self._wake_fd)
        now_s = time.monotonic()
        if self._woken or now_s > self._due_s - 0.001:
            # Not at every ack: those come 20 ms after each batch, and would make batches of 20 ms.
            self._woken = False  # Before looking: a wake-up that comes later is not lost.
            self._due_s = now_s + self._flush_interval_s
            self._backlog.collect()
            self._journal.refill()
        self._link.tend(now_s, self._wake_fd)
        waited_s = now_s - max(self._last_spill_s, self._link.detached_s)
        if self._journal.crowded:
            self._move(self._backlog.relieve)
        if self._link.state != State.ATTACHED and (self._hurry or waited_s >= SPILL_INTERVAL_S):
            self._spill(now_s)
        self._publish()

    def _spill(self, now_s: float) -> None:
        self._last_spill_s, self._hurry = now_s, False
        self._move(self._backlog.spill)

    def _move(self, to_disk: Callable[[], None]) -> None:
        try:
            to_disk()
        except OSError as exc:
            if str(exc) != self._told:
                self._warn(
                    f"records cannot be spooled to disk ({exc}); they stay in memory (tmpfs) until there is room"
                )
            self._told = str(exc)

    def _publish(self) -> None:
        with self._condition:
            self._acked = self._backlog.acked
            self._safe = self._backlog.spooled_below()
            self._condition.notify_all()

    def _close(self) -> None:
        """Leave nothing in tmpfs that could be on disk, then close, which unlocks what remains for adoption."""
        self._backlog.collect()
        if not self._backlog.empty:
            self._spill(time.monotonic())
        self._publish()
        self._spool.seal()
        held = self._backlog.files()
        for file in (*self._journal.files(), *self._spool.files()):
            if file in held:
                file.close()
            else:
                file.remove()
            failpoint("finish.remove.mid")
        self._link.close()
