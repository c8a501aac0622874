"""`ranklog ls`, `query` and `tail` on a bucket, as a user runs them: processes of their own against the Hub."""

import json
import signal
import subprocess
import sys

import pytest

from bucketroom import BucketRoom
from cli import environment
from hub.server import Hub
from node import Node, wait_for
from shards import STORE_A, STORE_B, records, start, writer

A, B = writer("a"), writer("b")


@pytest.fixture
def room(tmp_path):
    with BucketRoom(tmp_path) as room:
        room.add(start(A, name="otter") + records(A, [{"loss": 1.0}, {"loss": 0.5}]))
        for seq in range(3, 9):
            room.add(records(A, [{"loss": 1 / seq}], first_seq=seq))
        room.add(start(B, name="heron", run="run-2") + records(B, [{"loss": 7.0}], run="run-2"), store_id=STORE_B)
        yield room


def test_ls_fetches_two_shards_of_a_long_run_and_says_what_it_did_not_count(room):
    done = room.cli("ls", room.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "otter" in done.stdout
    assert "heron" in done.stdout
    assert "ranklog ls --run RUN" in done.stdout
    assert len(room.cached()) == 3
    found = {run["name"]: run for run in json.loads(room.cli("ls", room.url, "--json").stdout)}
    assert (found["otter"]["records"], found["otter"]["shards"], found["heron"]["records"]) == (None, 7, 2)
    assert found["otter"]["last_ts"] == "2026-11-22T12:00:08Z"


def test_ls_of_one_run_counts_everything(room):
    (found,) = json.loads(room.cli("ls", room.url, "--run", "otter", "--json").stdout)
    assert (found["records"], found["rows"], found["writers"], found["ranks"]) == (9, 9, 1, [0])


def test_query_and_tail_read_the_bucket(room):
    done = room.cli("query", "--to", room.url, "select count(*) as n, min(value) as best from metrics", "--json")
    assert (json.loads(done.stdout), done.stderr) == ([{"n": 9, "best": 0.125}], "")
    done = room.cli("tail", "otter", "--to", room.url, "-n", "1")
    assert done.stdout.endswith("loss = 0.125\n"), done.stderr


def test_the_store_of_the_configuration_is_read(room):
    done = room.cli("query", "select count(*) as n from metrics", "--json", RANKLOG_TO=room.url)
    assert json.loads(done.stdout) == [{"n": 9}]


@pytest.mark.parametrize("command", [["ls"], ["query", "select 1"], ["tail"], ["tail", "--follow"]], ids=" ".join)
@pytest.mark.parametrize(
    ("url", "token", "told"),
    [
        ("hf://buckets/user/logs/job", "hf_wrong", "answered 401: Invalid credentials. Log in with"),
        ("hf://buckets/user/nothing", None, "answered 404"),
    ],
    ids=["no login", "no bucket"],
)
def test_a_refusal_is_one_line_and_exit_code_1(room, command, url, token, told):
    env = {"HF_TOKEN": token} if token else {}
    done = room.cli(*command, "--to", url, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr


def test_a_hub_that_is_down_is_one_line_that_names_the_cache(room):
    assert room.cli("ls", room.url).returncode == 0
    room.hub.stop()
    done = room.cli("ls", room.url)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert f"--to {room.cache}" in done.stderr
    assert "otter" in room.cli("ls", "--to", str(room.cache)).stdout


def test_tail_follows_a_bucket_through_a_restart_of_the_hub_until_ctrl_c(room):
    command = [
        sys.executable,
        "-m",
        "ranklog.cli",
        "tail",
        "otter",
        "-n",
        "1",
        "--follow",
        "--interval",
        "0.05",
        "--to",
        room.url,
    ]
    with subprocess.Popen(
        command, env=environment(room.path) | room.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert "step 0 " in process.stdout.readline()
            for seq in (10, 11, 12):
                room.add(records(A, [{"loss": 0.25}], first_seq=seq, first_step=seq), store_id=STORE_A)
                assert f"step {seq} " in process.stdout.readline()
                if seq == 10:
                    room.hub.stop()
                    assert "trying again" in process.stderr.readline()
                    room.hub.start()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stdout.read() == ""
        finally:
            process.kill()


TRAINER = """
import sys, time, ranklog
ranklog.init(project="p", id="job")
for step in range(600):
    ranklog.log({"loss": 1.0}, step=step)
    time.sleep(0.01)
ranklog.finish()
"""


def test_who_follows_a_job_sees_each_record_once_whatever_the_hub_does(tmp_path):
    """A real daemon uploads, the Hub restarts twice and refuses in between, and the feed is cut again and again."""
    with Hub(tmp_path / "hub") as hub, Node(tmp_path) as node:
        url = "hf://buckets/user/logs"
        node.env |= {
            "RANKLOG_TO": url, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token(),
            "HF_XET_CACHE": str(tmp_path / "xet"), "RANKLOG_READ_CACHE_DIR": str(tmp_path / "cache"),
            "RANKLOG_SEAL_AGE_S": "0.2", "RANKLOG_UPLOAD_INTERVAL_MIN_S": "0.2", "RANKLOG_UPLOAD_INTERVAL_MAX_S": "1",
            "RANKLOG_RETRY_BASE_S": "0.1", "RANKLOG_RETRY_MAX_S": "0.4",
        }  # fmt: skip
        hub.buckets.create("user/logs", private=True)
        command = [sys.executable, "-m", "ranklog.cli", "tail", "job", "-n", "0", "-f", "--interval", "0.05", "--json"]
        out = tmp_path / "tail.out"
        with out.open("wb") as stream, (tmp_path / "tail.err").open("wb") as errors:
            tail = subprocess.Popen(command, env=node.env, stdout=stream, stderr=errors)
            node.daemons.append(tail)
            node.start_daemon()
            trainer = subprocess.Popen([sys.executable, "-c", TRAINER], env=node.env, cwd=tmp_path)
            for round_ in range(2):
                shown = len(lines(out))
                wait_for(lambda: len(lines(out)) > shown, "more is shown", 60)  # noqa: B023
                hub.stop()
                hub.start()
                hub.fault("tree", status=503, times=2)
                hub.fault("events", drop=True, times=1 + round_)
                hub.fault("reconstruct", status=503, times=1)
            assert trainer.wait(60) == 0
            node.upload(60)
            wait_for(lambda: len(lines(out)) >= 600, "everything is shown", 60)
            tail.send_signal(signal.SIGINT)
            assert tail.wait(60) == 130
        assert sorted(row["step"] for row in lines(out)) == list(range(600)), (tmp_path / "tail.err").read_text()


def lines(path):
    """The rows that were printed whole."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
