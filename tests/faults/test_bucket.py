"""Matrix rows 29-37 and 47: a whole node beside a Hub that refuses, vanishes, hangs, is slow or tells other things.

A case switches something on, brings records up to the wall and sees how the node behaves there; then the trouble is
over, and the oracle and `bucketnode.check` judge what the bucket holds.
"""

import email.utils
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from bucketnode import BUCKET, PREFIX, BucketNode, check, check_objects
from hub.server import API, Hub
from node import wait_for
from witness import read_ledgers


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def node(tmp_path: Path, hub: Hub) -> Iterator[BucketNode]:
    with BucketNode(tmp_path, hub) as node:
        yield node


# 29


def revoked(node: BucketNode) -> str:
    node.hub.revoke(node.token_file.read_text().strip())
    return "answered 401"


def read_only(node: BucketNode) -> str:
    node.new_token(write=False)
    return "answered 403"


def gone(node: BucketNode) -> str:
    node.token_file.unlink()
    return "the token file cannot be read"


@pytest.mark.parametrize("spoil", [revoked, pytest.param(read_only, marks=pytest.mark.full), gone])
def test_a_token_that_is_not_good_any_more_holds_everything_until_a_new_one_is_there(node, hub, spoil):
    daemon = node.start_daemon()
    node.train("before")
    node.upload()
    text = spoil(node)
    node.train("held-a", "held-b")
    node.wait_for_trouble("held", text)
    node.wait_for_shards(2)
    assert not {key for key in node.keys if "held" in key}
    node.new_token()
    check(node)
    assert node.ping() == daemon.pid, "without a restart"
    assert node.shipper()["last_error"] == ""


def test_a_login_that_is_renewed_with_the_hubs_own_command_is_found_as_well(node, hub):
    login = node.path / "home/token"
    login.parent.mkdir()
    login.write_text(node.token_file.read_text())
    node.start_daemon(RANKLOG_TOKEN_FILE="")
    hub.revoke(login.read_text().strip())
    node.train("a")
    node.wait_for_trouble("held", "hf auth login")
    login.write_text(node.new_token())
    check(node)


@pytest.mark.parametrize(
    "status", [409, pytest.param(301, marks=pytest.mark.full), pytest.param(451, marks=pytest.mark.full)]
)
def test_a_conflict_or_a_bucket_that_has_moved_is_for_a_person_and_costs_nothing(node, hub, status):
    node.start_daemon()
    with hub.fault("*", status=status, headers={"Location": f"{hub.url}/elsewhere"} if status == 301 else {}) as fault:
        node.train("a")
        node.wait_for_trouble("held", f"answered {status}")
        wait_for(lambda: fault.struck >= 2, "it is asked for again, slowly")
    check(node)


# 30


def test_a_bucket_that_may_not_be_created_is_asked_for_until_somebody_makes_it(node, hub):
    node.start_daemon(RANKLOG_CREATE_BUCKET="")
    node.train("a")
    node.wait_for_trouble("held", "answered 404")
    assert hub.requests["create"] == 0
    assert len(node.waiting()) >= 1
    hub.buckets.create(BUCKET, private=True)
    check(node)
    assert hub.requests["create"] == 0


def test_a_missing_bucket_is_created_once_and_private_where_that_is_allowed(node, hub):
    node.start_daemon()
    node.train("a")
    check(node)
    assert hub.requests["create"] == 1
    assert node.bucket.private


@pytest.mark.parametrize("restart", [False, True])
def test_a_bucket_that_vanished_is_an_alarm_and_never_created_again(node, hub, restart):
    daemon = node.start_daemon()
    node.train("before")
    node.upload()
    hub.buckets.remove(BUCKET)
    if restart:
        daemon.terminate()
        assert daemon.wait(30) == 0
        node.start_daemon()
    node.train("after")
    node.wait_for_trouble("held", "is gone")
    assert hub.requests["create"] == 1, "only in the beginning"
    assert hub.buckets.get(BUCKET) is None
    hub.buckets.create(BUCKET, private=True)
    node.upload()
    accounts = read_ledgers(oracle.ledgers_of(node))
    oracle.judge(node.raw_rows("run = 'after'"), {"after": accounts["after"]})
    assert not node.raw_rows("run = 'before'"), "what the bucket took with it is not made up"
    oracle.check_fresh(node)
    check_objects(node)
    assert hub.requests["create"] == 1


# 31


def test_other_bytes_under_a_shards_name_are_never_overwritten_and_it_comes_in_once_they_are_gone(node, hub):
    daemon = node.start_daemon()
    wall = hub.fault("*", status=503)
    node.train("mine", "other")
    node.wait_for_shards(2)
    taken = next(key for key in node.waiting() if "mine" in key)
    hub.buckets.create(BUCKET, private=True)
    hub.buckets.add(BUCKET, PREFIX + taken, "0" * 64, 0, 0)
    wall.end()
    wait_for(lambda: taken in node.letters(), "it is set aside")
    assert "holds other bytes" in node.letters()[taken]
    node.upload()
    assert hub.read(BUCKET, PREFIX + taken) == b"", "nothing was overwritten"
    assert [key for key in node.keys if "other" in key], "its neighbour is in"
    assert node.shipper()["dead_letters"] == 1
    daemon.terminate()
    assert daemon.wait(30) == 0
    stays = node.ranklog("requeue", "--deadletter", "--apply")
    assert "move that object away first" in stays.stdout, stays.stdout + stays.stderr
    hub.buckets.delete(BUCKET, PREFIX + taken)
    requeued = node.ranklog("requeue", "--deadletter", "--apply")
    assert "1 brought back" in requeued.stdout, requeued.stdout + requeued.stderr
    node.start_daemon()
    wait_for(lambda: not node.waiting(), "what came back is uploaded")
    check(node, cleared=(taken,))


# 32


@pytest.mark.parametrize("status", [422, 413, pytest.param(400, marks=pytest.mark.full)])
def test_of_many_shards_only_the_one_that_is_never_taken_is_set_aside_and_it_can_come_back(node, hub, status):
    daemon = node.start_daemon()
    wall = hub.fault("*", status=503)
    runs = [f"good-{number}" for number in range(6)]
    node.train(*runs, "poison")
    node.wait_for_shards(7)
    poison = hub.fault("batch", status=status, naming="run_id=poison")
    wall.end()
    wait_for(lambda: len(node.letters()) == 1, lambda: f"one is set aside; the status tells {node.shipper()}")
    [(key, reason)] = node.letters().items()
    assert "run_id=poison" in key
    assert f"answered {status}" in reason
    node.upload()
    assert {key.split("/")[2] for key in node.keys} >= {f"run_id={run}" for run in runs}
    daemon.terminate()
    assert daemon.wait(30) == 0
    poison.end()
    requeued = node.ranklog("requeue", "--deadletter", "--apply")
    assert "1 brought back" in requeued.stdout, requeued.stdout + requeued.stderr
    node.start_daemon()
    wait_for(lambda: not node.waiting(), "what came back is uploaded")
    check(node)


# 33


def calls_since(hub: Hub, start: int) -> list[tuple[float, str]]:
    """The requests that count, from that number of arrivals on."""
    return [(at_s, route) for at_s, route in hub.arrivals[start:] if route in API]


def test_whatever_a_rate_limit_says_about_waiting_is_obeyed_and_nonsense_is_survived(node, hub):
    node.start_daemon()
    node.train("first")
    node.upload()
    date = email.utils.formatdate(time.time() + 4, usegmt=True)
    for headers, asked_s in (
        ({"Retry-After": "1"}, 1.0),
        ({"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"api";q=1000;w=300'}, 1.0),
        ({"Retry-After": date}, 0.0),
        ({"Retry-After": "-1 parsecs"}, 0.0),
        ({}, 0.0),
    ):
        start = len(hub.arrivals)
        fault = hub.fault("*", status=429, headers=headers, times=1)
        node.train(f"run-{start}")
        wait_for(lambda fault=fault: fault.struck, "it is refused")
        wait_for(lambda start=start: len(calls_since(hub, start)) >= 2, "it is asked again")
        (first_s, _), (second_s, _) = calls_since(hub, start)[:2]
        assert second_s - first_s >= asked_s, headers
        node.upload()
    check(node)


def test_a_rate_limit_of_a_day_is_no_reason_to_go_on_asking_nor_to_miss_a_sigterm(node, hub):
    daemon = node.start_daemon(RANKLOG_STOP_DEADLINE_S="2")
    fault = hub.fault("*", status=429, headers={"Retry-After": "86400"})
    for name in "abc":
        node.train(name)
    node.wait_for_trouble("transient", "answered 429")
    node.wait_for_shards(3)
    assert fault.struck == 1, "one call for all that wait"
    assert 600 < node.shipper()["next_try_s"] <= 1200, "a quarter of an hour at most, and some jitter"
    daemon.terminate()
    assert daemon.wait(30) == 0, "long before the wait is over"
    assert fault.struck <= 2, "one last try"
    assert len(node.waiting()) == 3
    fault.end()
    node.start_daemon()
    check(node)


# 34


def outages(hub: Hub) -> Iterator[tuple[str, dict[str, object]]]:
    """What a Hub in trouble answers, to everything."""
    yield "answered 502", {"status": 502, "body": b"<html>Bad Gateway</html>", "content_type": "text/html"}
    yield "is not JSON", {"status": 200, "body": b"<html>Please log in</html>", "content_type": "text/html"}
    yield "reachable", {"drop": True}
    yield "complete message body", {"half": True}
    yield "answered 500", {"status": 500}


def test_an_outage_in_any_form_is_survived_with_few_calls_and_drained_with_fewer(node, hub):
    node.start_daemon(RANKLOG_RETRY_BASE_S="0.3", RANKLOG_RETRY_MAX_S="0.6")
    node.train("before")
    node.upload()
    began = len(hub.arrivals)
    tries = 0
    for number, (text, fields) in enumerate(outages(hub)):
        with hub.fault("*", **fields) as fault:
            node.train(f"run-{number}-a", f"run-{number}-b", f"run-{number}-c")
            node.wait_for_trouble("transient", text)
            wait_for(lambda fault=fault: fault.struck >= 2, "it is tried again")
        tries += fault.struck
    hub.stop()
    node.train("refused")
    node.wait_for_trouble("transient", "reachable")
    node.wait_for_shards(1)
    waiting = len(node.waiting())
    start = len(hub.arrivals)
    hub.start()
    node.upload()
    drained = len(calls_since(hub, start))
    assert drained <= 8, f"{drained} calls for {waiting} shards: a backlog makes larger calls, not more of them"
    assert start - began <= tries + 5 * len(node.keys), "each try is one request while the Hub is down"
    check(node)


@pytest.mark.full
def test_a_hub_that_commits_and_drops_every_other_reply_gets_each_shard_once(node, hub):
    node.start_daemon()
    for number in range(8):
        with hub.fault("*", drop_reply=True, skip=number % 4, times=2):
            node.train(f"run-{number}")
    check(node)
    assert all(len(hashes) == 1 for hashes in node.bucket.writes.values()), "a retry looks before it sends"


# 35

FLUSHES = """
import sys, time
import ranklog
ranklog.init(project="latency", id=sys.argv[1])
spent = []
for n in range(60):
    ranklog.log({"n": n})
    began = time.perf_counter()
    assert ranklog.flush(20)
    spent.append(time.perf_counter() - began)
ranklog.finish()
print(sorted(spent)[len(spent) // 2])
"""


def flush_s(node: BucketNode, run: str) -> float:
    """The median time from log() to the acknowledgement that it is durable."""
    done = node.python(FLUSHES, run)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("batch", {"hang": True}),
        ("put", {"hang": True}),
        ("paths", {"slow": True}),
        pytest.param("write_token", {"slow": True}, marks=pytest.mark.full),
        pytest.param("shards", {"hang": True}, marks=pytest.mark.full),
        pytest.param("grant", {"slow": True}, marks=pytest.mark.full),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_hub_that_hangs_holds_up_neither_acknowledgements_nor_the_watchdog(node, hub, route, fields):
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(node.path / "notify"))
    notify.setblocking(False)
    with notify:
        node.start_daemon(RANKLOG_UPLOAD_DEADLINE_S="1", NOTIFY_SOCKET=str(node.path / "notify"))
        sound_s = flush_s(node, "sound")
        node.upload()
        node.new_token()  # Nothing is left over from the last upload.
        with hub.fault(route, **fields) as fault:
            node.train("a")
            wait_for(lambda: fault.struck, "it hangs")
            said(notify)
            hung_s = flush_s(node, "hung")
            wait_for(lambda: b"WATCHDOG=1" in said(notify), "the watchdog hears of us")
            wait_for(lambda: fault.struck >= 2, "the deadline ends a call, and it is tried again")
        check(node)
    assert hung_s < 5 * sound_s + 0.1, f"an acknowledgement took {sound_s:.4f} s before, and {hung_s:.4f} s beside it"


def said(notify: socket.socket) -> bytes:
    """Return what the daemon has told its service manager since the last look."""
    heard = []
    try:
        while True:
            heard.append(notify.recv(4096))
    except BlockingIOError:
        return b"\n".join(heard)


# 36


def test_of_a_batch_that_fails_in_part_only_what_is_missing_is_sent_again(node, hub):
    node.start_daemon()
    wall = hub.fault("*", status=503)
    node.train(*(f"bad-{number}" for number in range(3)), *(f"good-{number}" for number in range(7)))
    node.wait_for_shards(10)
    partial = hub.fault("batch", fail_paths="run_id=bad", times=3)
    wall.end()
    check(node)
    assert partial.struck == 3
    assert all(len(hashes) == 1 for hashes in node.bucket.writes.values()), "what was there was not sent again"


# 37

IN_OWN_MOUNTS = 'mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


@pytest.mark.parametrize("silent", [False, True], ids=["no-resolver", "blackhole"])
def test_a_name_that_cannot_be_resolved_for_a_while_costs_nothing(node, hub, silent):
    """The daemon's view of names is its own, in a mount namespace: first without the Hub's name, then with it."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace with an own /etc/hosts")
    hosts, resolver = node.path / "hosts", node.path / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n")
    resolver.write_text("nameserver 127.0.0.53\noptions timeout:1 attempts:1\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dead:
        if silent:
            dead.bind(("127.0.0.53", 53))
        node.wrapper = ["unshare", "-m", "sh", "-c", IN_OWN_MOUNTS, str(hosts), str(resolver)]
        node.start_daemon(HF_ENDPOINT=hub.url.replace("127.0.0.1", "hub.ranklog.test"))
        node.train("a")
        node.wait_for_trouble("transient", "reachable from this node")
        assert flush_s(node, "meanwhile") < 1.0, "far below what a resolver takes to give up"
        assert hub.requests.total() == 0
        with hosts.open("a") as file:
            file.write("127.0.0.1 hub.ranklog.test\n")
        check(node)


# 47


def test_a_stop_with_more_pending_than_the_uplink_carries_ends_in_time_and_leaves_the_rest_whole(node, hub):
    daemon = node.start_daemon(RANKLOG_UPLOAD_BATCH_MAX="1", RANKLOG_STOP_DEADLINE_S="4")
    wall = hub.fault("*", status=503)
    for number in range(6):
        node.train(f"run-{number}", count=150)
        node.wait_for_shards(number + 1)
    order = list(node.waiting())
    assert len(order) >= 6
    sizes = [path.stat().st_size for path in node.waiting().values()]
    hub.uplink_bytes_s = round(sum(sizes) / len(sizes))  # About one shard a second.
    wall.end()
    daemon.terminate()
    assert daemon.wait(30) == 0
    left = list(node.waiting())
    assert left, "the uplink was too slow for all of it"
    assert left == order[-len(left) :], "oldest first"
    there = set(node.keys)
    assert there | set(left) == set(order)
    assert there & set(left) <= {left[0]}, "one may have arrived in the last moment, and is not marked"
    hub.uplink_bytes_s = 0
    node.start_daemon()
    check(node)


# Hubs that are down while a job runs

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RANKS = """
import os
import sys
from pathlib import Path
import torch.distributed as dist
import ranklog
from witness import Witness
dist.init_process_group("gloo")
ranklog.init(project="faults")
witness = Witness(f"{sys.argv[2]}-{os.environ['RANK']}", Path(sys.argv[1]))
for _ in range(60):
    witness.log()
dist.barrier()
ranklog.finish(timeout=20)
dist.destroy_process_group()
sys.exit(int(sys.argv[3]))
"""
"""Two ranks as torchrun starts them; each leaves its proof."""


def torchrun(node: BucketNode, name: str, code: int = 0) -> list[str]:
    """Return the command of a job of two ranks."""
    pytest.importorskip("torch", reason='pip install "ranklog[test-all]"')
    script = node.path / "ranks.py"
    script.write_text(RANKS)
    return [*TORCHRUN, str(script), str(oracle.ledgers_of(node)), name, str(code)]


@pytest.mark.parametrize("restart", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_torchrun_job_whose_hub_is_down_from_start_to_end_loses_nothing(node, hub, restart):
    """The daemon drains long after the trainer is gone; also one that was stopped meanwhile and is started again."""
    hub.stop()
    daemon = node.start_daemon()
    done = node.run(torchrun(node, "job"), timeout_s=240, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    node.wait_for_trouble("transient", "reachable")
    if restart:
        daemon.terminate()
        assert daemon.wait(30) == 0
    assert node.waiting()
    hub.start()
    if restart:
        daemon = node.start_daemon()
    check(node)
    assert node.ping() == daemon.pid
    accounts = read_ledgers(oracle.ledgers_of(node))
    assert [accounts[f"job-{rank}"].returned for rank in range(2)] == [60, 60]


def test_a_job_that_ends_before_its_hub_is_back_says_what_waits_and_a_later_daemon_delivers_it(node, hub):
    hub.stop()
    run = [sys.executable, "-m", "ranklog.cli", "run", "--drain", "2s", "--"]
    done = node.run([*run, *torchrun(node, "job", code=3)], timeout_s=240, OMP_NUM_THREADS="1")
    assert done.returncode == 1, f"what torchrun says of a rank that failed, and no code of ours: {done.stderr}"
    assert node.ping() == 0, "its daemon has gone with it"
    last = next(line for line in done.stderr.splitlines() if "Bring them in with: " in line)
    assert "records are not in" in last
    assert "Nothing is lost" in last
    assert node.waiting() or node.sealed()
    hub.start()
    command = shlex.split(last.partition("Bring them in with: ")[2])
    synced = node.ranklog(*command[1:], timeout_s=120)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    node.start_daemon()
    check(node)
