"""How far an upload is, while a command waits for it: a bar on a terminal, one line a minute anywhere else.

    [########------------]  41 % · 12,345 records, 3 shards, 4.2 MB left · 1,203 records/s · 10 s to go
    12,345 records, 3 shards, 4.2 MB wait, next try in 23 s: POST … answered 429 …

Rate and time to go are those of the last `WINDOW_S`, for an upload comes in batches. `Meter` is pure: the snapshots are
those of `ranklogd.report.Status`, the clock is an argument. `Progress` writes to stderr.
"""

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ranklog.cli.output import human_size, printable
from ranklog.cli.status import age
from ranklog.control import Flushed
from ranklog.errors import NoDaemon

SHOW_AFTER_S = 1.0
"""What takes no longer needs no bar."""
SHOW_INTERVAL_S = 0.5
LINE_INTERVAL_S = 60.0
WINDOW_S = 60.0
BAR_CELLS = 20
_CLEAR_LINE = "\r\x1b[K"

Snapshot = Mapping[str, Any]


class Meter:
    """What a row of snapshots says of the way that lies behind and ahead."""

    def __init__(self) -> None:
        self._begin: int | None = None
        self._seen: deque[tuple[float, int]] = deque()

    def describe(self, snapshot: Snapshot, now_s: float) -> str:
        """Take in a snapshot (empty: nobody answers) and return the line that says where things are."""
        if not snapshot:
            return "no daemon answers"
        marks = snapshot.get("watermarks", {})
        received, uploaded = int(marks.get("received", 0)), int(marks.get("uploaded", 0))
        if self._begin is None or uploaded < self._begin:
            self._begin = uploaded  # The daemon may be another one than a moment ago.
            self._seen.clear()
        self._seen.append((now_s, uploaded))
        while now_s - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        left = received - uploaded
        shipper = snapshot.get("shipper") or {}
        if trouble := str(snapshot.get("full") or shipper.get("last_error") or ""):
            # The reason comes last: it may be longer than a terminal is wide.
            next_s = 0 if snapshot.get("full") else shipper.get("next_try_s") or 0
            again = f", next try in {age(next_s)}" if next_s else ""
            return f"{self._left(snapshot, left)} wait{again}: {trouble}"
        if not left:
            return "taking in what dead writers left"
        share = (uploaded - self._begin) / (received - self._begin)
        filled = int(share * BAR_CELLS)
        bar = f"[{'#' * filled}{'-' * (BAR_CELLS - filled)}] {int(share * 100):3d} %"
        return " · ".join([bar, f"{self._left(snapshot, left)} left", *self._speed(left)])

    @staticmethod
    def _left(snapshot: Snapshot, records: int) -> str:
        shipper = snapshot.get("shipper") or {}
        parts = [f"{records:,} record{'s' * (records != 1)}"]
        if shards := shipper.get("backlog_shards"):
            parts.append(f"{shards:,} shard{'s' * (shards != 1)}")
        if size_bytes := shipper.get("backlog_bytes"):
            parts.append(human_size(size_bytes))
        return ", ".join(parts)

    def _speed(self, left: int) -> list[str]:
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        if last_s <= first_s or last <= first:
            return []
        rate = (last - first) / (last_s - first_s)
        return [f"{rate:,.0f} records/s", f"{age(left / rate)} to go"]


class Progress:
    """Says now and then how far things are; silent if `quiet`, and about what is over at once."""

    def __init__(
        self, *, quiet: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._quiet = quiet
        self._clock = clock
        self._meter = Meter()
        self._shown = False
        self._next_s = clock() + (SHOW_AFTER_S if self._on_terminal else LINE_INTERVAL_S)
        self._look_s = clock()

    def due(self) -> bool:
        """Return whether a snapshot would be of use."""
        return not self._quiet and self._clock() >= min(self._next_s, self._look_s)

    def show(self, snapshot: Snapshot) -> None:
        """Take in a snapshot, and say what it means if it is time for that."""
        now_s = self._clock()
        # Looked at more often than told, so that the first line already knows a rate.
        self._look_s = now_s + (SHOW_INTERVAL_S if self._on_terminal else LINE_INTERVAL_S / 4)
        text = printable(f"ranklog: {self._meter.describe(snapshot, now_s)}")
        if now_s < self._next_s:
            return
        if self._on_terminal:
            self._next_s = now_s + SHOW_INTERVAL_S
            width = shutil.get_terminal_size().columns - 1  # A line that wraps could not be rewritten.
            self._stream.write(f"{_CLEAR_LINE}{text[:width]}")
            self._shown = True
        else:
            self._next_s = now_s + LINE_INTERVAL_S
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self._shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._shown = False


class Asking(threading.Thread):
    """One blocking question to the daemon, asked beside a thread that shows how far things are."""

    def __init__(self, question: Callable[[], Flushed]) -> None:
        super().__init__(daemon=True)
        self._question = question
        self.answer: Flushed | None = None
        self.error: NoDaemon | None = None

    def run(self) -> None:
        """Ask, and keep the answer."""
        try:
            self.answer = self._question()
        except NoDaemon as exc:
            self.error = exc
