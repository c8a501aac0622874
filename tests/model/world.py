"""One node in one process, without threads, sockets or a clock: the product's own objects over a `SimFS`.

    Client   Writer, and with it Journal, Backlog, Spool, Sender and Link; its thread is `step`
    daemon   Server over what `setup.assemble` puts together: Wal, Writers, Ingest, Adopter, Disk
    shipper  Shipper: Conversion, Uploader, retention; over the `dir` store, with moods

Only what would need threads or a kernel is played: the socket (two queues, so that messages can be lost, doubled and
swapped), inotify, the shipper's process, and `time.monotonic`. A *kill* drops the objects and closes their
descriptors; it may come before any call that changes a file (`fuse`). A power cut kills all, empties the tmpfs and
leaves on disk what `SimFS` says.

Each ack is checked when it is sent: the durable state alone, recovered in another place, must hold it. At the end
`judge` compares what was delivered with what each record was promised (`Fate`).
"""

import logging
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import Any, Self

import pytest

import oracle
from model.simfs import Crash, SimFS
from oracle import May
from ranklog import backlog, journal, link, sender, spool, transport, wire
from ranklog.config import Settings
from ranklog.errors import StoreError
from ranklog.frame import Kind
from ranklog.start import Start
from ranklog.stores.base import Upload
from ranklog.stores.dir import DirStore
from ranklog.transport import Down, Event, Up
from ranklog.values import normalise
from ranklog.writer import Places, Writer
from ranklogd import adopt, server, setup
from ranklogd.config import Config
from ranklogd.ingest import Peer, Reply
from ranklogd.notify import Notifier
from ranklogd.server import Server
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from ranklogd.wal.recover import recover
from ranklogd.wal.segment import parse_sealed
from segments import read_rows, writer_id
from witness import Account, record

DRAIN_TURNS = 400


class Fate(IntEnum):
    """What may become of a record at worst, by what happened while it was there."""

    KEPT = 0
    """It is delivered: log() returned, and only kills, full stores and I/O errors of the daemon's disk followed."""
    COUNTED = 1
    """It is delivered, or lies in a gap row: there was no room for it, or its bytes were destroyed."""
    LOST = 2
    """It may be gone without a trace: a power cut took the tmpfs before any disk had it."""


class Clock:
    """Stands in for the module `time`: nothing may depend on how fast this machine is, or a history is not replayed."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return 1_700_000_000_000_000_000 + int(self.now_s * 1e9)

    def time(self) -> float:
        return self.time_ns() / 1e9

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Wire:
    """The client's transport."""

    def __init__(self, world: "World", client: "Client") -> None:
        self._world = world
        self._client = client

    def send(self, header: bytes, body: bytes | None = None) -> bool:
        if self._world.server is not None:
            parts = [header] if body is None else [header, body]
            self._world.to_daemon.append((self._client.identity, parts))
        return True  # As zmq does: where it goes to, nobody knows.

    def events(self, _timeout_s: float) -> Iterator[Event]:
        while self._client.inbox:
            yield self._client.inbox.popleft()

    def close(self) -> None:
        self._client.inbox.clear()


class Socket:
    """The daemon's socket: takes as many messages as it is allowed to."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.limit = 1 << 30

    def watch(self, fd: int) -> None:
        pass

    def wait(self, _timeout_s: float) -> set[int]:
        return set()

    def receive(self, limit: int) -> Iterator[tuple[Peer, list[bytes]]]:
        for _ in range(min(limit, self.limit)):
            if not self._world.to_daemon:
                return
            identity, parts = self._world.to_daemon.popleft()
            yield Peer(identity, os.geteuid()), parts

    def send(self, reply: Reply) -> None:
        kind, fields = wire.decode(reply.header)
        if kind == wire.Type.ACK:
            self._world.check_ack(fields[0], fields[1])
        for client in self._world.clients:
            if client.identity == reply.identity and client.alive:
                client.inbox.append((kind, fields, reply.body or b""))

    def close(self) -> None:
        pass


class Still:
    """Stands in for inotify and for the shipper's process: nothing ever happens by itself."""

    fd = -1
    restarts = pid = 0

    def __init__(self, *_: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_: None


class MoodyStore(DirStore):
    """The `dir` store behind a bad line."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.moods: deque[str] = deque()
        """What the next puts meet: `refused` (nothing was stored), `lost` (stored, and the answer did not come)."""

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        mood = self.moods.popleft() if self.moods else ""
        if mood == "refused":
            raise StoreError("the line is down", permanent=False)
        results = super().put(uploads)
        if mood == "lost":
            raise StoreError("the answer was lost", permanent=False)
        return results


@dataclass(eq=False)
class Client:
    """One trainer, and what it was promised."""

    name: str
    start: Start
    writer: Writer
    alive: bool = True
    ended: bool = False
    inbox: deque[Event] = field(default_factory=deque)
    seqs: list[int] = field(default_factory=list)
    """By record."""
    fates: list[Fate] = field(default_factory=list)
    safe_seq: int = 0
    """Below it every power cut is survived: acknowledged, or durable in the spool."""
    damaged: bool = False
    """Bytes of its spool were destroyed: what lay behind them cannot even be counted."""

    @property
    def identity(self) -> bytes:
        return self.name.encode()

    @property
    def sender(self) -> sender.Sender:
        return self.writer._sender

    def note_safe(self) -> None:
        self.safe_seq = max(self.safe_seq, self.sender._backlog.spooled_below())

    def worsen(self, fate: Fate, above_seq: int = 0) -> None:
        self.fates = [max(f, fate) if seq >= above_seq else f for f, seq in zip(self.fates, self.seqs, strict=True)]


class World:
    """The node. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.disk, self.shm = path / "disk", path / "shm"
        self.journal, self.spool = self.shm / "journal", self.disk / "spool"
        self.data = self.disk / "data"
        self.state = StateDir(self.disk / "state")
        for room in (self.disk, self.shm, self.journal, path / "scratch"):
            room.mkdir()
        self.clock = Clock()
        self.config = Config(
            to=str(self.data), state_dir=self.state.root, runtime_dir=self.shm / "run",
            socket=self.shm / "run/s.sock", journal_dir=self.journal, spool_dir=self.spool,
            disk_free_min_bytes=0, reserve_size_bytes=4096, node_metrics_interval_s=0.0, seal_size_bytes=4096,
            cache_size_bytes=8192, cache_age_s=1e8, upload_batch_max=2, node="node-1",
        )  # fmt: skip
        self.settings = replace(
            Settings.from_env({"HOME": str(path)}),
            journal_file_size_bytes=4096, journal_size_bytes=16384, spool_size_bytes=1 << 16,
        )  # fmt: skip
        self.store = MoodyStore(self.data)
        self.sim = SimFS(self.disk)
        self.clients: list[Client] = []
        self.server: Server | None = None
        self.socket = Socket(self)
        self.shipper: Shipper | None = None
        self.to_daemon: deque[tuple[bytes, list[bytes]]] = deque()
        self.acks = 0
        self.power_cuts = 0
        self.deaths: list[str] = []
        """Crash points that were reached."""
        self.rotten: set[str] = set()
        """Segments and spool files of which a byte was destroyed."""
        self._patch = pytest.MonkeyPatch()
        self._connecting: Client | None = None

    def __enter__(self) -> Self:
        patch = self._patch.setattr
        for module in (link, sender, journal, server, adopt):
            patch(module, "time", self.clock)
        patch(journal, "time_ns", self.clock.time_ns)
        rng = Random(0)
        patch(secrets, "token_hex", lambda size: rng.randbytes(size).hex())
        patch(secrets, "randbits", rng.getrandbits)
        patch(logging.root.manager, "disable", logging.CRITICAL)
        patch(sender.Sender, "start", lambda _: None)
        patch(transport, "Transport", self._make_wire)
        patch(setup, "DaemonSocket", lambda *_: self.socket)
        patch(setup, "Watch", Still)
        patch(setup, "ShipperProcess", Still)
        patch(Config, "keeps_cache", True)
        patch(spool, "FILE_SIZE_MAX", 4096)
        patch(backlog, "BATCH_SIZE", 1500)
        patch(backlog, "MERGE_SIZE_MAX", 1000)
        self.sim.__enter__()
        try:
            self.spool.mkdir()
            assert self.start_daemon()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self.kill_all()
        self.sim.__exit__(*exc)
        self._patch.undo()
        shutil.rmtree(self.path, ignore_errors=True)

    def _make_wire(self, _path: Path, _wake_fd: int) -> Wire:
        assert self._connecting is not None
        return Wire(self, self._connecting)

    def _play(self, actor: str, fuse: int | None, work: Callable[[], Any]) -> bool:
        """Let an actor work; False if it died of it: by the fuse, or by an error that its process exits for."""
        alive = True
        try:
            with self.sim.acting(actor, fuse):
                work()
        except Crash as exc:
            self.deaths.append(str(exc))
            alive = False
        except OSError:
            if actor != "daemon":
                raise
            alive = False
        return alive

    # Clients.

    def new_client(self) -> Client:
        """Start a trainer; its first record is its start frame."""
        number = len(self.clients)
        start = Start(
            writer=writer_id(number), project="faults", run="job", rank=number % 2, node="node-1",
            wall_ns=1_700_000_000_000_000_000 + number,
        )  # fmt: skip
        name = f"w{number}"
        with self.sim.acting(name):
            writer = Writer(
                start, self.settings, Places([self.journal], [self.spool], lambda: self.config.socket), lambda _: None
            )
            client = Client(name, start, writer)
            self.clients.append(client)
            self._connecting = client
            client.sender._link.connect(client.sender._wake_fd)
        if self.server is not None:
            client.inbox.append(Up())
        return client

    def log(self, client: Client, count: int = 1, fuse: int | None = None) -> None:
        """Log the next records."""

        def work() -> None:
            for _ in range(count):
                payload = normalise(record(client.name, len(client.seqs)), warn=lambda _: None)
                seq = client.writer._journal.next_seq
                taken = client.writer.write(Kind.METRICS, payload, None, counted=True)
                client.seqs.append(seq)
                fate = Fate.KEPT if taken else Fate.COUNTED
                client.fates.append(Fate.LOST if client.damaged else fate)

        if not self._play(client.name, fuse, work):
            self.kill_client(client)

    def client_step(self, client: Client, after_s: float = 0.11, fuse: int | None = None) -> None:
        """Let the sender look once."""
        self.clock.now_s += after_s
        alive = self._play(client.name, fuse, lambda: client.sender.step(0.0))
        client.note_safe()
        if not alive:
            self.kill_client(client)

    def end_client(self, client: Client, fuse: int | None = None) -> None:
        """Finish: an end record, what is unacknowledged to the spool, everything closed."""

        def work() -> None:
            client.writer.end(0)
            client.sender._close()

        client.ended = True
        self._play(client.name, fuse, work)
        client.note_safe()
        self.kill_client(client)

    def kill_client(self, client: Client) -> None:
        """kill -9 of a trainer."""
        if client.alive:
            client.alive = False
            client.note_safe()
            if client.writer._journal.anonymous:  # It said so: there was no place for a file.
                client.worsen(Fate.LOST, above_seq=client.safe_seq)
            client.inbox.clear()
            self.sim.bury(client.name)
            client.sender._closed = True

    @property
    def living(self) -> list[Client]:
        """Clients that can log."""
        return [client for client in self.clients if client.alive]

    # The daemon.

    def start_daemon(self, fuse: int | None = None) -> bool:
        """Start the ingest process; False if it died over it."""
        assert self.server is None

        def work() -> None:
            state = setup.prepare(self.config)
            parts = setup.assemble(self.config, state, Notifier(""), lock_wait_s=0, stopped=lambda _: False)
            self.server = Server(parts)

        if not self._play("daemon", fuse, work):
            self.kill_daemon()
            return False
        for client in self.living:
            client.inbox.append(Up())
        return True

    def daemon_step(self, after_s: float = 0.03, limit: int = 1 << 30, fuse: int | None = None, turns: int = 1) -> None:
        """Turn the loop."""
        assert self.server is not None
        self.socket.limit = limit
        turn = self.server.step

        def work() -> None:
            for _ in range(turns):
                self.clock.now_s += after_s
                turn(0.0)

        if not self._play("daemon", fuse, work):
            self.kill_daemon()

    def seal(self, fuse: int | None = None) -> None:
        """Have the open segment sealed."""
        assert self.server is not None
        self.server._ask_seal()
        self.daemon_step(fuse=fuse)

    def kill_daemon(self) -> None:
        """kill -9 of the ingest process; its shipper goes with it."""
        if self.server is not None:
            for client in self.living:
                client.inbox.append(Down())
            replay = self.server._adopter._current
            if replay is not None:  # It would close descriptors when it is collected, which are somebody else's then.
                replay.close()
                self.server._adopter._current = None
        self.server = None
        self.to_daemon.clear()
        self.sim.bury("daemon")
        self.kill_shipper()

    def check_ack(self, writer: bytes, durable: int) -> None:
        """I1, at once: a power cut right now leaves everything that this ack confirms."""
        self.acks += 1
        for live_names in (False, True):
            scratch = StateDir(self.path / "scratch")
            with self.sim.aside():
                for room in scratch.rooms:
                    shutil.rmtree(room, ignore_errors=True)
                    room.mkdir()
                try:
                    segments = self.sim.durable(self.state.wal, live_names=live_names)
                except FileNotFoundError:
                    segments = {}
                for name, data in segments.items():
                    (scratch.wal / name).write_bytes(data)
                mark = recover(scratch, 0).marks.get(writer)
            last = -1 if mark is None else mark.last_seq
            assert last >= durable, f"I1 seq {durable} was acknowledged, and a power cut would leave {last}"

    # The shipper.

    def convert(self, fuse: int | None = None) -> None:
        """Convert the next segment, if one is due."""
        self._ship(lambda shipper: shipper.convert_one(), fuse)

    def upload(self, fuse: int | None = None, mood: str = "") -> None:
        """Upload the next batch, if one is due, and keep the cache in its bounds."""
        self.store.moods = deque([mood] if mood else [])
        self._ship(lambda shipper: shipper.upload_some(), fuse)

    def _ship(self, work: Callable[[Shipper], Any], fuse: int | None) -> None:
        def with_start() -> None:
            if self.shipper is None:
                try:
                    self.shipper = Shipper(self.config, store=self.store, clock=self.clock.monotonic)
                    self.shipper.conversion._dice = self.shipper.uploader._dice = lambda: 0.5
                except OSError:
                    return  # It exits, and is started again.
            work(self.shipper)
            self.shipper.report()

        if not self._play("shipper", fuse, with_start):
            self.kill_shipper()

    def kill_shipper(self) -> None:
        """kill -9 of the shipper."""
        self.shipper = None
        self.store = MoodyStore(self.data)
        self.sim.bury("shipper")

    # The node.

    def kill_all(self) -> None:
        """Kill every process."""
        for client in self.clients:
            self.kill_client(client)
        self.kill_daemon()

    def power_cut(self, seed: int) -> None:
        """Take the power away from everything."""
        self.power_cuts += 1
        self.kill_all()
        for client in self.clients:
            client.worsen(Fate.LOST, above_seq=client.safe_seq)
        self.sim.power_cut(Random(seed))
        for room in (self.journal, self.shm / "run"):
            shutil.rmtree(room, ignore_errors=True)
        self.journal.mkdir()
        self.clock.now_s += 60.0

    def rot_segment(self, rng: Random) -> bool:
        """Destroy one byte of a sealed segment; False if there is none."""
        sealed = [path for path in sorted(self.state.wal.iterdir()) if parse_sealed(path.name)]
        sealed = [path for path in sealed if path.name not in self.rotten]
        if not sealed:
            return False
        path = rng.choice(sealed)
        held = _held(path)
        self.rotten.add(path.name)
        _flip(path, rng)
        for client in self.clients:
            client.fates = [
                max(fate, Fate.COUNTED) if (client.start.writer, seq) in held else fate
                for fate, seq in zip(client.fates, client.seqs, strict=True)
            ]
        return True

    def rot_spool(self, rng: Random) -> bool:
        """Destroy one byte of a spool file; False if there is none."""
        paths = [path for path in sorted(self.spool.glob("*.spool")) if path.stat().st_size]
        if not paths:
            return False
        path = rng.choice(paths)
        self.rotten.add(path.name)
        _flip(path, rng)
        for client in self.clients:
            if path.name.startswith(client.start.writer):
                client.damaged = True
                acked = client.sender._backlog.acked
                client.safe_seq = min(client.safe_seq, acked)
                client.worsen(Fate.LOST, above_seq=acked)
        return True

    def settle(self) -> None:
        """The faults are over: start what is down, end all clients, drain into the store."""
        self.sim.faults = []
        self.store.moods.clear()
        self.kill_shipper()
        if self.server is None:
            assert self.start_daemon(), "I8 the daemon does not start"
        fresh = self.new_client()
        self.log(fresh)
        self._turn(lambda: all(self._all_acked(client) for client in self.living), "I8 everything logged is acked")
        for client in self.living:
            self.end_client(client)
        self._turn(lambda: not self._left_behind(), "I8 dead writers' files are adopted")
        assert self.server is not None
        self.server._ask_seal()
        self._turn(lambda: self.server is not None and self.server._ingest.wal.empty, "I8 the segment is sealed")
        self._turn(lambda: not self._waiting(), "I8 everything is uploaded", ship=True)

    def _all_acked(self, client: Client) -> bool:
        return client.sender._backlog.acked >= client.writer._journal.closed_seq

    def _left_behind(self) -> list[str]:
        assert self.server is not None
        if self.server._ingest.pending or self.server._adopter.busy:
            return ["busy"]
        names = [path.name for room in (self.journal, self.spool) for path in room.iterdir()]
        # Without a start frame nobody knows whose it was: left alone, and told in the status.
        known = {Path(path).name for path in self.server._adopter.refused} & self.rotten
        # A power cut may leave one file both here and as evidence there: a link is refused, and all of it is safe.
        known |= {path.name for path in self.state.quarantine.iterdir()}
        return [name for name in names if not name.startswith(".") and name not in known]

    def _waiting(self) -> list[str]:
        segments = [path.name for path in self.state.wal.iterdir() if parse_sealed(path.name)]
        return segments + [str(path) for path in self.state.outbox.rglob("*")]

    def _turn(self, done: Callable[[], bool], what: str, *, ship: bool = False) -> None:
        for _ in range(DRAIN_TURNS):
            if done():
                return
            for client in self.living:
                self.client_step(client, 0.2)
            if ship:
                self.clock.now_s += 1.0
                self.convert()
                self.upload()
            else:
                if self.server is None:
                    self.start_daemon()
                self.daemon_step(0.3)
        assert self.server is not None
        raise AssertionError(
            f"still not: {what}; left {self._left_behind()}, waiting {self._waiting()}, refused "
            f"{self.server._adopter.refused}, shipper {self.shipper and self.shipper._error()}"
        )

    def judge(self) -> oracle.Verdict:
        """Everything that holds when all is drained."""
        self.settle()
        rows = read_rows(self.data) if self.data.exists() else []
        accounts = {c.name: Account(len(c.seqs), 0, 0.0, 0) for c in self.clients}
        strict = not self.power_cuts and not self.rotten and all(f == Fate.KEPT for c in self.clients for f in c.fates)
        strict = strict and not any(client.damaged for client in self.clients)
        verdict = oracle.judge(rows, accounts, May.LOSE_NOTHING if strict else May.LOSE_UNACKNOWLEDGED)
        self._check_fates(rows, verdict)
        return verdict

    def _check_fates(self, rows: list[dict[str, Any]], verdict: oracle.Verdict) -> None:
        names = {client.start.writer: client.name for client in self.clients}
        delivered = {
            (names[row["writer"]], round(row["value"]))
            for row in rows
            if row["kind"] == "metrics" and row["key"] == "n" and row["writer"] in names
        }
        missing = [
            (client.name, n, fate)
            for client in self.clients
            for n, fate in enumerate(client.fates)
            if (client.name, n) not in delivered
        ]
        lost = [(name, n) for name, n, fate in missing if fate == Fate.KEPT]
        assert not lost, f"I1 these were promised: {lost}"
        counted = sum(fate == Fate.COUNTED for _, _, fate in missing)
        assert counted <= verdict.in_gaps + verdict.lost_lsns, f"I6 {counted} are missing, {verdict} are in gaps"
        fresh = self.clients[-1]
        assert (fresh.name, 0) in delivered, "I8 a fresh record did not get through"


def _held(path: Path) -> set[tuple[str, int]]:
    """Return (writer, seq) of every record in a segment."""
    buffer = memoryview(path.read_bytes())
    header, offset = segment.decode_header(buffer)
    found: set[tuple[str, int]] = set()
    for entry in segment.scan(buffer, header.salt, offset, header.first_lsn):
        if not isinstance(entry, segment.Damage) and entry.type == segment.EntryType.BATCH:
            writer, first, count = segment.BATCH.unpack_from(entry.payload)
            found |= {(writer.hex(), seq) for seq in range(first, first + count)}
    return found


def _flip(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    mode = path.stat().st_mode
    # In place, below everybody: neither the owner's descriptor nor the durable copy may tell the old byte.
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, data, 0)
    os.fdatasync(fd)
    os.close(fd)
    assert path.stat().st_mode == mode
