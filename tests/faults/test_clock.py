"""The clock is set, forwards and backwards, by seconds and by decades, while everything runs: row 25 of the fault matrix.

Both sides ask Python for the time of day, and nobody else: a `sitecustomize` module first on the path shifts `time.time`
and `time.time_ns` by what stands in a file, which the test rewrites mid-run. That it works is seen in the rows' times.
The monotonic clock is another one for a process in a time namespace of its own.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

import oracle
from ingesting import RawPeer, frames
from node import Node, wait_for
from ranklog.start import encode_start
from ranklog.stores.dir import DirStore
from ranklogd.clockstep import ClockStep
from ranklogd.config import Config, load_config
from ranklogd.ship.shipper import RETAIN_INTERVAL_S, Shipper
from ranklogd.wal.segment import sealed_name
from segments import SegmentBuilder, start_of

YEAR_S = 365 * 86_400
SHIM = """
import os, time
_path = os.environ.get("TEST_CLOCK", "")
if _path:
    _seconds, _nanoseconds = time.time, time.time_ns
    def _shift_s():
        fd = os.open(_path, os.O_RDONLY)
        try:
            return int(os.read(fd, 100))
        finally:
            os.close(fd)
    time.time = lambda: _seconds() + _shift_s()
    time.time_ns = lambda: _nanoseconds() + _shift_s() * 10**9
"""


class Clock:
    """The time of day of processes that have `env`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.env = {"TEST_CLOCK": str(path)}
        self.set(0)

    def set(self, shift_s: int) -> None:
        """Set it so far ahead of the real one."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{shift_s}")
        new.rename(self._path)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM)
    with Node(tmp_path) as node:
        node.env["PYTHONPATH"] = f"{tmp_path / 'shim'}{os.pathsep}{node.env['PYTHONPATH']}"
        node.env["RANKLOG_SEAL_AGE_S"] = "0.5"
        yield node


class Trainer:
    """A witness that logs until it is told that it is enough."""

    def __init__(self, node: Node, env: dict[str, str], *prefix: str) -> None:
        self._node = node
        self.process = subprocess.Popen(
            [*prefix, *oracle.witness("trainer", node, "--pause", "0.002", "--flush-every", "50")],
            env=node.env | env, cwd=node.path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def durable(self) -> int:
        accounts = oracle.read_ledgers(oracle.ledgers_of(self._node))
        return accounts["trainer"].durable if "trainer" in accounts else 0

    def goes_on(self) -> None:
        """See that what is logged from now on becomes durable, and is uploaded without anybody's asking."""
        before = self.durable
        wait_for(lambda: self.durable > before + 50, "records become durable")
        lsn = self._node.status()["watermarks"]["durable"]
        wait_for(lambda: self._node.status()["watermarks"]["uploaded"] >= lsn, "they are sealed by age, and uploaded")

    def finish(self) -> None:
        (self._node.path / "enough").touch()
        _, words = self.process.communicate(timeout=60)
        (self._node.path / "enough").unlink()
        assert self.process.returncode == 0, words

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def years(node: Node, column: str) -> set[int]:
    """Return the years in a column of times; fails where they do not follow the order of the log."""
    rows = sorted(node.raw_rows("project = 'faults'"), key=lambda row: row["lsn"])
    return {row[column].year for row in rows}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_calm(node: Node) -> None:
    """See that neither of the daemon's processes spins: over two seconds each takes less than one of CPU."""
    pids = (node.ping(), node.status()["shipper"]["pid"])
    before, until_s = [cpu_s(pid) for pid in pids], time.monotonic() + 2
    wait_for(lambda: time.monotonic() >= until_s, "two seconds have passed")
    assert max(cpu_s(pid) - spent for pid, spent in zip(pids, before, strict=True)) < 1.0


SAMPLE = (10 * YEAR_S, -10 * YEAR_S, 3600, -1)
SWEEP = (*SAMPLE, -3600, 1, 30 * YEAR_S, -50 * YEAR_S, 200 * YEAR_S, 86_400, -86_400, 59, -61)


@pytest.mark.parametrize("shifts", [SAMPLE, pytest.param(SWEEP, marks=pytest.mark.full)], ids=["sample", "sweep"])
@pytest.mark.parametrize("whose", ["both", "the daemon's", "the trainer's"])
def test_a_clock_that_is_set_mid_run_costs_nothing(node: Node, whose: str, shifts: tuple[int, ...]) -> None:
    clock = Clock(node.path / "clock")
    steady: dict[str, str] = {}
    node.start_daemon(**(steady if whose == "the trainer's" else clock.env))
    with Trainer(node, steady if whose == "the daemon's" else clock.env) as trainer:
        wait_for(lambda: trainer.durable, "it is heard")
        for shift_s in shifts:
            clock.set(shift_s)
            trainer.goes_on()
        trainer.finish()
    if whose == "both":
        is_calm(node)
    assert oracle.check(node).writers == 1
    now = time.gmtime().tm_year
    seen = {now, now + 10, now - 10}
    assert (years(node, "ts") >= seen) == (whose != "the daemon's"), "the shift was really there"
    assert (years(node, "recv_ts") >= seen) == (whose != "the trainer's")
    assert node.status()["refused"] == {}


@pytest.mark.parametrize("shift_s", [10 * YEAR_S, -10 * YEAR_S])
def test_a_clock_that_is_wrong_at_the_start_and_set_right_later_costs_nothing(node: Node, shift_s: int) -> None:
    """As a machine without a battery: NTP comes after the daemon, and after it was killed it begins anew."""
    clock = Clock(node.path / "clock")
    clock.set(shift_s)
    daemon = node.start_daemon(**clock.env)
    with Trainer(node, clock.env) as trainer:
        wait_for(lambda: trainer.durable, "it is heard")
        clock.set(0)
        trainer.goes_on()
        daemon.kill()
        daemon.wait()
        clock.set(shift_s)
        daemon = node.start_daemon(**clock.env)
        trainer.goes_on()
        trainer.process.kill()
        trainer.process.wait()
        clock.set(0)
    oracle.check(node)


def test_retries_go_on_when_the_clock_is_set_while_the_store_is_away(node: Node) -> None:
    clock = Clock(node.path / "clock")
    node.data.mkdir()
    (node.data / "v1").write_bytes(b"in the way")
    node.start_daemon(RANKLOG_RETRY_MAX_S="1", **clock.env)
    with Trainer(node, clock.env) as trainer:
        wait_for(lambda: node.status()["shipper"].get("last_error"), "the store is away")
        for shift_s in (10 * YEAR_S, -10 * YEAR_S):
            clock.set(shift_s)
            before = trainer.durable
            wait_for(lambda before=before: trainer.durable > before + 50, "records are taken all the same")
        is_calm(node)
        (node.data / "v1").unlink()
        trainer.goes_on()
        trainer.finish()
    oracle.check(node)


def test_what_waits_for_adoption_is_taken_whatever_the_clock_says(node: Node) -> None:
    """Files from the future and from long ago; and those of a writer that is not yet in view are left alone."""
    clock = Clock(node.path / "clock")
    for number, shift_s in enumerate((0, 10 * YEAR_S, -10 * YEAR_S)):
        clock.set(shift_s)
        name = f"dead-{number}"
        done = node.run(oracle.witness(name, node, "--count", "200", "--no-finish", "--run", name), **clock.env)
        assert done.returncode == 0, done.stderr
    for path, age_s in zip(node.leftovers(), cycle((10 * YEAR_S, -10 * YEAR_S, 0)), strict=False):
        os.utime(path, (time.time() - age_s,) * 2)
    clock.set(-10 * YEAR_S)
    node.start_daemon(**clock.env)
    clock.set(10 * YEAR_S)
    assert oracle.check(node).delivered == 600


def test_no_writer_is_forgotten_because_the_clock_was_set(node: Node) -> None:
    """One without a file here, in another container: forgotten, what it sends again would be taken twice."""
    clock = Clock(node.path / "clock")
    node.start_daemon(**clock.env)
    one = start_of(1)
    with RawPeer(Path(node.env["RANKLOG_RUNTIME_DIR"]) / "ranklog.sock") as peer:
        peer.hello(one)
        assert peer.batch(one, 0, encode_start(one) + frames(1, 4), 5).durable == 4
        log = node.path / "daemon.log"
        for number, shift_s in enumerate((10 * YEAR_S, -10 * YEAR_S, 0), 1):
            clock.set(shift_s)
            wait_for(lambda number=number: log.read_text().count("clock_set") == number, "it is noticed, and told")
            assert node.status()["writers"] == 1
            assert peer.batch(one, 0, encode_start(one) + frames(1, 4), 5).durable == 4
        assert node.status()["duplicates"] == 3
    oracle.check(node)
    rows = node.raw_rows("project = 'demo' and kind = 'metrics'")
    assert sorted(row["seq"] for row in rows) == [1, 2, 3, 4]


def test_a_daemon_in_another_time_namespace_leaves_a_live_trainer_its_files(node: Node) -> None:
    """Two containers with clocks that began at other moments: a process's start time is not the same number in both."""
    if os.geteuid():
        pytest.skip("needs root, for a time namespace: run the tests with sudo")
    node.start_daemon()
    other = ["unshare", "--time", "--monotonic", "300000000", "--boottime", "300000000"]
    with Trainer(node, {}, *other) as trainer:
        wait_for(lambda: trainer.durable, "it is heard")
        trainer.goes_on()
        assert node.leftovers(), "its journal"
        assert node.status()["adopted"] == 0
        trainer.finish()
    oracle.check(node)


@pytest.mark.parametrize("shift_s", [10 * YEAR_S, -10 * YEAR_S, 0])
def test_the_cache_lets_go_of_nothing_because_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: int
) -> None:
    """Neither of what was in it before nor of what comes later; real age still counts."""
    now_s = 0.0
    rooms = {name: str(tmp_path / name) for name in ("state_dir", "runtime_dir", "spool_dir", "journal_dir")}
    config = load_config(rooms | {"to": str(tmp_path / "store"), "cache_age_s": "3600"}, env={"HOME": str(tmp_path)})
    monkeypatch.setattr(Config, "keeps_cache", property(lambda _: True))  # As with any store but a directory.
    shipper = Shipper(config, store=DirStore(tmp_path / "store"), clock=lambda: now_s)
    real_s, shift = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real_s() + shift[0])

    def ship(first_lsn: int) -> None:
        builder = SegmentBuilder(first_lsn)
        builder.writer(start_of(1))
        builder.batch(start_of(1).writer, first_lsn, 4, frames(first_lsn, 4))
        builder.seal(shipper.state)
        assert sealed_name(first_lsn, first_lsn + 3) in os.listdir(shipper.state.wal)
        shipper.step()

    ship(1)
    (early,) = shipper.state.cache.rglob("*.parquet")
    shift[0] = shift_s
    now_s += RETAIN_INTERVAL_S + 1
    ship(5)
    now_s += RETAIN_INTERVAL_S + 1
    shipper.step()
    assert len(list(shipper.state.cache.rglob("*.parquet"))) == 2
    if shift_s == 0:
        os.utime(early, (real_s() - 4000,) * 2)
        now_s += RETAIN_INTERVAL_S + 1
        shipper.step()
        assert not early.exists(), "what is really old goes"


def test_a_step_is_told_once_and_drift_is_none() -> None:
    steps = ClockStep(1000.0, 50.0)
    assert steps.look(1010.0, 60.0) == 0
    assert steps.look(1021.0, 70.0) == 0, "a second of drift"
    assert steps.look(1031.0 + YEAR_S, 80.0) == YEAR_S + 1
    assert steps.look(1041.0 + YEAR_S, 90.0) == 0
    assert steps.earliest(1041.0 + YEAR_S, 90.0) == 1040.0
    assert steps.look(1051.0 - YEAR_S, 100.0) == -2 * YEAR_S
    assert steps.earliest(1051.0 - YEAR_S, 100.0) == 1051.0 - YEAR_S
