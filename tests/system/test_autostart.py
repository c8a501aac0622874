"""RANKLOG_AUTOSTART: of many ranks that find no daemon, one starts a detached one; no trainer is hurt by it."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from node import Node, wait_for
from ranklog.autostart import is_listening

START = """
import os, sys, time
from ranklog.autostart import start_if_absent
from ranklog.config import Settings
open(sys.argv[1], "w").close()
while not os.path.exists("go"):
    pass
print(start_if_absent(Settings.from_env()))
"""
ONCE = (
    "from ranklog.autostart import start_if_absent as s; from ranklog.config import Settings; "
    "print(s(Settings.from_env()))"
)


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node
        if is_listening(socket(node)) and (pid := node.ping()):
            os.kill(pid, signal.SIGKILL)


def socket(node: Node) -> Path:
    return node.settings.runtime_dir / "ranklog.sock"


def ready(node: Node) -> int:
    return wait_for(lambda: is_listening(socket(node)) and node.ping(), "the daemon answers")


def test_of_many_ranks_at_once_exactly_one_starts_a_daemon(node):
    command = [sys.executable, "-c", START]
    ranks = [
        subprocess.Popen([*command, f"rank{n}"], env=node.env, cwd=node.path, stdout=subprocess.PIPE, text=True)
        for n in range(8)
    ]
    wait_for(lambda: all((node.path / f"rank{n}").exists() for n in range(8)), "all ranks are there")
    (node.path / "go").touch()
    answers = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    assert sorted(answers) == ["False"] * 7 + ["True"]
    ready(node)
    log = (node.settings.runtime_dir / "ranklogd.log").read_text()
    assert log.count("ready pid=") == 1


def test_the_daemon_is_detached_and_goes_when_nobody_needs_it(node):
    assert node.python(ONCE).stdout == "True\n"
    pid = ready(node)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    parent, session = int(fields[1]), int(fields[3])
    assert parent != os.getpid()
    assert session != os.getsid(0)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert command[command.index(b"--idle-exit") + 1] == b"10m"
    assert node.python(ONCE).stdout == "False\n"


def test_a_trainers_directory_full_of_module_names_does_not_reach_the_daemon(node):
    for name in ("socket", "signal", "json", "ranklogd", "pyarrow", "logging"):
        (node.path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    (node.path / "elsewhere").mkdir()
    script = f"import os; os.chdir({str(node.path)!r}); {ONCE}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=node.env, cwd=node.path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
    ready(node)
    assert node.python(f"import os; os.chdir('elsewhere'); {ONCE}", PYTHONSAFEPATH="1").stdout == "False\n"


def test_after_the_daemon_was_killed_another_can_be_started(node):
    assert node.python(ONCE).stdout == "True\n"
    pid = ready(node)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_listening(socket(node)), "it is gone")
    assert node.python(ONCE).stdout == "True\n"
    assert ready(node) != pid


def test_beside_a_daemon_that_runs_none_is_started(node):
    node.start_daemon()
    assert node.python(ONCE).stdout == "False\n"
    assert not (node.settings.runtime_dir / "ranklogd.log").exists()


def test_beside_a_daemon_that_hangs_none_is_started(node):
    daemon = node.start_daemon()
    daemon.send_signal(signal.SIGSTOP)
    assert node.python(ONCE).stdout == "False\n"


def test_without_the_extra_the_pip_line_is_told_once_and_no_daemon_is_tried(node):
    hide = "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'watchdog']))"
    done = node.python(f"{hide}; {ONCE}; print(s(Settings.from_env()))")
    assert done.stdout == "False\nFalse\n"
    assert done.stderr.count('pip install "ranklog[daemon]"') == 1
    assert not (node.settings.runtime_dir / "ranklogd.log").exists()


def test_a_place_that_cannot_be_used_is_a_warning_and_never_an_exception(node):
    (node.path / "file").touch()
    done = node.python(ONCE, RANKLOG_RUNTIME_DIR=str(node.path / "file/runtime"))
    assert done.stdout == "False\n"
    assert done.stderr.startswith("ranklog: warning: RANKLOG_AUTOSTART=1: no daemon could be started:")
    assert done.stderr.rstrip().endswith("Run: ranklogd")


def test_starting_a_daemon_loads_nothing_of_it_into_the_trainer(node):
    heavy = "{'pyarrow', 'numpy', 'ranklogd', 'watchdog', 'huggingface_hub', 'zmq', 'asyncio'}"
    done = node.python(f"{ONCE}; import sys; print(sorted(set(sys.modules) & {heavy}))")
    assert done.stdout == "True\n[]\n"
    ready(node)


def test_a_trainer_that_is_killed_with_its_whole_group_leaves_the_daemon_alive(node):
    script = f"{ONCE}; open('started', 'w').close()\nwhile True: pass"
    trainer = subprocess.Popen([sys.executable, "-c", script], env=node.env, cwd=node.path, start_new_session=True)
    wait_for((node.path / "started").exists, "it has started a daemon")
    with suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    ready(node)
