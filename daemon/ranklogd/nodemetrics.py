"""Node metrics: CPU, memory, disk and network of this node, once, as records of every run that is live here.

The daemon is a writer of its own in each of these runs: rank null, role `node`, kind SYSTEM, no step. Such a writer
begins at the first sample after the run appeared and ends with an end record when nobody of the run lives here any
more, or when the daemon stops. Its records go the way of all others, but for the socket: a daemon that is killed loses
those of the last commit interval, and a full disk means that there are none.

    cpu/utilization            percent of all cores since the sample before
    memory/used  /available    GiB;   memory/percent, swap/percent
    disk/read_mb_per_sec  /write_mb_per_sec  /read_iops  /write_iops      all disks, MiB and operations per second
    network/sent_mb_per_sec  /recv_mb_per_sec                             all interfaces, MiB per second

The names are those of Trackio. psutil is imported here and only if there is something to sample.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import msgpack

from ranklog.frame import Kind, encode_frame
from ranklog.identity import boot_id, pid_namespace, process_start
from ranklog.start import Start, encode_start
from ranklog.version import __version__
from ranklogd.ingest import Ingest
from ranklogd.sequence import WriterState

log = logging.getLogger("ranklogd")

ROLE = "node"
RUNS_MAX = 64
"""Runs that get node metrics at a time: anybody can make up runs, and each costs a record in every interval."""
_GIB, _MIB = 1 << 30, 1 << 20

Run = tuple[str, str]
Live = Mapping[Run, list[Start]]


class Sampler:
    """Reads the node's counters through psutil; rates are over the time since the sample before."""

    def __init__(self, psutil: ModuleType, now_s: float) -> None:
        self._psutil = psutil
        self._last_s = now_s
        self._disk = self._counters("disk_io_counters")
        self._network = self._counters("net_io_counters")
        psutil.cpu_percent(None)

    def sample(self, now_s: float) -> dict[str, float]:
        """Return what this node lets us see now."""
        memory, swap = self._psutil.virtual_memory(), self._psutil.swap_memory()
        values = {
            "cpu/utilization": self._psutil.cpu_percent(None),
            "memory/used": memory.used / _GIB,
            "memory/available": memory.available / _GIB,
            "memory/percent": memory.percent,
            "swap/percent": swap.percent,
        }
        disk, network = self._counters("disk_io_counters"), self._counters("net_io_counters")
        elapsed_s = max(now_s - self._last_s, 1e-3)
        for name, attribute, factor in (
            ("disk/read_mb_per_sec", "read_bytes", _MIB),
            ("disk/write_mb_per_sec", "write_bytes", _MIB),
            ("disk/read_iops", "read_count", 1),
            ("disk/write_iops", "write_count", 1),
            ("network/sent_mb_per_sec", "bytes_sent", _MIB),
            ("network/recv_mb_per_sec", "bytes_recv", _MIB),
        ):
            before, now = (self._disk, disk) if name.startswith("disk/") else (self._network, network)
            if before is not None and now is not None:
                values[name] = (getattr(now, attribute) - getattr(before, attribute)) / elapsed_s / factor
        self._last_s, self._disk, self._network = now_s, disk, network
        return {name: float(value) for name, value in values.items()}

    def _counters(self, name: str) -> Any:
        try:
            return getattr(self._psutil, name)()
        except (OSError, RuntimeError):
            return None  # Some containers hide them.


class NodeMetrics:
    """The daemon's own writers, one for each live run. Owned by the server loop."""

    def __init__(self, ingest: Ingest, node: str, interval_s: float) -> None:
        self._ingest = ingest
        self._node = node
        self._interval_s = interval_s
        self._psutil: ModuleType | None = None
        self._sampler: Sampler | None = None
        self._next_s = 0.0
        self._writers: dict[Run, WriterState] = {}

    def step(self, now_s: float, live: Callable[[], Live]) -> None:
        """Take a sample if one is due, and end the writers of runs that are over. `live` is asked only then."""
        if not self._interval_s or now_s < self._next_s:
            return
        self._next_s = now_s + self._interval_s
        runs = live()
        for run in [run for run in self._writers if run not in runs]:
            self._end(run)
        if not runs:
            self._sampler = None  # Rates over the pause until the next run would mean nothing.
        elif self._sampler is None:
            self._begin(now_s)
        elif not self._ingest.full_reason(os.geteuid()):
            values = self._sampler.sample(now_s)
            for run, starts in list(runs.items())[:RUNS_MAX]:
                self._write(self._writer(run, starts[0]), Kind.SYSTEM, values)

    def finish(self) -> None:
        """End every writer: the daemon is going down. Another commit must follow."""
        self._next_s = float("inf")
        for run in list(self._writers):
            self._end(run)

    def _begin(self, now_s: float) -> None:
        """Take the first counters, to which the first sample will be compared."""
        if self._psutil is None:
            try:
                import psutil  # type: ignore[import-untyped, unused-ignore]
            except ImportError:
                log.warning('node_metrics_off: psutil is not installed. Run: pip install "ranklog[daemon]"')
                self._interval_s = 0.0
                return
            self._psutil = psutil
        self._sampler = Sampler(self._psutil, now_s)

    def _writer(self, run: Run, like: Start) -> WriterState:
        state = self._writers.get(run)
        if state is None or self._ingest.writers.get(state.writer) is not state:
            pid = os.getpid()
            start = Start(
                writer=os.urandom(16).hex(), project=run[0], run=run[1], name=like.name, group=like.group,
                job_type=like.job_type, rank=None, role=ROLE, node=self._node, pid=pid, boot=boot_id(),
                pid_start=process_start(pid) or 0, pid_ns=pid_namespace() or 0, client=__version__,
                wall_ns=time.time_ns(),
            )  # fmt: skip
            welcome = self._ingest.writers.hello(os.geteuid(), start, encode_start(start), 0)
            assert welcome is not None, "nobody else can have this random id"
            state = self._writers[run] = welcome.state
        return state

    def _write(self, state: WriterState, kind: Kind, payload: dict[str, Any]) -> None:
        """Append one record. What a full disk took back is not missed: its seq is used by the next one."""
        now_ns = time.time_ns()
        if state.next_seq == 0:
            self._ingest.append(state, 0, 1, state.start_frame, now_ns)
        frame = encode_frame(msgpack.packb([kind, state.next_seq, now_ns, None, payload]))
        self._ingest.append(state, state.next_seq, 1, frame, now_ns, ending=kind == Kind.END)

    def _end(self, run: Run) -> None:
        state = self._writers.pop(run)
        if state.next_seq:
            self._write(state, Kind.END, {"exit_code": None, "last": state.next_seq})
