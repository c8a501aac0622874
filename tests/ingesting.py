"""The ingest half of a daemon without its loop: WAL, writers and rules over a real directory. And a raw peer.

What the daemon is told here is made by hand, byte by byte: none of the client's journal, sender or transport.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from ranklog import wire
from ranklog.frame import HEADER, Kind, body_at, decode_body, spans
from ranklog.layout import Lsn
from ranklog.start import Start, encode_start
from ranklog.wire import Type
from ranklogd.config import Config
from ranklogd.disk import Shares
from ranklogd.ingest import Ingest, Offer, Peer, Reply
from ranklogd.notify import Notifier
from ranklogd.sequence import Writers
from ranklogd.server import Server
from ranklogd.setup import Parts, assemble, prepare
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.log import Wal, WalIdentity
from ranklogd.wal.recover import Recovered, recover, seal_leftovers
from ranklogd.wal.segment import BATCH, Damage, EntryType
from segments import frame, start_of

NOW_NS = 1_700_000_000_000_000_000
NOW_S = NOW_NS // 1_000_000_000
UID = os.geteuid()
OTHER_UID = UID + 1


def frames(first: int, count: int, *, key: str = "loss") -> bytes:
    """Return `count` metrics frames; seq 0 would be the start frame."""
    return b"".join(frame(Kind.METRICS, seq, {key: float(seq)}, step=seq) for seq in range(first, first + count))


def end_frame(seq: int) -> bytes:
    """Return an end record."""
    return frame(Kind.END, seq, {"exit_code": 0, "last": seq})


class Answer(NamedTuple):
    """A decoded message to the client."""

    kind: Type
    fields: list[Any]
    body: bytes

    @property
    def code(self) -> str:
        """The refusal's code in words."""
        assert self.kind == Type.REFUSE, self
        return wire.Code(self.fields[1]).name

    @property
    def durable(self) -> int:
        """What an ack says."""
        assert self.kind == Type.ACK, self
        return int(self.fields[1])


def answers(replies: Sequence[Reply]) -> list[Answer]:
    """Decode replies as a client does."""
    return [Answer(*wire.decode(reply.header), reply.body or b"") for reply in replies]


class Half:
    """WAL, writers and the rules of ingest over one state directory, as `setup` puts them together."""

    def __init__(self, state: StateDir, *, writers_max: int = 1000, quota_per_uid_bytes: int = 0) -> None:
        self.state = state
        self.full = ""
        self._writers_max = writers_max
        self._quota = quota_per_uid_bytes
        self.recovered = self.open()

    def open(self) -> Recovered:
        """Start over what is on disk."""
        found = recover(self.state, NOW_S)
        self.writers = Writers(found.marks.values())
        identity = WalIdentity("node-1", found.store_id, "boot")
        self.wal = Wal(self.state.wal, identity, Lsn(found.next_lsn), self.writers.marks)
        seal_leftovers(self.state, found, self.wal.first_lsn)
        self.ingest = Ingest(
            self.wal,
            self.writers,
            Offer("/spool", "/journal", "/cookie"),
            writers_max=self._writers_max,
            disk_full=lambda: self.full,
            shares=Shares(self._quota),
        )
        return found

    def crash(self) -> Recovered:
        """Lose all memory and start again; what was written stays, synced or not, as after a kill."""
        self.wal.close()
        self.recovered = self.open()
        return self.recovered

    def handle(self, *parts: bytes, uid: int = UID, identity: bytes = b"peer") -> list[Answer]:
        """Hand over one message."""
        return answers(self.ingest.handle(Peer(identity, uid), list(parts), NOW_NS))

    def hello(self, start: Start, base: int = 0, *, uid: int = UID, versions: tuple[int, int] = (1, 1)) -> list[Answer]:
        """Say HELLO."""
        return self.handle(*hello_message(start, base, versions=versions), uid=uid)

    def batch(
        self, start: Start, first: int, data: bytes, count: int, *, uid: int = UID, last: bool = False
    ) -> list[Answer]:
        """Send a batch."""
        return self.handle(*batch_message(start, first, data, count, last=last), uid=uid)

    def commit(self) -> list[Answer]:
        """Make it durable."""
        return answers(self.ingest.commit(NOW_NS))

    def log(self, start: Start, first: int, count: int) -> None:
        """Bring `count` records the whole way; with first 0 the start frame is the first of them."""
        if first == 0:
            assert self.hello(start)[0].kind == Type.WELCOME
        data = encode_start(start) + frames(1, count - 1) if first == 0 else frames(first, count)
        assert self.batch(start, first, data, count) == []
        assert [answer.durable for answer in self.commit()] == [first + count - 1]


def hello_message(start: Start, base: int = 0, *, versions: tuple[int, int] = (1, 1)) -> tuple[bytes, bytes]:
    """Return the two parts of a HELLO."""
    return wire.encode(Type.HELLO, *versions, bytes.fromhex(start.writer), base), encode_start(start)


def batch_message(start: Start, first: int, data: bytes, count: int, *, last: bool = False) -> tuple[bytes, bytes]:
    """Return the two parts of a BATCH."""
    writer = bytes.fromhex(start.writer)
    return wire.encode(Type.BATCH, writer, first, count, zlib.crc32(data), last), data


class Kept(NamedTuple):
    """One frame in the WAL. A gap frame stands for the seqs up to `last`."""

    lsn: int
    writer: str
    seq: int
    last: int
    kind: Kind
    uid: int


def kept(state: StateDir) -> list[Kept]:
    """Return every frame that the WAL's segments hold within the ranges of their names, in the order of the names."""
    return [record for path in sorted(state.wal.iterdir()) for record in kept_in(path)]


def kept_in(path: Path) -> Iterator[Kept]:
    """Yield the frames of one segment file; fails where an entry is not what its head says."""
    sealed = segment.parse_sealed(path.name)
    if sealed is None and segment.parse_open(path.name) is None:
        return
    buffer = memoryview(path.read_bytes())
    header, offset = segment.decode_header(buffer)
    for entry in segment.scan(buffer, header.salt, offset, header.first_lsn):
        if isinstance(entry, Damage) or entry.type != EntryType.BATCH or (sealed and entry.lsn > sealed[1]):
            continue
        writer, first, count = BATCH.unpack_from(entry.payload)
        seq = first
        for span in spans(entry.payload, BATCH.size):
            assert span.first == seq, f"{path.name}: seq {span.first} where {seq} is due"
            yield Kept(entry.lsn + seq - first, writer.hex(), seq, span.last, Kind(span.kind), entry.uid)
            seq = span.last + 1
        assert seq == first + count, f"{path.name}: {seq - first} records in a batch of {count}"


def seqs(records: Sequence[Kept], start: Start) -> list[int]:
    """Return the seqs of one writer in the order of the log, those within gaps included."""
    return [seq for r in records if r.writer == start.writer for seq in range(r.seq, r.last + 1)]


def gap_of(data: bytes) -> dict[str, Any]:
    """Return the payload of the first frame."""
    body = body_at(memoryview(data), 0)
    assert body is not None
    assert HEADER.size + len(body) <= len(data)
    payload: dict[str, Any] = decode_body(body)[4]
    return payload


class Inside:
    """A daemon put together in this process, as `setup` does it, with its loop driven by hand."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.parts: Parts = assemble(config, prepare(config), Notifier(""), lock_wait_s=0, stopped=lambda _: False)
        self.server = Server(self.parts)

    def step_until(self, condition: Callable[[], Any], what: str, turns: int = 2000) -> Any:
        """Turn the loop until `condition` is true."""
        for _ in range(turns):
            if value := condition():
                return value
            self.server.step(0.005)
        raise AssertionError(f"still not: {what}")


class RawPeer:
    """A DEALER socket of its own: says what it is told, byte for byte."""

    def __init__(self, path: Path) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{path}")

    def send(self, *parts: bytes) -> None:
        """Send one message."""
        self.socket.send_multipart(parts)

    def receive(self, timeout_s: float = 10.0) -> Answer:
        """Return the next answer; fails after the timeout."""
        assert self.socket.poll(timeout_s * 1000), "no answer"
        parts = self.socket.recv_multipart()
        return Answer(*wire.decode(parts[0]), parts[1] if len(parts) > 1 else b"")

    def silent(self, time_s: float) -> bool:
        """Return whether nothing comes for so long."""
        return not self.socket.poll(time_s * 1000)

    def ask(self, *parts: bytes, timeout_s: float = 10.0) -> Answer:
        """Send one message and return the next answer."""
        self.send(*parts)
        return self.receive(timeout_s)

    def hello(self, start: Start | None = None, base: int = 0) -> Answer:
        """Say HELLO."""
        return self.ask(*hello_message(start or start_of(), base))

    def batch(self, start: Start, first: int, data: bytes, count: int) -> Answer:
        """Send a batch and return what comes of it."""
        return self.ask(*batch_message(start, first, data, count))

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close(0)
        self._context.destroy(0)
