"""The ingest loop: receive, append, commit, acknowledge; beside it adoption, sealing and the shipper's life.

    wait ─▶ receive ≤ N messages ─▶ adopt one piece ─▶ commit if due (one fdatasync for all) ─▶ send acks ─▶ chores

A plain poller in the main thread: the loop owns every object, and nothing in it waits for the network, a conversion
or an upload, so none of them can delay an ack. No rules here: those are in `ingest`, `sequence`, `seal`, `disk`.

A mistake of ours that one message or one file brings to light costs that one its turn: it is counted as `internal`,
told in the log, and the neighbours go on. What the WAL cannot keep ends the process.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ranklog import wire
from ranklog.errors import ProtocolError
from ranklog.failpoint import failpoint
from ranklog.version import __version__
from ranklog.wire import Type
from ranklogd import report
from ranklogd.adopt import Adopter
from ranklogd.clockstep import ClockStep
from ranklogd.disk import Disk
from ranklogd.ingest import Ingest, Peer, Reply
from ranklogd.nodemetrics import NodeMetrics
from ranklogd.requests import Progress, Requests
from ranklogd.runs import Runs
from ranklogd.seal import SealPolicy
from ranklogd.setup import Parts
from ranklogd.wal.log import NoSegment

log = logging.getLogger("ranklogd")

RECEIVE_MAX = 256
CHORE_INTERVAL_S = 1.0
ANSWER_INTERVAL_S = 0.02
QUIET_S = 0.3
"""At stop: clients that sent nothing for this long have nothing on the way."""
_TOOLS = frozenset({Type.PING, Type.STATUS, Type.FLUSH, Type.SYNC})
_LOOK_SHARE = 20
"""Listing what waits takes at most one part in so many of the loop's time, however much that is."""

T = TypeVar("T")


class Server:
    """The ingest loop and what it owns."""

    def __init__(self, parts: Parts) -> None:
        self._config = parts.config
        self._state = parts.state
        self._socket = parts.socket
        self._ingest: Ingest = parts.ingest
        self._adopter: Adopter = parts.adopter
        self._shipper = parts.shipper
        self._watch = parts.watch
        self._notify = parts.notify
        self._store_id = parts.store_id
        self._disk: Disk = parts.disk
        self._policy = SealPolicy(parts.config.seal_size_bytes, parts.config.seal_age_s)
        self._requests = Requests(status=self.status, seal=self._ask_seal, scan=self._scan)
        self._runs = Runs(self._ingest.writers)
        self._node_metrics = NodeMetrics(self._ingest, self._config.node, self._config.node_metrics_interval_s)
        self._started_s = time.monotonic()
        self._clock_step = ClockStep(time.time(), self._started_s)
        self._first_entry_s: float | None = None
        self._last_commit_s = self._last_chore_s = self._last_scan_s = 0.0
        self._last_message_s = self._started_s
        self._seal_asked = False
        self._was_full = ""
        self._uploaded = 0
        self._look_again_s = 0.0

    def run(self, stop_asked: "StopFlag") -> None:
        """Serve until asked to stop, or idle for `idle_exit_s`. Raises OSError when the WAL cannot be kept."""
        while not stop_asked.is_set():
            self.step(self._patience())
            if self._idle_for(self._config.idle_exit_s):
                log.info("idle_exit after_s=%g", self._config.idle_exit_s)
                return

    def step(self, timeout_s: float) -> None:
        """Wait for something to do, then do all of it once."""
        if self._watch.fd in self._socket.wait(timeout_s):
            self._watch.clear()
            self._last_scan_s = min(self._last_scan_s, time.monotonic() - self._config.rescan_interval_s + 0.1)
        for peer, parts in self._socket.receive(RECEIVE_MAX):
            for reply in self._guarded("message", partial(self._take, peer, parts)) or []:
                self._socket.send(reply)
            if self._ingest.urgent:
                break  # The rest waits with its senders rather than in our memory.
        self._guarded("adoption", self._adopter.step)
        now_s = time.monotonic()
        if self._ingest.pending and (
            self._ingest.urgent or now_s - self._last_commit_s >= self._config.commit_interval_s
        ):
            self._commit(now_s)
        if not self._ingest.pending and (self._seal_asked or self._seal_due(now_s)):
            self._seal()
        if self._requests.waiting:
            for reply in self._requests.answer(self._progress(), now_s):
                self._socket.send(reply)
        if now_s - self._last_chore_s >= CHORE_INTERVAL_S:
            self._chores(now_s)
        if now_s - self._last_scan_s >= self._config.rescan_interval_s and not self._adopter.busy:
            self._last_scan_s = now_s
            self._adopter.scan()
            self._watch.follow(self._adopter.directories)

    def _guarded(self, where: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Exception:  # The loop's top: what a peer sends or leaves behind must not end it for the others.
            log.exception("internal_error where=%s", where)
            self._ingest.refused["internal"] += 1
            return None

    def _patience(self) -> float:
        if self._adopter.busy and not self._ingest.urgent:
            return 0.0
        if self._ingest.pending:
            return max(0.0, self._last_commit_s + self._config.commit_interval_s - time.monotonic())
        return ANSWER_INTERVAL_S if self._requests.waiting else 0.1

    def _take(self, peer: Peer, parts: list[bytes]) -> list[Reply]:
        now_s = time.monotonic()
        try:
            kind, fields = wire.decode(parts[0]) if parts else (Type.PING, [])
        except ProtocolError:
            return self._ingest.handle(peer, parts, time.time_ns())  # Counts and refuses it.
        if kind in _TOOLS and fields:
            return self._requests.handle(peer, kind, fields, self._progress(), now_s)
        self._last_message_s = now_s
        return self._ingest.handle(peer, parts, time.time_ns()) if parts else []

    def _commit(self, now_s: float) -> None:
        replies = self._ingest.commit(time.time_ns())
        if self._ingest.met_full:
            self._disk.mark_full(self._ingest.met_full)
        self._last_commit_s = time.monotonic()
        if self._first_entry_s is None and not self._ingest.wal.empty:
            self._first_entry_s = now_s
        for reply in replies:
            self._socket.send(reply)
        if replies:
            failpoint("ack.after")

    def _seal_due(self, now_s: float) -> bool:
        return self._policy.due(size_bytes=self._ingest.wal.size, first_entry_s=self._first_entry_s, now_s=now_s)

    def _ask_seal(self) -> None:
        self._seal_asked = True
        self._shipper.hurry()

    def _scan(self, include_offline: bool) -> None:  # noqa: FBT001
        self._adopter.scan(include_offline=include_offline)

    def _seal(self) -> None:
        self._seal_asked = False
        try:
            if self._ingest.wal.roll():
                self._ingest.shares.sealed(self._ingest.wal.first_lsn - 1)
        except NoSegment as exc:
            self._disk.mark_full(f"the segment cannot be sealed: {exc.strerror}")
            self._first_entry_s = time.monotonic()  # Tried again after another age.
            return
        self._first_entry_s = None

    def _chores(self, now_s: float) -> None:
        self._last_chore_s = now_s
        self._disk.look()
        if self._disk.reason != self._was_full:
            self._was_full = self._disk.reason
            if self._was_full:
                log.warning("disk_full reason=%r; records are refused and stay with the clients", self._was_full)
            else:
                log.info("disk_has_room; records are taken again")
        self._shipper.tend(now_s)
        self._runs.update(now_s)
        self._node_metrics.step(now_s, self._runs.live)
        if step_s := self._clock_step.look(time.time(), now_s):
            log.warning("clock_set by_s=%.0f; order and timers do not depend on it", step_s)
            self._ingest.writers.shift(round(step_s))
        self._ingest.writers.forget(int(time.time()), self._config.writer_keep_s, self._adopter.held)
        marks = self._marks()
        self._ingest.shares.uploaded(marks.uploaded)
        self._notify(
            "WATCHDOG=1",
            f"STATUS={marks.received - marks.uploaded} records waiting for upload; {self._was_full or 'ok'}",
        )

    def _marks(self) -> report.Watermarks:
        wal = self._ingest.wal
        now_s = time.monotonic()
        if now_s >= self._look_again_s:
            self._uploaded = report.uploaded_lsn(self._state, wal.first_lsn)
            took_s = time.monotonic() - now_s
            self._look_again_s = now_s + took_s * _LOOK_SHARE
        return report.watermarks(
            received=wal.next_lsn - 1, durable=wal.durable_lsn, open_first=wal.first_lsn, uploaded=self._uploaded
        )

    def _progress(self) -> Progress:
        marks = self._marks()
        stuck = bool(self._adopter.stuck)
        return Progress(marks.received, marks.durable, marks.sealed, marks.uploaded, self._adopter.busy, stuck)

    def _idle_for(self, limit_s: float) -> bool:
        """Return whether nothing came for so long, nobody who could log lives, and nothing can be uploaded any more."""
        if not limit_s or self._adopter.busy or self._ingest.pending or self._requests.waiting:
            return False
        silent_s = time.monotonic() - self._last_message_s
        if silent_s < limit_s or self._runs.live():
            return False
        marks = self._marks()
        return marks.uploaded >= marks.received or silent_s >= 2 * limit_s

    def status(self) -> str:
        """Return the status snapshot as JSON."""
        wal, config = self._ingest.wal, self._config
        return report.Status(
            version=__version__, pid=report.own_pid(), node=config.node, store_id=self._store_id, to=config.to,
            socket=str(config.socket), state_dir=str(config.state_dir), uptime_s=time.monotonic() - self._started_s,
            watermarks=self._marks(),
            used_bytes=self._disk.used_bytes, full=self._disk.reason, records=self._ingest.records,
            duplicates=self._ingest.duplicates, refused=dict(self._ingest.refused), writers=len(self._ingest.writers),
            adopted=self._adopter.adopted, adoption_refused=dict(list(self._adopter.refused.items())[:100]),
            offline_waiting=len(self._adopter.waiting_offline), poisoned_segments=wal.poisoned,
            shipper=report.shipper_report(self._state), runs=self._runs.status(time.monotonic()),
            adoption_stuck=len(self._adopter.stuck), quarantined_spools=self._adopter.quarantined,
            shipper_restarts=self._shipper.restarts,
        ).to_json()  # fmt: skip

    def drain(self, deadline_s: float, stop_now: "StopFlag") -> int:
        """Take what is on the way, adopt, seal, upload until `deadline_s`; return the records that remain."""
        self._notify("STOPPING=1")
        began_s = time.monotonic()
        self._adopter.scan()
        while time.monotonic() < began_s + deadline_s / 3 and not stop_now.is_set():
            self.step(0.02)
            quiet = time.monotonic() - max(self._last_message_s, began_s) > QUIET_S
            if quiet and not self._ingest.pending and not self._adopter.busy:
                break
        self._node_metrics.finish()
        self._commit(time.monotonic())
        self._seal()
        failpoint("shutdown.seal.after")
        self._upload_rest(began_s + deadline_s, stop_now)
        self._shipper.kill()
        self._look_again_s = 0.0  # The last word must not be from the last look.
        marks = self._marks()
        return marks.received - marks.uploaded

    def _upload_rest(self, deadline_s: float, stop_now: "StopFlag") -> None:
        """Let the shipper finish. It is told to stop only once it has reported: before that it would just die."""
        self._shipper.tend(time.monotonic())
        asked, restarts = False, self._shipper.restarts
        while time.monotonic() < deadline_s and not stop_now.is_set():
            if not asked and report.shipper_report(self._state).get("pid") == self._shipper.pid:
                self._shipper.stop()
                asked = True
            if self._shipper.ended() and (asked or self._shipper.restarts > restarts):
                return
            marks = self._marks()
            if marks.uploaded == marks.sealed and not asked:
                return
            self.step(0.02)


class StopFlag:
    """Set by a signal handler; plain attribute access, so it is safe there."""

    def __init__(self) -> None:
        self.count = 0

    def is_set(self) -> bool:
        """Return whether anybody asked."""
        return self.count > 0
