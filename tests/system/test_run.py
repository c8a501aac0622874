"""`ranklog run` with real jobs, real signals and a real daemon: exit codes, draining, and who stops the daemon."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import terminal
from node import Node, wait_for
from ranklog.autostart import is_listening

RANKLOG = [sys.executable, "-m", "ranklog.cli"]
RUN = [*RANKLOG, "run"]
LOGS = """
import os, signal, sys, time, ranklog
ranklog.init(project="job", id=sys.argv[1])
for n in range(int(sys.argv[2])):
    ranklog.log({"n": n})
open(f"logged-{sys.argv[1]}", "w").close()
while len(sys.argv) > 3 and not os.path.exists(sys.argv[3]):
    ranklog.log({"more": 1.0})
    time.sleep(0.01)
if len(sys.argv) > 4:
    os.kill(os.getpid(), signal.SIGKILL)
ranklog.finish()
"""


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node
        kill_daemon(node)


def answering(node: Node) -> int:
    """The pid of the daemon that answers, or 0, which a dead one's socket tells at once."""
    return node.ping() if is_listening(node.settings.runtime_dir / "ranklog.sock") else 0


def kill_daemon(node: Node) -> None:
    """A test that failed half way must leave no daemon behind."""
    starter = node.settings.runtime_dir / "ranklog.sock.starter"
    if answering(node) and starter.exists():
        with suppress(ProcessLookupError, ValueError, KeyError):
            os.kill(json.loads(starter.read_text())["pid"], signal.SIGKILL)


def start(node: Node, *arguments: str, **options) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*RUN, *arguments], env=node.env, cwd=node.path, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def job(run: str, count: int, *more: str) -> list[str]:
    return [sys.executable, "-c", LOGS, run, str(count), *more]


def stored(node: Node, run: str) -> list[float]:
    return sorted(row["value"] for row in node.raw_rows(f"run = '{run}' and key = 'n'"))


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 7"], 7, ""),
        (["--", "sh", "-c", "kill -9 $$"], 137, ""),
        (["no-such-command"], 127, "ranklog: no-such-command cannot be run: No such file or directory"),
        (["/dev/null"], 126, "ranklog: /dev/null cannot be run: Permission denied"),
    ],
)
def test_the_exit_code_is_the_jobs_and_nothing_is_said_without_a_terminal(node, command, code, says):
    done = node.run([*RUN, *command])
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", says)
    assert answering(node) == 0


def test_what_the_job_logged_is_in_the_store_when_run_ends_and_its_daemon_is_gone(node):
    done = node.run([*RUN, "--", *job("a", 100)])
    assert done.returncode == 0, done.stderr
    assert stored(node, "a") == list(range(100))
    assert answering(node) == 0
    assert node.leftovers() == []


def test_a_killed_jobs_records_are_adopted_before_run_ends(node):
    (node.path / "go").touch()
    done = node.run([*RUN, "--", *job("a", 500, "go", "die")])
    assert done.returncode == 137
    assert stored(node, "a") == list(range(500))
    assert node.leftovers() == []


def test_a_job_that_leaves_its_records_to_offline_mode_has_them_brought_in(node):
    done = node.run([*RUN, *job("a", 50)], RANKLOG_MODE="offline")
    assert done.returncode == 0
    assert stored(node, "a") == list(range(50))


def test_the_job_finds_the_daemon_the_store_and_an_id_for_its_run(node):
    script = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('RANKLOG_')}))"
    done = node.run([*RUN, "--to", str(node.path / "other"), "--", sys.executable, "-c", script], RANKLOG_AUTOSTART="1")
    env = json.loads(done.stdout)
    assert env["RANKLOG_SOCKET"] == str(node.settings.runtime_dir / "ranklog.sock")
    assert env["RANKLOG_TO"] == str(node.path / "other")
    assert env["RANKLOG_AUTOSTART"] == "0"
    assert re.fullmatch("r[0-9a-z]{26}", env["RANKLOG_RUN_ID_HINT"])
    again = node.run([*RUN, sys.executable, "-c", script], RANKLOG_RUN_ID_HINT="from-the-scheduler")
    assert json.loads(again.stdout)["RANKLOG_RUN_ID_HINT"] == "from-the-scheduler"


def test_flags_behind_the_command_are_the_commands(node):
    done = node.run([*RUN, "--drain", "30s", "echo", "--drain", "5s", "--json", "--", "--to"])
    assert (done.returncode, done.stdout) == (0, "--drain 5s --json -- --to\n")


def test_json_tells_how_the_drain_ended_on_stderr(node):
    done = node.run([*RUN, "--json", *job("a", 10)], RANKLOG_QUIET="1")
    facts = json.loads(done.stderr)
    assert facts["exit_code"] == 0
    assert facts["drain"] == {"done": True, "pending": 0, "adopted": 0, "uploaded": 12, "reason": ""}


@pytest.mark.parametrize("arguments", [[], ["--"], ["--drain", "soon", "true"], ["--nonsense", "true"]])
def test_wrong_usage_runs_nothing(node, arguments):
    done = node.run([*RUN, *arguments])
    assert done.returncode == 2
    assert not (node.settings.runtime_dir / "ranklog.sock").exists()


SIGNALLED = """
import os, signal, sys, time
seen = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(number, frame):
    os.write(seen, f"{number}\\n".encode())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
if len(sys.argv) > 2 and os.fork() == 0:
    os.execv(sys.executable, [sys.executable, sys.argv[0], sys.argv[2]])
os.write(seen, b"ready\\n")
while not os.path.exists("enough"):
    time.sleep(0.01)
"""


def test_signals_reach_every_process_of_the_job_and_run_waits_for_it(node):
    (node.path / "script.py").write_text(SIGNALLED)
    process = start(node, sys.executable, "script.py", "parent", "child")
    wait_for(lambda: lines(node.path / "parent") and lines(node.path / "child"), "parent and child run")
    sent = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    for count, number in enumerate(sent, 2):
        process.send_signal(number)
        for who in ("parent", "child"):
            wait_for(lambda who=who, count=count: len(lines(node.path / who)) == count, f"{who} has seen {number!r}")
    assert process.poll() is None
    assert lines(node.path / "parent")[1:] == [str(int(number)) for number in sent]
    (node.path / "enough").touch()
    assert process.wait(30) == 0, process.stderr.read()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_job_that_dies_of_a_forwarded_signal_is_drained_like_any_other(node):
    process = start(node, *job("a", 300, "never"))
    wait_for((node.path / "logged-a").exists, "the job has logged")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, process.stderr.read()
    assert stored(node, "a") == list(range(300))


def test_a_signal_that_was_ignored_when_run_began_is_not_forwarded(node):
    (node.path / "script.py").write_text(SIGNALLED)  # It handles SIGHUP, as torchrun does even under nohup.
    shell = f"trap '' HUP; exec {shlex.join([*RUN, sys.executable, 'script.py', 'job'])}"
    process = subprocess.Popen(["sh", "-c", shell], env=node.env, cwd=node.path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lines(node.path / "job"), "the job runs")
    for number in (signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
    wait_for(lambda: len(lines(node.path / "job")) > 1, "it has seen a signal")
    (node.path / "enough").touch()
    assert process.wait(30) == 0, process.stderr.read()
    assert lines(node.path / "job") == ["ready", str(int(signal.SIGUSR1))]


def test_a_daemon_that_was_there_is_joined_and_left_alone(node):
    daemon = node.start_daemon()
    done = node.run([*RUN, *job("a", 20)])
    assert done.returncode == 0, done.stderr
    assert stored(node, "a") == list(range(20))
    assert answering(node) == daemon.pid


def test_to_join_a_daemon_no_extra_is_needed_and_to_start_one_the_pip_line_is_told(node):
    hide = "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'numpy', 'watchdog']))"
    call = "from ranklog.cli import main; sys.exit(main(['run', 'echo', 'ran']))"
    command = [sys.executable, "-c", f"{hide}; {call}"]
    alone = node.run(command)
    assert (alone.returncode, alone.stdout) == (2, "")
    assert 'pip install "ranklog[daemon]"' in alone.stderr
    node.start_daemon()
    assert node.run(command).stdout == "ran\n"


def test_the_first_of_two_leaves_its_daemon_to_the_second_which_stops_it(node):
    first = start(node, *job("a", 50, "a-enough"))
    wait_for((node.path / "logged-a").exists, "the first job runs")
    pid = answering(node)
    second = start(node, *job("b", 50, "b-enough"))
    wait_for((node.path / "logged-b").exists, "the second job runs")
    assert answering(node) == pid
    (node.path / "a-enough").touch()
    assert first.wait(30) == 0, first.stderr.read()
    assert answering(node) == pid
    (node.path / "b-enough").touch()
    assert second.wait(30) == 0, second.stderr.read()
    assert answering(node) == 0
    assert stored(node, "a") == stored(node, "b") == list(range(50))


def test_two_that_begin_at_the_same_moment_share_one_daemon(node):
    several = [start(node, *job(name, 30)) for name in ("a", "b", "c")]
    assert [process.wait(60) for process in several] == [0, 0, 0], [process.stderr.read() for process in several]
    assert all(stored(node, name) == list(range(30)) for name in ("a", "b", "c"))
    log = (node.settings.runtime_dir / "ranklogd.log").read_text()
    # One that came when the others had ended has had a daemon of its own; no two were there at a time.
    assert log.count("ready pid") == log.count("everything is uploaded")
    assert "another ranklogd" not in log
    assert answering(node) == 0


def test_a_run_that_is_killed_leaves_its_daemon_to_the_others(node):
    first = start(node, *job("a", 50, "a-enough"))
    wait_for((node.path / "logged-a").exists, "the first job runs")
    second = start(node, *job("b", 50, "b-enough"))
    wait_for((node.path / "logged-b").exists, "the second job runs")
    first.kill()
    first.wait()
    (node.path / "a-enough").touch()
    (node.path / "b-enough").touch()
    assert second.wait(30) == 0, second.stderr.read()
    assert answering(node) == 0
    assert stored(node, "b") == list(range(50))


def test_a_daemon_that_dies_is_started_again_beside_the_job(node):
    process = start(node, *job("a", 200, "enough"))
    wait_for((node.path / "logged-a").exists, "the job has logged")
    pid = answering(node)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: answering(node) not in (0, pid), "another daemon answers")
    (node.path / "enough").touch()
    assert process.wait(30) == 0, process.stderr.read()
    assert stored(node, "a") == list(range(200))
    assert node.leftovers() == []


def test_a_daemon_that_dies_during_the_drain_is_started_again_and_the_drain_goes_on(node):
    process = start(node, "--drain", "60s", "--to", blocked(node), "--", *job("a", 40))
    wait_for(lambda: answering(node) and node.status()["shipper"].get("last_error"), "the drain has met the wall")
    pid = answering(node)
    os.kill(pid, signal.SIGKILL)
    (node.path / "wall").unlink()
    assert process.wait(40) == 0
    assert process.stderr.read().count("records are not in") == 0
    assert list((node.path / "wall/store").glob("v1/**/*.parquet"))


def test_a_daemon_that_cannot_start_is_125_with_its_own_words_and_the_job_does_not_run(node):
    daemon = node.start_daemon()
    place = node.path / "elsewhere"
    done = node.run([*RUN, "--runtime-dir", str(place), "--lock-wait", "0.1", "--", "touch", "ran"])
    assert done.returncode == 125
    assert f"another ranklogd (pid {daemon.pid}) owns {node.state}" in done.stderr
    assert str(place / "ranklogd.log") in done.stderr
    assert not (node.path / "ran").exists()


def test_a_daemon_with_another_store_is_not_joined_by_mistake(node):
    node.start_daemon()
    done = node.run([*RUN, "--to", str(node.path / "other"), "--", "touch", "ran"])
    assert done.returncode == 125
    assert f"uses {node.url}, not {node.path / 'other'}. Leave --to out to join it" in done.stderr
    assert not (node.path / "ran").exists()
    same = node.run([*RUN, "--to", "data", "--", "touch", "ran"])  # Relative to the working directory: the same.
    assert same.returncode == 0, same.stderr


def blocked(node: Node) -> str:
    """A store that fails as long as a file stands where a directory must be."""
    (node.path / "wall").touch()
    return str(node.path / "wall/store")


def test_a_failed_drain_keeps_the_exit_code_and_prints_the_command_that_brings_the_records_in(node):
    done = node.run([*RUN, "--drain", "1s", "--to", blocked(node), "--", *job("a", 40)])
    assert done.returncode == 0
    last = done.stderr.splitlines()[-1]
    assert "42 records are not in" in last
    assert "Nothing is lost" in last
    command = shlex.split(last.partition("Bring them in with: ")[2])
    (node.path / "wall").unlink()
    synced = node.run([*RANKLOG, *command[1:]])
    assert (synced.returncode, synced.stdout) == (0, f"42 records uploaded to {node.path / 'wall/store'}\n")


def test_a_signal_during_the_drain_ends_it_at_once_with_the_jobs_code(node):
    script = f"{shlex.join(job('a', 40))}; exit 3"
    process = start(node, "--drain", "600s", "--to", blocked(node), "--", "sh", "-c", script)
    wait_for(lambda: answering(node) and node.status()["shipper"].get("last_error"), "the drain has met the wall")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    assert "42 records are not in" in process.stderr.read()
    assert answering(node) == 0


def test_a_signal_before_the_job_began_calls_it_off(node):
    daemon = node.start_daemon()
    place = node.path / "elsewhere"
    process = start(node, "--runtime-dir", str(place), "--lock-wait", "60", "--", "touch", "ran")
    wait_for((place / "ranklogd.log").exists, "its daemon waits for the lock")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not (node.path / "ran").exists()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    assert "ready" not in (place / "ranklogd.log").read_text()


AS_PID_1 = """
import os, subprocess, sys, time
# Orphans: their parent ends before them, so they fall to PID 1.
for _ in range(3):
    subprocess.run(["sh", "-c", "sleep 0.05 & exit 0"])
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    states = [open(f"/proc/{p}/stat").read().rpartition(")")[2].split()[:2] for p in os.listdir("/proc") if p.isdigit()]
    mine = [state for state, parent in states if parent == "1"]
    if len(mine) == 2 and "Z" not in mine:      # This job and the daemon.
        sys.exit(9)
    time.sleep(0.02)
"""


def test_as_pid_1_it_reaps_orphans_and_exits_with_the_jobs_code(node):
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    try:
        if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to make a pid namespace: run the tests as root")
    except FileNotFoundError:
        pytest.skip("needs unshare: apt-get install util-linux")
    done = node.run([*namespace, *RUN, "--", sys.executable, "-c", AS_PID_1])
    assert done.returncode == 9, done.stderr


def test_in_a_terminal_the_job_has_the_keyboard_and_ctrl_c_is_its_own(node):
    script = "print('you said', input('? '), flush=True); import time; time.sleep(60)"
    process, keyboard = terminal.start([*RUN, sys.executable, "-c", script], node.env, node.path)
    terminal.read_until(keyboard, "? ")
    os.write(keyboard, b"hello\n")
    terminal.read_until(keyboard, "you said hello")
    os.write(keyboard, b"\x03")
    terminal.read_until(keyboard, "KeyboardInterrupt")
    assert process.wait(30) == 130
    os.close(keyboard)


def test_in_a_terminal_ctrl_z_stops_run_and_job_and_both_go_on(node):
    script = "import time, os; print('ready', flush=True)\nwhile not os.path.exists('enough'): time.sleep(0.01)"
    command = shlex.join([*RUN, sys.executable, "-c", script])
    process, keyboard = terminal.start(
        ["sh", "-ic", f"{command}; echo stopped $?; fg; echo code $?"], node.env, node.path
    )
    terminal.read_until(keyboard, "ready")
    os.write(keyboard, b"\x1a")
    terminal.read_until(keyboard, "stopped 14")  # 128 + SIGSTOP or SIGTSTP, as the shell counts.
    (node.path / "enough").touch()
    terminal.read_until(keyboard, "code 0")
    assert process.wait(30) == 0
    os.close(keyboard)


def test_on_a_terminal_the_drain_says_what_waits_and_why_until_it_is_done(node):
    (node.path / "wall").touch()
    to = str(node.path / "wall" / "store")
    process, screen = terminal.start(
        [*RUN, "--to", to, "--", sys.executable, "-c", LOGS, "a", "30"], node.env, node.path
    )
    seen = terminal.read_until(screen, "next try in")
    assert re.search(r"\r\x1b\[Kranklog: 32 records, 1 shard, [\d.]+ kB wait, next try in [\d.]+ s: ", seen)
    (node.path / "wall").unlink()
    seen = terminal.read_until(screen, f"ranklog: everything is in {to}")
    assert seen.replace("\r\n", "\n").rpartition("ranklog:")[0].endswith("\r\x1b[K"), "the bar is taken away"
    assert process.wait(30) == 0
    os.close(screen)
