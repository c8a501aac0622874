"""One writer: the caller's path with its interruptions, and its end."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Record, Rig, check_whole, gaps, logged, on_disk
from ranklog import journal
from ranklog.config import Settings
from ranklog.frame import Kind
from ranklog.start import Start
from ranklog.writer import HANDED_MAX, Places, Writer


class Bench:
    """An offline writer, and what it leaves on disk."""

    def __init__(self, path: Path, **sizes: str) -> None:
        self.directories = [path / "journal", path / "spool"]
        for directory in self.directories:
            directory.mkdir()
        env = {"HOME": str(path), **{f"RANKLOG_{name.upper()}_SIZE_BYTES": size for name, size in sizes.items()}}
        self.told: list[str] = []
        self.id = os.urandom(16).hex()
        self.writer = Writer(
            Start(writer=self.id, project="p", run="r"), Settings.from_env(env),
            Places([self.directories[0]], [self.directories[1]], None), self.told.append,
        )  # fmt: skip

    def log(self, number: int) -> bool:
        return self.writer.write(Kind.METRICS, {"n": number}, None, counted=True)

    def records(self) -> list[Record]:
        found = on_disk(*self.directories)[self.id]
        check_whole(found)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.writer.close(5)


def test_steps_are_counted_unless_they_are_given_and_may_go_back(bench: Bench):
    write = bench.writer.write
    for step in (None, None, 10, None, 3, None):
        assert write(Kind.METRICS, {"n": 1}, step, counted=True)
    assert write(Kind.SYSTEM, {"cpu": 1})
    assert write(Kind.METRICS, {"n": 1}, None, counted=True)
    steps = [(record.kind, record.step) for record in bench.records()[1:]]
    assert steps == [(1, 0), (1, 1), (1, 10), (1, 11), (1, 3), (1, 4), (2, None), (1, 5)]


def inside_append(call: Callable[[], Any], times: int = 1) -> Callable[..., Any]:
    """A trace function that calls `call` in the middle of `Journal.append`, as a signal handler might."""
    left = [times]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not journal.Journal.append.__code__:
            return None
        if event == "line" and left[0] and "frame" in frame.f_locals:
            left[0] -= 1
            call()
        return trace

    return trace


def interrupted(bench: Bench, call: Callable[[], Any], number: int = 1) -> bool:
    """Log `number`, and do `call` in the middle of that."""
    sys.settrace(inside_append(call))
    try:
        return bench.log(number)
    finally:
        sys.settrace(None)


def test_a_record_of_a_signal_handler_is_written_by_the_write_it_interrupted(bench: Bench):
    accepted = []
    assert bench.log(0)
    assert interrupted(bench, lambda: accepted.append(bench.log(2)))
    assert accepted == [True]
    assert logged(bench.records(), "n") == [0, 1, 2]


def test_what_is_handed_over_cannot_fail_there_and_cannot_be_changed_any_more(bench: Bench):
    payload: dict[str, Any] = {"n": 2}

    def call() -> None:
        with pytest.raises(TypeError):
            bench.writer.write(Kind.METRICS, {"n": object()}, None, counted=True)
        bench.writer.write(Kind.METRICS, payload, None, counted=True)
        payload["n"] = object()

    assert interrupted(bench, call)
    assert bench.log(3)
    assert logged(bench.records(), "n") == [1, 2, 3]


def test_what_was_handed_over_is_written_even_if_the_interrupted_write_fails(bench: Bench):
    def call() -> None:
        bench.log(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(bench, call)
    assert logged(bench.records(), "n") == [2]
    assert bench.log(3)
    assert logged(bench.records(), "n") == [2, 3]


def test_a_handler_that_logs_without_end_is_refused_at_a_bound(bench: Bench):
    accepted: list[bool] = []
    assert interrupted(bench, lambda: accepted.extend(bench.log(n) for n in range(2, HANDED_MAX + 7)))
    assert accepted.count(True) == HANDED_MAX
    assert accepted[-5:] == [False] * 5
    assert logged(bench.records(), "n") == list(range(1, HANDED_MAX + 2))


def test_a_finish_amid_a_write_leaves_the_end_to_that_write_and_the_files_open(bench: Bench):
    closed = []

    def call() -> None:
        bench.writer.end(0)
        closed.append(bench.writer.close(1))

    assert interrupted(bench, call)
    assert closed == [False]
    assert [record.kind for record in bench.records()[1:]] == [Kind.METRICS, Kind.END]
    assert bench.records()[-1].payload == {"exit_code": 0, "last": 2}
    assert bench.writer.closed


def test_after_the_end_nothing_is_taken_and_no_descriptor_is_written_to(bench: Bench, tmp_path: Path):
    assert bench.log(1)
    bench.writer.end(3)
    assert bench.writer.close(5)
    others = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(20)]
    assert not bench.log(2)
    bench.writer.end(3)
    assert bench.writer.close(5)
    assert {os.fstat(fd).st_size for fd in others} == {0}, "descriptors of closed journals belong to others now"
    for fd in others:
        os.close(fd)
    assert [(r.seq, r.kind) for r in bench.records()] == [(0, Kind.START), (1, Kind.METRICS), (2, Kind.END)]
    assert list(bench.directories[0].iterdir()) == [], "nothing remains in tmpfs"


def test_the_end_record_names_the_last_seq_of_the_writer(bench: Bench):
    for number in range(10):
        bench.log(number)
    bench.writer.end(0)
    assert bench.records()[-1].payload == {"exit_code": 0, "last": 11}
    assert bench.writer.written == 11


def test_refused_records_are_counted_and_their_gap_is_there_after_close(tmp_path: Path):
    bench = Bench(tmp_path, journal="16K", journal_file="8K", spool="8K")
    for number in range(5000):
        bench.log(number)
    refused = bench.writer.refused
    assert refused > 3000
    assert bench.writer.written == 5000
    bench.writer.close(5)
    found = bench.records()
    assert found[-1].last == 5000
    assert sum(last - first + 1 for first, last in gaps(found)) == refused


def test_flush_waits_for_what_was_taken_and_not_for_an_open_gap(tmp_path: Path):
    bench = Bench(tmp_path, journal="16K", journal_file="8K", spool="8K")
    for number in range(3000):
        bench.log(number)
    refused, taken = bench.writer.refused, bench.records()
    assert refused
    assert gaps(taken)[-1][1] == 3000, "the newest were refused"
    began = time.monotonic()
    bench.writer.flush(0.3, spooled=True)
    assert time.monotonic() - began < 2
    bench.writer.close(5)


def test_threads_write_whole_records_in_one_order(bench: Bench):
    def work(thread: int) -> None:
        for number in range(500):
            bench.writer.write(Kind.METRICS, {f"t{thread}": number}, None, counted=True)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = bench.records()
    assert [record.step for record in found[1:]] == list(range(4000))
    for thread in range(8):
        assert logged(found, f"t{thread}") == list(range(500))


def test_without_a_thread_records_are_kept_and_adopted_when_the_process_is_gone(tmp_path: Path):
    with Rig(tmp_path) as rig:
        rig.start_daemon()
        errors = rig.client("""
import threading, ranklog
run = ranklog.init(project="p", mode="disabled")
threading.stack_size(1 << 46)  # More than there is: no thread can be started.
run = ranklog.init(project="p")
for i in range(100): ranklog.log({"i": i})
ranklog.finish()
""")
        assert "no thread could be started" in errors
        rig.adopted()
        [records] = rig.written().values()
        assert logged(records, "i") == list(range(100))
        assert records[-1].kind == Kind.END


def test_abandoning_closes_every_descriptor_and_says_nothing_to_the_daemon(tmp_path: Path):
    with Rig(tmp_path) as rig:
        rig.start_daemon()
        rig.client("""
import os, ranklog
run = ranklog.init(project="p")
for i in range(3000): ranklog.log({"i": i, "pad": "x" * 300})
pid = os.fork()
if pid == 0:
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    ours = [name for name in held if name.endswith((".journal", ".spool"))]
    os._exit(len(ours))
assert os.waitpid(pid, 0)[1] == 0, "the child has none of the parent's files"
for i in range(3000, 4000): ranklog.log({"i": i})
ranklog.finish()
""")
        [records] = rig.written().values()
        assert logged(records, "i") == list(range(4000))
