"""The README's table of promises, a test for each row, with real processes, real kills and real disks.

One oracle for all: what `log()` returned for is in the parquet exactly once, in each writer's order, with the value
that was logged; what was refused lies within a gap row; nothing was made up.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from node import Node, wait_for

TRAINER = """
import os, sys, time, random
import ranklog
rank, seconds, pause = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
proof = os.open(f"proof-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
ranklog.init(project="promises", id="job", rank=int(rank), name="x")
os.write(proof, b"ready\\n")
slowest, count, end = 0.0, 0, time.monotonic() + seconds
while time.monotonic() < end and not os.path.exists("enough"):
    began = time.perf_counter()
    ranklog.log({"n": count, "x": count / 7})
    slowest = max(slowest, time.perf_counter() - began)
    os.write(proof, b"%d\\n" % count)
    count += 1
    if pause:
        time.sleep(pause)
ranklog.finish(timeout=10)
os.write(proof, b"slowest %f\\n" % slowest)
"""


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node


class Job:
    """Trainers and what they have proven."""

    def __init__(self, node: Node, ranks: int, seconds: float, pause: float = 0.002, **env: str) -> None:
        self.node = node
        self.env = env
        self.processes = [self._start(rank, seconds, pause) for rank in range(ranks)]
        wait_for(lambda: all(self._lines(rank) for rank in range(ranks)), "every rank logs")

    def _start(self, rank: int, seconds: float, pause: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TRAINER, str(rank), str(seconds), str(pause)]
        log = (self.node.path / "trainer.log").open("ab")
        return subprocess.Popen(command, env=self.node.env | self.env, cwd=self.node.path, stderr=log)

    def _lines(self, rank: int) -> list[str]:
        path = self.node.path / f"proof-{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def logged(self, rank: int) -> int:
        """How many records log() returned for, at least."""
        return sum(line.isdigit() for line in self._lines(rank))

    def reach(self, count: int) -> None:
        wait_for(lambda: all(self.logged(rank) >= count for rank in range(len(self.processes))), f"{count} records each")

    def enough(self) -> None:
        (self.node.path / "enough").touch()

    def wait(self) -> None:
        for process in self.processes:
            assert process.wait(60) in (0, -signal.SIGKILL), (self.node.path / "trainer.log").read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    def slowest_s(self) -> float:
        return max(float(self._lines(rank)[-1].split()[1]) for rank in range(len(self.processes)))


def check(job: Job) -> dict[int, int]:
    """The oracle. Returns the records that gap rows account for, by rank."""
    by_rank: dict[int, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    gaps: dict[int, int] = defaultdict(int)
    for row in job.node.raw_rows("kind in ('metrics', 'gap')"):
        if row["kind"] == "gap":
            gap = json.loads(row["text"])
            gaps[row["rank"]] += gap["last"] - gap["first"] + 1
            continue
        record = by_rank[row["rank"]][row["seq"]]
        assert row["key"] not in record, f"doubled: {row}"
        record[row["key"]] = row["value"]
    for rank in range(len(job.processes)):
        records = [by_rank[rank][seq] for seq in sorted(by_rank[rank])]
        counts = [int(record["n"]) for record in records]
        logged = job.logged(rank)
        assert counts == sorted(set(counts)), f"rank {rank}: order"
        assert all(record["x"] == record["n"] / 7 for record in records), f"rank {rank}: values"
        lost = set(range(logged)) - set(counts)
        assert len(lost) == gaps[rank], f"rank {rank}: {len(lost)} lost, {gaps[rank]} in gaps"
        # A killed rank may have logged one record that it did not live to note down.
        assert set(counts) <= set(range(logged + 1)), f"rank {rank}: invented"
    return {rank: count for rank, count in gaps.items() if count}


def test_nothing_is_lost_when_the_trainer_is_killed(node):
    node.start_daemon()
    for pause in (0.0, 0.002):
        for proof in node.path.glob("proof-*"):
            proof.unlink()
        job = Job(node, ranks=2, seconds=60, pause=pause)
        job.reach(random.randint(200, 800))
        job.kill()
        node.upload()
        assert not check(job)
        subprocess.run(["rm", "-rf", str(node.data)], check=True)


def kill_shipper(node: Node) -> bool:
    """Kill it; False if the last report is of one that is gone already."""
    try:
        os.kill(node.status()["shipper"]["pid"], signal.SIGKILL)
    except (KeyError, ProcessLookupError):
        return False
    return True


def test_nothing_is_lost_or_doubled_when_either_daemon_process_is_killed(node):
    daemon = node.start_daemon("--seal-age", "0.3s")
    job = Job(node, ranks=3, seconds=60)
    for round_ in range(4):
        job.reach(300 * (round_ + 1))
        wait_for(lambda: kill_shipper(node), "the shipper is there to be killed")
        job.reach(300 * (round_ + 1) + 150)
        daemon.kill()
        daemon.wait()
        daemon = node.start_daemon("--seal-age", "0.3s")
    job.enough()
    job.wait()
    node.upload()
    assert not check(job)


def test_nothing_is_lost_when_trainer_and_daemon_are_killed_together(node):
    daemon = node.start_daemon()
    job = Job(node, ranks=2, seconds=60, pause=0.0)
    job.reach(2000)
    daemon.kill()
    job.kill()
    node.start_daemon()
    node.upload()
    assert not check(job)


def test_nothing_is_lost_while_the_daemon_is_absent_or_frozen(node):
    job = Job(node, ranks=2, seconds=60)
    wait_for(lambda: list(node.spool.glob("*.spool")), "records are spooled")
    daemon = node.start_daemon()
    job.reach(job.logged(0) + 200)
    daemon.send_signal(signal.SIGSTOP)
    wait_for(lambda: list(node.spool.glob("*.spool")), "records are spooled again")
    daemon.send_signal(signal.SIGCONT)
    job.reach(job.logged(0) + 200)
    job.enough()
    job.wait()
    node.upload()
    assert not check(job)


def test_past_the_spools_cap_the_newest_records_are_a_counted_gap(node):
    job = Job(node, 1, 60, 0.0, RANKLOG_SPOOL_SIZE_BYTES="300000", RANKLOG_JOURNAL_SIZE_BYTES="1200000")
    job.reach(60_000)
    node.start_daemon()
    wait_for(lambda: node.status()["records"] > 1000, "the daemon takes the spool")
    job.reach(job.logged(0) + 2000)
    job.enough()
    job.wait()
    node.upload()
    gaps = check(job)
    assert 0 < gaps[0] < job.logged(0)


def test_a_store_that_is_down_for_the_whole_job_gets_everything_later(node):
    node.data.write_text("not a directory")
    node.start_daemon("--seal-age", "0.2s", "--retry-max", "0.5s", "--retry-base", "0.1s")
    job = Job(node, ranks=2, seconds=60)
    job.reach(1000)
    job.enough()
    job.wait()
    wait_for(lambda: node.status()["shipper"].get("last_error"), "the failure is told in status")
    node.data.unlink()
    node.upload()
    assert not check(job)


def test_training_goes_on_when_the_disk_is_full_and_records_return_with_the_space(node, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs: run as root")
    for directory in (node.state, node.spool):
        directory.mkdir()
    mounts = [node.state, node.spool]
    for directory, size in zip(mounts, ("12m", "600k"), strict=True):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(directory)], check=True)
    try:
        flags = ("--disk-free-min", "1MiB", "--reserve-size", "1MiB")
        node.start_daemon(*flags)
        ballast = node.state / "ballast"
        with ballast.open("wb") as file:
            file.write(bytes(21 << 19))
        job = Job(node, ranks=2, seconds=60, pause=0.001)
        job.reach(1500)
        assert node.status()["full"], "the daemon says that it is full"
        ballast.unlink()
        wait_for(lambda: not node.status()["full"], "the daemon takes records again")
        job.reach(job.logged(0) + 300)
        job.enough()
        job.wait()
        node.upload()
        assert not check(job), "the journal and the spool held everything meanwhile"
        for daemon in node.daemons:
            daemon.terminate()
            daemon.wait(30)
    finally:
        for directory in mounts:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def test_run_waits_for_the_upload_before_it_returns(node):
    script = node.path / "train.py"
    script.write_text("import ranklog\nranklog.init(project='d')\nfor n in range(500): ranklog.log({'n': n})\nimport os; os._exit(3)")
    command = [sys.executable, "-m", "ranklog.cli", "run", "--drain", "60s", "--", sys.executable, str(script)]
    done = node.run(command)
    assert done.returncode == 3, done.stderr
    assert sorted(row["value"] for row in node.raw_rows("key = 'n'")) == list(range(500))


def test_log_never_waits_for_a_frozen_daemon(node):
    daemon = node.start_daemon()
    job = Job(node, ranks=1, seconds=60)
    job.reach(100)
    daemon.send_signal(signal.SIGSTOP)
    frozen_s = time.monotonic()
    job.reach(job.logged(0) + 1000)
    assert time.monotonic() - frozen_s < 30
    daemon.send_signal(signal.SIGCONT)
    job.enough()
    job.wait()
    # The budget is 10 ms; on a loaded test machine only a wait for the daemon itself would come near this.
    assert job.slowest_s() < 1.0
    node.upload()
    assert not check(job)


