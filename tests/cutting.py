"""A node in one process, for cuts by the hundred: the real client's files, WAL, adoption, conversion and upload.

Sockets, threads and the shipper's process are left out, for they cost seconds a round and put nothing on a disk. What
is acknowledged is told through a pipe, at once and in order, so that whoever cuts the power knows exactly what this
node had promised by then:

    ready                          it has recovered, and goes on
    account NAME RETURNED DURABLE  as a witness's ledger has it; RETURNED before the record is written, DURABLE after
    POINT sleep PID                the failpoint that was asked for is reached: half a second to cut right there
    failed TEXT                    the disk answers with errors
    died TEXT                      it raised what it must not
"""

import hashlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

from ingesting import Half
from ranklog import fs, values
from ranklog.backlog import Backlog
from ranklog.frame import Kind
from ranklog.journal import Journal
from ranklog.spool import Spool
from ranklog.start import encode_start
from ranklog.stores import dir as dir_store
from ranklog.wire import Type
from ranklogd.adopt import Adopter
from ranklogd.config import Config
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from segments import start_of
from witness import record


class Rooms(NamedTuple):
    """Where this node keeps what."""

    state: Path
    spool: Path
    store: Path


class Order(NamedTuple):
    """What one life of the node shall be."""

    name: str
    """Its trainers are called after it."""
    seed: int
    point: str = ""
    """`name:nth` of a failpoint to wait at."""
    blind: str = ""
    """What it does not sync, for a negative control: a key of `BLIND`."""


def _no_sync(_: object) -> None:
    """Do nothing, and say that all is well."""


def _without_sync() -> None:
    os.fdatasync = os.fsync = _no_sync  # type: ignore[assignment]


def _without_directory_sync() -> None:
    fs.sync_dir = _no_sync


def _without_store_sync() -> None:
    dir_store.fs = SimpleNamespace(**vars(fs) | {"sync_data": _no_sync, "sync_dir": _no_sync})  # type: ignore[assignment]


BLIND: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "files and directories": _without_sync,
    "directories": _without_directory_sync,
    "the store": _without_store_sync,
}


class Trainer:
    """The client's own journal, backlog and spool around a pipe; the journal is in memory, which no cut survives."""

    def __init__(self, name: str, spool_dir: Path, tell: Callable[[str], None]) -> None:
        self.name = name
        self.start = start_of(writer=hashlib.sha256(name.encode()).hexdigest()[:32], project="faults", run="job")
        self.greeted = False
        self._tell = tell
        self._returned = self._durable = 0
        frame = encode_start(self.start)
        self._journal = Journal(self.start.writer, frame, [], file_size=256 << 10, size_max=32 << 20, wake=lambda: None)
        self._spool = Spool(self.start.writer, frame, [spool_dir], size_max=1 << 30)
        self.backlog = Backlog(self._journal, self._spool)

    def _note(self) -> None:
        self._tell(f"account {self.name} {self._returned} {self._durable}")

    def log(self, count: int) -> None:
        """Log some records."""
        first, self._returned = self._returned, self._returned + count
        self._note()
        for n in range(first, self._returned):
            assert self._journal.append(Kind.METRICS, n, values.normalise(record(self.name, n), warn=_no_warning))
        self.backlog.collect()

    def spill(self) -> None:
        """Put what is not acknowledged on the disk."""
        self.backlog.spill()
        self._durable = self._returned
        self._note()

    def acknowledge(self, seq: int) -> None:
        """Take an ack: the start frame is record 0."""
        self.backlog.acknowledge(seq)
        self._durable = max(self._durable, seq)
        self._note()

    def die(self) -> None:
        """Leave files that nobody holds any more."""
        for file in (*self._journal.files(), *self._spool.files()):
            file.close()


def _no_warning(text: str, *_: object) -> None:
    raise AssertionError(text)


class Life:
    """From a start to a cut."""

    def __init__(self, rooms: Rooms, order: Order, tell: Callable[[str], None]) -> None:
        self._rng = Random(order.seed)
        self._rooms = rooms
        self._name = order.name
        self._tell = tell
        self._trainers: dict[bytes, Trainer] = {}
        self._count = 0
        state = StateDir(rooms.state)
        for directory in (rooms.spool, *state.rooms):
            fs.make_dir(directory)
        self._half = Half(state)
        self._adopter = Adopter(self._half.ingest, lambda: [rooms.spool], state.quarantine)
        config = Config(to=str(rooms.store), state_dir=rooms.state, retry_base_s=0.01, retry_max_s=0.05)
        self._shipper = Shipper(config)
        self._ship = self._shipping()

    def run(self) -> None:
        """Go on until somebody cuts the power."""
        actions = [
            self._log,
            self._log,
            self._log,
            self._spool,
            self._adopt,
            self._roll,
            self._ship_one,
            self._ship_one,
        ]
        while True:
            self._rng.choice(actions)()

    def settle(self) -> None:
        """Bring everything in."""
        self._adopter.scan()
        while self._adopter.step():
            self._commit()
        self._commit()
        self._half.wal.roll()
        self._shipper.step()

    def _trainer(self) -> Trainer:
        self._count += 1
        return Trainer(f"{self._name}-{self._count}", self._rooms.spool, self._tell)

    def _log(self) -> None:
        """Some trainers log, one commit is for all of them."""
        if len(self._trainers) < 3:
            trainer = self._trainer()
            self._trainers[bytes.fromhex(trainer.start.writer)] = trainer
        for writer, trainer in list(self._trainers.items()):
            if self._rng.random() < 0.3:
                continue
            trainer.log(self._rng.randrange(1, 12))
            if not trainer.greeted:
                assert self._half.hello(trainer.start)[0].kind == Type.WELCOME
                trainer.greeted = True
            batch = trainer.backlog.next_batch()
            assert batch is not None
            assert self._half.batch(trainer.start, batch.first_seq, batch.frames, batch.records) == []
            if self._rng.random() < 0.1:
                trainer.log(5)
                trainer.spill()  # The daemon is too slow for it: then both have it.
                trainer.die()
                del self._trainers[writer]
        self._commit()

    def _commit(self) -> None:
        for answer in self._half.commit():
            trainer = self._trainers.get(answer.fields[0])
            if trainer is not None:
                trainer.acknowledge(answer.durable)

    def _spool(self) -> None:
        """A trainer meets no daemon, and ends."""
        trainer = self._trainer()
        for _ in range(self._rng.randrange(1, 4)):
            trainer.log(self._rng.randrange(1, 20))
            trainer.spill()
        trainer.die()

    def _adopt(self) -> None:
        self._adopter.scan()
        while self._adopter.step():
            if self._rng.random() < 0.8:
                self._commit()
        self._commit()

    def _roll(self) -> None:
        self._half.wal.roll()

    def _shipping(self) -> Iterator[None]:
        while True:
            self._shipper.convert_one()
            yield
            self._shipper.upload_some()
            yield

    def _ship_one(self) -> None:
        next(self._ship)


def _arm(point: str, pipe: int) -> None:
    name, _, nth = point.partition(":")
    failpoints = sys.modules["ranklog.failpoint"]
    os.environ["RANKLOG_FAILPOINT_LOG"] = f"/proc/self/fd/{pipe}"
    failpoints._armed[name] = (int(nth or 1), "sleep")


@contextmanager
def _told(pipe: Connection) -> Iterator[Callable[[str], None]]:
    def tell(line: str) -> None:
        os.write(pipe.fileno(), f"{line}\n".encode())

    logging.disable()
    try:
        yield tell
    except OSError as exc:
        tell(f"failed {exc!r}")
        signal.pause()
    except BaseException:
        tell(f"died {traceback.format_exc()!r}")
        raise


def drive(pipe: Connection, rooms: Rooms, order: Order) -> None:
    """Be such a node until the power is cut. The target of a process."""
    with _told(pipe) as tell:
        BLIND[order.blind]()
        if order.point:
            _arm(order.point, pipe.fileno())
        life = Life(rooms, order, tell)
        tell("ready")
        life.run()


def settle(pipe: Connection, rooms: Rooms, order: Order) -> None:
    """Be a node that brings in everything that is there, and ends. The target of a process."""
    with _told(pipe) as tell:
        Life(rooms, order, tell).settle()
