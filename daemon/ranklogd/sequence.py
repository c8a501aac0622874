"""Who may append what: per-writer order, dedup and ownership. Pure: no files, no sockets, no clock.

    received   next_seq - 1: appended to the WAL, not yet synced
    durable    last_seq: a power cut cannot take it back; acknowledged, and kept in every segment's header

A batch is appended only if it starts at the writer's next seq. An older one was appended before and is only
acknowledged again; a jump is answered with the expected seq, so that a cumulative ack never confirms what was lost
on the way. What a writer does not hold any more (below its `base`) is recorded as a gap, never asked for. The first
uid that names a writer owns it.

A writer that only said HELLO is not kept: it is in no segment header and the first to go when there is no room, for
all it takes to come back is another HELLO.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ranklog.start import Start
from ranklogd.wal.segment import WriterMark

GAP_MAX = 1 << 31
"""Seqs that one gap may stand for: more than any outage, and few enough that nobody can use up the lsns."""


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
    base: int = 0
    """The oldest seq its owner still held when it last said so."""
    began: int = 0
    """The seq from which on this daemon knows it; the one before that was somebody else's business."""
    moved_s: int = 0
    """When it last brought something, or was first looked at by `forget`; 0: neither yet."""
    start: Start | None = None
    """None until the writer says HELLO to this process of the daemon, or its files are adopted."""
    start_frame: bytes = b""
    ending: bool = False
    """Its end record was received, and will be durable with the next sync."""
    finished: bool = False
    """Its end record is durable."""

    @property
    def kept(self) -> bool:
        """Whether anything of it is in the WAL, or on its way."""
        return self.next_seq > self.began

    @property
    def lost(self) -> tuple[int, int] | None:
        """Seqs that can never come any more and are not recorded as a gap yet."""
        return (self.next_seq, self.base - 1) if self.base > self.next_seq else None


class Welcome(NamedTuple):
    """The answer to a HELLO: go on from `expected`."""

    state: WriterState
    expected: int


class Writers:
    """Every writer whose dedup state is still needed."""

    def __init__(self, marks: Iterable[WriterMark] = ()) -> None:
        self._states: dict[bytes, WriterState] = {}
        self._ranks: dict[bytes, list[WriterState]] = defaultdict(list)
        """By run key: the attempts of one rank."""
        for m in marks:
            self._add(
                WriterState(m.writer, m.uid, m.last_seq + 1, m.last_seq, m.attempt, m.run_key, m.ended_s, m.start_ns)
            )

    def _add(self, state: WriterState) -> None:
        self._states[state.writer] = state
        self._ranks[state.run_key].append(state)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[WriterState]:
        return iter(self._states.values())

    def get(self, writer: bytes) -> WriterState | None:
        """Return what is known of a writer."""
        return self._states.get(writer)

    def hello(self, uid: int, start: Start, start_frame: bytes, base: int) -> Welcome | None:
        """Take note of a writer whose oldest held seq is `base`; None if it belongs to another uid.

        The caller records the state's `lost` seqs as a gap before anything else of the writer.
        """
        writer = bytes.fromhex(start.writer)
        state = self._states.get(writer)
        if state is None:
            # Seqs below the base of a writer nobody here knows were taken by another daemon: not lost.
            key = run_key(start)
            attempt = self._attempt(start, key)
            state = WriterState(writer, uid, base, base - 1, attempt, key, 0, start.wall_ns, began=base)
            self._add(state)
        if state.uid != uid:
            return None
        state.start, state.start_frame = start, start_frame
        state.base = max(state.base, base)
        return Welcome(state, max(state.next_seq, state.base))

    def _attempt(self, start: Start, key: bytes) -> int:
        """Count restarts of that run and rank which the environment may not know of."""
        if start.parent:
            # A forked worker is not a restart of the rank it was forked from.
            parent = self._states.get(bytes.fromhex(start.parent)) if _is_hex(start.parent) else None
            return max(start.attempt, parent.attempt if parent else 0)
        earlier = [s.attempt for s in self._ranks.get(key, ()) if s.start_ns < start.wall_ns]
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
            state.moved_s = now_s
            if state.ending:
                state.ended_s, state.finished = now_s, True

    def revert(self, touched: Iterable[WriterState]) -> None:
        """Nothing received of these writers since the last sync was kept."""
        for state in touched:
            state.next_seq = state.durable + 1
            state.ending = False

    def marks(self) -> tuple[WriterMark, ...]:
        """Return the durable state of every writer that has any, for a segment header."""
        return tuple(
            WriterMark(s.uid, s.writer, s.durable, s.attempt, s.run_key, s.ended_s, s.start_ns)
            for s in self._states.values()
            if s.durable >= s.began
        )

    def forget(self, now_s: int, keep_s: float, held: set[bytes]) -> int:
        """Drop writers that ended, or fell silent, `keep_s` ago and have no file left (`held`); return how many.

        Silence counts because the end of a writer in another container may never be seen. One that speaks again only
        has to say HELLO again.
        """
        old = []
        for state in self._states.values():
            state.moved_s = state.moved_s or now_s
            if now_s - (state.ended_s or state.moved_s) > keep_s and state.writer not in held:
                old.append(state)
        self._drop(old)
        return len(old)

    def shift(self, step_s: int) -> None:
        """The clock was set by so much: the ages of all writers stay what they were."""
        for state in self._states.values():
            state.ended_s += step_s if state.ended_s else 0
            state.moved_s += step_s if state.moved_s else 0

    def drop_greeted(self) -> None:
        """Make room: drop every writer that said HELLO and brought nothing yet."""
        self._drop([state for state in self._states.values() if not state.kept])

    def _drop(self, states: list[WriterState]) -> None:
        for state in states:
            del self._states[state.writer]
            self._ranks[state.run_key].remove(state)
            if not self._ranks[state.run_key]:
                del self._ranks[state.run_key]


def run_key(start: Start) -> bytes:
    """Return 8 bytes that stand for (project, run, role, rank)."""
    text = "\0".join((start.project, start.run, start.role, str(start.rank)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]


def _is_hex(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
