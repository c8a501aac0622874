"""The rules of ingest: a message in, replies out. No sockets, no loop; time is an argument.

    HELLO ─▶ WELCOME │ REFUSE          BATCH ─▶ appended, acknowledged by `commit` │ acknowledged again │ REFUSE

Everything a peer sends is checked here, at the boundary: the header by `wire`, the body's checksum, size and
sequence, the uid the kernel reports. Frames are not decoded: what they hold is the shipper's business, and a record
that nobody can decode must still not disturb its neighbours. Refusals are counted by code.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ranklog import wire
from ranklog.errors import FormatError, ProtocolError
from ranklog.failpoint import failpoint
from ranklog.frame import HEADER, body_at, encode_gap, spans
from ranklog.start import decode_start
from ranklog.wire import Code, Type
from ranklogd.disk import Shares
from ranklogd.sequence import GAP_MAX, Verdict, Writers, WriterState
from ranklogd.wal.log import Full, Wal, WalBatch

COMMIT_SIZE = 8 << 20
"""Pending bytes at which a commit does not wait for its interval."""
FRAME_SIZE_MIN = HEADER.size + 6  # An array of five one-byte fields.


class Peer(NamedTuple):
    """Who sent a message."""

    identity: bytes
    uid: int


class Reply(NamedTuple):
    """What to send back."""

    identity: bytes
    header: bytes
    body: bytes | None = None


class Offer(NamedTuple):
    """What WELCOME tells a client about this daemon."""

    spool_dir: str
    journal_dir: str
    cookie: str


class Ingest:
    """Writers, their order and the WAL. Owned by the server loop."""

    def __init__(
        self,
        wal: Wal,
        writers: Writers,
        offer: Offer,
        *,
        writers_max: int,
        disk_full: Callable[[], str],
        shares: Shares | None = None,
    ) -> None:
        self.wal = wal
        self.writers = writers
        self.refused: Counter[str] = Counter()
        """Refused messages by code."""
        self.records = 0
        """Records appended since the start."""
        self.duplicates = 0
        self.shares = shares or Shares(0)
        """What each user has here."""
        self.met_full = ""
        """What the last commit said if there was no room for it, else empty."""
        self._offer = offer
        self._writers_max = writers_max
        self._disk_full = disk_full
        self._unacked: dict[bytes, set[bytes]] = {}
        """Writers with something to acknowledge at the next commit, and to whom."""
        self._touched: set[WriterState] = set()
        self._taken: Counter[int] = Counter()
        """Bytes by uid that wait for the next commit."""

    def full_reason(self, uid: int) -> str:
        """Return why no records of that user can be taken now; empty while they can."""
        return self._disk_full() or self.shares.reason(uid)

    def handle(self, peer: Peer, parts: list[bytes], now_ns: int) -> list[Reply]:
        """Take one HELLO or BATCH; return the replies that need not wait for a commit."""
        try:
            kind, fields = wire.decode(parts[0])
            if len(parts) > 2:
                raise ProtocolError(f"{len(parts)} parts; 2 at most")
        except ProtocolError as exc:
            return [self._refuse(peer, bytes(16), Code.MALFORMED, str(exc))]
        body = parts[1] if len(parts) == 2 else b""
        if kind == Type.BATCH:
            return self._batch(peer, fields, body, now_ns)
        if kind == Type.HELLO:
            return self._hello(peer, fields, body, now_ns)
        return [self._refuse(peer, bytes(16), Code.MALFORMED, f"{kind.name} is not for the daemon")]

    def _hello(self, peer: Peer, fields: list[Any], body: bytes, now_ns: int) -> list[Reply]:
        low, high, writer, base = fields
        if high < wire.VERSION_MIN or low > wire.VERSION:
            ours = f"{wire.VERSION_MIN}..{wire.VERSION}"
            text = f"client speaks protocol {low}..{high}, this daemon {ours}: upgrade the older of the two"
            return [self._refuse(peer, writer, Code.VERSION, text)]
        try:
            frame = body_at(memoryview(body), 0)
            if frame is None or len(body) != HEADER.size + len(frame):
                raise FormatError("HELLO without a whole start frame")
            start = decode_start(frame)
        except FormatError as exc:
            return [self._refuse(peer, writer, Code.MALFORMED, str(exc))]
        if bytes.fromhex(start.writer) != writer:
            return [self._refuse(peer, writer, Code.MALFORMED, "HELLO and its start frame name different writers")]
        known = self.writers.get(writer)
        if known is not None and base - known.next_seq > GAP_MAX:
            text = f"the writer claims to have lost {base - known.next_seq} records; {GAP_MAX} are possible"
            return [self._refuse(peer, writer, Code.MALFORMED, text)]
        if known is None and not self.has_room():
            text = f"this daemon knows {len(self.writers)} writers already (writers_max)"
            return [self._refuse(peer, writer, Code.FULL, text, retryable=True)]
        welcome = self.writers.hello(peer.uid, start, body, base)
        if welcome is None:
            return [self._refuse(peer, writer, Code.FOREIGN, "this writer belongs to another user")]
        self.lose(welcome.state, now_ns)
        version = min(high, wire.VERSION)
        answer = wire.encode(Type.WELCOME, version, writer, welcome.expected, *self._offer, wire.CREDIT)
        return [Reply(peer.identity, answer)]

    def has_room(self) -> bool:
        """Return whether one more writer can be known."""
        if len(self.writers) >= self._writers_max:
            self.writers.drop_greeted()
        return len(self.writers) < self._writers_max

    def lose(self, state: WriterState, now_ns: int) -> None:
        """Record as a gap what a writer does not hold any more and this daemon never got, if there is any."""
        if state.lost is not None:
            self.append_gap(state, state.lost[1], now_ns)

    def append_gap(self, state: WriterState, last: int, now_ns: int) -> None:
        """Append a gap from the seq that is due to `last`."""
        first = state.next_seq
        gap = encode_gap(first, last, "lost before the daemon", now_ns)
        self.append(state, first, last - first + 1, gap, now_ns)

    def _batch(self, peer: Peer, fields: list[Any], body: bytes, now_ns: int) -> list[Reply]:
        failpoint("recv.after")
        writer, first_seq, count, crc, last = fields
        verdict = self.writers.judge(writer, peer.uid, first_seq, count)
        if verdict == Verdict.UNKNOWN:
            return [self._refuse(peer, writer, Code.UNKNOWN_WRITER, "say HELLO first", retryable=True)]
        if verdict == Verdict.FOREIGN:
            return [self._refuse(peer, writer, Code.FOREIGN, "this writer belongs to another user")]
        state = self.writers.get(writer)
        assert state is not None
        if verdict == Verdict.DUPLICATE:
            self.duplicates += 1
            if state not in self._touched:
                return self._acks({writer: {peer.identity}})
            self._unacked.setdefault(writer, set()).add(peer.identity)
            return []
        reason = self.full_reason(peer.uid)
        if reason:
            return [self._refuse(peer, writer, Code.FULL, reason, retryable=True)]
        if verdict == Verdict.JUMP and first_seq == state.base:
            self.lose(state, now_ns)  # Recorded at HELLO, but there was no room for it.
            verdict = self.writers.judge(writer, peer.uid, first_seq, count)
        if verdict == Verdict.JUMP:
            return [self._refuse(peer, writer, Code.SEQUENCE, "out of order", retryable=True, expected=state.next_seq)]
        if zlib.crc32(body) != crc:
            text = "checksum of the batch"
            return [self._refuse(peer, writer, Code.DAMAGED, text, retryable=True, expected=state.next_seq)]
        # One gap frame may stand for any number of seqs. Only then is it worth looking at the frames.
        if not count or (count > len(body) // FRAME_SIZE_MIN and not _covers(body, count)):
            return [self._refuse(peer, writer, Code.MALFORMED, f"BATCH of {count} records in {len(body)} bytes")]
        self.append(state, first_seq, count, body, now_ns, ending=last)
        self._unacked.setdefault(writer, set()).add(peer.identity)
        return []

    def append(
        self, state: WriterState, first_seq: int, count: int, frames: bytes, now_ns: int, *, ending: bool = False
    ) -> None:
        """Append a batch whose order was checked; for the wire, adoption and the daemon's own records."""
        assert first_seq == state.next_seq, (first_seq, state.next_seq)
        self.wal.append(WalBatch(state, first_seq, count, frames, now_ns))
        state.next_seq += count
        state.ending = state.ending or ending
        self._taken[state.uid] += len(frames)
        self._touched.add(state)
        self.records += count

    @property
    def pending(self) -> bool:
        """True if something waits for a commit."""
        return bool(self._touched)

    @property
    def urgent(self) -> bool:
        """True if so much waits that a commit should not wait for its interval."""
        return self.wal.pending_bytes >= COMMIT_SIZE

    def commit(self, now_ns: int) -> list[Reply]:
        """Make everything appended durable; return the acks, or refusals if the disk is full.

        Raises OSError if the WAL cannot be kept: the caller must exit.
        """
        touched, unacked, taken = self._touched, self._unacked, self._taken
        self._touched, self._unacked, self._taken = set(), {}, Counter()
        self.met_full = ""
        try:
            self.wal.commit()
        except Full as exc:
            self.met_full = str(exc)
            self.writers.revert(touched)
            return [
                self._refuse(Peer(identity, -1), writer, Code.FULL, str(exc), retryable=True)
                for writer, identities in unacked.items()
                for identity in identities
            ]
        self.shares.add(taken)
        self.writers.synced(touched, now_ns // 1_000_000_000)
        failpoint("ack.before")
        return self._acks(unacked)

    def _acks(self, unacked: dict[bytes, set[bytes]]) -> list[Reply]:
        replies = []
        for writer, identities in unacked.items():
            state = self.writers.get(writer)
            if state is not None:
                header = wire.encode(Type.ACK, writer, state.durable, wire.CREDIT)
                replies += [Reply(identity, header) for identity in identities]
        return replies

    def _refuse(
        self, peer: Peer, writer: bytes, code: Code, text: str, *, retryable: bool = False, expected: int = -1
    ) -> Reply:
        self.refused[code.name.lower()] += 1
        return Reply(peer.identity, wire.encode(Type.REFUSE, writer, code, text, retryable, expected))


def _covers(body: bytes, count: int) -> bool:
    """Return whether these frames stand for `count` seqs, through gap frames."""
    end = seqs = 0
    for span in spans(memoryview(body)):
        end, seqs = span.end, seqs + span.last - span.first + 1
    return end == len(body) and seqs == count <= GAP_MAX
