"""`ranklog ping`: 0 where a daemon answers, 3 where none does."""

import json
import signal

import pytest

from cli import ranklog
from node import Node


def test_a_daemon_that_answers_is_0(tmp_path):
    with Node(tmp_path) as node:
        daemon = node.start_daemon()
        socket = node.settings.runtime_dir / "ranklog.sock"
        done = ranklog("ping", home=tmp_path, env=node.env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"ranklogd 0.1.0 (pid {daemon.pid}) answers on {socket} after ")
        answer = json.loads(ranklog("ping", "--json", home=tmp_path, env=node.env).stdout)
        assert (answer["pid"], answer["socket"]) == (daemon.pid, str(socket))
        assert 0 < answer["took_ms"] < 2000
        # Found by its name alone, too.
        assert ranklog("ping", "--socket", str(socket), home=tmp_path).returncode == 0


def test_no_daemon_is_3_with_the_command_that_starts_one(tmp_path):
    done = ranklog("ping", home=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert str(tmp_path / "runtime/ranklog.sock") in done.stderr
    assert "ranklogd" in done.stderr


def test_a_daemon_that_hangs_is_3_after_the_timeout(tmp_path):
    with Node(tmp_path) as node:
        node.start_daemon().send_signal(signal.SIGSTOP)
        done = ranklog("ping", "--timeout", "0.3", home=tmp_path, env=node.env)
        assert (done.returncode, done.stdout) == (3, "")
        assert "within 0.3 s" in done.stderr


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "soon"])
def test_a_timeout_that_is_none_is_wrong_usage(tmp_path, timeout):
    assert ranklog("ping", f"--timeout={timeout}", home=tmp_path).returncode == 2
