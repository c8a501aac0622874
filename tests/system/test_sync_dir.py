"""`ranklog sync DIR`: what a daemon and its clients left in a directory goes up, in place or from a copy elsewhere."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ranklog
from harness import shard_rows
from hub.server import Hub
from node import Node, wait_for
from oracle import judge, ledgers_of, witness
from witness import read_ledgers

SYNC = [sys.executable, "-m", "ranklog.cli", "sync"]


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node


@pytest.fixture
def elsewhere(tmp_path):
    """The login node: nothing of the training node is known there but what was copied."""
    (tmp_path / "login").mkdir()
    with Node(tmp_path / "login") as login:
        yield login


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def leave_everything(node: Node) -> None:
    """A node's whole life without a store, ended by SIGKILL: shards, segments, journals and spools remain."""
    (node.path / "data").touch()  # Where the store's directory should be.
    daemon = node.start_daemon("--seal-age", "0.3s")
    assert node.run(witness("a", node, "--count", "200", "--flush-every", "50")).returncode == 0
    wait_for(lambda: list((node.state / "outbox").rglob("*.parquet")), "a shard waits")
    job = subprocess.Popen(witness("b", node, "--pause", "0.002"), env=node.env, cwd=node.path)
    wait_for(lambda: read_ledgers(ledgers_of(node)).get("b", (0,))[0] > 100, "b has logged")
    kill(daemon)
    reached = read_ledgers(ledgers_of(node))["b"].returned
    wait_for(lambda: read_ledgers(ledgers_of(node))["b"].returned > reached + 100, "b goes on without a daemon")
    kill(job)
    assert node.run(witness("c", node, "--count", "50"), RANKLOG_MODE="offline").returncode == 0
    (node.path / "data").unlink()


def copy_of(node: Node, target: Path) -> Path:
    for source, name in ((node.state, "state"), (node.journal, "journal"), (node.spool, "spool")):
        shutil.copytree(source, target / name)
    return target


def check(node: Node, store: Path) -> None:
    verdict = judge(shard_rows(store), read_ledgers(ledgers_of(node)))
    assert not verdict.missing
    assert verdict.in_gaps == verdict.lost_lsns == 0


def test_a_copy_of_everything_a_dead_node_left_is_delivered_exactly_once_and_twice_is_the_same(node, elsewhere):
    leave_everything(node)
    copy = copy_of(node, elsewhere.path / "copy")
    before = {path: path.read_bytes() for path in node.state.rglob("*") if path.is_file()}
    done = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)], timeout_s=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 writers brought in" in done.stdout
    check(node, elsewhere.data)
    objects = {path: path.read_bytes() for path in elsewhere.data.rglob("*.parquet")}
    again = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)])
    assert (again.returncode, again.stdout) == (0, f"Nothing was waiting: everything is in {elsewhere.data}\n")
    assert {path: path.read_bytes() for path in elsewhere.data.rglob("*.parquet")} == objects
    assert {path: path.read_bytes() for path in node.state.rglob("*") if path.is_file()} == before
    assert not [*copy.rglob("*.spool"), *copy.rglob("*.journal")]


@pytest.mark.parametrize("kept", [True, False], ids=["spools kept on the node", "spools removed from the node"])
def test_the_original_and_its_copy_in_one_store_give_each_record_once(node, elsewhere, kept):
    leave_everything(node)
    copy = copy_of(node, elsewhere.path / "copy")
    if not kept:
        for path in node.leftovers():
            path.unlink()
    store = node.path / "store"
    assert elsewhere.run([*SYNC, str(copy), "--to", str(store)], timeout_s=120).returncode == 0
    # The node comes back and goes on: it gives the lsns to new records that the copy has given to the adopted ones.
    node.env["RANKLOG_TO"] = str(store)
    node.start_daemon()
    assert node.run(witness("d", node, "--count", "120", "--flush-every", "60")).returncode == 0
    node.upload(60)
    rows = ranklog.read(str(store), project="faults").to_pylist()
    stored = [row for row in shard_rows(store) if row["kind"] == "metrics"]
    assert (len(stored) > len(rows)) == kept, "where the spools were kept, both have brought in the same writers"
    assert not judge(rows, read_ledgers(ledgers_of(node))).missing


def test_a_state_directory_is_synced_in_place_and_a_daemon_goes_on_in_it(node):
    leave_everything(node)
    done = node.run([*SYNC, str(node.state), "--to", node.url], timeout_s=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [path for path in (node.state / "outbox").rglob("*") if path.is_file()]
    node.start_daemon()
    node.upload(60)
    check(node, node.data)


def test_a_spool_alone_is_adopted_beside_itself(node, elsewhere):
    for name in ("a", "b"):
        assert node.run(witness(name, node, "--count", "70"), RANKLOG_MODE="offline").returncode == 0
    copy = elsewhere.path / "copied spool"
    shutil.copytree(node.spool, copy)
    done = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data), "--json"])
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["done"], facts["adopted"], facts["writers_before"]) == (0, True, 2, 2)
    assert facts["to"] == str(elsewhere.data)
    check(node, elsewhere.data)
    shutil.copytree(node.spool, copy, dirs_exist_ok=True)  # Copied once more, by somebody who was not sure.
    assert elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)]).returncode == 0
    check(node, elsewhere.data)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_files_of_another_user_in_a_copy_are_brought_in(node, elsewhere):
    leave_everything(node)
    copy = copy_of(node, elsewhere.path / "copy")
    for path in [*copy.rglob("*.journal"), *copy.rglob("*.spool")]:
        os.chown(path, 12345, 12345)
    os.chown(copy / "state", 12345, 12345)
    done = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)])
    assert done.returncode == 2
    assert f"{copy / 'state'} belongs to user 12345: run this as that user, or sync a copy of it" in done.stderr
    os.chown(copy / "state", 0, 0)
    done = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)], timeout_s=120)
    assert (done.returncode, done.stderr) == (0, "")
    check(node, elsewhere.data)


def test_until_the_store_has_them_records_stay_in_the_directory(node, elsewhere):
    leave_everything(node)
    copy = copy_of(node, elsewhere.path / "copy")
    (elsewhere.path / "wall").touch()
    to = str(elsewhere.path / "wall" / "store")
    done = elsewhere.run([*SYNC, str(copy), "--to", to, "--timeout", "3s"], timeout_s=120)
    assert done.returncode == 4
    assert f"they are in {copy}. Go on with: ranklog sync {copy} --to {to}" in done.stderr
    moved = elsewhere.path / "moved"
    copy.rename(moved)  # Everything is in there, wherever it is.
    (elsewhere.path / "wall").unlink()
    assert elsewhere.run([*SYNC, str(moved), "--to", to], timeout_s=120).returncode == 0
    check(node, Path(to))


def test_a_shard_that_the_store_refuses_for_good_stays_in_the_directory_and_is_told(node, elsewhere):
    leave_everything(node)
    copy = copy_of(node, elsewhere.path / "copy")
    outbox = copy / "state" / "outbox"
    shard = next(outbox.rglob("*.parquet"))
    taken = elsewhere.data.joinpath(*shard.relative_to(outbox).parts[1:])
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"other bytes")
    done = elsewhere.run([*SYNC, str(copy), "--to", str(elsewhere.data)], timeout_s=120)
    assert done.returncode == 4
    assert f"the store refused 1 shard for good: kept in {copy / 'state' / 'deadletter'}" in done.stderr
    assert (copy / "state" / "deadletter" / taken.relative_to(elsewhere.data)).exists()


def test_what_a_node_kept_while_its_hub_was_down_goes_to_the_bucket_from_a_copy(node, elsewhere):
    with Hub(node.path / "hub") as hub:
        node.env |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token(), "HF_HOME": str(node.path / "home"),
            "HF_XET_CACHE": str(node.path / "xet"), "RANKLOG_TO": "hf://buckets/user/logs",
        }  # fmt: skip
        hub.stop()
        leave_everything(node)
        hub.start()
        copy = copy_of(node, elsewhere.path / "copy")
        elsewhere.env |= {name: value for name, value in node.env.items() if name.startswith("HF_")}
        elsewhere.env |= {"HF_XET_CACHE": str(elsewhere.path / "xet"), "RANKLOG_UPLOAD_INTERVAL_MIN_S": "0.5"}
        command = [*SYNC, str(copy), "--to", "hf://buckets/user/logs"]
        done = elsewhere.run([*command, "--timeout", "3s"], timeout_s=120)
        assert done.returncode == 4, "there is no bucket, and nobody allowed to make one"
        assert "404" in done.stderr
        done = elsewhere.run([*command, "--create-bucket", "private"], timeout_s=120)
        assert (done.returncode, done.stderr) == (0, "")
        files = {path: hub.read("user/logs", path) for path in hub.buckets.get("user/logs").files}
        rows = [row for data in files.values() for row in pq.read_table(io.BytesIO(data)).to_pylist()]
        assert not judge(rows, read_ledgers(ledgers_of(node))).missing
        assert elsewhere.run(command).stdout == "Nothing was waiting: everything is in hf://buckets/user/logs\n"


def test_a_directory_of_a_living_daemon_or_of_living_writers_is_refused(node):
    daemon = node.start_daemon()
    done = node.run([*SYNC, str(node.state)])
    assert (done.returncode, done.stdout) == (2, "")
    assert f"a running ranklogd (pid {daemon.pid}) owns {node.state}" in done.stderr
    kill(daemon)
    job = subprocess.Popen(witness("a", node, "--pause", "0.01"), env=node.env, cwd=node.path)
    wait_for(lambda: list(node.spool.glob("*.spool")), "its records are in the spool")
    done = node.run([*SYNC, str(node.spool)])
    assert done.returncode == 2
    assert f"processes still write to {node.spool} (pid {job.pid})" in done.stderr
    assert not (node.spool / "ranklog-sync").exists()
    (node.path / "enough").touch()
    assert job.wait(30) == 0


def test_a_directory_that_cannot_be_used_is_told_in_words(node):
    empty = node.path / "empty"
    empty.mkdir()
    assert f"{empty} holds nothing of ranklog" in node.run([*SYNC, str(empty)]).stderr
    assert "is no directory" in node.run([*SYNC, str(node.path / "missing")]).stderr
    for name in ("one", "two"):
        (empty / name / "wal").mkdir(parents=True)
    done = node.run([*SYNC, str(empty)])
    assert done.returncode == 2
    assert "holds 2 state directories" in done.stderr
    assert "leave --state-dir out" in node.run([*SYNC, str(empty), "--state-dir", str(empty)]).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount something read-only")
def test_a_read_only_directory_says_how_to_go_on(node):
    assert node.run(witness("a", node, "--count", "10"), RANKLOG_MODE="offline").returncode == 0
    bind = ["mount", "--bind", str(node.spool), str(node.spool)]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(node.spool)], check=True)
        done = node.run([*SYNC, str(node.spool)])
        assert done.returncode == 2
        assert f"{node.spool} is read-only for you" in done.stderr
        assert f"cp -a {node.spool} /var/tmp/copy && ranklog sync /var/tmp/copy" in done.stderr
    finally:
        subprocess.run(["umount", str(node.spool)], check=True)
