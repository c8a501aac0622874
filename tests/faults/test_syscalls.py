"""EIO, ENOSPC and SIGKILL at the N-th write, fsync, rename, unlink, … of ingest, adoption, shipper and trainer.

Matrix rows 18 (ENOSPC), 19 (EIO on fdatasync), 20 (EIO on read) and, by kills in the place of every call that changes
a file, 1–7, 11 and 13.

SQLite's way: make the N-th call fail, for N = 1, 2, … until a run is not hit any more. After each case the same
process starts again without a fault, a fresh record follows, everything is shipped, and the oracle judges the parquet.
Continuous integration takes the first call of each kind and one more; `-m full` takes all of them.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import oracle
from faults.strace import NEEDS_STRACE, Call, Fault, Outcome, Warm, attached, read_trace
from faults.syscall_loads import CLIENTS, RECORDS, left_behind, make_ledgers
from node import Node, wait_for
from oracle import May, Verdict, judge
from ranklog import control
from ranklog.wire import Wait
from segments import make_state, read_rows
from witness import Account, read_ledgers

pytestmark = NEEDS_STRACE

SYNCS = ("fdatasync", "fsync")
WRITES = ("pwrite64", "pwritev", "pwritev2", "write", "ftruncate", "fallocate")
READS = ("read", "pread64", "getdents64")
NAMES = ("openat", "rename", "unlink", "link", "linkat", "mkdir", "rmdir", "fchmod", "utimensat")
CHANGES = (*SYNCS, *WRITES, *NAMES)
CALLS = (*CHANGES, *READS)
LOADS = ("ingest", "adopt", "ship", "ship_cached", "train", "train_spool")
THREADS = {"train": 0, "train_spool": 1}
"""Main and sender thread: both together would meet the same fault twice."""
KILL = -9


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm("faults.syscall_loads") as interpreter:
        yield interpreter


Templates = Callable[[str], Path]


@pytest.fixture(scope="module")
def template(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Templates:
    """Return the directory from which each case of a load starts: what came before it, without a fault."""
    home = tmp_path_factory.mktemp("templates")

    def make(load: str) -> Path:
        root = home / load
        if not root.exists():
            make_state(root / "state")
            for room in ("journal", "spool", "ledgers"):
                (root / room).mkdir()
            if load in ("ingest", "ship", "ship_cached"):
                make_ledgers(root, *CLIENTS)
            before = {"adopt": ("train", "train_killed"), "ship": ("ingest",), "ship_cached": ("ingest",)}
            for earlier in before.get(load, ()):
                assert warm.run(earlier, root).code == 0
            if load == "adopt":
                torn = min((root / "spool").iterdir())
                torn.write_bytes(torn.read_bytes() + b"a frame that was not finished")
        return root

    return make


class Case:
    """One run of a load in a directory of its own."""

    def __init__(self, warm: Warm, template: Path, root: Path) -> None:
        self._warm = warm
        self.load = template.name
        self.root = root
        shutil.copytree(template, root)

    @property
    def rooms(self) -> list[Path]:
        """Where the files are of which the calls count."""
        return [self.root / room for room in ("state", "journal", "spool", "data")]

    def run(self, fault: Fault | None = None) -> Outcome:
        return self._warm.run(self.load, self.root, ",".join(CALLS), fault, thread=THREADS.get(self.load, -1))

    def settle(self, may: May = May.LOSE_NOTHING) -> Verdict:
        """Start again without a fault, ship everything, and let the oracle judge."""
        after = self._warm.run("recover", self.root)
        assert after.code == 0, f"I8 a restart does not recover: {after.said}"
        assert left_behind(self.root) == []
        state = self.root / "state"
        assert [path.suffix for path in (state / "wal").iterdir()] == [".open"], "I8 nothing waits, nothing was left"
        assert not list((state / "outbox").iterdir())
        verdict = judge(read_rows(self.root / "data"), read_ledgers(self.root / "ledgers"), may)
        assert verdict.delivered >= RECORDS, "the fresh ones at least"
        if may == May.LOSE_NOTHING:
            assert not verdict.lost_lsns
            assert not list((state / "quarantine").glob("*.wal*")), "no segment was harmed"
        return verdict


Cases = Callable[[str], Case]


@pytest.fixture
def case(warm: Warm, template: Templates, tmp_path: Path) -> Cases:
    number = iter(range(1 << 20))
    return lambda load: Case(warm, template(load), tmp_path / f"{load}-{next(number)}")


@pytest.fixture(scope="module")
def points(warm: Warm, template: Templates, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list]:
    """Return (call, n) of every call that a load makes at its files when nothing fails; found once for each load."""
    known: dict[str, list[tuple[str, int]]] = {}

    def find(load: str) -> list[tuple[str, int]]:
        if load not in known:
            rehearsal = Case(warm, template(load), tmp_path_factory.mktemp("rehearsal") / load)
            outcome = rehearsal.run()
            assert outcome.code == 0, outcome.said
            known[load] = outcome.points(*rehearsal.rooms)
            rehearsal.settle()
        return known[load]

    return find


def check(case: Case, fault: Fault) -> bool:
    """Run one case with a fault and everything that must hold after it; return whether the fault was met."""
    outcome = case.run(fault)
    where = f"{case.load} with {fault}: {outcome.said}"
    if not outcome.hits:
        assert outcome.code == 0, where
    elif fault.error == "KILL":
        assert outcome.code == KILL, where
    else:
        # 0: it went on; 1: it ended, and says why; 3: it had no room for as long as it asked.
        assert outcome.code in (0, 1, 3), where
        assert outcome.code == 0 or outcome.said, where
        check_no_second_sync(outcome.calls)
    check_trim_follows_sync(outcome.calls)
    # The one write that `log()` makes: what fails there is refused, and counted.
    refuses = case.load == "train" and fault.call == "pwrite64" and fault.error != "KILL"
    may = May.LOSE_COUNTED if refuses else May.LOSE_NOTHING
    case.settle(may)
    for account in read_ledgers(case.root / "ledgers").values():
        assert account.slowest_s < 5, f"log() waited for {account.slowest_s} s: {where}"
    shutil.rmtree(case.root)
    return bool(outcome.hits)


def check_no_second_sync(calls: list[Call]) -> None:
    """A file whose fsync failed once is never synced again: the kernel would say that all is well."""
    failed: set[str] = set()
    for call in calls:
        if call.name == "unlink":  # Another file may get its name.
            failed = {file for file in failed if call.text.split('"')[1] not in file}
        if call.name in SYNCS and ("/wal/" in call.text or "/spool/" in call.text):
            file = call.text.partition(">")[0]  # Descriptor and path.
            assert file not in failed, f"{file} was synced again after an error"
            if call.injected:
                failed.add(file)


def check_trim_follows_sync(calls: list[Call]) -> None:
    """A segment is removed only when the name under which its shards are committed is durable."""
    synced = False
    for call in calls:
        done = call.text.endswith(" = 0")
        if call.name == "rename" and "/outbox/" in call.text:
            synced = False
        elif call.name == "fsync" and "/outbox>" in call.text:
            synced = done
        elif call.name == "unlink" and "/wal/" in call.text and '.wal"' in call.text and done:
            assert synced, f"{call.text} before an fsync of the outbox"


ERRORS = {
    "KILL": CHANGES,
    "EIO": CALLS,
    "ENOSPC": (*SYNCS, *WRITES, "openat", "rename", "link", "mkdir"),
}
CACHED = ("rename", "unlink", "utimensat", "rmdir")
"""The calls in which a shipper with a cache differs from one without: mark and retention."""
KINDS = [(load, error) for load in LOADS for error in ERRORS]


@pytest.mark.parametrize(("load", "error"), KINDS)
def test_a_fault_at_any_call_costs_nothing(
    load: str, error: str, case: Cases, points: Callable[[str], list[tuple[str, int]]]
) -> None:
    """The first call of each kind, and one more."""
    found = points(load)
    wanted = CACHED if load == "ship_cached" else ERRORS[error]
    for call in sorted({call for call, _ in found if call in ERRORS[error] and call in wanted}):
        numbers = [nth for name, nth in found if name == call]
        chosen = {numbers[0], Random(f"{load} {error} {call}").choice(numbers)}
        met = [check(case(load), Fault(call, error, nth)) for nth in sorted(chosen)]
        assert any(met), f"{call} was not met"


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("load", "error"), KINDS)
def test_a_fault_at_every_call_costs_nothing(
    load: str, error: str, case: Cases, points: Callable[[str], list[tuple[str, int]]]
) -> None:
    """Every call, one after the other, and then the run that is not hit any more."""
    found = points(load)
    for call in sorted({call for call, _ in found if call in ERRORS[error]}):
        numbers = [nth for name, nth in found if name == call]
        missed = [nth for nth in numbers if not check(case(load), Fault(call, error, nth))]
        assert load in THREADS or not missed, f"{call} was not met at {missed}"
        assert not check(case(load), Fault(call, error, 10 * numbers[-1] + 100))


def test_a_full_disk_refuses_and_when_it_has_room_again_the_same_process_goes_on(case: Cases) -> None:
    """Row 18: the WAL's writes meet ENOSPC for as long as the process asks; what it holds comes in afterwards."""
    full = case("ingest")
    outcome = full.run(Fault("pwritev2", "ENOSPC", 1, for_ever=True))
    assert outcome.code == 3, f"refused, and asked again, as often as it took: {outcome.said}"
    assert len(outcome.hits) > 10
    assert {account.durable for account in read_ledgers(full.root / "ledgers").values()} == {0}, "no ack"
    full.settle()


def test_deletes_and_marks_work_where_nothing_can_be_written(case: Cases) -> None:
    """Row 18: a shipper that cannot write a byte waits, loses nothing, and goes on when there is room."""
    full = case("ship")
    outcome = full.run(Fault("pwrite64", "ENOSPC", 1, for_ever=True))
    assert (outcome.code, "ENOSPC" in str(outcome.hits)) == (3, True), outcome.said
    assert not list((full.root / "state" / "quarantine").iterdir()), "a full disk is no segment's fault"
    full.settle()


def test_an_fdatasync_that_fails_once_is_not_repeated_and_its_batch_comes_to_a_new_segment(case: Cases) -> None:
    """Row 19."""
    poisoned = case("ingest")
    path = poisoned.root / "state" / "wal" / "0000000000000001.open"
    outcome = poisoned.run(Fault("fdatasync", "EIO", 1, path=path))
    assert (outcome.code, len(outcome.hits)) == (0, 1), outcome.said
    assert "segment_poisoned first_lsn=1" in outcome.said
    check_no_second_sync(outcome.calls)
    poisoned.settle()


@pytest.mark.parametrize("nth", range(1, 9))
def test_an_fdatasync_that_fails_for_ever_ends_the_process_without_an_ack_and_a_restart_recovers(
    nth: int, case: Cases
) -> None:
    """Row 19."""
    dead = case("ingest")
    outcome = dead.run(Fault("fdatasync", "EIO", nth, for_ever=True))
    assert outcome.code == 1, outcome.said
    assert "Input/output error" in outcome.said
    check_no_second_sync(outcome.calls)
    dead.settle()


def test_a_spool_file_that_cannot_be_read_waits_and_its_neighbours_are_adopted(case: Cases) -> None:
    """Row 20, for adoption: every read of one file fails, until the disk is well again."""
    sick = case("adopt")
    spool = sorted((sick.root / "spool").iterdir())
    outcome = sick.run(Fault("pread64", "EIO", 1, for_ever=True, path=spool[0]))
    left = left_behind(sick.root)
    assert outcome.code == 3, outcome.said
    assert spool[0] in left
    assert {path.name[:32] for path in left} == {spool[0].name[:32]}, "what follows it waits for it; nobody else does"
    assert f"{spool[0]}" in outcome.said, "it is refused, in words"
    assert len(outcome.hits) <= 8, "looked at once in a scan, not in a loop"
    sick.settle()


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_a_read_that_fails_while_a_spool_is_adopted_is_repeated_by_a_later_scan(nth: int, case: Cases) -> None:
    """Row 20, for adoption: the same process adopts the file after all."""
    sick = case("adopt")
    outcome = sick.run(Fault("pread64", "EIO", nth))
    assert (outcome.code, len(outcome.hits)) == (0, 1), outcome.said
    sick.settle()


@pytest.mark.parametrize("room", ["journal", "spool"])
def test_a_directory_that_cannot_be_listed_for_a_while_costs_nothing(room: str, case: Cases) -> None:
    """What a writer left in the other one must not be taken as all there is."""
    sick = case("adopt")
    outcome = sick.run(Fault("getdents64", "EIO", 1, path=sick.root / room))
    assert (outcome.code, len(outcome.hits)) == (0, 1), outcome.said
    sick.settle()


@pytest.mark.parametrize("call", ["unlink", "rename", "write", "openat"])
def test_an_adopted_file_that_cannot_be_removed_now_is_removed_by_a_later_scan(
    call: str, case: Cases, points: Callable[[str], list[tuple[str, int]]]
) -> None:
    """Its records are safe; the file must not stay until a human restarts the daemon."""
    for nth in [nth for name, nth in points("adopt") if name == call]:
        stays = case("adopt")
        outcome = stays.run(Fault(call, "EIO", nth))
        assert outcome.code in (0, 1), f"{call} {nth}: {outcome.said}"
        stays.settle()


@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "fsync", "mkdir", "rename"])
def test_a_shipper_whose_disk_fails_for_ever_quarantines_no_sound_segment(call: str, case: Cases) -> None:
    """Row 20's other side: the disk's fault is not the segment's."""
    sick = case("ship")
    outcome = sick.run(Fault(call, "EIO", 1, for_ever=True))
    assert outcome.code in (1, 3), outcome.said
    assert not list((sick.root / "state" / "quarantine").iterdir())
    sick.settle()


def sealed(case: Case) -> list[Path]:
    """Return the sealed segments that wait."""
    return sorted((case.root / "state" / "wal").glob("*.wal"))


@pytest.mark.parametrize("nth", [1, 2, 3, 5])
def test_a_segment_that_cannot_be_read_for_a_while_is_converted_after_that(nth: int, case: Cases) -> None:
    """Row 20: by the same process, and nothing is lost."""
    sick = case("ship")
    outcome = sick.run(Fault("read", "EIO", nth, path=sealed(sick)[0]))
    assert outcome.code == 0, outcome.said
    assert len(outcome.hits) == (nth < 3), "twice is it read: its bytes, and the end of them"
    sick.settle()


def test_a_shard_that_cannot_be_read_for_a_while_is_uploaded_after_that(case: Cases) -> None:
    """Row 20, for the outbox: the segment is gone by then, so a shard must not be given up for one error."""
    reads = [call.nth for call in case("ship").run().calls if call.name == "read" and ".parquet" in call.text]
    for nth in {reads[0], reads[-1]}:
        sick = case("ship")
        outcome = sick.run(Fault("read", "EIO", nth))
        assert (outcome.code, len(outcome.hits)) == (0, 1), outcome.said
        sick.settle()


def test_a_segment_that_can_never_be_read_is_read_around_and_counted_while_the_others_flow(case: Cases) -> None:
    """Row 20: what the disk does not give back lies in gap rows, the original in quarantine/."""
    sick = case("ship")
    bad, good = sealed(sick)[:2]
    outcome = sick.run(Fault("read,pread64", "EIO", 1, for_ever=True, path=bad))
    assert outcome.code == 0, outcome.said
    assert len(outcome.hits) < 100, "some tries, not a loop"
    assert (sick.root / "state" / "quarantine" / bad.name).exists()
    assert not good.exists()
    verdict = sick.settle(May.LOSE_COUNTED)
    assert sum(verdict.missing.values()) > 10


# Whole nodes: real daemons and trainers, with strace attached for as long as the fault lasts.


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


class Trainer:
    """A witness that logs until it is told that it is enough."""

    def __init__(self, node: Node, name: str = "left") -> None:
        self._node, self._name = node, name
        command = oracle.witness(name, node, "--pause", "0.01", "--flush-every", "5")
        self.process = subprocess.Popen(command, env=node.env, cwd=node.path, stderr=subprocess.PIPE)

    @property
    def account(self) -> Account:
        return read_ledgers(oracle.ledgers_of(self._node)).get(self._name, Account(0, 0, 0.0, 0))

    def goes_on(self, *, durable: bool = False) -> None:
        """Wait until it has logged more than now; with `durable`, until some of that is acknowledged."""
        now = self.account.returned
        wait_for(lambda: (self.account.durable if durable else self.account.returned) > now + 10, "training goes on")

    def end(self) -> None:
        """Let it finish."""
        enough = self._node.path / "enough"
        enough.touch()
        _, said = self.process.communicate(timeout=60)
        enough.unlink()
        assert self.process.returncode == 0, said
        assert self.account.slowest_s < 5


def test_a_node_whose_disk_fails_one_fdatasync_goes_on_and_its_status_says_so(node: Node, tmp_path: Path) -> None:
    """Row 19."""
    daemon = node.start_daemon()
    trainer = Trainer(node)
    trainer.goes_on(durable=True)
    trace = tmp_path / "trace"
    with attached(daemon.pid, trace, "-e", "trace=fdatasync,fsync,unlink", *Fault("fdatasync", "EIO", 1).options):
        wait_for(lambda: node.status()["poisoned_segments"] == 1, "the status tells of the poisoned segment")
        trainer.goes_on(durable=True)
    check_no_second_sync(read_trace(trace))
    trainer.end()
    oracle.check(node)
    assert daemon.poll() is None, "and all of that in one process"


def test_a_node_whose_disk_fails_every_fdatasync_ends_its_daemon_in_words_and_a_restart_recovers(
    node: Node, tmp_path: Path
) -> None:
    """Row 19."""
    daemon = node.start_daemon()
    trainer = Trainer(node)
    trainer.goes_on(durable=True)
    fault = Fault("fdatasync", "EIO", 1, for_ever=True)
    with attached(daemon.pid, tmp_path / "trace", "-e", "trace=fdatasync", *fault.options):
        assert daemon.wait(60) == 1
    assert "Input/output error" in (node.path / "daemon.log").read_text().splitlines()[-1]
    trainer.goes_on()
    node.start_daemon()
    trainer.goes_on(durable=True)
    trainer.end()
    oracle.check(node)


def test_a_node_whose_disk_is_full_for_a_while_trains_on_and_drains_without_help(node: Node, tmp_path: Path) -> None:
    """Row 18."""
    daemon = node.start_daemon()
    trainer = Trainer(node)
    trainer.goes_on(durable=True)
    fault = Fault("pwritev2", "ENOSPC", 1, for_ever=True)
    with attached(daemon.pid, tmp_path / "trace", "-e", "trace=pwritev2", *fault.options):
        wait_for(lambda: node.status()["refused"].get("full", 0) > 1, "batches are refused")
        trainer.goes_on()
        taken = node.status()["watermarks"]["durable"]
    wait_for(lambda: node.status()["watermarks"]["durable"] > taken, "records are taken again")
    trainer.end()
    oracle.check(node)
    assert daemon.poll() is None


def test_a_node_with_a_segment_that_cannot_be_read_ships_the_others_and_does_not_loop(
    node: Node, tmp_path: Path
) -> None:
    """Row 20: for as long as the disk does not give it back, and without a loss once it does."""
    daemon = node.start_daemon(RANKLOG_RETRY_BASE_S="0.2", RANKLOG_RETRY_MAX_S="0.4")
    shipper = wait_for(lambda: node.status()["shipper"].get("pid"), "the shipper reports")
    os.kill(shipper, signal.SIGSTOP)
    for name in ("left", "right"):
        assert node.run(oracle.witness(name, node, "--count", "20", "--flush-every", "20")).returncode == 0
        assert control.flush(node.settings, Wait.SEALED, 30).done
    bad = min((node.state / "wal").glob("*.wal"))
    trace = tmp_path / "trace"
    fault = Fault("read", "EIO", 1, for_ever=True, path=bad)
    with attached(shipper, trace, "-e", "trace=read", *fault.options):
        os.kill(shipper, signal.SIGCONT)
        wait_for(lambda: list(node.data.rglob("*.parquet")), "the other segment is shipped")
        wait_for(lambda: sum(call.injected for call in read_trace(trace)) >= 3, "the bad one is tried again")
        assert "Input/output error" in node.status()["shipper"]["last_error"]
        assert bad.exists()
    assert sum(call.injected for call in read_trace(trace)) < 50, "with pauses"
    oracle.check(node)
    assert daemon.poll() is None
    assert not list((node.state / "quarantine").iterdir())
