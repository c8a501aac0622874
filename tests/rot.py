"""A daemon's state directory in this process, its bytes at a test's mercy: from damaged files to judged parquet.

    yard = Yard(path)
    yard.log("a", 3)                 trainer `a` logs three records of `witness`, acknowledged
    …                                a test damages what is on disk while the daemon is `down`
    yard.up()                        recovery and sealing, as a daemon's start does them
    yard.finish(May.LOSE_COUNTED)    every trainer logs once more; seal, convert, upload; the oracle judges

Ingest, WAL, recovery, adoption, conversion and upload are the real ones; only the loop and the processes around them
are missing. A trainer that comes back says HELLO with the first record that was never acknowledged, as a client does.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgpack
import pyarrow.parquet as pq

from ingesting import Half
from oracle import May, Verdict, judge
from ranklog.frame import Kind, encode_frame
from ranklog.framefile import FileName, format_name
from ranklog.start import Start, encode_start
from ranklog.values import normalise
from ranklogd.adopt import Adopter
from ranklogd.config import Config, load_config
from ranklogd.ship.counters import ShipperReport
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from segments import T0_NS, make_state, start_of
from witness import Account, record

NOW_NS = T0_NS


def memory_dir(name: str) -> Path:
    """Return a fresh directory in memory where there is one: a sweep makes thousands of files and syncs each."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix=f"rot-{name}-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


class Trainer:
    """What one trainer logged so far, and as whom."""

    def __init__(self, name: str, start: Start) -> None:
        self.name = name
        self.start = start
        self.returned = 0
        self.next_seq = 0

    def frames(self, count: int) -> tuple[int, bytes, int]:
        """Log `count` records: (first seq, their frames, how many seqs); the start frame is the first of all."""
        first, data = self.next_seq, b""
        if first == 0:
            data = encode_start(self.start)
            self.next_seq = 1
        for _ in range(count):
            payload = normalise(record(self.name, self.returned), warn=lambda key, text: None)
            data += encode_frame(msgpack.packb([int(Kind.METRICS), self.next_seq, NOW_NS, None, payload]))
            self.next_seq += 1
            self.returned += 1
        return first, data, self.next_seq - first


class Yard:
    """One state directory with its store, journal and spool beside it."""

    def __init__(self, root: Path, trainers: tuple[str, ...] = ("a", "b")) -> None:
        self.root = root
        self.state: StateDir = make_state(root / "state")
        self.store, self.journal, self.spool = root / "store", root / "journal", root / "spool"
        self.journal.mkdir()
        self.spool.mkdir()
        self.trainers = {
            name: Trainer(name, start_of(number, project="faults", run="job", rank=number))
            for number, name in enumerate(trainers)
        }
        self.half = Half(self.state)

    @property
    def config(self) -> Config:
        """The shipper's configuration."""
        flags = {
            "to": self.store, "state_dir": self.state.root, "runtime_dir": self.root, "journal_dir": self.journal,
            "spool_dir": self.spool,
        }  # fmt: skip
        return load_config({name: str(value) for name, value in flags.items()}, env={"HOME": str(self.root)})

    def log(self, name: str, count: int) -> None:
        """Log `count` records as one batch, and have them acknowledged."""
        trainer = self.trainers[name]
        if not self.greeted(trainer):
            self.half.hello(trainer.start, base=trainer.next_seq)
        first, data, seqs = trainer.frames(count)
        assert self.half.batch(trainer.start, first, data, seqs) == []
        assert [answer.durable for answer in self.half.commit()] == [first + seqs - 1]

    def greeted(self, trainer: Trainer) -> bool:
        """Return whether this daemon has heard of that trainer since its start."""
        state = self.half.writers.get(bytes.fromhex(trainer.start.writer))
        return state is not None and state.start is not None

    def leave(self, name: str, kind: str, number: int, count: int, *, room: int = 0) -> Path:
        """Log `count` records that nobody acknowledged: in a journal or spool file, left by a dead trainer."""
        trainer = self.trainers[name]
        first, data, _ = trainer.frames(count)
        if first:
            data = encode_start(trainer.start) + data
        path = (self.journal if kind == "journal" else self.spool) / format_name(
            FileName(trainer.start.writer, number, kind)
        )
        path.write_bytes(data + bytes(max(0, room - len(data))))
        return path

    def down(self) -> None:
        """The daemon is killed."""
        self.half.wal.close()

    def up(self) -> None:
        """A daemon starts over what is on disk."""
        self.half.recovered = self.half.open()

    def adopt(self) -> Adopter:
        """Adopt until nothing is left to do; return the adopter, which knows what it refused."""
        adopter = Adopter(self.half.ingest, lambda: [self.journal, self.spool], self.state.quarantine)
        adopter.scan()
        for _ in range(10_000):
            if not adopter.step():
                break
            self.half.commit()
        self.half.commit()
        assert not adopter.busy
        return adopter

    def ship(self) -> ShipperReport:
        """Seal what is open, convert and upload; the shipper's report."""
        self.half.wal.roll()
        shipper = Shipper(self.config)
        try:
            return shipper.step()
        finally:
            for waker in (shipper._main, shipper._upload):
                os.close(waker._fd)  # A process of its own never needs to; a sweep would run out of descriptors.

    def rows(self) -> list[dict[str, object]]:
        """Return the rows of every shard in the store."""
        return [row for path in sorted(self.store.rglob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]

    def accounts(self) -> dict[str, Account]:
        """Return what every trainer logged."""
        return {name: Account(t.returned, t.returned, 0.0, 0) for name, t in self.trainers.items()}

    def judged(self, may: May) -> Verdict:
        """Judge what is in the store."""
        return judge(self.rows(), self.accounts(), may)

    def finish(self, may: May, *, again: bool = True) -> tuple[Verdict, ShipperReport]:
        """Every trainer comes back and logs once more; ship and judge."""
        if again:
            for name in self.trainers:
                self.log(name, 1)
        report = self.ship()
        assert not report.last_error, report
        assert (report.backlog_segments, report.backlog_shards) == (0, 0), report
        return self.judged(may), report

    def evidence(self) -> list[bytes]:
        """Return the originals in quarantine."""
        return [path.read_bytes() for path in self.state.quarantine.iterdir() if not path.name.endswith(".reason")]

    def close(self) -> None:
        """Take everything away."""
        self.half.wal.close()
        shutil.rmtree(self.root)


class Template:
    """A state directory as it was at one moment, to be unfolded again for every case of a sweep."""

    def __init__(self, make: Callable[[Yard], Path], **options: object) -> None:
        """`make` fills a yard and returns the file that the sweep will damage; the daemon is down afterwards."""
        self.room = memory_dir("sweep")
        self._yard = Yard(self.room / "template", **options)  # type: ignore[arg-type]
        self._path = make(self._yard)
        self._yard.down()
        self.victim = self._path.relative_to(self._yard.root)
        self.data = self._path.read_bytes()
        self._files = {
            path.relative_to(self._yard.root): path.read_bytes()
            for path in self._yard.root.rglob("*")
            if path.is_file()
        }
        self._number = 0

    def unfold(self, data: bytes | None) -> Yard:
        """Return a yard with the victim replaced by `data`, or removed; its daemon is down."""
        self._number += 1
        yard = Yard.__new__(Yard)
        yard.root = self.room / str(self._number)
        yard.state = make_state(yard.root / "state")
        yard.store, yard.journal, yard.spool = yard.root / "store", yard.root / "journal", yard.root / "spool"
        yard.journal.mkdir()
        yard.spool.mkdir()
        yard.half = Half.__new__(Half)
        yard.half.state, yard.half.full, yard.half._writers_max, yard.half._quota = yard.state, "", 1000, 0
        yard.trainers = {}
        for name, trainer in self._yard.trainers.items():
            copy = Trainer(name, trainer.start)
            copy.returned, copy.next_seq = trainer.returned, trainer.next_seq
            yard.trainers[name] = copy
        for relative, content in self._files.items():
            if relative != self.victim:
                (yard.root / relative).parent.mkdir(parents=True, exist_ok=True)
                (yard.root / relative).write_bytes(content)
        if data is not None:
            (yard.root / self.victim).write_bytes(data)
        return yard

    def close(self) -> None:
        """Take everything away."""
        shutil.rmtree(self.room)
