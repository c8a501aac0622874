"""The life of a trainer's process, with a daemon beside it: kills, forks, threads, signals and every way to the exit."""

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from harness import Record, Rig, gaps, logged, wait_for

from ranklog.frame import Kind

FLAT_OUT = "pass"
PACED = "time.sleep(0.0002)"


@pytest.fixture
def rig(tmp_path: Path):
    with Rig(tmp_path) as rig:
        yield rig


def counting(pace: str = FLAT_OUT) -> str:
    """A trainer that counts for ever, and notes down each count for which log() has returned."""
    return f"""
import os, sys, time, ranklog
proof = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
ranklog.init(project="p")
i = 0
while True:
    ranklog.log({{"i": i, "loss": i / 3}})
    os.write(proof, b"%d\\n" % i)
    i += 1
    {pace}
"""


def proven(proof: Path) -> int:
    """How many calls of log() are known to have returned."""
    lines = proof.read_bytes().split(b"\n") if proof.exists() else []
    return len(lines) - 1 if lines else 0


def kill_somewhere(client: "subprocess.Popen[str]", proof: Path) -> None:
    """Kill the trainer at a moment nobody can foresee."""
    some = proven(proof) + random.randrange(1, 2000)
    wait_for(lambda: proven(proof) >= some, "the trainer logs")
    client.kill()
    client.wait()


def of_process(rig: Rig, client: "subprocess.Popen[str]") -> list[Record]:
    """The records of the one writer in that process."""
    [writer] = [writer for writer, start in rig.starts().items() if start.pid == client.pid]
    return rig.written()[writer]


def pieces(rig: Rig) -> dict[str, list[Record]]:
    """Every writer's records by the role that the scripts below put into them."""
    starts = rig.starts()
    return {starts[writer].role: records for writer, records in rig.written().items()}


def ends(records: list[Record]) -> list[Record]:
    return [record for record in records if record.kind == Kind.END]


# Killed.


@pytest.mark.parametrize("pace", [FLAT_OUT, PACED], ids=["flat out", "paced"])
def test_kill_9_at_any_moment_loses_nothing_for_which_log_had_returned(rig: Rig, tmp_path: Path, pace: str):
    rig.start_daemon()
    for turn in range(3):
        clients = [rig.spawn(counting(pace), tmp_path / f"{turn}.{number}") for number in range(2)]
        for number, client in enumerate(clients):
            kill_somewhere(client, tmp_path / f"{turn}.{number}")
        rig.adopted()
        for number, client in enumerate(clients):
            counts = logged(of_process(rig, client), "i")
            assert counts == list(range(len(counts))), "in order, once"
            assert proven(tmp_path / f"{turn}.{number}") <= len(counts) <= proven(tmp_path / f"{turn}.{number}") + 1


def test_kill_9_of_trainer_and_daemon_together_loses_nothing(rig: Rig, tmp_path: Path):
    for turn in range(3):
        daemon = rig.start_daemon()
        client = rig.spawn(counting(), tmp_path / str(turn))
        wait_for(lambda path=tmp_path / str(turn): proven(path) > 1000, "the trainer logs")
        daemon.kill()
        kill_somewhere(client, tmp_path / str(turn))
        daemon.wait()
        daemon = rig.start_daemon()
        rig.adopted()
        counts = logged(of_process(rig, client), "i")
        assert counts == list(range(len(counts)))
        assert len(counts) >= proven(tmp_path / str(turn))
        rig.kill(daemon)


@pytest.mark.parametrize("point", ["journal.write.before", "journal.write.after", "journal.rotate.after", "journal.create.after"])
def test_a_kill_inside_the_journal_loses_nothing_that_log_had_returned_for(rig: Rig, tmp_path: Path, point: str):
    rig.start_daemon()
    nth = 3 if point == "journal.create.after" else 2000 if "write" in point else 2
    client = rig.spawn(counting(), tmp_path / "proof", RANKLOG_FAILPOINT=f"{point}:{nth}=kill", RANKLOG_JOURNAL_FILE_SIZE_BYTES="64K")
    assert client.wait(30) == -signal.SIGKILL
    rig.adopted()
    counts = logged(of_process(rig, client), "i")
    assert counts == list(range(len(counts)))
    assert proven(tmp_path / "proof") <= len(counts) <= proven(tmp_path / "proof") + 1


def test_a_killed_writer_in_the_middle_of_creating_a_file_leaves_none_that_is_never_looked_at(rig: Rig, tmp_path: Path):
    rig.client(counting(), tmp_path / "proof", code=-signal.SIGKILL, RANKLOG_FAILPOINT="journal.create.after:1=kill")
    hidden = list(rig.journal.glob(".*"))
    assert len(hidden) == 1, "killed before the rename"
    rig.start_daemon()
    wait_for(lambda: not list(rig.journal.glob(".*")), "the daemon removes it", 10)


# Forked.


def test_a_forked_child_writes_records_of_its_own_and_leaves_the_parents_alone(rig: Rig):
    rig.start_daemon()
    rig.client("""
import os, ranklog
run = ranklog.init(project="p")
for i in range(500): ranklog.log({"parent": i})
pid = os.fork()
for i in range(500): ranklog.log({"child" if pid == 0 else "parent2": i})
if pid == 0:
    raise SystemExit
os.waitpid(pid, 0)
ranklog.finish()
""")
    rig.adopted()
    parent, child = (pieces(rig)[role] for role in ("", "worker"))
    assert logged(parent, "parent") == logged(parent, "parent2") == list(range(500))
    assert logged(child, "child") == list(range(500))
    assert not logged(parent, "child")
    assert not logged(child, "parent2")
    starts = {start.role: start for start in rig.starts().values()}
    assert starts["worker"].parent == starts[""].writer
    assert starts["worker"].run == starts[""].run
    assert starts["worker"].attempt == starts[""].attempt


def test_forks_amid_logging_threads_neither_hang_nor_lose_a_record(rig: Rig):
    rig.start_daemon()
    rig.client("""
import os, threading, ranklog
ranklog.init(project="p")
stop = threading.Event()
counts = [0] * 3
def work(n):
    while not stop.is_set():
        ranklog.log({f"thread{n}": counts[n]}); counts[n] += 1
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for t in threads: t.start()
for turn in range(20):
    pid = os.fork()
    if pid == 0:
        ranklog.log({"child": turn})
        ranklog.finish()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for t in threads: t.join()
ranklog.log({"total": sum(counts)})
ranklog.finish()
""")
    rig.adopted()
    written, starts = rig.written(), rig.starts()
    children = [count for writer, records in written.items() if starts[writer].parent for count in logged(records, "child")]
    [main] = [records for writer, records in written.items() if not starts[writer].parent]
    assert sorted(children) == list(range(20))
    total = sum(len(logged(main, f"thread{n}")) for n in range(3))
    assert [total] == logged(main, "total")
    for n in range(3):
        found = logged(main, f"thread{n}")
        assert found == list(range(len(found)))
