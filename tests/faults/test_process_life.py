"""Matrix rows 15, 42, 43, 48 and 49: how processes begin, end and are stopped, judged by the oracle.

Forks, threads, coroutines and signal handlers that log; every way out of a trainer; signals for the daemon. What the
WAL itself says about forks, threads and exits stands in system/test_client_life.py.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from node import Node, wait_for
from witness import Account, read_ledgers

FAST = {"RANKLOG_SEAL_AGE_S": "0.1", "RANKLOG_RESCAN_INTERVAL_S": "0.3", "RANKLOG_RETRY_BASE_S": "0.05"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


@pytest.fixture
def spawned() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes of a case, killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


Spawned = list["subprocess.Popen[bytes]"]


def spawn(node: Node, spawned: Spawned, command: list[str], **env: str) -> "subprocess.Popen[bytes]":
    """Start a process of the trainer's side, as the leader of a group."""
    with (node.path / "trainer.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=node.env | env, cwd=node.path, stdout=log, stderr=log, process_group=0
        )  # fmt: skip
    spawned.append(process)
    return process


def accounts(node: Node) -> dict[str, Account]:
    return read_ledgers(oracle.ledgers_of(node))


def returned(node: Node) -> int:
    """How many calls of log() are known to have returned, over all trainers."""
    return sum(account.returned for account in accounts(node).values())


def durable(node: Node) -> int:
    """How many records a flush() has called durable, over all trainers."""
    return sum(account.durable for account in accounts(node).values())


def script(node: Node, source: str) -> list[str]:
    """Return the command of a trainer that is a file, which spawned children import again."""
    path = node.path / "trainer.py"
    path.write_text(f"import os, signal, sys, threading\nfrom pathlib import Path\n{HEAD}{source}")
    return [sys.executable, str(path), str(oracle.ledgers_of(node))]


HEAD = """
import ranklog
from witness import Witness
LEDGERS = Path(sys.argv[1])

def begin(rank=0):
    ranklog.init(project="faults", id="job", rank=rank)

def log(name, count):
    witness = Witness(name, LEDGERS)
    for _ in range(count):
        witness.log()
    return witness
"""

FORKS = """
begin()
main = log("main", 200)
children = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        log(f"child{number}", 200)
        if number == 1:
            sys.exit(0)
        if number == 2:
            ranklog.finish()
        os._exit(0)
    children.append(pid)
    for _ in range(100): main.log()
for pid in children: assert os.waitpid(pid, 0)[1] == 0
for _ in range(100): main.log()
ranklog.finish()
"""
SPAWN = """
import multiprocessing
def work(rank):
    begin(rank)
    log(f"spawned{rank}", 300)
if __name__ == "__main__":
    begin()
    main = log("main", 100)
    children = [multiprocessing.get_context("spawn").Process(target=work, args=(rank,)) for rank in (1, 2)]
    for child in children: child.start()
    for _ in range(200): main.log()
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 0]
    ranklog.finish()
"""
THREADS = """
begin()
threads = [threading.Thread(target=log, args=(f"thread{n}", 400)) for n in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
ranklog.finish()
"""
ASYNCIO = """
import asyncio
async def work(number):
    witness = Witness(f"task{number}", LEDGERS)
    for n in range(200):
        witness.log()
        await asyncio.sleep(0)
        if n % 50 == 0:
            assert await asyncio.to_thread(ranklog.flush, 10)
async def everything():
    begin()
    await asyncio.gather(*(work(number) for number in range(5)))
    await asyncio.to_thread(ranklog.finish)
asyncio.run(everything())
"""
HANDLER = """
begin()
main, ticks, inside = Witness("main", LEDGERS), Witness("ticks", LEDGERS), 0
def tick(number, frame):
    global inside
    inside += frame.f_code.co_name in ("append", "write")
    signal.setitimer(signal.ITIMER_REAL, 0)  # A witness counts for itself: it must not interrupt itself.
    ticks.log()
    signal.setitimer(signal.ITIMER_REAL, 0.0003)
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.0003)
while inside < 100: main.log()
signal.setitimer(signal.ITIMER_REAL, 0)
ranklog.finish()
"""


@pytest.mark.parametrize(
    "source", [FORKS, SPAWN, THREADS, ASYNCIO, HANDLER], ids=["fork", "spawn", "threads", "asyncio", "signal handler"]
)
def test_whatever_logs_in_a_process_and_its_children_is_delivered_once(node: Node, source: str) -> None:
    node.start_daemon(**FAST)
    done = node.run(script(node, source))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(accounts(node)) > 1
    oracle.check(node)


@pytest.mark.parametrize("source", [FORKS, THREADS, ASYNCIO], ids=["fork", "threads", "asyncio"])
def test_a_process_killed_with_all_its_children_and_threads_loses_nothing(
    node: Node, spawned: Spawned, source: str
) -> None:
    node.start_daemon(**FAST)
    endless = source.replace("00)", "000000)").replace("range(1000000)", "range(100)")
    trainer = spawn(node, spawned, script(node, endless))
    some = random.randrange(200, 1500)
    wait_for(lambda: returned(node) > some, "they log")
    os.killpg(trainer.pid, signal.SIGKILL)
    assert trainer.wait(20) == -signal.SIGKILL
    oracle.check(node)


# Every way out.

LEAVE = """
begin()
witness = log("trainer", 500)
"""


@pytest.mark.parametrize("daemon", ["with a daemon", pytest.param("without", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("leave", "codes"),
    [
        ("pass", (0,)), ("sys.exit(3)", (3,)), ("raise ValueError('a bug of the trainer')", (1,)),
        ("import atexit; atexit.register(sys.exit, 5)", (0, 5)),
        ("import atexit; atexit.register(witness.log)", (0,)),
        ("import atexit; atexit.register(os._exit, 6)", (6,)), ("os._exit(4)", (4,)),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", (-signal.SIGTERM,)),
        # Python ends by the signal itself, unless something was compiled after the exception.
        ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", (1, -signal.SIGINT)),
        ("os.kill(os.getpid(), signal.SIGKILL); signal.pause()", (-signal.SIGKILL,)),
        ("os.kill(os.getpid(), signal.SIGHUP); signal.pause()", (-signal.SIGHUP,)),
        ("os.abort()", (-signal.SIGABRT,)), ("os.execv('/bin/true', ['true'])", (0,)),
        ("threading.Thread(target=log, args=('late', 500)).start()", (0,)),
    ],
    ids=[
        "end of the script", "sys.exit", "exception", "sys.exit in atexit", "log in atexit", "os._exit in atexit",
        "os._exit", "SIGTERM", "SIGINT", "SIGKILL", "SIGHUP", "abort", "exec", "a thread goes on",
    ],
)  # fmt: skip
def test_no_way_out_without_finish_loses_a_record(node: Node, leave: str, codes: tuple[int, ...], daemon: str) -> None:
    if daemon == "with a daemon":
        node.start_daemon(**FAST)
    done = node.run(script(node, LEAVE + leave))
    assert done.returncode in codes, done.stderr
    if daemon == "without":
        node.start_daemon(**FAST)
    verdict = oracle.check(node)
    assert verdict.delivered >= 500
    [run] = [run for run in node.status()["runs"] if run["run"] == "job"]
    assert run["state"] != "finished", "nobody called finish()"


AGENT = """
import subprocess
workers = [subprocess.Popen([sys.executable, "-m", "witness", f"worker{n}", str(LEDGERS), "--pause", "0.001"])
           for n in range(2)]
heard = []
def stop(number, frame):
    heard.append(number)
    for worker in workers: worker.send_signal(number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGHUP, stop)
for worker in workers: worker.wait()
sys.exit(128 + heard[0])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_a_launcher_that_passes_a_signal_on_to_its_workers_loses_none_of_their_records(
    node: Node, spawned: Spawned, number: signal.Signals
) -> None:
    node.start_daemon(**FAST)
    launcher = spawn(node, spawned, script(node, AGENT))
    wait_for(lambda: len(accounts(node)) == 2 and returned(node) > 300, "both workers log")
    launcher.send_signal(number)
    assert launcher.wait(20) == 128 + number
    assert oracle.check(node).delivered > 300


def test_a_trainer_killed_with_a_thousand_records_in_flight_loses_none(node: Node, spawned: Spawned) -> None:
    daemon = node.start_daemon(**FAST)
    trainer = spawn(node, spawned, oracle.witness("trainer", node, "--pause", "0.0005", "--flush-every", "100"))
    wait_for(lambda: durable(node), "the daemon has acknowledged some")
    daemon.send_signal(signal.SIGSTOP)
    before = returned(node)
    wait_for(lambda: returned(node) > before + 1000, "a thousand more are on their way")
    trainer.kill()
    trainer.wait()
    daemon.send_signal(signal.SIGCONT)
    assert oracle.check(node).delivered > 1000


# Signals for the daemon.


def train(node: Node, name: str = "trainer", count: int = 200) -> None:
    done = node.run(oracle.witness(name, node, "--count", str(count), "--flush-every", "100"))
    assert done.returncode == 0, done.stderr


def store_in_the_way(node: Node) -> None:
    """Let no shard be uploaded: the store's directory is a file."""
    node.data.write_text("in the way")


@pytest.mark.parametrize(
    "how",
    [
        "second SIGTERM",
        "SIGKILL",
        pytest.param("SIGINT, then SIGTERM", marks=pytest.mark.full),
        "SIGKILL of the shipper",
    ],
)
def test_a_drain_that_is_cut_short_leaves_the_rest_for_the_next_daemon(node: Node, how: str) -> None:
    store_in_the_way(node)
    daemon = node.start_daemon(**FAST, RANKLOG_STOP_DEADLINE_S="3600")
    train(node)
    shipper = wait_for(lambda: node.status()["shipper"].get("pid"), "the shipper has reported")
    daemon.send_signal(signal.SIGINT if how.startswith("SIGINT") else signal.SIGTERM)
    wait_for(lambda: not list((node.state / "wal").glob("*-*.wal")), "everything is converted")
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(0.5)
    if how == "SIGKILL of the shipper":
        os.kill(shipper, signal.SIGKILL)
        assert daemon.wait(20) == 0, "it does not wait for the dead"
    else:
        daemon.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)
        assert daemon.wait(20) == (-signal.SIGKILL if how == "SIGKILL" else 0)
    if how != "SIGKILL":
        assert "records_not_uploaded=" in (node.path / "daemon.log").read_text()
    node.data.unlink()
    node.start_daemon(**FAST)
    assert oracle.check(node).delivered == 200


@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)])
def test_signals_in_a_row_while_records_come_lose_none_of_them(node: Node, spawned: Spawned, nth: int) -> None:
    trainer = spawn(node, spawned, oracle.witness("trainer", node, "--pause", "0.001", "--flush-every", "50"))
    for _ in range(3):
        daemon = node.start_daemon(**FAST, RANKLOG_STOP_DEADLINE_S="6")
        before = durable(node)
        wait_for(lambda before=before: durable(node) > before, "the trainer flushes")
        for _ in range(nth):
            daemon.terminate()
        assert daemon.wait(30) == 0
    node.start_daemon(**FAST)
    (node.path / "enough").touch()
    assert trainer.wait(30) == 0
    (node.path / "enough").unlink()
    oracle.check(node)


@pytest.mark.parametrize(
    "config", [pytest.param("sound", marks=pytest.mark.full), "broken", pytest.param("gone", marks=pytest.mark.full)]
)
def test_a_hangup_does_not_end_the_daemon_which_keeps_its_configuration(node: Node, config: str) -> None:
    settings = node.path / "ranklogd.toml"
    settings.write_text("seal_age_s = 0.1\n")
    daemon = node.start_daemon("--config", str(settings))
    train(node, "before")
    if config == "broken":
        settings.write_text("seal_age_s = never [\n")
    elif config == "gone":
        settings.unlink()
    for _ in range(3):
        daemon.send_signal(signal.SIGHUP)
    train(node, "after")
    assert node.ping() == daemon.pid
    assert "hangup ignored" in (node.path / "daemon.log").read_text()
    wait_for(lambda: list(node.data.rglob("*.parquet")), "it seals as it was told")
    oracle.check(node)


@pytest.mark.parametrize("who", ["daemon", "shipper"])
def test_a_frozen_daemon_process_costs_its_trainers_nothing_and_goes_on(node: Node, spawned: Spawned, who: str) -> None:
    daemon = node.start_daemon(**FAST)
    trainer = spawn(node, spawned, oracle.witness("trainer", node, "--pause", "0.001", "--flush-every", "200"))
    shipper = wait_for(lambda: node.status()["shipper"].get("pid"), "the shipper has reported")
    wait_for(lambda: durable(node), "the trainer flushes")
    frozen = daemon.pid if who == "daemon" else shipper
    os.kill(frozen, signal.SIGSTOP)
    try:
        before = durable(node)
        if who == "daemon":
            # The sender gives a silent daemon up after two seconds, and moves to the spool what it does not take.
            wait_for(lambda: list(node.spool.glob("*.spool")), "records wait on disk meanwhile")
        wait_for(lambda: durable(node) > before + 1000, "flush() goes on, and so does log()")
    finally:
        os.kill(frozen, signal.SIGCONT)
    (node.path / "enough").touch()
    assert trainer.wait(30) == 0
    (node.path / "enough").unlink()
    assert node.ping() == daemon.pid
    oracle.check(node)
    assert accounts(node)["trainer"].slowest_s < 1, "no call waited for the two seconds of the daemon's silence"
