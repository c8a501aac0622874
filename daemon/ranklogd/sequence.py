"""Who may append what: per-writer order, dedup and ownership. Pure: no files, no sockets, no clock.

    received   next_seq - 1: appended to the WAL, not yet synced
    durable    last_seq: a power cut cannot take it back; acknowledged, and kept in every segment's header

A batch is appended only if it starts at the writer's next seq. An older one was appended before and is only
acknowledged again; a jump is answered with the expected seq, so that a cumulative ack never confirms what was lost
on the way. The first uid that names a writer owns it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ranklog.start import Start
from ranklogd.wal.segment import WriterMark


class Verdict(Enum):
    """What to do with a batch."""

    APPEND = "append"
    DUPLICATE = "duplicate"
    JUMP = "jump"
    UNKNOWN = "unknown"
    FOREIGN = "foreign"


@dataclass(eq=False)
class WriterState:
    """One writer as this daemon knows it."""

    writer: bytes
    uid: int
    next_seq: int
    durable: int
    """Last durable seq; -1 before the first."""
    attempt: int
    run_key: bytes
    ended_s: int = 0
    start_ns: int = 0
    start: Start | None = None
    """None until the writer says HELLO to this process of the daemon, or its files are adopted."""
    start_frame: bytes = b""
    ending: bool = False
    """Its end record was received, and will be durable with the next sync."""
    finished: bool = False
    """Its end record is durable."""


class Welcome(NamedTuple):
    """The answer to a HELLO: go on from `expected`. Seqs in `lost` can never come any more."""

    state: WriterState
    expected: int
    lost: tuple[int, int] | None


class Writers:
    """Every writer whose dedup state is still needed."""

    def __init__(self, marks: Iterable[WriterMark] = ()) -> None:
        self._states = {
            m.writer: WriterState(
                m.writer, m.uid, m.last_seq + 1, m.last_seq, m.attempt, m.run_key, m.ended_s, m.start_ns
            )
            for m in marks
        }

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[WriterState]:
        return iter(self._states.values())

    def get(self, writer: bytes) -> WriterState | None:
        """Return what is known of a writer."""
        return self._states.get(writer)

    def hello(self, uid: int, start: Start, start_frame: bytes, base: int) -> Welcome | None:
        """Take note of a writer whose oldest held seq is `base`; None if it belongs to another uid."""
        writer = bytes.fromhex(start.writer)
        state = self._states.get(writer)
        if state is None:
            # Seqs below the base of a writer nobody here knows were taken by another daemon: not lost.
            key = run_key(start)
            state = WriterState(writer, uid, base, base - 1, self._attempt(start, key), key, 0, start.wall_ns)
            self._states[writer] = state
        if state.uid != uid:
            return None
        state.start, state.start_frame = start, start_frame
        lost = (state.next_seq, base - 1) if base > state.next_seq else None
        return Welcome(state, max(state.next_seq, base), lost)

    def _attempt(self, start: Start, key: bytes) -> int:
        """Count restarts of that run and rank which the environment may not know of."""
        if start.parent:
            # A forked worker is not a restart of the rank it was forked from.
            parent = self._states.get(bytes.fromhex(start.parent)) if _is_hex(start.parent) else None
            return max(start.attempt, parent.attempt if parent else 0)
        earlier = [s.attempt for s in self._states.values() if s.run_key == key and s.start_ns < start.wall_ns]
        return max(start.attempt, max(earlier) + 1 if earlier else 0)

    def judge(self, writer: bytes, uid: int, first_seq: int, count: int) -> Verdict:
        """Say what to do with a batch of seqs first_seq … first_seq + count - 1."""
        state = self._states.get(writer)
        if state is None or state.start is None:
            return Verdict.UNKNOWN
        if state.uid != uid:
            return Verdict.FOREIGN
        if first_seq == state.next_seq:
            return Verdict.APPEND
        return Verdict.DUPLICATE if first_seq + count <= state.next_seq else Verdict.JUMP

    def synced(self, touched: Iterable[WriterState], now_s: int) -> None:
        """Everything received of these writers is durable now."""
        for state in touched:
            state.durable = state.next_seq - 1
            if state.ending:
                state.ended_s, state.finished = now_s, True

    def revert(self, touched: Iterable[WriterState]) -> None:
        """Nothing received of these writers since the last sync was kept."""
        for state in touched:
            state.next_seq = state.durable + 1
            state.ending = False

    def marks(self) -> tuple[WriterMark, ...]:
        """Return the durable state of every writer, for a segment header."""
        return tuple(
            WriterMark(s.uid, s.writer, s.durable, s.attempt, s.run_key, s.ended_s, s.start_ns)
            for s in self._states.values()
        )

    def forget(self, now_s: int, keep_s: float, held: set[bytes]) -> int:
        """Drop writers that ended `keep_s` ago and have no file left (`held`); return how many."""
        old = [w for w, s in self._states.items() if s.ended_s and now_s - s.ended_s > keep_s and w not in held]
        for writer in old:
            del self._states[writer]
        return len(old)


def run_key(start: Start) -> bytes:
    """Return 8 bytes that stand for (project, run, role, rank)."""
    text = "\0".join((start.project, start.run, start.role, str(start.rank)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]


def _is_hex(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
