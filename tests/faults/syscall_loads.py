"""What runs while its system calls fail: each load is one function of a case's directory, and returns an exit code.

    ingest   two clients and the ingest half of a daemon: HELLO, batches, acks, rolls; goes on where it was left
    adopt    the ingest half adopts what dead trainers left, and seals
    ship     a shipper's two halves, until nothing is left to do; `ship_cached` with a cache and its retention
    train    a trainer without a daemon: journal, spool, finish(); `train_spool` for its sender thread;
             `train_killed` leaves without finish()
    recover  what a restart does, without any fault: all of this, and a fresh record

Each calls `ready` when its calls may begin to fail.
Exit codes: 0 all is done, 1 an OSError that ends the process, 3 there is no room and it gave up asking.
Ledgers are mapped into memory: to note down that a record is safe must not be a system call that could fail.
"""

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import count
from pathlib import Path
from zlib import crc32

import ranklog
from ingesting import Half
from node import wait_for
from ranklog import wire
from ranklog.frame import Kind
from ranklog.start import encode_start
from ranklog.stores.dir import DirStore
from ranklog.values import normalise
from ranklog.wire import Type
from ranklogd.adopt import Adopter
from ranklogd.config import Config
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from ranklogd.wal.log import NoSegment
from segments import frame, start_of
from witness import Witness, record

CLIENTS = ("one", "two")
RECORDS = 24
BATCH = 6
TURNS_MAX = 30
TRAINED = 90
SHIP_STEPS = 12
RETRY_S = 0.001
_LEDGER = struct.Struct("<QQQQ")
Ready = Callable[[], None]
Load = Callable[[Path, Ready], int]


def _ends_at_os_error(load: Load) -> Load:
    """As `ranklogd` does: what the WAL cannot keep ends the process, with the reason in words."""

    @wraps(load)
    def guarded(root: Path, ready: Ready) -> int:
        try:
            return load(root, ready)
        except OSError as exc:
            sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
            return 1

    return guarded


class Client:
    """One writer that sends what was not acknowledged, from where WELCOME says."""

    def __init__(self, half: Half, ledgers: Path, name: str) -> None:
        self._half = half
        self._name = name
        self.start = start_of(crc32(name.encode()), project="faults", run=f"job of {name}", name=name)
        with (ledgers / f"{name}.ledger").open("r+b") as file:
            self._ledger = mmap.mmap(file.fileno(), 0)
        self.hello()

    @property
    def durable(self) -> int:
        """Records that were acknowledged."""
        return int(_LEDGER.unpack(self._ledger[:])[1])

    def hello(self) -> None:
        """Say which is the oldest record still held, and go on with the one that is due."""
        base = self.durable + 1 if self.durable else 0
        (welcome,) = self._half.hello(self.start, base)
        assert welcome.kind == Type.WELCOME, welcome
        self._due = int(welcome.fields[2])
        if self._due > base:
            self._due -= 1
            self.send(1)  # What the daemon has is sent once more, alone: that draws its ack.

    def send(self, records: int = BATCH) -> None:
        """Send the next batch, if there is one."""
        first, last = self._due, min(self._due + records, RECORDS + 1)
        if first == last:
            return
        data = b"".join(self._frame(seq) for seq in range(first, last))
        self._due = last
        for answer in self._half.batch(self.start, first, data, last - first):
            self.hear(answer.kind, answer.fields)

    def hear(self, kind: Type, fields: list[object]) -> None:
        """Note an ack; after a refusal for lack of room, ask again."""
        if kind == Type.ACK:
            durable = int(str(fields[1]))
            assert durable >= self.durable, "an ack never goes back"
            self._ledger[:] = _LEDGER.pack(RECORDS, durable, 0, 0)
        else:
            assert (kind, fields[1]) == (Type.REFUSE, wire.Code.FULL), fields
            self.hello()

    def _frame(self, seq: int) -> bytes:
        if seq == 0:
            return encode_start(self.start)
        return frame(Kind.METRICS, seq, normalise(record(self._name, seq - 1), warn=print), step=seq - 1)


def make_ledgers(root: Path, *names: str) -> None:
    """Note down that these clients hold their records, none of them acknowledged."""
    (root / "ledgers").mkdir(exist_ok=True)
    for name in names:
        (root / "ledgers" / f"{name}.ledger").write_bytes(_LEDGER.pack(RECORDS, 0, 0, 0))


@_ends_at_os_error
def ingest(root: Path, ready: Ready) -> int:
    """Bring every record of two clients into the WAL."""
    ready()
    return _ingest(root, CLIENTS)


def _ingest(root: Path, names: Sequence[str]) -> int:
    half = Half(StateDir(root / "state"))
    clients = [Client(half, root / "ledgers", name) for name in names]
    for turn in range(TURNS_MAX):
        for client in clients:
            client.send()
        for answer in half.commit():
            for client in clients:
                if answer.fields[0] == bytes.fromhex(client.start.writer):
                    client.hear(answer.kind, answer.fields)
        if turn % 2:
            _seal(half)
        if all(client.durable == RECORDS for client in clients):
            half.wal.close()
            return 0
    return 3


def _seal(half: Half) -> None:
    try:
        half.wal.roll()
    except NoSegment as exc:
        sys.stderr.write(f"not sealed: {exc}\n")  # The server goes on as well, and tries again later.


@_ends_at_os_error
def adopt(root: Path, ready: Ready) -> int:
    """Adopt what lies in the journal and spool directories, looking again as a daemon does, and seal."""
    ready()
    half = Half(StateDir(root / "state"))
    rooms = [root / "journal", root / "spool"]
    adopter = Adopter(half.ingest, lambda: rooms, half.state.quarantine)
    for _ in range(4):
        adopter.scan()
        for turn in count():
            if not adopter.step():
                break
            if turn % 4 == 3:  # Not after each piece: the server commits by time.
                half.commit()
        half.commit()
    _seal(half)
    half.wal.close()
    sys.stderr.write(f"adopted={adopter.adopted} poisoned={half.wal.poisoned} refused={adopter.refused}\n")
    return 3 if left_behind(root) else 0


def left_behind(root: Path) -> list[Path]:
    """Return journal and spool files that nobody has adopted."""
    return [path for room in ("journal", "spool") for path in (root / room).glob("[0-9a-f]*")]


@_ends_at_os_error
def ship(root: Path, ready: Ready) -> int:
    """Convert and upload everything; what failed is tried again."""
    ready()
    return _ship(root, Config)


@_ends_at_os_error
def ship_cached(root: Path, ready: Ready) -> int:
    """As `ship`, for a store that is not at hand: shards go through the cache, and expire there at once."""
    ready()
    return _ship(root, _Cached)


def _pass(time_s: float) -> None:
    due_s = time.monotonic() + time_s
    wait_for(lambda: time.monotonic() > due_s, "time passes")


class _Cached(Config):
    keeps_cache = True


def _ship(root: Path, kind: type[Config]) -> int:
    state = StateDir(root / "state")
    config = kind(state_dir=state.root, to=str(root / "data"), cache_age_s=0, retry_base_s=RETRY_S, retry_max_s=RETRY_S)
    shipper = Shipper(config, store=DirStore(root / "data"))
    for _ in range(SHIP_STEPS):
        _pass(2 * RETRY_S)  # Everything is due.
        report = shipper.step()
        if not report.backlog_segments + report.backlog_shards and not list(state.outbox.iterdir()):
            return 0
    sys.stderr.write(f"{report.last_error_class}: {report.last_error}\n")
    return 3


class _MappedWitness(Witness):
    """A witness whose notes are no system calls."""

    _map: mmap.mmap | None = None

    def _note(self) -> None:
        if self._map is None:
            os.ftruncate(self._fd, _LEDGER.size)
            self._map = mmap.mmap(self._fd, _LEDGER.size)
        self._map[:] = _LEDGER.pack(self.returned, self.durable, self._slowest_ns, self._raised)


def train(root: Path, ready: Ready) -> int:
    """Log beside a daemon that is not there: through many small journal files, into the spool, and finish()."""
    witness = _begin(root, "left")
    ready()
    return _train(witness, lambda: None)


def train_spool(root: Path, ready: Ready) -> int:
    """As `train`; the sender thread exists when it is ready."""
    return _train(_begin(root, "left"), ready)


def train_killed(root: Path, ready: Ready) -> int:
    """As `train`, but the process is gone from one moment to the next."""
    return _train(_begin(root, "right"), ready, finish=False)


def _begin(root: Path, name: str) -> Witness:
    os.environ |= {
        "HOME": str(root), "RANKLOG_RUNTIME_DIR": str(root / "r"), "RANKLOG_STATE_DIR": str(root / "state"),
        "RANKLOG_JOURNAL_DIR": str(root / "journal"), "RANKLOG_SPOOL_DIR": str(root / "spool"),
        "RANKLOG_JOURNAL_FILE_SIZE_BYTES": "4K", "RANKLOG_JOURNAL_SIZE_BYTES": "12K",
        "RANKLOG_FLUSH_INTERVAL_S": "0.01",
    }  # fmt: skip
    return _MappedWitness(name, root / "ledgers")


def _train(witness: Witness, ready: Ready, *, finish: bool = True) -> int:
    ranklog.init(project="faults", id=f"job of {witness.name}", name=witness.name)
    ready()
    for _ in range(TRAINED):
        witness.log()
        if witness.returned % 10 == 0:
            _pass(0.01)  # The sender thread gets its turn.
    if finish:
        ranklog.finish(timeout=5)
    return 0


@_ends_at_os_error
def recover(root: Path, ready: Ready) -> int:
    """Start again, bring in whatever waits anywhere and one client more, and ship all of it."""
    make_ledgers(root, "fresh")
    clients = [name for name in (*CLIENTS, "fresh") if (root / "ledgers" / f"{name}.ledger").exists()]
    return _ingest(root, clients) or adopt(root, ready) or ship(root, ready)
