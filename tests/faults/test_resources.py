"""What a node runs out of: room, descriptors, memory, a disk that answers. Matrix rows 18, 39 (descriptors), 44, 46, 51.

Everything is real here: small tmpfs, an ext4 that froze or broke, RLIMITs, a memory cgroup. Through all of it trainers
log (`witness`): no call raises or hangs, what is refused is counted, and once the fault is over all goes on by itself.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import combinations
from pathlib import Path

import pytest

import oracle
from loopdisk import LoopDisk, fill, loop_disk, require_root, small_tmpfs
from node import Node, wait_for
from oracle import May, ledgers_of
from ranklog.frame import Kind
from ranklog.framefile import FileName, format_name
from ranklog.start import encode_start
from segments import frame, start_of
from witness import Account, read_ledgers

Process = subprocess.Popen[bytes]
MEMORY_MAX = 256 << 20
"""Of ingest and shipper together, with the page cache: a third of what the units allow."""
SPOOL_FILE_SIZE = 64 << 20
QUICK = {
    "RANKLOG_SEAL_AGE_S": "0.3", "RANKLOG_RESCAN_INTERVAL_S": "0.3", "RANKLOG_DISK_FREE_MIN_BYTES": "0",
    "RANKLOG_RESERVE_SIZE_BYTES": "512K", "RANKLOG_RETRY_BASE_S": "0.1", "RANKLOG_RETRY_MAX_S": "0.5",
}  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        node.env |= QUICK
        yield node


def move(node: Node, **places: Path) -> None:
    """Put this node's rooms somewhere else."""
    variables = {"state": "STATE_DIR", "spool": "SPOOL_DIR", "data": "TO"}
    for name, path in places.items():
        setattr(node, name, path)
        node.env[f"RANKLOG_{variables[name]}"] = str(path)
    node.url = str(node.data)


def trainer(node: Node, name: str, *flags: str) -> Process:
    with (node.path / f"{name}.log").open("wb") as log:
        command = oracle.witness(name, node, "--pause", "0.001", *flags)
        return subprocess.Popen(command, env=node.env, cwd=node.path, stderr=log, stdout=log)


def account(node: Node, name: str) -> Account:
    return read_ledgers(ledgers_of(node)).get(name, Account(0, 0, 0.0, 0))


def log_more(node: Node, names: list[str], count: int) -> None:
    """Wait until each of these trainers has logged so many more records."""
    before = {name: account(node, name).returned for name in names}
    wait_for(lambda: all(account(node, n).returned >= before[n] + count for n in names), "they log", 60)


def end(node: Node, trainers: list[Process]) -> None:
    """Tell the trainers that it is enough; each of them ends well."""
    (node.path / "enough").touch()
    for process in trainers:
        assert process.wait(60) == 0, "\n".join(path.read_text() for path in node.path.glob("*.log"))
    (node.path / "enough").unlink()


FULL = ("state", "spool", "journal", "store")
SETS = [set(names) for size in range(1, 5) for names in combinations(FULL, size)]
SAMPLE = [{"state"}, {"store"}, {"state", "spool"}, set(FULL)]


@pytest.mark.parametrize(
    "full", [pytest.param(s, id="+".join(sorted(s)), marks=() if s in SAMPLE else pytest.mark.full) for s in SETS]
)
def test_training_goes_on_while_disks_are_full_and_all_is_brought_in_once_there_is_room(
    node: Node, full: set[str]
) -> None:
    with ExitStack() as stack:
        disks = {
            "state": stack.enter_context(small_tmpfs(node.path / "disk-state", 8 << 20)),
            "spool": stack.enter_context(small_tmpfs(node.path / "disk-spool", 80 << 20)),
            "store": stack.enter_context(small_tmpfs(node.path / "disk-store", 16 << 20)),
            "journal": stack.enter_context(small_tmpfs(node.journal, 16 << 20)),
        }
        move(node, state=disks["state"] / "state", spool=disks["spool"] / "spool", data=disks["store"] / "data")
        daemon = node.start_daemon()
        names = ["before-0", "before-1", "late"]
        trainers = [trainer(node, name) for name in names[:2]]
        log_more(node, names[:2], 100)
        for name in full:
            fill(disks[name] / "ballast")
        trainers.append(trainer(node, names[2]))
        log_more(node, names, 500)
        if "state" in full:
            wait_for(lambda: node.status()["full"], "it says that it is full")
            assert not (node.state / "reserve").exists(), "given to the deletes"
        if "store" in full:
            wait_for(lambda: "space" in node.status()["shipper"]["last_error"], "it says what is wrong")
        if full == {"state"}:
            wait_for(lambda: uploaded_all(node), "deletes and renames work on a full disk: the shipper drains it")
        log_more(node, names, 100)
        for name in full:
            (disks[name] / "ballast").unlink()
        log_more(node, names, 100)
        end(node, trainers)
        wait_for(lambda: not node.status()["full"], "it finds that there is room again")
        verdict = oracle.check(node, May.LOSE_NOTHING)
        assert verdict.delivered >= 3 * 800
        assert daemon.poll() is None, "it never needed a restart"
        daemon.terminate()
        assert daemon.wait(30) == 0


def uploaded_all(node: Node) -> bool:
    """Return whether everything that the daemon took is in the store."""
    marks = node.status()["watermarks"]
    return bool(marks["uploaded"] == marks["received"])


def test_beyond_every_cap_the_newest_records_are_refused_counted_and_visible_as_gaps(node: Node) -> None:
    with ExitStack() as stack:
        disk = stack.enter_context(small_tmpfs(node.path / "disk", 80 << 20))
        stack.enter_context(small_tmpfs(node.journal, 1 << 20))
        move(node, state=disk / "state", spool=disk / "spool")
        node.env |= {"RANKLOG_JOURNAL_FILE_SIZE_BYTES": "128K"}
        node.start_daemon()
        names = ["a", "b"]
        trainers = [trainer(node, name, "--pause", "0.0002") for name in names]
        log_more(node, names, 100)
        fill(disk / "ballast")
        log_more(node, names, 6000)
        assert all("room" in (node.path / f"{name}.log").read_text() for name in names), "they say so, once"
        (disk / "ballast").unlink()
        wait_for(lambda: not node.status()["full"], "it finds that there is room again")
        log_more(node, names, 2000)
        end(node, trainers)
        verdict = oracle.check(node, May.LOSE_COUNTED)
        assert sum(verdict.missing.values()) == verdict.in_gaps > 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    with loop_disk(tmp_path, "disk", 256 << 20) as disk:
        yield disk


def test_a_disk_that_turns_read_only_ends_the_daemon_in_words_and_the_next_one_goes_on(
    node: Node, disk: LoopDisk
) -> None:
    """As ext4 does after an error. Somebody mounts it again, or the machine reboots; a supervisor does the rest."""
    move(node, state=disk.point / "state")
    daemon = node.start_daemon()
    trainers = [trainer(node, name, "--flush-every", "50") for name in ("a", "b")]
    log_more(node, ["a", "b"], 200)
    disk.break_down()
    assert daemon.wait(30) == 1
    told = (node.path / "daemon.log").read_text()
    assert "ranklogd: OSError: [Errno 30] Read-only file system" in told
    refused = node.run([sys.executable, "-m", "ranklogd"])
    assert refused.returncode == 1, "a restart may help, later"
    assert "Read-only file system" in refused.stderr
    assert str(node.state) in refused.stderr, "it names the place"
    assert "Traceback" not in refused.stderr
    log_more(node, ["a", "b"], 200)
    disk.power_on()
    node.start_daemon()
    end(node, trainers)
    oracle.check(node)


def test_a_spool_disk_that_turns_read_only_while_no_daemon_runs_costs_nothing_within_the_journal(
    node: Node, disk: LoopDisk
) -> None:
    move(node, spool=disk.point / "spool")
    trainers = [trainer(node, name) for name in ("a", "b")]
    log_more(node, ["a", "b"], 100)
    wait_for(lambda: len(list(node.spool.glob("*.spool"))) == 2, "they spool")
    disk.break_down()
    log_more(node, ["a", "b"], 500)
    end(node, trainers)
    disk.power_on()
    node.start_daemon()
    oracle.check(node)


def test_a_disk_that_freezes_stops_no_trainer_and_loses_nothing(node: Node, disk: LoopDisk) -> None:
    frozen_s = 4.0
    move(node, state=disk.point / "state", spool=disk.point / "spool", data=disk.point / "data")
    daemon = node.start_daemon()
    names = ["a", "b"]
    trainers = [trainer(node, name, "--flush-every", "0") for name in names]
    log_more(node, names, 100)
    with disk.frozen():
        thaw_s = time.monotonic() + frozen_s
        wait_for(lambda: time.monotonic() > thaw_s, "the time is over")
    assert all(account(node, name).returned > 300 for name in names)
    end(node, trainers)
    assert daemon.poll() is None
    oracle.check(node)
    for name in names:
        assert account(node, name).slowest_s < frozen_s / 2, "it did not wait for the disk"


def test_a_daemon_with_few_descriptors_serves_all_clients_in_the_end(node: Node) -> None:
    """libzmq aborts where it cannot accept a connection: then its supervisor, here we, starts the next one."""
    ended: list[int] = []

    def tend() -> None:
        if not node.daemons or node.daemons[-1].poll() is not None:
            ended.extend(daemon.returncode for daemon in node.daemons[-1:])
            node.daemons.append(limited(node, "ulimit -n 64"))

    tend()
    wait_for(lambda: node.ping(), "it answers")
    trainers = [trainer(node, f"t{n}", "--count", "300", "--flush-every", "50") for n in range(12)]
    idlers = [connection(node) for _ in range(80)]

    def over() -> bool:
        tend()
        return all(process.poll() is not None for process in trainers)

    wait_for(over, "all trainers end", 120)
    assert [process.returncode for process in trainers] == [0] * 12
    for idler in idlers:
        idler.close()

    def sound() -> bool:
        tend()
        return node.ping() != 0

    wait_for(sound, "it answers")
    oracle.check(node)
    assert 0 < len(ended) < 20, ended


def leave(directory: Path, number: int, records: int, pad: int, *, written_s: float = 0) -> str:
    """Leave the spool files of a dead writer with so many records; return the writer. The first one has `n` 0."""
    directory.mkdir(parents=True, exist_ok=True)
    start = start_of(number, project="backlog", run=f"run-{number}", rank=number)
    n, part, text = 0, 0, "x" * pad
    while n < records:
        data = bytearray(encode_start(start))
        while n < records and len(data) < SPOOL_FILE_SIZE:
            data += frame(
                Kind.METRICS, n + 1, {"n": float(n), "text": text, **{f"m{k}": n / (k + 1) for k in range(8)}}
            )
            n += 1
        path = directory / format_name(FileName(start.writer, part, "spool"))
        path.write_bytes(data)
        os.utime(path, (written_s or time.time(),) * 2)
        part += 1
    return start.writer


def limited(node: Node, limit: str) -> Process:
    """Start a daemon behind a line of shell."""
    with (node.path / "daemon.log").open("ab") as log:
        command = ["bash", "-c", f"{limit} && exec {sys.executable} -m ranklogd"]
        return subprocess.Popen(command, env=node.env, cwd=node.path, stdout=log, stderr=log)


def connection(node: Node) -> socket.socket:
    """Open a connection that says nothing; one that is refused is as good."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.setblocking(False)
    with suppress(OSError):
        client.connect(str(Path(node.env["RANKLOG_RUNTIME_DIR"]) / "ranklog.sock"))
    return client


@pytest.mark.parametrize("torn", [False, True])
def test_a_large_open_segment_is_recovered_in_little_memory(node: Node, torn: bool) -> None:
    node.env |= {"RANKLOG_SEAL_SIZE_BYTES": "64M", "RANKLOG_SEAL_AGE_S": "1h"}
    records = 56_000
    writer = leave(node.spool, 1, records, 880)
    daemon = node.start_daemon()
    wait_for(lambda: node.leftovers() == [], "it adopts", 100)
    daemon.kill()
    daemon.wait()
    (segment,) = (node.state / "wal").glob("*.open")
    assert segment.stat().st_size > 50 << 20
    if torn:
        with segment.open("ab") as file:
            file.write(b"torn" * 1000)
    with memory_limit(MEMORY_MAX) as group:
        daemon = limited(node, f"echo $$ > {group}/cgroup.procs")
        node.daemons.append(daemon)
        wait_for(node.ping, "it answers")
        assert oracle.peak_rss(daemon.pid) < (64 << 20) + (56 << 20), "the segment once, and what a daemon has anyhow"
        node.upload(100)
        assert oom_kills(group) == 0
        check_backlog(node, {writer: records})
        daemon.kill()
        daemon.wait()


def test_a_trainer_that_is_killed_for_its_memory_is_adopted(node: Node) -> None:
    node.start_daemon()
    with memory_limit(96 << 20) as group:
        source = "import sys, witness; sys.argv[1:] = {!r}; hoard = []; {}; witness.main()"
        grow = "import threading; threading.Timer(1, lambda: [hoard.append(bytearray(1 << 20)) for _ in range(1000)]).start()"
        code = source.format(["hog", str(ledgers_of(node)), "--pause", "0.001"], grow)
        command = ["bash", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "-", sys.executable, "-c", code]
        hog = subprocess.Popen(command, env=node.env, cwd=node.path, stderr=subprocess.DEVNULL)
        assert hog.wait(60) == -signal.SIGKILL
        assert oom_kills(group) == 1
    verdict = oracle.check(node)
    assert verdict.delivered > 50


@pytest.mark.parametrize("spooling", [True, False])
def test_a_limit_on_the_size_of_files_costs_a_trainer_nothing(node: Node, spooling: bool) -> None:
    """`ulimit -f`: EFBIG, with a short write in front of it, in the middle of a frame."""
    node.env |= {"RANKLOG_JOURNAL_FILE_SIZE_BYTES": "64K"}
    if not spooling:
        node.start_daemon()
    command = oracle.witness("small", node, "--count", "6000", "--pause", "0.001", "--no-finish")
    done = node.run(["bash", "-c", 'ulimit -f 200 && exec "$@"', "-", *command])
    assert done.returncode == 0, done.stderr
    if spooling:
        sizes = [path.stat().st_size for path in node.spool.glob("*.spool")]
        assert len(sizes) > 1
        assert max(sizes) <= 200 << 10
        node.start_daemon()
    verdict = oracle.check(node)
    assert verdict.delivered == 6000
    assert list((node.state / "quarantine").iterdir()) == [], "nothing was damaged"


def test_after_a_long_absence_spools_come_in_oldest_first_and_what_was_beyond_the_cap_is_a_gap(node: Node) -> None:
    node.env |= {
        "RANKLOG_SPOOL_SIZE_BYTES": "256K",
        "RANKLOG_JOURNAL_SIZE_BYTES": "256K",
        "RANKLOG_JOURNAL_FILE_SIZE_BYTES": "64K",
    }
    names = [f"t{n}" for n in range(8)]
    trainers = [trainer(node, name, "--pause", "0", "--count", "6000") for name in names]
    assert [process.wait(100) for process in trainers] == [0] * 8
    assert "ranklog sync" in (node.path / "t0.log").read_text()
    now_s = time.time()
    aged = {leave(node.spool, n, 100, 0, written_s=now_s - 3600 * n): n for n in range(1, 9)}
    node.start_daemon()
    verdict = oracle.check(node, May.LOSE_COUNTED)
    missing = sum(verdict.missing.values())
    assert set(verdict.missing) == set(names), "each of them wrote more than its cap"
    assert missing <= verdict.in_gaps <= missing + len(names), "counted, and perhaps the end record with them"
    check_backlog(node, dict.fromkeys(aged, 100))
    first = {row["writer"]: row["lsn"] for row in node.raw_rows("project = 'backlog' and key = 'n' and value = 0")}
    assert sorted(aged, key=aged.__getitem__, reverse=True) == sorted(first, key=first.__getitem__)


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """Give a memory cgroup: who writes its pid to `cgroup.procs` may use so much, page cache included."""
    require_root()
    root = Path("/sys/fs/cgroup/memory")
    if not (root / "memory.limit_in_bytes").exists():
        pytest.skip("needs a memory controller of cgroup v1; elsewhere the units' MemoryMax does the same")
    group = root / f"ranklog-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:

        def gone() -> bool:
            with suppress(OSError):
                group.rmdir()
            return not group.exists()

        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_for(gone, "the cgroup is empty")


def oom_kills(group: Path) -> int:
    """Return how often the kernel killed a process of this group for its memory."""
    lines = (group / "memory.oom_control").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@pytest.mark.parametrize("size_mb", [150, pytest.param(1000, marks=pytest.mark.full)])
def test_a_large_backlog_is_adopted_by_a_daemon_with_little_memory(node: Node, size_mb: int) -> None:
    node.env |= {"RANKLOG_SEAL_SIZE_BYTES": "64M", "RANKLOG_SEAL_AGE_S": "10"}
    records = size_mb * 1000
    writer = leave(node.spool, 1, records, 880)
    with memory_limit(MEMORY_MAX) as group:
        daemon = limited(node, f"echo $$ > {group}/cgroup.procs")
        node.daemons.append(daemon)
        wait_for(node.ping, "it answers")
        wait_for(lambda: node.leftovers() == [], "it adopts", 200)
        node.upload(200)
        assert oom_kills(group) == 0
        assert daemon.poll() is None
        check_backlog(node, {writer: records})
        oracle.check_fresh(node)
        daemon.kill()
        daemon.wait()


def check_backlog(node: Node, expected: dict[str, int]) -> None:
    """Each of these writers has records 0 … n - 1 in the store, once."""
    import duckdb

    shards = str(node.data / "v1" / "**" / "*.parquet")
    found = duckdb.sql(
        f"select writer, count(*), count(distinct value), min(value), max(value) from '{shards}' "
        "where key = 'n' and project = 'backlog' group by writer"
    ).fetchall()
    assert sorted(found) == sorted((writer, n, n, 0.0, n - 1.0) for writer, n in expected.items())
