"""`ranklog flush`: 0 once everything is there, 4 while data is pending, 3 without a daemon."""

import json
import os
import sys

import pytest

import terminal
from cli import ranklog
from node import Node, wait_for

LOG = """
import ranklog
ranklog.init(project="job", id="a")
for n in range(30):
    ranklog.log({"n": n})
ranklog.finish()
"""


def test_it_returns_when_everything_is_uploaded_without_waiting_for_the_seal(tmp_path):
    with Node(tmp_path) as node:
        node.start_daemon(RANKLOG_SEAL_AGE_S="1h")
        assert node.python(LOG).returncode == 0
        done = ranklog("flush", home=tmp_path, env=node.env)
        assert (done.returncode, done.stdout) == (0, "Everything that the daemon has received is uploaded.\n")
        assert len(node.raw_rows("key = 'n'")) == 30


@pytest.mark.parametrize("stage", ["durable", "sealed"])
def test_earlier_stages_do_not_need_the_store(tmp_path, stage):
    with Node(tmp_path) as node:
        (tmp_path / "data").touch()  # Where a directory should be.
        node.start_daemon(RANKLOG_SEAL_AGE_S="1h")
        assert node.python(LOG).returncode == 0
        done = ranklog("flush", "--wait", stage, "--json", home=tmp_path, env=node.env)
        assert json.loads(done.stdout) == {"done": True, "wait": stage, "pending": 0, "reason": ""}
        assert node.status()["watermarks"]["durable"] == 32
        assert (node.status()["watermarks"]["sealed"] == 32) is (stage == "sealed")


def test_data_that_is_pending_is_4_with_the_number_and_the_stores_reason(tmp_path):
    with Node(tmp_path) as node:
        (tmp_path / "data").touch()
        node.start_daemon()
        assert node.python(LOG).returncode == 0
        ranklog("flush", "--wait", "sealed", home=tmp_path, env=node.env)
        wait_for(lambda: node.status()["shipper"].get("last_error"), "the upload has failed")
        done = ranklog("flush", "--timeout", "0.5", home=tmp_path, env=node.env)
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.startswith("ranklog: 32 records are not uploaded after 0.5 s (upload: ")
        assert str(tmp_path / "data") in done.stderr
        assert "ranklog status --watch" in done.stderr
        answer = json.loads(ranklog("flush", "--timeout", "0.5", "--json", home=tmp_path, env=node.env).stdout)
        assert (answer["done"], answer["pending"]) == (False, 32)
        assert str(tmp_path / "data") in answer["reason"]


def test_no_daemon_is_3_at_once(tmp_path):
    done = ranklog("flush", "--timeout", "3600", home=tmp_path, timeout_s=20)
    assert (done.returncode, done.stdout) == (3, "")


def test_on_a_terminal_it_says_what_waits_and_why_until_it_is_done(tmp_path):
    with Node(tmp_path) as node:
        (tmp_path / "data").touch()
        node.start_daemon(RANKLOG_RETRY_MAX_S="2")
        assert node.python(LOG).returncode == 0
        process, screen = terminal.start(
            [sys.executable, "-m", "ranklog.cli", "flush"], node.env, tmp_path, columns=400
        )
        seen = terminal.read_until(screen, str(tmp_path / "data"))
        assert "\r\x1b[Kranklog: 32 records, 1 shard, " in seen
        assert "next try in" in seen
        (tmp_path / "data").unlink()
        seen = terminal.read_until(screen, "is uploaded.")
        assert seen.endswith("\r\x1b[KEverything that the daemon has received is uploaded.\r\n"), (
            "the bar is taken away"
        )
        assert process.wait(30) == 0
        os.close(screen)


def test_quiet_and_json_show_no_bar(tmp_path):
    with Node(tmp_path) as node:
        (tmp_path / "data").touch()
        node.start_daemon()
        assert node.python(LOG).returncode == 0
        for flags, env in ((["--json"], {}), ([], {"RANKLOG_QUIET": "1"})):
            command = [sys.executable, "-m", "ranklog.cli", "flush", "--timeout", "2.5", *flags]
            process, screen = terminal.start(command, node.env | env, tmp_path)
            assert "\x1b[K" not in terminal.read_until(screen, "32")
            assert process.wait(30) == 4
            os.close(screen)


def test_a_daemon_that_dies_meanwhile_is_3(tmp_path):
    with Node(tmp_path) as node:
        (tmp_path / "data").touch()
        daemon = node.start_daemon()
        assert node.python(LOG).returncode == 0
        process, screen = terminal.start(
            [sys.executable, "-m", "ranklog.cli", "flush", "--timeout", "5"], node.env, tmp_path, columns=400
        )
        terminal.read_until(screen, "next try in")
        daemon.kill()
        daemon.wait()
        seen = terminal.read_until(screen, "Is the daemon running")
        assert "ranklog: no daemon answers" in seen
        assert process.wait(30) == 3
        os.close(screen)
