"""The shipper: sealed segments to shards, shards to the store. `python -m ranklogd.ship.shipper`, config on stdin.

    main thread      sealed segment ─▶ shards in the outbox ─▶ report          woken by wal/, uploads, signals
    upload thread    outbox ─▶ store ─▶ cache or gone ─▶ retention             woken by conversions

Conversion never waits for the store: a put that hangs holds up its own thread only. What each thread owns it finds as
files, so neither tells the other more than "look". A rescan is the truth, every wake-up an optimisation.

A network store's call has a deadline. One that is still not back long after it (a name lookup, a library that never
returns) cannot be ended from inside: between two conversions this process ends itself with EXIT_HUNG, and the next one
begins anew. A library that also keeps every other thread from running is met by a timer that needs none of them.

A line on stdin: somebody waits for the upload, keep no pace. SIGTERM: finish what is running, convert and upload what
is left until `stop_deadline_s`, exit 0. A second signal exits at once. What remains is found by the next shipper.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TypeVar

from ranklog import fs
from ranklog.errors import RanklogError
from ranklog.stores.base import Store, open_store
from ranklogd.clockstep import ClockStep
from ranklogd.config import Config, environment
from ranklogd.retry import backoff_s
from ranklogd.secrecy import CHATTY_LOGGERS, forbid_core_file, unpack
from ranklogd.ship.conversion import Conversion
from ranklogd.ship.convert import Converted
from ranklogd.ship.counters import ShipperReport, read_counts, read_hang, write_report
from ranklogd.ship.guard import outcome
from ranklogd.ship.process import Waker, close_inherited_fds, die_with_parent, read_line, watch_stdin
from ranklogd.ship.retention import retain
from ranklogd.ship.upload import Uploader
from ranklogd.statedir import StateDir
from ranklogd.supervise import EXIT_HUNG
from ranklogd.wal.segment import parse_open, parse_sealed
from ranklogd.watch import Watch

_log = logging.getLogger("ranklogd.shipper")

RETAIN_INTERVAL_S = 30.0
NICE = 5
EXIT_CONFIG = 78
STANDSTILL_S = 1800.0
"""A main loop that has not turned for so long never will: no conversion takes that long."""

THREADS_MAX = 64
"""More than so many: calls were given up whose threads wait for ever. A new process has none of them."""

T = TypeVar("T")


class Shipper:
    """Both halves over one state directory. `step` does everything there is to do once; `run` is the process."""

    def __init__(
        self, config: Config, *, store: Store | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.state = StateDir(config.state_dir)
        self._make_rooms()
        self.conversion = Conversion(self.state, config, clock=clock)
        self.uploader = Uploader(store or open_store(config.to, config.store_options), self.state, config, clock=clock)
        self._config = config
        self._clock = clock
        self._before = self._counts = read_counts(self.state.shipper_report)
        self._hung_before = read_hang(self.state.shipper_report)
        self._troubles: dict[str, str] = {}
        self._upload_failures = 0
        self._retained_s = -RETAIN_INTERVAL_S
        self._clock_step = ClockStep(time.time(), time.monotonic())
        self._main = Waker()
        self._upload = Waker()
        self._stopping = False
        self.conversion.start()

    def step(self) -> ShipperReport:
        """Convert and upload all that is due, keep the cache in its bounds, write the report. For tests and tools."""
        while self.convert_one() is not None:
            continue
        while self.upload_some() == 0:
            continue
        return self.report() or self._counts

    def _make_rooms(self) -> None:
        for room in self.state.rooms:
            fs.make_dir(room)

    def convert_one(self) -> Converted | None:
        """Convert one segment that is due; None if there is none."""
        done = self._guard("conversion", self.conversion.step)
        if not isinstance(done, Converted):
            return None
        self._counts = replace(
            self._counts,
            converted_segments=self._counts.converted_segments + 1,
            shards=self._counts.shards + len(done.shards),
            rows=self._counts.rows + done.rows,
            quarantined_records=self._counts.quarantined_records + done.quarantined_records,
            damaged_stretches=self._counts.damaged_stretches + done.damaged_stretches,
        )
        return done

    def upload_some(self) -> float | None:
        """Upload one batch; return seconds until the next call is of use, None if only news can make it so."""
        wait_s = self._guard("upload", self.uploader.step)
        if isinstance(wait_s, Exception):
            # The state directory failed, or a store broke its contract: neither give up nor spin.
            self._upload_failures += 1
            base_s, max_s = self._config.retry_base_s, self._config.retry_max_s
            return max(0.05, backoff_s(self._upload_failures, base_s=base_s, max_s=max_s, dice=1.0))
        self._upload_failures = 0
        if self._clock() - self._retained_s >= RETAIN_INTERVAL_S:
            self._retained_s = self._clock()
            size_max = self._config.cache_size_bytes if self._config.keeps_cache else 0
            age_max_s = self._config.cache_age_s
            now_s = self._clock_step.earliest(time.time(), time.monotonic())
            work = partial(retain, self.state.cache, age_max_s=age_max_s, size_max=size_max, now_s=now_s)
            self._guard("retention", work)
        return wait_s

    def report(self) -> ShipperReport | None:
        """Measure what waits and write it down; None if it cannot be measured."""
        report = self._guard("measure", self._measure)
        if isinstance(report, Exception):
            return None
        self._guard("report", partial(write_report, self.state.shipper_report, report))
        return report

    def hurry(self) -> None:
        """Somebody waits for the upload of what is there. May be called from any thread."""
        self.uploader.hurry()
        self._upload.wake()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then drain; return an exit code when all is uploaded or the time is over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._upload_loop, name="upload", daemon=True).start()
        watch = outcome(lambda: Watch([self.state.wal]))
        fds = [watch.fd] if isinstance(watch, Watch) else []
        if isinstance(watch, Exception):
            _log.info("watch_unavailable error=%s; looking every %g s", watch, self._config.rescan_interval_s)
        deadline_s: float | None = None
        while True:
            faulthandler.dump_traceback_later(STANDSTILL_S, exit=True, file=2)
            if isinstance(watch, Watch):
                watch.clear()
            if self._stopping and deadline_s is None:
                deadline_s = self._clock() + self._config.stop_deadline_s
                self.conversion.hurry()
                self.uploader.hurry(self._config.stop_deadline_s)
                self._upload.wake()
            converted = self.convert_one()
            report = self.report()
            if reason := self._hang():
                _log.error("store_hung error=%s; this process ends and another one begins", reason)
                return EXIT_HUNG
            if deadline_s is not None:
                drained = report is not None and not report.backlog_segments + report.backlog_shards
                if drained or self._clock() >= deadline_s:
                    _log.info("shipper_stopped drained=%s", drained)
                    return 0
            if converted is not None:
                self._upload.wake()
                continue
            wait_s = self._config.rescan_interval_s
            self._main.wait(wait_s if deadline_s is None else min(wait_s, deadline_s - self._clock(), 0.2), *fds)

    def _upload_loop(self) -> None:
        while True:
            wait_s = self.upload_some()
            if wait_s == 0:
                self._main.wake()  # For the report.
            else:
                self._upload.wait(min(self._config.rescan_interval_s, wait_s or self._config.rescan_interval_s))

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            os._exit(1)
        self._stopping = True
        self._main.wake()

    def _measure(self) -> ShipperReport:
        sealed = self.conversion.sealed()
        self.uploader.outbox.refresh()
        totals = self.uploader.outbox.totals()
        error, kind = self._error()
        return replace(
            self._counts,
            pid=os.getpid(),
            uploaded_shards=self._before.uploaded_shards + self.uploader.uploaded_shards,
            uploaded_bytes=self._before.uploaded_bytes + self.uploader.uploaded_bytes,
            last_upload_s=self.uploader.last_upload_s or self._before.last_upload_s,
            quarantined_files=sum(not name.endswith(".reason") for name in os.listdir(self.state.quarantine)),
            dead_letters=sum(1 for _ in self.state.deadletter.rglob("*.parquet")),
            last_error=error,
            last_error_class=kind,
            next_try_s=self.uploader.next_try_s(),
            backlog_segments=len(sealed),
            backlog_shards=totals.shards,
            backlog_bytes=totals.size_bytes + sum(path.stat().st_size for path in sealed),
            uploaded_lsn=self._uploaded_lsn(),
        )

    def _uploaded_lsn(self) -> int:
        """Return the lsn below everything that still waits, in the WAL or in the outbox."""
        waiting = []
        for name in (*os.listdir(self.state.wal), self.uploader.outbox.first_segment() or ""):
            sealed, first = parse_sealed(name), parse_open(name)
            waiting += [sealed[0]] if sealed else [] if first is None else [first]
        return max(0, min(waiting, default=1) - 1)

    def _busy_s(self) -> float:
        """Return for how long the store has not answered; 0 while nobody asks it."""
        since_s = self.uploader.busy_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def _hang(self) -> str:
        """Return what of the store never ends, or nothing. A directory's calls may take long: a slow disk gets on."""
        if not self._config.is_remote:
            return ""
        if self._busy_s() > 1 + 1.25 * self._config.upload_deadline_s:
            return self._error()[0]
        lost = threading.active_count()
        return f"{lost} threads, most of them in calls that never came back" if lost > THREADS_MAX else ""

    def _error(self) -> tuple[str, str]:
        busy_s = self._busy_s()
        if busy_s > self._config.upload_deadline_s:
            return f"{self._config.to} has not answered for {busy_s:.0f} s", "hung"
        if self._hung_before and not self.uploader.answered:
            return self._hung_before, "hung"
        if self.uploader.last_error:
            return self.uploader.last_error, self.uploader.last_error_class
        if self.conversion.last_error:
            return self.conversion.last_error, "conversion"
        text = next(iter(self._troubles.values()), "")
        return text, "internal" if text else ""

    def _guard(self, where: str, work: Callable[[], T]) -> T | Exception:
        """Do one piece of work; if it raises, say so once, keep it in the report until it works again, and go on."""
        done = outcome(work)
        text = f"{where}: {type(done).__name__}: {done}" if isinstance(done, Exception) else ""
        if isinstance(done, FileNotFoundError):
            outcome(self._make_rooms)  # Somebody removed one: its files are gone, but not the work of the next.
        if text and text != self._troubles.get(where):
            _log.error("shipper_trouble %s", text, exc_info=done if isinstance(done, Exception) else None)
        # Replaced, never changed: the other thread may be reading it.
        others = {place: told for place, told in self._troubles.items() if place != where}
        self._troubles = {**others, where: text} if text else others
        return done


def main() -> int:
    """Be the shipper process; return its exit code."""
    close_inherited_fds()
    die_with_parent()
    forbid_core_file()
    try:
        line = read_line(0)
        config = Config.from_json(line)
        unpack(line, environment())
        logging.basicConfig(level=config.log_level.upper(), format="%(name)s %(levelname)s %(message)s")
        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        os.nice(NICE)
        outcome(lambda: fs.remove_tree(StateDir(config.state_dir).xet))
        shipper = Shipper(config)
        watch_stdin(shipper.hurry)
        return shipper.run()
    except RanklogError as exc:
        sys.stderr.write(f"ranklogd shipper: {exc}\n")
        return EXIT_CONFIG


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not sys.exit: the upload thread may be inside a store's library, and must not be unwound under it.
    os._exit(code)
