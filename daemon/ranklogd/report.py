"""The status snapshot: what a daemon says of itself, as one JSON object. Pure but for listing its own directories.

Watermarks, in lsns:  uploaded ≤ sealed ≤ durable ≤ received
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ranklog import wire
from ranklogd.statedir import StateDir
from ranklogd.wal import segment


@dataclass(frozen=True)
class Watermarks:
    """How far records have come. Everything at or below a mark has reached that stage."""

    uploaded: int
    sealed: int
    durable: int
    received: int

    def __post_init__(self) -> None:
        assert self.uploaded <= self.sealed <= self.durable <= self.received, self


@dataclass(frozen=True)
class RunStatus:
    """One run on this node."""

    project: str
    run: str
    name: str
    ranks: int
    world_size: int
    records: int
    state: str
    """running, ended (no writer lives any more) or finished (the last attempt of every rank left an end record)."""
    last_s: float
    """Seconds since the last record arrived."""


@dataclass(frozen=True)
class Status:
    """One frozen snapshot."""

    version: str
    pid: int
    node: str
    store_id: str
    to: str
    socket: str
    state_dir: str
    uptime_s: float
    watermarks: Watermarks
    used_bytes: int
    full: str
    """Why records are refused now; empty while they are not."""
    records: int
    duplicates: int
    refused: dict[str, int]
    writers: int
    adopted: int
    adoption_refused: dict[str, str]
    offline_waiting: int
    poisoned_segments: int
    shipper: dict[str, Any]
    runs: list[RunStatus] = field(default_factory=list)
    adoption_stuck: int = 0
    """Dead writers whose files wait for room."""
    quarantined_spools: int = 0
    """Spool files in quarantine/ since the start: they could not be read to their end."""
    shipper_restarts: int = 0
    protocol: tuple[int, int] = (wire.VERSION_MIN, wire.VERSION)
    """What this daemon speaks, oldest and newest: tells a client of another version what it can expect."""

    def to_json(self) -> str:
        """Return the snapshot as JSON."""
        return json.dumps(asdict(self))


def backlog(state: StateDir) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the lsn ranges of (sealed segments, outbox directories) that wait."""
    sealed = [parsed for name in _names(state.wal) if (parsed := segment.parse_sealed(name))]
    outbox = [parsed for name in _names(state.outbox) if (parsed := segment.parse_sealed(name.removesuffix(".tmp")))]
    return sorted(sealed), sorted(outbox)


def uploaded_lsn(state: StateDir, open_first: int) -> int:
    """Return the lsn up to which nothing waits any more, from file names alone: it is the names that cannot be wrong.

    The WAL is listed before the outbox, for that is the way a segment goes.
    """
    below = open_first - 1
    for directory in (state.wal, state.outbox):
        first = _first_waiting(directory)
        below = below if first is None else min(below, first - 1)
    return max(0, below)


def _first_waiting(directory: Path) -> int | None:
    """Return the lowest first lsn among segment names; ready for a hundred thousand of them, which sort by it."""
    names = set(_names(directory))
    while names:
        name = min(names)
        names.discard(name)
        parsed = segment.parse_sealed(name.removesuffix(".tmp"))
        if parsed is not None:
            return parsed[0]
    return None


def watermarks(*, received: int, durable: int, open_first: int, uploaded: int) -> Watermarks:
    """Return the marks of one moment; `uploaded` may be a little old."""
    sealed = open_first - 1
    return Watermarks(uploaded, sealed, max(durable, sealed), max(received, durable, sealed))


def own_pid() -> int:
    """Return this process's id."""
    return os.getpid()


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def shipper_report(state: StateDir) -> dict[str, Any]:
    """Return the shipper's last counters; empty before its first."""
    try:
        report: dict[str, Any] = json.loads(state.shipper_report.read_text())
    except (OSError, ValueError):
        return {}
    return report
