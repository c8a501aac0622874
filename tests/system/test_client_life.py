"""The life of a trainer's process, with a daemon beside it: kills, forks, threads, signals and every way out."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import Record, Rig, logged, wait_for
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
for turn in range(8):
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
    [main] = [records for writer, records in written.items() if not starts[writer].parent]
    assert sorted(count for records in written.values() for count in logged(records, "child")) == list(range(8))
    total = sum(len(logged(main, f"thread{n}")) for n in range(3))
    assert [total] == logged(main, "total")
    for n in range(3):
        found = logged(main, f"thread{n}")
        assert found == list(range(len(found)))


def test_a_child_forked_right_after_init_can_import_what_the_sender_was_importing(rig: Rig):
    """A module that another thread was importing at the fork stays locked in the child for ever."""
    rig.start_daemon()
    for _ in range(5):
        output = rig.client("""
import os, signal, time, ranklog
ranklog.init(project="p")
began = time.monotonic()
pid = os.fork()
assert time.monotonic() - began < 3
if pid == 0:
    signal.alarm(10)
    import zmq
    ranklog.log({"child": 1})
    assert ranklog.flush(5)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
ranklog.finish()
""")
        assert "Exception ignored" not in output, "nor are its fork hooks set in the middle of a fork"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_send_what_they_logged_before_they_leave(rig: Rig, tmp_path: Path, method: str):
    rig.start_daemon()
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing, sys, time
import ranklog

def work(rank):
    if sys.argv[1] != "fork":
        ranklog.init(project="p", id="job", rank=rank)
    for i in range(300):
        ranklog.log({f"child{rank}": i})

if __name__ == "__main__":
    run = ranklog.init(project="p", id="job", rank=0)
    processes = [multiprocessing.get_context(sys.argv[1]).Process(target=work, args=(n,)) for n in (1, 2)]
    for process in processes: process.start()
    for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ranklog.finish()
""")
    done = rig.run([sys.executable, str(script), method])
    assert done.returncode == 0, done.stderr
    assert rig.orphans() == [], "nothing is left for adoption: each child delivered by itself"
    written = rig.written()
    for number in (1, 2):
        [found] = [counts for records in written.values() if (counts := logged(records, f"child{number}"))]
        assert found == list(range(300))
    assert len(written) == 3


def test_data_loading_workers_may_log(rig: Rig, tmp_path: Path):
    pytest.importorskip("torch", reason='pip install "ranklog[test-all]"')
    rig.start_daemon()
    rig.client("""
import os, ranklog, torch
from torch.utils.data import DataLoader, Dataset
class Data(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index):
        ranklog.log({"item": index})
        return torch.tensor([float(index)])
ranklog.init(project="p")
for epoch in range(2):
    for batch in DataLoader(Data(), batch_size=8, num_workers=2):
        ranklog.log({"batch": batch.sum()})
ranklog.finish()
""")
    rig.adopted()
    starts, written = rig.starts(), rig.written()
    items = [item for records in written.values() for item in logged(records, "item")]
    assert sorted(items) == sorted([*range(64)] * 2)
    assert len(written) == 5, "the trainer, and two workers in each of two epochs"
    [main] = [records for writer, records in written.items() if starts[writer].role == ""]
    assert sum(logged(main, "batch")) == 2 * sum(range(64))


@pytest.mark.parametrize("fork", ["os.fork()", "ctypes.CDLL(None).fork()"], ids=["fork", "fork behind Python's back"])
def test_the_files_of_a_dead_writer_are_adopted_though_its_child_lives_on(rig: Rig, fork: str):
    """Without Python's hooks, the child inherits the locks of its parent's files and never lets go of them."""
    rig.start_daemon()
    client = rig.spawn(f"""
import ctypes, os, signal, sys, ranklog
ranklog.init(project="p")
for i in range(5000): ranklog.log({{"i": i}})
pid = {fork}
if pid == 0:
    signal.pause()
print(pid, flush=True)
signal.pause()
""")
    child = int(client.stdout.readline())
    try:
        client.kill()
        client.wait()
        rig.adopted()
        os.kill(child, 0)  # It is still there.
    finally:
        os.kill(child, signal.SIGKILL)
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(5000))


# Threads and signals.


def test_eight_threads_at_once_lose_no_record_and_keep_their_order(rig: Rig):
    rig.start_daemon()
    rig.client("""
import threading, ranklog
ranklog.init(project="p")
def work(n):
    for i in range(2000): ranklog.log({f"t{n}": i})
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
ranklog.finish()
""")
    [records] = rig.written().values()
    for n in range(8):
        assert logged(records, f"t{n}") == list(range(2000))
    assert [record.step for record in records if record.kind == Kind.METRICS] == list(range(16000))


def test_a_signal_handler_may_log_in_the_middle_of_log(rig: Rig):
    rig.start_daemon()
    rig.client("""
import itertools, signal, ranklog
run = ranklog.init(project="p")
ticks, inside = itertools.count(), 0
def tick(number, frame):
    global inside
    inside += frame.f_code.co_name in ("append", "write")
    ranklog.log({"tick": next(ticks)})
ranklog.log({"tick": -1})
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
i = 0
while inside < 500:
    ranklog.log({"i": i}); i += 1
signal.setitimer(signal.ITIMER_REAL, 0)
ranklog.log({"ticks": next(ticks), "count": i, "inside": inside})
ranklog.finish()
""")
    [records] = rig.written().values()
    [total] = [record.payload for record in records if "inside" in record.payload]
    assert sorted(logged(records, "tick")) == list(range(-1, total["ticks"]))  # A handler may interrupt itself.
    assert logged(records, "i") == list(range(total["count"]))


def test_a_signal_handler_that_logs_what_needs_conversion_or_warns_does_not_hang(rig: Rig):
    rig.start_daemon()
    output = rig.client("""
import decimal, itertools, signal, ranklog
ranklog.init(project="p")
ticks = itertools.count()
class Odd:
    def __float__(self): raise RuntimeError("odd")
def tick(number, frame):
    mine = next(ticks)
    ranklog.log({"tick": decimal.Decimal(mine), f"odd{mine}": Odd()})
signal.signal(signal.SIGALRM, tick)
ranklog.log({"tick": 0.5, "n": 0})
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for i in range(20000):
    ranklog.log({"i": decimal.Decimal(i), f"odd{i}": Odd()})
signal.setitimer(signal.ITIMER_REAL, 0)
ranklog.log({"ticks": next(ticks)})
ranklog.finish()
""")
    assert "Traceback" not in output
    [records] = rig.written().values()
    [total] = [record.payload for record in records if "ticks" in record.payload]
    assert sorted(logged(records, "tick")[1:]) == list(range(total["ticks"]))
    assert logged(records, "i") == list(range(20000))


def test_ctrl_c_in_log_passes_and_the_records_stay_in_order(rig: Rig):
    """Half of the exceptions hit log() somewhere inside; small journal files make it rotate all the time."""
    rig.start_daemon()
    rig.client("""
import signal, ranklog
ranklog.init(project="p")
def interrupt(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
returned, hits, i = [], 0, 0
while hits < 1500:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0004)
        while True:
            ranklog.log({"i": i, "pad": "x" * 300})
            returned.append(i)
            i += 1
    except KeyboardInterrupt:
        hits += 1
        i += 1
signal.setitimer(signal.ITIMER_REAL, 0)
for n in returned: ranklog.log({"returned": n})
ranklog.finish()
""", RANKLOG_JOURNAL_FILE_SIZE_BYTES="8K", RANKLOG_JOURNAL_SIZE_BYTES="64M")  # fmt: skip
    [records] = rig.written().values()
    counts = logged(records, "i")
    assert counts == sorted(set(counts)), "in order, once"
    assert set(logged(records, "returned")) <= set(counts), "what log() returned for is there"
    assert len(ends(records)) == 1


def test_finish_in_a_signal_handler_neither_hangs_nor_loses_a_record(rig: Rig, tmp_path: Path):
    rig.start_daemon()
    for turn in range(12):
        client = rig.spawn(
            counting().replace("i = 0\n", """i = 0
import signal
def stop(number, frame):
    ranklog.finish()
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
"""), tmp_path / str(turn)
        )  # fmt: skip
        some = random.randrange(1, 3000)
        wait_for(lambda path=tmp_path / str(turn), some=some: proven(path) >= some, "the trainer logs")
        client.terminate()
        assert client.wait(15) == 7
        rig.adopted()
        records = of_process(rig, client)
        counts = logged(records, "i")
        assert counts == list(range(len(counts)))
        assert len(counts) >= proven(tmp_path / str(turn))
        assert len(ends(records)) == 1


# To the exit.


def test_a_process_that_exits_without_finish_leaves_nothing_for_adoption(rig: Rig):
    rig.start_daemon()
    rig.client("import ranklog\nranklog.init(project='p')\nfor i in range(2000): ranklog.log({'i': i})")
    assert rig.orphans() == []
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(2000))


def test_exit_handlers_of_the_script_may_still_log_and_finish(rig: Rig):
    rig.start_daemon()
    rig.client("""
import atexit, ranklog
def last():
    ranklog.log({"i": 1})
    ranklog.finish()
atexit.register(last)  # Before init(): it runs after whatever init() registers.
ranklog.init(project="p")
ranklog.log({"i": 0})
""")
    [records] = rig.written().values()
    assert logged(records, "i") == [0, 1]
    assert len(ends(records)) == 1


def test_what_is_logged_while_the_interpreter_goes_down_is_told_and_harms_nobody(rig: Rig):
    rig.start_daemon()
    output = rig.client("""
import ranklog
class Last:
    def __del__(self): ranklog.log({"i": 2})
last = Last()
last.itself = last
ranklog.init(project="p")
ranklog.log({"i": 1})
""")
    assert "Exception" not in output
    assert "Traceback" not in output
    [records] = rig.written().values()
    assert logged(records, "i") == [1]


def test_a_thread_that_logs_while_another_finishes_loses_nothing_it_was_promised(rig: Rig):
    """And its frames never land in a file of somebody else's that got the descriptor of a closed journal."""
    rig.start_daemon()
    output = rig.client("""
import os, threading, time, ranklog
bad = 0
for turn in range(6):
    run = ranklog.init(project="p", id=f"run{turn}")
    stop, counts = threading.Event(), [0, 0, 0]
    def work(n):
        while not stop.is_set():
            run.log({f"t{n}": counts[n]}); counts[n] += 1
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads: t.start()
    while min(counts) < 20: time.sleep(0.001)
    run.finish()
    victims = [os.open(f"victim{turn}.{n}", os.O_RDWR | os.O_CREAT) for n in range(12)]
    before = counts[:]
    while min(counts) < max(before) + 20: time.sleep(0.001)
    stop.set()
    for t in threads: t.join()
    bad += sum(os.fstat(fd).st_size for fd in victims)
    for fd in victims: os.close(fd)
print("bad", bad)
""")
    assert "bad 0" in output
    assert output.count("after finish()") == 1, "one warning"
    for records in rig.written().values():
        assert [record.kind for record in records[-1:]] == [Kind.END], "nothing behind the end"
        for n in range(3):
            found = logged(records, f"t{n}")
            assert found == list(range(len(found)))


# init() and finish(), again and again.


def test_init_and_finish_two_hundred_times_leak_no_descriptor_no_thread_and_no_memory(rig: Rig):
    rig.start_daemon()
    rig.client("""
import os, threading, time, ranklog
def look():
    rss = int(open("/proc/self/statm").read().split()[1]) * 4096
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")), rss
for turn in range(200):
    run = ranklog.init(project="p", id="again")
    for i in range(10): ranklog.log({"i": i})
    if turn % 2: ranklog.finish()
    else: run.finish(wait=None)
    if turn == 20: first = look()
deadline = time.monotonic() + 5
while (last := look())[2] > first[2] and time.monotonic() < deadline: pass  # libzmq's threads end on their own.
assert last[:2] == first[:2] and last[2] <= first[2], (first, last)
assert last[3] - first[3] < 4 << 20, (first, last)
""", RANKLOG_QUIET="1")  # fmt: skip
    rig.adopted()
    written = rig.written()
    assert len(written) == 200
    for records in written.values():
        assert logged(records, "i") == list(range(10))
        assert len(ends(records)) == 1


def test_a_writer_has_one_thread_of_ours_and_libzmqs_two(rig: Rig):
    rig.start_daemon()
    rig.client("""
import os, threading, ranklog
before = set(threading.enumerate())
ranklog.init(project="p")
for i in range(20000): ranklog.log({"i": i})  # Large batches take another way through libzmq.
assert ranklog.flush(10)
assert len(set(threading.enumerate()) - before) == 1
assert len(os.listdir("/proc/self/task")) <= 4
assert len(os.listdir("/proc/self/fd")) <= 20
ranklog.finish()
assert set(threading.enumerate()) == before
""")


def test_a_process_without_a_free_descriptor_goes_on_and_its_records_are_adopted(rig: Rig):
    """libzmq aborts a process that has none left for a new context."""
    rig.start_daemon()
    rig.client("""
import os, resource, ranklog, ranklog.transport
keep = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True: keep.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
for fd in keep[-9:]: os.close(fd)  # Enough for a journal, not for a socket.
ranklog.init(project="p")
for i in range(1000): ranklog.log({"i": i})
os._exit(0)
""")
    rig.adopted()
    [records] = rig.written().values()
    assert logged(records, "i") == list(range(1000))
