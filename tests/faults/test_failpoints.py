"""Matrix rows 1-11, 13, 14 and 16: every named point of client, ingest and shipper, met by real processes.

    kill             once, three times in a row, and together with the process at the other end
    err              the call at that point fails: the process goes on, or ends in words
    sleep            another actor overtakes

A case brings armed processes to their point under a load of `witness` trainers that outlive the daemon; a line in
RANKLOG_FAILPOINT_LOG proves that the point was reached. Then sound processes take over and the oracle judges all of it.
LOADS says for each point what reaches it; -m full runs every combination.
"""

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import oracle
from node import ROOT, Node, wait_for
from oracle import May
from ranklog.failpoint import FAILPOINTS
from ranklogd.wal import segment
from witness import read_ledgers

FAST = {
    "RANKLOG_SEAL_AGE_S": "0.1", "RANKLOG_RESCAN_INTERVAL_S": "0.3", "RANKLOG_RETRY_BASE_S": "0.05",
    "RANKLOG_RETRY_MAX_S": "0.2", "RANKLOG_STOP_DEADLINE_S": "6",
}  # fmt: skip
OPEN = {"RANKLOG_SEAL_AGE_S": "3600"}
SMALL_JOURNAL = {"RANKLOG_JOURNAL_FILE_SIZE_BYTES": "16K"}
TINY_ROOM = {"RANKLOG_JOURNAL_SIZE_BYTES": "48K", "RANKLOG_SPOOL_SIZE_BYTES": "32K"}


class Case:
    """One node that meets one point. Scenes bring armed processes there; `settle` brings everything to rest."""

    def __init__(self, node: Node, point: str, action: str) -> None:
        self.node, self.point, self.action = node, point, action
        self.load = LOADS[point]
        self.round = 0
        self.daemon: subprocess.Popen[bytes] | None = None
        self.trainer: subprocess.Popen[bytes] | None = None
        """The one that logs through every round."""
        self.planted: dict[Path, Path] = {}
        """Shard in the outbox -> what stands in its place in the store."""

    @property
    def arms(self) -> dict[str, str]:
        """The environment of the process that is to meet the point."""
        nth = self.load.nths[self.round % len(self.load.nths)]
        spec = f"{self.point}:{nth}={self.action}" + (f",{self.load.also}" if self.load.also else "")
        return {"RANKLOG_FAILPOINT": spec, "RANKLOG_FAILPOINT_LOG": str(self.node.path / "reached")}

    def hits(self) -> list[int]:
        """Return the pids of the processes that met the point."""
        log = self.node.path / "reached"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(line.split()[2]) for line in lines if line.startswith(f"{self.point} {self.action} ")]

    def start(self, **env: str) -> "subprocess.Popen[bytes]":
        """Start a daemon that may die before it answers."""
        self.stop()
        log = (self.node.path / "daemon.log").open("ab")
        command = [sys.executable, "-m", "ranklogd"]
        environment = self.node.env | FAST | env
        self.daemon = subprocess.Popen(command, env=environment, cwd=self.node.path, stdout=log, stderr=log)
        log.close()
        self.node.daemons.append(self.daemon)
        return self.daemon

    def sound(self, **env: str) -> None:
        """Have a daemon that answers and meets nothing."""
        daemon = self.start(**env)
        wait_for(lambda: self.node.ping() == daemon.pid or daemon.poll() is not None, "a sound daemon answers")
        assert daemon.poll() is None, self.told()

    def stop(self) -> None:
        """Kill the daemon, if it is still there; its shipper dies with it."""
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(20)
            self.daemon = None

    def told(self) -> str:
        """Return what the daemons of this node wrote."""
        return (self.node.path / "daemon.log").read_text()

    def train(self, count: int, *flags: str, **env: str) -> int:
        """Run a trainer to its end; return its exit code. It tells no more than words."""
        name = f"trainer{self.round}-{len(read_ledgers(oracle.ledgers_of(self.node)))}"
        command = oracle.witness(name, self.node, "--count", str(count), "--flush-every", "40", *flags)  # Flags win.
        done = self.node.run(command, **env)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    def keep_training(self) -> None:
        """Have a trainer that logs until `settle`, whatever happens to the daemon."""
        if self.trainer is None:
            command = oracle.witness("lasting", self.node, "--pause", "0.002", "--flush-every", "40")
            with (self.node.path / "trainer.log").open("ab") as log:
                self.trainer = subprocess.Popen(command, env=self.node.env, cwd=self.node.path, stdout=log, stderr=log)

    def wait_for_hit(self) -> None:
        """Wait until this round's process met the point; the ones before have met it, too."""
        wait_for(lambda: len(self.hits()) > self.round, f"{self.point} is reached; {self.node.path}")
        self.round += 1

    def settle(self, may: May) -> oracle.Verdict:
        """Let the last trainer finish, with a sound daemon or the one that goes on, and judge."""
        if self.daemon is None or self.daemon.poll() is not None:
            self.sound()
        wait_for(self.node.ping, "the daemon answers")
        if self.trainer is not None and self.trainer.poll() is None:
            (self.node.path / "enough").touch()
            assert self.trainer.wait(60) == 0, (self.node.path / "trainer.log").read_text()
            (self.node.path / "enough").unlink()
        wait_for(lambda: not self.node.status()["full"], "what met the error is tried again")
        return oracle.check(self.node, may)


# Scenes: each brings a process of its own to the point.


def a_trainer_logs(case: Case) -> None:
    """An armed trainer logs, flushes and finishes beside a daemon."""
    if case.daemon is None or case.daemon.poll() is not None:
        case.sound()
    code = case.train(240, **SMALL_JOURNAL, **case.arms)
    assert code == (-signal.SIGKILL if case.action == "kill" else 0)


def a_trainer_logs_without_a_daemon(case: Case) -> None:
    code = case.train(120, **SMALL_JOURNAL, **case.arms)
    assert code == (-signal.SIGKILL if case.action == "kill" else 0)


def a_trainer_has_no_room(case: Case) -> None:
    code = case.train(1500, "--flush-every", "0", **SMALL_JOURNAL, **TINY_ROOM, **case.arms)
    assert code == (-signal.SIGKILL if case.action == "kill" else 0)


def a_daemon_serves(case: Case) -> None:
    """An armed daemon takes a trainer's records, seals and ships."""
    case.start(**case.arms)
    case.keep_training()


def a_daemon_finds_an_open_segment(case: Case) -> None:
    case.keep_training()
    case.sound(**OPEN)
    before = case.node.status()["watermarks"]["durable"]
    wait_for(lambda: case.node.status()["watermarks"]["durable"] > before, "something is in the open segment")
    case.start(**case.arms)


def a_daemon_finds_an_empty_segment(case: Case) -> None:
    """One that a roll has created, and a power cut has emptied."""
    case.sound(**OPEN)
    assert case.train(40) == 0
    received = case.node.status()["watermarks"]["received"]
    case.stop()
    (case.node.state / "wal" / f"{received + 1:016x}.open").touch()
    case.start(**case.arms)
    case.keep_training()


def a_daemon_adopts(case: Case) -> None:
    """A trainer has died without a daemon, and left a spool and a journal."""
    case.stop()
    assert case.train(100, "--no-finish") == 0
    assert {path.suffix for path in case.node.leftovers()} == {".spool", ".journal"}
    case.start(**case.arms)


def a_daemon_adopts_a_damaged_spool(case: Case) -> None:
    case.stop()
    assert case.train(100, "--no-finish") == 0
    for spool in case.node.spool.glob("*.spool"):
        with spool.open("ab") as file:
            file.write(b"no frame at all")
    case.start(**case.arms)


def a_daemon_is_told_to_stop(case: Case) -> None:
    daemon = case.start(**case.arms)
    wait_for(lambda: case.node.ping() == daemon.pid, "it answers")
    assert case.train(80, "--no-finish") == 0
    daemon.terminate()


def a_shipper_meets_damage(case: Case) -> None:
    """The disk has lost some bytes in the middle of a segment."""
    case.sound(**OPEN)
    assert case.train(200, "--no-finish") == 0
    case.stop()
    [damaged] = [path for path in (case.node.state / "wal").glob("*.open") if path.stat().st_size > 4096]
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        file.write(bytes(16))
    case.start(**case.arms)


def a_shipper_meets_a_foreign_object(case: Case) -> None:
    """Other bytes stand under a shard's name in the store, which is never overwritten."""
    case.start(RANKLOG_FAILPOINT="upload.before=kill")
    assert case.train(80) == 0
    outbox = case.node.state / "outbox"
    wait_for(lambda: list(outbox.glob("*-*[!p]/**/*.parquet")), "a shard waits")
    case.stop()
    for shard in outbox.glob("*-*[!p]/**/*.parquet"):
        taken = case.node.data / Path(*shard.relative_to(outbox).parts[1:])
        taken.parent.mkdir(parents=True, exist_ok=True)
        taken.write_bytes(b"somebody else's")
        case.planted[shard] = taken
    case.start(**case.arms)


def a_cache_expires(case: Case) -> None:
    """Left from a time when the store was no directory."""
    for name in ("a", "b", "c"):
        shard = case.node.state / "cache" / "v1" / "run" / f"{name}{case.round}.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        shard.write_bytes(b"uploaded and verified")
    case.start(**case.arms)
    case.keep_training()


class Load(NamedTuple):
    """What reaches a point, and what becomes of an error there."""

    scene: Callable[[Case], None]
    nths: tuple[int, ...] = (1,)
    """Which pass of the point, by round."""
    also: str = ""
    """Armed besides."""
    ends: bool = False
    """An error here ends the daemon: in words, with exit code 1. Else it goes on."""
    may: May = May.LOSE_NOTHING
    err_may: May = May.LOSE_NOTHING


_TRAINER = Load(a_trainer_logs)
_ALONE = Load(a_trainer_logs_without_a_daemon)
_SERVES = Load(a_daemon_serves)
_SERVES_OR_ENDS = Load(a_daemon_serves, ends=True)
_OPEN_OR_ENDS = Load(a_daemon_finds_an_open_segment, ends=True)
_POISONED = Load(a_daemon_serves, also="wal.sync.before:2=err", ends=True)
_ADOPTS = Load(a_daemon_adopts)
_DAMAGE = Load(a_shipper_meets_damage, may=May.LOSE_COUNTED, err_may=May.LOSE_COUNTED)

LOADS = {
    # client
    "journal.write.before": Load(a_trainer_logs, nths=(100,), err_may=May.LOSE_COUNTED),
    "journal.write.after": Load(a_trainer_logs, nths=(100,), err_may=May.LOSE_COUNTED),
    "journal.rotate.mid": Load(a_trainer_logs, err_may=May.LOSE_COUNTED),
    "journal.create.after": Load(a_trainer_logs, nths=(2, 1, 3)),
    "journal.gap.after": Load(a_trainer_has_no_room, nths=(1, 20), may=May.LOSE_COUNTED, err_may=May.LOSE_COUNTED),
    "journal.recycle.after": _TRAINER,
    "spool.create.after": _ALONE,
    "spool.write.after": Load(a_trainer_logs_without_a_daemon, nths=(2, 1)),
    "spool.sync.after": Load(a_trainer_logs_without_a_daemon, nths=(2, 1)),
    "finish.end.after": _TRAINER,
    "finish.remove.mid": _TRAINER,
    # ingest
    "recv.after": _SERVES,
    "wal.append.before": _SERVES_OR_ENDS,
    "wal.append.after": _SERVES_OR_ENDS,
    "wal.sync.before": _SERVES,
    "wal.sync.after": _SERVES_OR_ENDS,
    "ack.before": _SERVES_OR_ENDS,
    "ack.after": _SERVES_OR_ENDS,
    "seg.sync.after": _SERVES_OR_ENDS,
    "seg.create.after": Load(a_daemon_serves, nths=(2, 1)),
    "seg.header.after": Load(a_daemon_serves, nths=(2, 1), ends=True),
    "seg.seal.after": _SERVES_OR_ENDS,
    "seg.dirsync.after": _SERVES_OR_ENDS,
    "poison.truncate.after": _POISONED,
    "poison.rewrite.after": _POISONED,
    "recover.cut.after": _OPEN_OR_ENDS,
    "recover.seal.mid": _OPEN_OR_ENDS,
    "recover.quarantine.mid": Load(a_daemon_finds_an_empty_segment, ends=True),
    "reserve.unlink.after": _SERVES_OR_ENDS,
    "reserve.create.mid": _SERVES,
    "adopt.copy.after": _ADOPTS,
    "adopt.sync.after": _ADOPTS,
    "adopt.quarantine.mid": Load(a_daemon_adopts_a_damaged_spool),
    "adopt.unlink.mid": _ADOPTS,
    "adopt.unlink.after": _ADOPTS,
    "shutdown.seal.after": Load(a_daemon_is_told_to_stop, ends=True),
    # shipper
    "tries.create.after": _SERVES,
    "shard.write.mid": _SERVES,
    "shard.sync.after": _SERVES,
    "evidence.publish.after": _DAMAGE,
    "outbox.rename.after": _SERVES,
    "outbox.dirsync.after": _SERVES,
    "evidence.move.after": _DAMAGE,
    "trim.unlink.after": _SERVES,
    "trim.dirsync.after": _SERVES,
    "upload.before": _SERVES,
    "store.put.mid": _SERVES,
    "store.sync.after": _SERVES,
    "store.publish.after": _SERVES,
    "upload.sent.before_reply": _SERVES,
    "upload.verified.before_mark": _SERVES,
    "mark.rename.after": _SERVES,
    "mark.sync.after": _SERVES,
    "aside.reason.after": Load(a_shipper_meets_a_foreign_object),
    "retain.delete.mid": Load(a_cache_expires, nths=(2,)),
}
CLIENT = {point for point in FAILPOINTS if point.startswith(("journal.", "spool.", "finish."))}
SHIPPER = {
    point
    for point in FAILPOINTS
    if point.startswith(
        ("tries.", "shard.", "evidence.", "outbox.", "trim.", "upload.", "store.", "mark.", "aside.", "retain.")
    )
}
INGEST = FAILPOINTS - CLIENT - SHIPPER


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


@pytest.fixture
def case_of(node: Node) -> Iterator[Callable[[str, str], Case]]:
    cases = []

    def make(point: str, action: str) -> Case:
        cases.append(Case(node, point, action))
        return cases[-1]

    yield make
    for case in cases:
        if case.trainer is not None:
            case.trainer.kill()
            case.trainer.wait()


CaseOf = Callable[[str, str], Case]


def sampled(points: set[str] | frozenset[str], *sample: str) -> list[object]:
    """All of `points`, those outside the sample only with -m full."""
    assert set(sample) <= points
    return [pytest.param(point, marks=() if point in sample else pytest.mark.full) for point in sorted(points)]


def dies(case: Case) -> None:
    """One round: the process that met the point is dead, and nobody else of the daemon lives on."""
    case.load.scene(case)
    case.wait_for_hit()
    if case.point in INGEST:
        assert case.daemon is not None
        assert case.daemon.wait(20) == -signal.SIGKILL
        assert case.hits()[-1] == case.daemon.pid


def cure(case: Case) -> None:
    """Do what a person does about dead letters: take away what stands in their place, and put them back."""
    if not case.planted:
        return
    case.stop()
    letters = case.node.state / "deadletter"
    for shard, taken in case.planted.items():
        taken.unlink()
        letter = letters / taken.relative_to(case.node.data)
        assert letter.exists() != shard.exists(), "it is in one place"
        if letter.exists():
            assert "holds other bytes" in letter.with_name(f"{letter.name}.reason").read_text()
            shard.parent.mkdir(parents=True, exist_ok=True)
            letter.rename(shard)
    case.planted = {}


def test_every_failpoint_has_its_load() -> None:
    assert set(LOADS) == FAILPOINTS


def test_every_failpoint_is_called_at_exactly_one_place() -> None:
    source = "\n".join(path.read_text() for folder in ("client", "daemon") for path in (ROOT / folder).rglob("*.py"))
    assert Counter(re.findall(r'\bfailpoint\(\s*"([^"]+)"\s*\)', source)) == Counter(FAILPOINTS)


@pytest.mark.parametrize("point", sorted(FAILPOINTS))
def test_a_kill_at_any_point_loses_and_doubles_nothing(case_of: CaseOf, point: str) -> None:
    case = case_of(point, "kill")
    dies(case)
    case.stop()
    cure(case)
    verdict = case.settle(case.load.may)
    assert verdict.delivered, "something was really there to lose"
    if point == "retain.delete.mid":
        wait_for(lambda: not list((case.node.state / "cache").rglob("*.parquet")), "retention is done")


@pytest.mark.parametrize(
    "point",
    sampled(
        FAILPOINTS, "journal.create.after", "wal.sync.before", "seg.header.after", "recover.seal.mid",
        "adopt.unlink.mid", "store.publish.after",
    ),
)  # fmt: skip
def test_three_kills_in_a_row_at_one_point_lose_and_double_nothing(case_of: CaseOf, point: str) -> None:
    case = case_of(point, "kill")
    for _ in range(3):
        dies(case)
        if point not in CLIENT:
            case.stop()
        cure(case)
    assert len(set(case.hits())) >= 3, "three processes"
    assert case.settle(case.load.may).delivered


@pytest.mark.parametrize("point", sampled(FAILPOINTS, "journal.recycle.after", "ack.before", "outbox.rename.after"))
def test_trainer_and_daemon_killed_together_at_any_point_lose_and_double_nothing(case_of: CaseOf, point: str) -> None:
    case = case_of(point, "kill")
    dies(case)
    if case.trainer is not None:
        case.trainer.kill()
        case.trainer.wait()
    case.stop()
    cure(case)
    assert case.settle(case.load.may).delivered


@pytest.mark.parametrize(
    "point",
    sampled(
        FAILPOINTS, "journal.write.before", "journal.rotate.mid", "spool.sync.after", "wal.append.after",
        "wal.sync.before", "seg.create.after", "poison.rewrite.after", "recover.seal.mid", "adopt.unlink.mid",
        "outbox.rename.after", "store.publish.after", "aside.reason.after",
    ),
)  # fmt: skip
def test_an_error_at_any_point_is_survived_or_ends_the_process_in_words(case_of: CaseOf, point: str) -> None:
    case = case_of(point, "err")
    case.load.scene(case)
    case.wait_for_hit()
    assert case.daemon is not None or point in CLIENT
    if case.load.ends:
        assert case.daemon is not None
        assert case.daemon.wait(20) == 1
    elif case.planted:
        letters = case.node.state / "deadletter"
        wait_for(lambda: len(list(letters.rglob("*.parquet"))) == len(case.planted), "they are set aside all the same")
    elif case.daemon is not None:
        wait_for(lambda: case.daemon is not None and case.node.ping() == case.daemon.pid, "it goes on")
        if point == "wal.sync.before":
            assert case.node.status()["poisoned_segments"] == 1
        if point == "adopt.quarantine.mid":
            case.stop()  # A file that could not be moved once stays until the next start.
    cure(case)
    case.settle(case.load.err_may)
    if point in INGEST:
        assert ("Traceback" in case.told()) == (point in {"recv.after", "adopt.sync.after", "adopt.unlink.after"})


@pytest.mark.parametrize(
    "point",
    sampled(
        FAILPOINTS, "spool.write.after", "ack.before", "seg.header.after", "adopt.unlink.mid", "outbox.rename.after",
    ),
)  # fmt: skip
def test_a_delay_at_any_point_holds_up_but_loses_and_doubles_nothing(case_of: CaseOf, point: str) -> None:
    case = case_of(point, "sleep")
    case.load.scene(case)
    case.wait_for_hit()
    if point in {"shutdown.seal.after"}:
        assert case.daemon is not None
        assert case.daemon.wait(30) == 0
    if case.planted:
        letters = case.node.state / "deadletter"
        wait_for(lambda: len(list(letters.rglob("*.parquet"))) == len(case.planted), "they are set aside")
    cure(case)
    case.settle(case.load.may)


def test_a_crash_between_the_two_opens_of_a_poisoned_segment_takes_no_doubtful_record_for_durable(
    case_of: CaseOf, node: Node
) -> None:
    """The fdatasync fails, the new segment is born, and then: nothing of the old one beyond its last sync counts."""
    case = case_of("seg.header.after", "kill")
    case.load = Load(a_daemon_serves, nths=(2,), also="wal.sync.before:3=err")
    daemon = case.start(**OPEN, **case.arms)
    case.keep_training()
    case.wait_for_hit()
    assert daemon.wait(20) == -signal.SIGKILL
    opens = sorted((node.state / "wal").glob("*.open"))
    assert len(opens) == 2
    younger = segment.parse_open(opens[1].name)
    assert younger is not None
    buffer = memoryview(opens[0].read_bytes())
    header, offset = segment.decode_header(buffer)
    entries = segment.scan(buffer, header.salt, offset, header.first_lsn)
    assert all(entry.lsn < younger for entry in entries if isinstance(entry, segment.Entry))
    case.settle(May.LOSE_NOTHING)


KEEPER = """
import sys
from pathlib import Path
from ranklog.stores import base
from ranklog.stores.dir import DirStore
from ranklogd.config import Config
from ranklogd.ship.shipper import Shipper
base._MODULES["far"] = "no.module"
state, store, age_s = sys.argv[1:]
config = Config(state_dir=Path(state), to="far://away", cache_age_s=float(age_s))
Shipper(config, store=DirStore(Path(store))).step()
"""
"""A shipper that keeps a cache, which only stores that are no directories have, over a store that is one."""


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("point", ["mark.rename.after", "mark.sync.after", "retain.delete.mid"])
def test_a_kill_between_mark_and_cache_or_in_retention_deletes_nothing_that_is_not_in_the_store(
    case_of: CaseOf, node: Node, point: str, times: int
) -> None:
    case = case_of(point, "kill")
    case.sound(**OPEN)
    for run in ("a", "b", "c"):
        assert case.train(40, "--run", run) == 0
    case.start(RANKLOG_FAILPOINT="tries.create.after=kill")
    wait_for(lambda: list((node.state / "wal").glob("*.tries")), "the segment is sealed, and not converted")
    case.stop()
    age_s = "0" if point.startswith("retain") else "3600"
    cache = node.state / "cache"
    for _ in range(times):
        killed = node.python(KEEPER, str(node.state), str(node.data), age_s, **case.arms)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for shard in cache.rglob("*.parquet"):
            assert shard.read_bytes() == (node.data / shard.relative_to(cache)).read_bytes()
    sound = node.python(KEEPER, str(node.state), str(node.data), age_s)
    assert sound.returncode == 0, sound.stderr
    assert len(list(cache.rglob("*.parquet"))) == (0 if point.startswith("retain") else 3)
    case.settle(May.LOSE_NOTHING)
