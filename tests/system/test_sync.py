"""`ranklog sync`: what waits in a node's journals and spools comes in, with or without a daemon."""

import json
import os
import signal
import subprocess
import sys

import pytest

import terminal
from node import Node, wait_for
from ranklog.autostart import is_listening

SYNC = [sys.executable, "-m", "ranklog.cli", "sync"]
LOGS = """
import os, sys, time, ranklog
ranklog.init(project="job", id=sys.argv[1])
for n in range(int(sys.argv[2])):
    ranklog.log({"n": n})
open(f"logged-{sys.argv[1]}", "w").close()
while len(sys.argv) > 3 and not os.path.exists(sys.argv[3]):
    time.sleep(0.01)
ranklog.finish()
"""


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node


def stored(node: Node, run: str) -> list[float]:
    return sorted(row["value"] for row in node.raw_rows(f"run = '{run}' and key = 'n'"))


def test_offline_runs_come_in_without_a_daemon_and_nothing_is_left_running(node):
    for run in ("a", "b"):
        assert node.python(LOGS, run, "30", RANKLOG_MODE="offline").returncode == 0
    assert len(node.leftovers()) == 2
    done = node.run(SYNC)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"2 writers brought in, 64 records uploaded to {node.url}\n"
    assert stored(node, "a") == stored(node, "b") == list(range(30))
    assert node.leftovers() == []
    assert not is_listening(node.settings.runtime_dir / "ranklog.sock")
    assert node.run(SYNC).stdout == f"Nothing was waiting: everything is in {node.url}\n"


def test_a_running_daemon_brings_offline_runs_in_and_goes_on(node):
    daemon = node.start_daemon()
    assert node.python(LOGS, "a", "30", RANKLOG_MODE="offline").returncode == 0
    done = node.run([*SYNC, "--json"])
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["done"], facts["adopted"], facts["writers_waiting"]) == (0, True, 1, 0)
    assert facts["to"] == node.url
    assert stored(node, "a") == list(range(30))
    assert node.ping() == daemon.pid


def test_what_a_killed_daemon_and_a_killed_job_left_behind_comes_in(node):
    daemon = node.start_daemon(RANKLOG_SEAL_AGE_S="1h")
    job = subprocess.Popen([sys.executable, "-c", LOGS, "a", "50", "never"], env=node.env, cwd=node.path)
    wait_for((node.path / "logged-a").exists, "the job has logged")
    for process in (daemon, job):
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = node.run(SYNC)
    assert done.returncode == 0, done.stderr
    assert stored(node, "a") == list(range(50))
    assert node.leftovers() == []


def test_a_store_that_is_down_is_4_with_the_reason_and_the_next_sync_goes_on(node):
    assert node.python(LOGS, "a", "30", RANKLOG_MODE="offline").returncode == 0
    (node.path / "wall").touch()
    to = str(node.path / "wall/store")
    done = node.run([*SYNC, "--to", to, "--timeout", "1s"])
    assert done.returncode == 4
    assert done.stdout == "1 writer brought in, 0 records uploaded to " + to + "\n"
    assert "32 records are not in" in done.stderr
    assert "wall" in done.stderr
    (node.path / "wall").unlink()
    assert node.run([*SYNC, "--to", to]).stdout == f"32 records uploaded to {to}\n"


def test_an_offline_run_that_is_still_going_on_is_pending(node):
    job = subprocess.Popen(
        [sys.executable, "-c", LOGS, "a", "30", "enough"], env=node.env | {"RANKLOG_MODE": "offline"}, cwd=node.path
    )
    wait_for(lambda: list(node.spool.glob("*.spool")), "its records are in the spool")
    done = node.run(SYNC)
    assert done.returncode == 4
    assert "1 writer of this node could not be brought in: still running, or refused" in done.stderr
    (node.path / "enough").touch()
    assert job.wait(30) == 0
    done = node.run(SYNC)
    assert (done.returncode, done.stderr) == (0, "")
    assert stored(node, "a") == list(range(30))


def test_a_hostile_file_is_left_alone_and_named(node):
    node.spool.mkdir()
    planted = node.spool / f"{'0' * 32}.00000000.spool"
    planted.symlink_to("/etc/passwd")
    done = node.run(SYNC)
    assert done.returncode == 4
    assert f"left alone: {planted}:" in done.stderr
    assert planted.is_symlink()


def test_interrupted_it_stops_its_daemon_and_says_what_is_left(node):
    assert node.python(LOGS, "a", "30", RANKLOG_MODE="offline").returncode == 0
    (node.path / "wall").touch()
    process = subprocess.Popen(
        [*SYNC, "--to", str(node.path / "wall/store")], env=node.env, cwd=node.path, stderr=subprocess.PIPE, text=True
    )
    socket = node.settings.runtime_dir / "ranklog.sock"
    wait_for(lambda: is_listening(socket) and node.status()["shipper"].get("last_error"), "it has met the wall")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 4
    assert "32 records are not in" in process.stderr.read()
    assert not is_listening(socket)


def test_on_a_terminal_it_says_what_waits_and_why_until_it_is_done(node):
    assert node.python(LOGS, "a", "30", RANKLOG_MODE="offline").returncode == 0
    (node.path / "wall").touch()
    to = str(node.path / "wall/store")
    process, screen = terminal.start([*SYNC, "--to", to], node.env, node.path)
    seen = terminal.read_until(screen, "next try in")
    assert "\r\x1b[Kranklog: 32 records, 1 shard, " in seen
    (node.path / "wall").unlink()
    terminal.read_until(screen, f"32 records uploaded to {to}")
    assert process.wait(30) == 0
    os.close(screen)
