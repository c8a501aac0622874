"""A node whose write-ahead log is kept for the test to read, whatever the shipper does with it meanwhile.

    with Rig(tmp_path) as rig:
        rig.start_daemon()
        rig.python("import ranklog …")
        [records] = rig.written().values()      # one writer: its records in the order of the log

Segments are sealed only when a daemon stops or starts again, and each open one gets a second name in `kept` as soon
as its daemon answers: a hard link, so the shipper may convert and unlink the first. What is read here was decoded with
`ranklog.frame` and `ranklogd.wal.segment` alone; `shard_rows` reads the parquet with pyarrow alone.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow.parquet
import pytest
import zmq

from node import Node, wait_for
from ranklog import wire
from ranklog.frame import Kind, Span, body_at, decode_body, spans
from ranklog.journal import Journal
from ranklog.link import State
from ranklog.sender import Sender
from ranklog.spool import Spool
from ranklog.start import Start, encode_start, start_from_map
from ranklog.wire import Type
from ranklogd.wal import segment
from ranklogd.wal.segment import BATCH, Damage, EntryType

__all__ = [
    "Heard", "Peer", "Record", "Rig", "Sending", "check_whole", "gaps", "logged", "on_disk", "shard_rows", "small_tmpfs", "wait_for",
]  # fmt: skip


class Record(NamedTuple):
    """One frame of the log. A gap frame stands for the seqs up to `payload["last"]`."""

    seq: int
    kind: Kind
    step: int | None
    payload: Any

    @property
    def last(self) -> int:
        """The last seq this frame stands for."""
        return int(self.payload["last"]) if self.kind == Kind.GAP else self.seq


Written = dict[str, list[Record]]


class Heard(NamedTuple):
    """One message that a client sent."""

    kind: Type
    fields: list[Any]
    body: bytes


class Peer:
    """The other end of a client's socket, which says what a test wants a daemon to say. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(f"ipc://{path}")
        self._identity = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(0)
        self._context.destroy(0)

    def hear(self, timeout_s: float = 10.0) -> Heard | None:
        """Return the next message, or None if none came in time."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        self._identity, header, *body = self._socket.recv_multipart()
        kind, fields = wire.decode(header)
        return Heard(kind, fields, b"".join(body))

    def expect(self, kind: Type) -> Heard:
        """Return the next message, which must be of this kind."""
        heard = self.hear()
        assert heard is not None, f"no {kind.name} came"
        assert heard.kind == kind, heard
        return heard

    def next_of(self, kind: Type) -> Heard:
        """Return the next message of this kind; others before it are passed over."""
        while (heard := self.hear()) is not None and heard.kind != kind:
            pass
        assert heard is not None, f"no {kind.name} came"
        return heard

    def say(self, kind: Type, *fields: Any, body: bytes | None = None) -> None:
        """Answer whoever spoke last."""
        parts = [self._identity, wire.encode(kind, *fields)]
        self._socket.send_multipart(parts if body is None else [*parts, body])

    def say_raw(self, *parts: bytes) -> None:
        """Answer with bytes that need be no message."""
        self._socket.send_multipart([self._identity, *parts])

    def welcome(self, writer: bytes, expected: int = 0) -> None:
        """Let the client send from `expected` on."""
        self.say(Type.WELCOME, wire.VERSION, writer, expected, "", "", "", wire.CREDIT)


class Rig(Node):
    """A node with a log to look into, and processes to be cruel to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._kept = path / "kept"
        self._kept.mkdir()
        self._clients: list[subprocess.Popen[str]] = []
        self.env |= {
            "RANKLOG_SEAL_AGE_S": "3600",
            "RANKLOG_SEAL_SIZE_BYTES": "1G",
            "RANKLOG_RESCAN_INTERVAL_S": "0.2",
            "RANKLOG_STOP_DEADLINE_S": "5",
        }

    def __exit__(self, *args: object) -> None:
        for client in self._clients:
            if client.poll() is None:
                client.send_signal(signal.SIGCONT)
                client.kill()
            client.wait()
            for pipe in (client.stdin, client.stdout, client.stderr):
                if pipe is not None:
                    pipe.close()
        super().__exit__(*args)

    def start_daemon(self, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a daemon, wait until it answers and keep its segment."""
        daemon = super().start_daemon(*flags, **env)
        for path in (self.state / "wal").glob("*.open"):
            number = path.stat().st_ino
            if not list(self._kept.glob(f"*.{number}")):
                os.link(path, self._kept / f"{len(list(self._kept.iterdir())):04}.{number}")
        return daemon

    def kill(self, daemon: subprocess.Popen[bytes]) -> None:
        """Kill a daemon with SIGKILL."""
        daemon.kill()
        daemon.wait()

    def spawn(self, source: str, *args: object, **env: str) -> "subprocess.Popen[str]":
        """Start a client script given as text; its pipes are open, and it is killed at the end of the test."""
        client = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, args)],
            env=self.env | env, cwd=self.path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._clients.append(client)
        return client

    def client(self, source: str, *args: object, code: int | tuple[int, ...] = 0, **env: str) -> str:
        """Run a client script to its end, check its exit code and return what it printed on both streams."""
        done = self.python(source, *map(str, args), **env)
        assert done.returncode in (code if isinstance(code, tuple) else (code,)), f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def adopted(self, timeout_s: float = 20.0) -> None:
        """Wait until no journal or spool file is left: their writers are dead, and the daemon has taken them over."""
        wait_for(lambda: not self.orphans(), "every file is adopted", timeout_s)

    def orphans(self) -> list[Path]:
        """Return the files in view that wait to be adopted: hidden ones were not finished, and hold no record."""
        return [path for path in self.leftovers() if not path.name.startswith(".")]

    def written(self) -> Written:
        """Return every record in the log by writer, in the order of the log; that none is missing is checked."""
        records = self.raw_written()
        for writer, found in records.items():
            check_whole(found, writer)
        return records

    def raw_written(self) -> Written:
        """As `written`, without the check."""
        records: Written = {}
        for path in sorted(self._kept.iterdir(), key=lambda path: path.name):
            for writer, found in _segment_records(path.read_bytes()):
                records.setdefault(writer, []).extend(found)
        return records

    def starts(self) -> dict[str, Start]:
        """Return the start frame of every writer in the log."""
        return {writer: start_from_map(found[0].payload) for writer, found in self.raw_written().items()}


class Sending:
    """A journal with its sender and spool, and what they told the user."""

    WRITER = "0f" * 16
    START = encode_start(Start(writer=WRITER, project="p", run="r"))

    def __init__(self, path: Path, find_socket: Callable[[], Path] | None) -> None:
        self.path = path
        for name in ("journal", "spool"):
            (path / name).mkdir()
        self.told: list[str] = []
        self.journal = Journal(
            self.WRITER, self.START, [path / "journal"], file_size=64 << 10, size_max=8 << 20, wake=lambda: self.sender.wake()
        )
        spool = Spool(self.WRITER, self.START, [path / "spool"], size_max=1 << 30)
        self.sender = Sender(
            self.START, bytes.fromhex(self.WRITER), self.journal, spool, find_socket, self.told.append, 0.02
        )  # fmt: skip
        self.sender.start()

    def log(self, *numbers: int) -> None:
        for number in numbers:
            assert self.journal.append(Kind.METRICS, None, {"n": number})

    def reaches(self, state: State) -> None:
        wait_for(lambda: self.sender.state == state, f"the sender is {state.value}")

    def spooled(self) -> list[int]:
        return logged(on_disk(self.path / "spool").get(self.WRITER, []), "n")


def _segment_records(data: bytes) -> Iterable[tuple[str, list[Record]]]:
    buffer = memoryview(data)
    header, offset = segment.decode_header(buffer)
    for entry in segment.scan(buffer, header.salt, offset, header.first_lsn):
        assert not isinstance(entry, Damage), entry
        if entry.type != EntryType.BATCH:
            continue
        writer, first, count = BATCH.unpack_from(entry.payload)
        found = list(_records(entry.payload, BATCH.size))
        assert found, "a batch entry without a frame"
        assert (found[0].seq, found[-1].last) == (first, first + count - 1), "a batch is what its head says"
        yield writer.hex(), found


def _records(buffer: memoryview, offset: int) -> Iterable[Record]:
    end = offset
    for span in spans(buffer, offset):
        end = span.end
        yield _record(buffer, span)
    assert end == len(buffer), "bytes behind the last frame"


def _record(buffer: memoryview, span: Span) -> Record:
    body = body_at(buffer, span.offset)
    assert body is not None, "spans yields whole frames"
    kind, seq, _, step, payload = decode_body(body)
    return Record(seq, Kind(kind), step, payload)


def on_disk(*directories: Path) -> Written:
    """Return the records in the journal and spool files of these directories by writer: what a daemon would adopt."""
    pieces: dict[str, list[list[Record]]] = {}
    written: Written = {}
    for path in (path for directory in directories for path in directory.glob("[!.]*")):
        start, *found = _frames(path.read_bytes())
        assert start.kind == Kind.START, path
        writer = path.name.partition(".")[0]
        written[writer] = [start]
        pieces.setdefault(writer, []).append(found)
    for writer, records in written.items():
        for record in (record for piece in sorted(filter(None, pieces[writer]), key=lambda piece: piece[0].seq) for record in piece):
            if record.seq > records[-1].last:
                records.append(record)
    return written


def _frames(data: bytes) -> Iterable[Record]:
    """Return the frames from the head of a file up to the first that does not follow."""
    buffer = memoryview(data)
    return (_record(buffer, span) for span in spans(buffer))


def check_whole(records: list[Record], writer: str = "") -> None:
    """Check that every seq from 0 on is there once and in order, as a record or within a gap."""
    expected = 0
    for record in records:
        assert record.seq == expected, f"{writer}: seq {record.seq} where {expected} was due"
        expected = record.last + 1


def logged(records: list[Record], key: str) -> list[Any]:
    """Return the values of one key of the training records, in order."""
    return [r.payload[key] for r in records if r.kind == Kind.METRICS and key in r.payload]


def gaps(records: list[Record]) -> list[tuple[int, int]]:
    """Return the (first, last) seqs of every gap frame."""
    return [(r.seq, r.last) for r in records if r.kind == Kind.GAP]


def shard_rows(root: Path) -> list[dict[str, Any]]:
    """Return the rows of every parquet file below `root`, as they are: a second reader beside the project's own."""
    rows: list[dict[str, Any]] = []
    for path in sorted(root.rglob("*.parquet")):
        rows += pyarrow.parquet.ParquetFile(path).read().to_pylist()
    return rows


@contextlib.contextmanager
def small_tmpfs(path: Path, size_bytes: int = 1 << 20) -> Iterator[Path]:
    """Mount a tmpfs of that size at a new directory `path`; the test is skipped where that is not allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
