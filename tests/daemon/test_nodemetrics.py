"""Node metrics: once per node, into every live run, as a writer of the daemon's own."""

import builtins
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from ingesting import Half
from node import Node, wait_for
from ranklog.frame import Kind, body_at, decode_body, spans
from ranklog.start import Start, start_from_map
from ranklogd.nodemetrics import ROLE, RUNS_MAX, NodeMetrics, Sampler
from ranklogd.wal import segment
from ranklogd.wal.segment import BATCH, EntryType
from segments import make_state, start_of

RATES = {
    "disk/read_mb_per_sec", "disk/write_mb_per_sec", "disk/read_iops", "disk/write_iops",
    "network/sent_mb_per_sec", "network/recv_mb_per_sec",
}  # fmt: skip


class Place:
    """The ingest half, and the runs that live."""

    def __init__(self, root: Path, interval_s: float = 10.0) -> None:
        self.half = Half(make_state(root / "state"))
        self.live: dict[tuple[str, str], list[Start]] = {}
        self.metrics = NodeMetrics(self.half.ingest, "node-7", interval_s)
        self.asked = 0
        self.now_s = 100.0

    def _live(self) -> Mapping[tuple[str, str], list[Start]]:
        self.asked += 1
        return dict(self.live)

    def run(self, run: str = "r", **fields: Any) -> None:
        self.live["p", run] = [replace(start_of(1), project="p", run=run, **fields)]

    def after(self, seconds: float) -> None:
        self.now_s += seconds
        self.metrics.step(self.now_s, self._live)
        self.half.commit()

    def records(self) -> dict[str, list[tuple[int, int, Any]]]:
        """(seq, kind, payload) of each frame by run, in the order of the log."""
        runs: dict[str, str] = {}
        found: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(self.half.state.wal.iterdir()):
            buffer = memoryview(path.read_bytes())
            header, offset = segment.decode_header(buffer)
            for entry in segment.scan(buffer, header.salt, offset, header.first_lsn):
                assert isinstance(entry, segment.Entry)
                if entry.type != EntryType.BATCH:
                    continue
                for span in spans(entry.payload, BATCH.size):
                    _, seq, _, step, payload = decode_body(body_at(entry.payload, span.offset))
                    writer = bytes(entry.payload[:16]).hex()
                    if span.kind == Kind.START:
                        runs[writer] = start_from_map(payload).run
                    assert step is None
                    found.setdefault(runs[writer], []).append((seq, span.kind, payload))
        return found

    def kinds(self, run: str = "r") -> list[Kind]:
        return [Kind(kind) for _, kind, _ in self.records().get(run, [])]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_every_live_run_gets_the_same_sample_in_each_interval(place: Place) -> None:
    place.run("a")
    place.run("b")
    place.after(0)
    place.after(5)
    assert place.records() == {}, "rates need a time to be over"
    place.after(5)
    place.after(9)
    place.after(1)
    found = place.records()
    assert [Kind(kind).name for _, kind, _ in found["a"]] == ["START", "SYSTEM", "SYSTEM"]
    assert [seq for seq, _, _ in found["a"]] == [0, 1, 2]
    assert [payload for _, _, payload in found["a"][1:]] == [payload for _, _, payload in found["b"][1:]]
    sample = found["a"][1][2]
    assert set(sample) >= RATES
    assert {"cpu/utilization", "memory/used", "memory/available", "memory/percent", "swap/percent"} <= set(sample)
    assert all(type(value) is float and math.isfinite(value) for value in sample.values())
    assert 0 <= sample["cpu/utilization"] <= 100
    assert 0 < sample["memory/used"] < 1 << 20


def test_the_writer_is_the_daemons_own_and_of_no_rank(place: Place) -> None:
    place.run("r", name="grand-ocean-1", group="g")
    place.after(0)
    place.after(10)
    _, _, payload = place.records()["r"][0]
    start = start_from_map(payload)
    assert (start.rank, start.role, start.node) == (None, ROLE, "node-7")
    assert (start.project, start.run, start.name, start.group) == ("p", "r", "grand-ocean-1", "g")
    assert start.writer != start_of(1).writer
    assert start.pid > 0


def test_an_end_record_follows_when_nobody_of_the_run_lives_any_more(place: Place) -> None:
    place.run("a")
    place.run("b")
    place.after(0)
    place.after(10)
    del place.live["p", "a"]
    place.after(10)
    assert place.kinds("a") == [Kind.START, Kind.SYSTEM, Kind.END]
    assert place.kinds("b") == [Kind.START, Kind.SYSTEM, Kind.SYSTEM]
    assert place.records()["a"][-1][2] == {"exit_code": None, "last": 2}
    states = list(place.half.writers)
    assert [state.finished for state in states] == [True, False]
    place.run("a")
    place.after(10)
    assert place.kinds("a") == [Kind.START, Kind.SYSTEM, Kind.END, Kind.START, Kind.SYSTEM], "a writer of its own"


def test_a_stop_ends_every_writer(place: Place) -> None:
    place.run("a")
    place.after(0)
    place.after(10)
    place.metrics.finish()
    place.half.commit()
    place.after(1000)
    assert place.kinds("a") == [Kind.START, Kind.SYSTEM, Kind.END]


def test_nobody_is_asked_between_the_samples(place: Place) -> None:
    for _ in range(100):
        place.after(0.1)
    assert place.asked <= 2


def test_an_interval_of_0_means_never(tmp_path: Path) -> None:
    place = Place(tmp_path, interval_s=0.0)
    place.run()
    for _ in range(5):
        place.after(100)
    assert (place.asked, place.records()) == (0, {})


def test_rates_do_not_reach_over_a_time_without_runs(place: Place) -> None:
    place.run()
    place.after(0)
    place.live.clear()
    place.after(10)
    place.run()
    place.after(10_000)
    assert place.records() == {}, "the first look after the pause is what the first sample is compared with"
    place.after(10)
    assert place.kinds() == [Kind.START, Kind.SYSTEM]


def test_a_full_disk_is_not_filled_further(place: Place) -> None:
    place.run()
    place.after(0)
    place.half.full = "no room"
    place.after(10)
    assert place.kinds() == []
    place.half.full = ""
    place.after(10)
    assert place.kinds() == [Kind.START, Kind.SYSTEM]


def test_a_record_that_was_taken_back_leaves_no_hole(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> int:
        raise OSError(28, "No space left on device")

    place.run()
    place.after(0)
    for turn in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("os.pwritev", no_room)
            place.after(10)
        place.after(10)
        assert [seq for seq, _, _ in place.records()["r"]] == list(range(2 + turn))


def test_the_number_of_runs_is_bounded(place: Place) -> None:
    for number in range(RUNS_MAX + 10):
        place.run(f"r{number}")
    place.after(0)
    place.after(10)
    assert len(place.records()) == RUNS_MAX


def test_without_psutil_there_is_one_line_and_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any) -> ModuleType:
        if name == "psutil":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", importing)
    place.run()
    for _ in range(5):
        place.after(10)
    assert place.records() == {}
    (line,) = [record.message for record in caplog.records]
    assert 'pip install "ranklog[daemon]"' in line


def test_what_a_container_hides_is_left_out() -> None:
    def hidden() -> None:
        raise FileNotFoundError("/proc/diskstats")

    blind = SimpleNamespace(
        cpu_percent=lambda _: 12.5, virtual_memory=psutil.virtual_memory, swap_memory=psutil.swap_memory,
        disk_io_counters=hidden, net_io_counters=lambda: None,
    )  # fmt: skip
    sample = Sampler(blind, 0.0).sample(10.0)  # type: ignore[arg-type]
    assert sample["cpu/utilization"] == 12.5
    assert not RATES & set(sample)


def test_rates_are_per_second_and_in_mib() -> None:
    disks: Iterator[Any] = iter([
        SimpleNamespace(read_bytes=0, write_bytes=1 << 20, read_count=0, write_count=100),
        SimpleNamespace(read_bytes=30 << 20, write_bytes=6 << 20, read_count=40, write_count=150),
    ])  # fmt: skip
    counting = SimpleNamespace(
        cpu_percent=lambda _: 0.0, virtual_memory=psutil.virtual_memory, swap_memory=psutil.swap_memory,
        disk_io_counters=lambda: next(disks), net_io_counters=lambda: SimpleNamespace(bytes_sent=5, bytes_recv=7),
    )  # fmt: skip
    sample = Sampler(counting, 0.0).sample(10.0)  # type: ignore[arg-type]
    assert [sample[name] for name in ("disk/read_mb_per_sec", "disk/write_mb_per_sec", "disk/read_iops", "disk/write_iops")] == [
        3.0, 0.5, 4.0, 5.0,
    ]  # fmt: skip
    assert (sample["network/sent_mb_per_sec"], sample["network/recv_mb_per_sec"]) == (0.0, 0.0)


def test_a_real_run_gets_them_into_its_shards_and_no_rank_more(tmp_path: Path) -> None:
    script = (
        "import ranklog, sys\nrun = ranklog.init('p', id='r')\nrun.log({'loss': 1.0}); run.flush()\n"
        "print('up', flush=True); sys.stdin.readline()\nrun.finish()"
    )
    with Node(tmp_path) as node:
        daemon = node.start_daemon(RANKLOG_NODE_METRICS_INTERVAL_S="1")

        client = subprocess.Popen(
            [sys.executable, "-c", script], env=node.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )  # fmt: skip
        client.stdout.readline()
        before = node.status()["records"]
        wait_for(lambda: node.status()["records"] >= before + 3, "samples come")
        assert node.status()["runs"][0]["ranks"] == 1
        client.communicate(b"\n", timeout=20)
        wait_for(
            lambda: node.status()["runs"][0]["state"] == "finished", "the run ends though the daemon's writer lives"
        )
        node.upload()
        daemon.terminate()
        assert daemon.wait(30) == 0
        rows = node.raw_rows("role = 'node'")
        assert {row["run"] for row in rows} == {"r"}
        assert {row["rank"] for row in rows} == {None}
        assert {"cpu/utilization", "memory/used"} <= {row["key"] for row in rows if row["kind"] == "system"}
        assert "end" in {row["kind"] for row in rows}
