"""A run as the training script sees it: `log()` and its siblings. Values in, records out; never waits, never raises.

The fast path of `log` takes what nearly every call is: known clean keys and floats only. Everything else goes through
`values`, which knows what people put into metrics. A forked child opens a writer of its own at its first record.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from ranklog import values
from ranklog.frame import Kind
from ranklog.lifecycle import lifecycle
from ranklog.shield import shielded, warn
from ranklog.start import Start
from ranklog.writer import Writer

KNOWN_KEYS_MAX = 4096
FLUSH_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 5.0
EXIT_TIMEOUT_S = 1.0
EXIT_SPILL_S = 0.2
"""The part of EXIT_TIMEOUT_S in which what no daemon took is moved to disk."""
FINISHED = "log() after finish(): the record is dropped. Call ranklog.init() again"
REFUSED = (
    "a record was refused: it is larger than 1 MiB, or no daemon takes records and the spool is full. "
    "Gaps are marked in the data; see `ranklog status`"
)
_METRICS = int(Kind.METRICS)
_UNUSUAL = (TypeError, ValueError, ArithmeticError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What adding up or packing something that is no number may raise. Whoever raises it has not written the record."""


class Config:
    """The run's settings: a mapping whose changes are logged. Nested values keep their nesting here."""

    def __init__(self, record: Callable[[dict[str, Any]], None]) -> None:
        self._record = record
        self._items: dict[str, Any] = {}

    @shielded(None)
    def update(self, settings: Mapping[str, Any] | None = None, *, allow_val_change: bool = True, **more: Any) -> None:
        """Set several at once. A changed value is a new record; readers take the newest."""
        changed = {**(settings or {}), **more}
        if not allow_val_change:
            for key in [k for k in changed if k in self._items and self._items[k] != changed[k]]:
                warn(f"config {key!r} keeps its value {self._items[key]!r}; pass allow_val_change=True to change it")
                del changed[key]
        self._items.update(changed)
        if changed:
            self._record(dict(changed))

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or `default`."""
        return self._items.get(key, default)

    def keys(self) -> list[str]:
        """Return the names, so that `dict(run.config)` works."""
        return list(self._items)


class Run:
    """One run in one process. Make it with `ranklog.init()`; a context manager that finishes it."""

    def __init__(
        self,
        start: Start,
        open_writer: Callable[[Start], Writer | None],
        on_finish: Callable[["Run", bool | None], None],
    ) -> None:
        """`on_finish` is told whether the daemon has everything; None where this process had no writer."""
        self.id = start.run
        self.name = start.name
        self.project = start.project
        self.rank = start.rank
        self.config = Config(self._log_config)
        self._start = start
        self._open_writer = open_writer
        self._on_finish = on_finish
        self._known_keys: set[tuple[str, ...]] = set()
        self._lock = threading.RLock()  # A signal handler may call finish().
        self._pid = os.getpid()
        self._finished = False
        self._writer = open_writer(start)

    @shielded(None)
    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one record of metrics, from any rank, thread or forked worker.

        When this returns, the record survives the death of this process. `step` defaults to the last one plus 1; an
        explicit one may go back, as after a restart from a checkpoint.
        """
        if step is not None and type(step) is not int:
            step = values.normalise_step(step, warn=warn)
        writer = self._writer
        if tuple(metrics) in self._known_keys and writer is not None:
            try:
                # Adds up exactly what is made of numbers. Those that are not Python's own fail to pack, below.
                sum(metrics.values(), 0.0)
                accepted = writer.write(_METRICS, metrics, step, True)  # noqa: FBT003
            except _UNUSUAL:
                pass
            else:
                if not accepted:
                    warn(FINISHED if writer.closed else REFUSED)
                return
        self._write(_METRICS, self._normal(metrics), step, True)  # noqa: FBT003

    def _normal(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = tuple(metrics)
        if len(self._known_keys) < KNOWN_KEYS_MAX and values.check_keys(keys):
            self._known_keys.add(keys)
        return values.normalise(metrics, warn=warn)

    @shielded(None)
    def log_system(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics of this process or machine rather than of the training; they have no step."""
        self._write(Kind.SYSTEM, values.normalise(metrics, warn=warn))

    @shielded(None)
    def alert(self, title: str, text: str = "", level: str = "INFO") -> None:
        """Record something a person should see; `level` is INFO, WARN or ERROR."""
        self._write(Kind.ALERT, {"title": str(title), "text": str(text), "level": str(getattr(level, "value", level))})

    @shielded(None)
    def define_metric(self, name: str, step_metric: str | None = None, summary: str | None = None) -> None:
        """Declare how readers should treat a metric: its x axis, and which value sums it up (min, max, last, mean)."""
        self._write(Kind.CONFIG, values.normalise({f"_metric/{name}": [step_metric, summary]}, warn=warn))

    def _log_config(self, changed: dict[str, Any]) -> None:
        self._write(Kind.CONFIG, values.normalise(changed, warn=warn))

    def _write(self, kind: int, payload: Mapping[str, Any], step: int | None = None, counted: bool = False) -> None:  # noqa: FBT001, FBT002
        writer = self._writer or self._reopen()
        if writer is not None and not writer.write(kind, payload, step, counted):
            warn(FINISHED if writer.closed else REFUSED)

    def _reopen(self) -> Writer | None:
        """Open a writer of this forked process's own; None if the run is finished or disabled."""
        with self._lock:
            if self._finished:
                warn(FINISHED)
            elif self._pid != os.getpid():
                self.after_fork()
            if self._writer is None and not self._finished and self._start.pid not in (0, self._pid):
                self._start = child_start(self._start)
                self._writer = self._open_writer(self._start)
                lifecycle.watch_multiprocessing()
            return self._writer

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's writer; the next record opens one of its own."""
        self._pid = os.getpid()
        self._lock = threading.RLock()  # Another thread may have held the old one when the process was forked.
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    @shielded(default=False)
    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything logged so far survives a power cut; False if it took longer than `timeout` seconds."""
        return self._writer is None or self._writer.flush(timeout, spooled=True)

    @shielded(None)
    def finish(
        self, exit_code: int | None = None, *, wait: str | None = "durable", timeout: float = FLUSH_TIMEOUT_S
    ) -> None:
        """End the run in this process. Repeated calls do nothing.

        `wait`: "durable" until the daemon has everything on disk, "uploaded" until it is in the store, None not at
        all. Without a daemon the records go to this node's spool, and the command that brings them in is printed.
        """
        with self._lock:
            if self._finished:
                return
            self._finished = True
            writer, self._writer = self._writer, None
        complete = None
        try:
            if writer is not None:
                writer.end(exit_code)
                complete = drain(writer, 0.0 if wait is None else timeout)
        finally:  # Ctrl-C while waiting: what is not sent is moved to disk, and the run is over all the same.
            if writer is not None:
                writer.close(CLOSE_TIMEOUT_S)
                complete = complete or writer.acknowledged
            self._on_finish(self, complete)
        if wait == "uploaded" and complete:
            from ranklog import control  # Only this wait talks to the daemon by itself.

            control.wait_uploaded(timeout)

    @shielded(None)
    def at_exit(self) -> None:
        """At interpreter exit without `finish()`: send what can be sent in a second; the rest is adopted."""
        writer = self._writer
        if writer is not None and self._pid == os.getpid():
            deadline = time.monotonic() + EXIT_TIMEOUT_S
            drain(writer, EXIT_TIMEOUT_S - EXIT_SPILL_S)
            writer.close(max(EXIT_SPILL_S, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(0 if kind is None else 1)


def drain(writer: Writer, timeout_s: float) -> bool:
    """Wait for the daemon to have everything, but not for a daemon that is not there; True if it has."""
    if timeout_s <= 0 or not writer.connects(min(CONNECT_TIMEOUT_S, timeout_s)):
        return False
    return writer.flush(timeout_s)


def child_start(start: Start) -> Start:
    """Return the start frame of a forked child of the writer that `start` describes."""
    from dataclasses import replace

    from ranklog.identity import process_start

    pid = os.getpid()
    return replace(
        start,
        writer=os.urandom(16).hex(),
        parent=start.writer,
        role=start.role or "worker",
        pid=pid,
        pid_start=process_start(pid) or 0,
    )
