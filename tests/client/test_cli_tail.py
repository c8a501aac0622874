import json
import signal
import subprocess
import sys

import pytest

from cli import environment, ranklog
from shards import records, start, write_shard, writer

A, B = writer("a"), writer("b")


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    write_shard(root, start(A, name="otter") + records(A, [{"loss": 1 / (seq + 1), "acc": 0.5} for seq in range(9)]))
    return root


def tail(tmp_path, store, *arguments):
    return ranklog("tail", *arguments, "--to", str(store), home=tmp_path)


def test_the_newest_rows_are_printed_oldest_first(tmp_path, store):
    done = tail(tmp_path, store, "-n", "3", "-k", "loss")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "2026-11-22 12:00:07.000  proj/run-1  rank 0   step 6      loss = 0.142857143\n"
        "2026-11-22 12:00:08.000  proj/run-1  rank 0   step 7      loss = 0.125\n"
        "2026-11-22 12:00:09.000  proj/run-1  rank 0   step 8      loss = 0.111111111\n"
    )


def test_a_named_run_is_not_repeated_in_each_line(tmp_path, store):
    for run in ("run-1", "otter"):
        assert tail(tmp_path, store, run, "-n", "1", "-k", "acc").stdout == (
            "2026-11-22 12:00:09.000  rank 0   step 8      acc = 0.5\n"
        )


def test_keys_may_be_several_and_globs(tmp_path, store):
    keys = [
        json.loads(line)["key"]
        for line in tail(tmp_path, store, "-k", "l*", "-k", "acc", "-n", "4", "--json").stdout.splitlines()
    ]
    assert sorted(keys) == ["acc", "acc", "loss", "loss"]


def test_json_is_one_object_a_line(tmp_path, store):
    done = tail(tmp_path, store, "-n", "1", "-k", "loss", "--json")
    assert json.loads(done.stdout) == {
        "project": "proj", "run": "run-1", "rank": 0, "node": "node-1", "attempt": 0, "step": 8,
        "ts": "2026-11-22T12:00:09Z", "kind": "metrics", "key": "loss", "value": 1 / 9, "text": None,
        "seq": 9, "writer": A,
    }  # fmt: skip


def test_alerts_gaps_and_node_metrics_are_marked(tmp_path, store):
    rows = records(B, [{"loss\x1b[2J": "NaN in layer 3"}], kind="alert", first_seq=20)
    rows += records(B, [{"cpu": 93.0}], kind="system", first_seq=21, first_step=None, rank=None)
    write_shard(store, rows, store_id="b" * 16)
    assert tail(tmp_path, store, "-n", "2").stdout == (
        '2026-11-22 12:00:20.000  proj/run-1  rank 0   step 0      [alert] loss\\x1b[2J = "NaN in layer 3"\n'
        "2026-11-22 12:00:21.000  proj/run-1  node                 [system] cpu = 93.0\n"
    )


def test_an_empty_store_says_so(tmp_path):
    done = tail(tmp_path, tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"No rows yet in {tmp_path / 'nothing'}.\n"


@pytest.mark.parametrize("arguments", [["-n", "-1"], ["--interval", "0"], ["--interval", "nan"]])
def test_senseless_numbers_are_wrong_usage(tmp_path, store, arguments):
    done = tail(tmp_path, store, *arguments)
    assert done.returncode == 2
    assert "--interval" in done.stderr


def test_follow_prints_new_shards_until_ctrl_c(tmp_path, store):
    command = [
        sys.executable,
        "-m",
        "ranklog.cli",
        "tail",
        "-k",
        "loss",
        "-n",
        "1",
        "--follow",
        "--interval",
        "0.05",
        "--to",
        str(store),
    ]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert "step 8 " in process.stdout.readline()
            for seq in (10, 11):
                write_shard(store, records(A, [{"loss": 0.25}], first_seq=seq, first_step=seq))
                assert f"step {seq} " in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert (process.stdout.read(), process.stderr.read()) == ("", "")
        finally:
            process.kill()
