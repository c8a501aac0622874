"""The backlog against a daemon that receives, commits, crashes and forgets as real ones do."""

import os
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import logged, on_disk
from ranklog import backlog as backlog_module
from ranklog.backlog import Backlog, Batch
from ranklog.frame import Kind, spans
from ranklog.journal import Journal
from ranklog.spool import Spool
from ranklog.start import Start, encode_start

WRITER = "ef" * 16
START = encode_start(Start(writer=WRITER, project="p", run="r"))
CREDIT = 2


class Daemon:
    """The daemon's rules of order, as `ranklogd.sequence` states them: what is received is not durable yet."""

    def __init__(self) -> None:
        self.received: list[tuple[int, int]] = []
        """(first, last) of every frame."""
        self.durable = 0
        """How many of them a crash leaves."""

    @property
    def next_seq(self) -> int:
        return self.received[-1][1] + 1 if self.received else 0

    @property
    def durable_seq(self) -> int:
        return self.received[self.durable - 1][1] if self.durable else -1

    def take(self, batch: Batch) -> str:
        if batch.first_seq + batch.records <= self.next_seq:
            return "duplicate"
        if batch.first_seq != self.next_seq:
            return "jump"
        found = [(span.first, span.last) for span in spans(memoryview(batch.frames))]
        assert found[-1][1] == batch.first_seq + batch.records - 1
        self.received += found
        return "append"

    def commit(self) -> int:
        self.durable = len(self.received)
        return self.durable_seq

    def crash(self) -> None:
        del self.received[self.durable :]


class Bench:
    """A writer's journal and spool, its backlog, and the wire to a daemon."""

    def __init__(self, path: Path, *, spool_size_max: int = 1 << 30) -> None:
        for name in ("journal", "spool"):
            (path / name).mkdir()
        self.path = path
        self.journal = Journal(WRITER, START, [path / "journal"], file_size=4096, size_max=1 << 20, wake=lambda: None)
        self.spool = Spool(WRITER, START, [path / "spool"], size_max=spool_size_max)
        self.backlog = Backlog(self.journal, self.spool)
        self.wire: deque[Batch] = deque()
        self.daemon = Daemon()
        self.count = 0

    def log(self, count: int) -> None:
        for _ in range(count):
            assert self.journal.append(Kind.METRICS, None, {"n": self.count, "pad": "x" * 50})
            self.count += 1

    def collect(self) -> None:
        self.backlog.collect()

    def send(self) -> None:
        while self.backlog.in_flight < CREDIT and (batch := self.backlog.next_batch()) is not None:
            self.wire.append(batch)

    def pump(self) -> None:
        self.collect()
        self.send()
        self.deliver()

    def deliver(self) -> None:
        if self.wire and self.daemon.take(self.wire.popleft()) == "jump":
            self.backlog.resume(self.daemon.next_seq)

    def acknowledge(self) -> None:
        self.backlog.acknowledge(self.daemon.commit())

    def commit_unheard(self) -> None:
        self.daemon.commit()

    def reconnect(self) -> None:
        """What was on the wire is lost, and WELCOME says what the daemon has, safe or not."""
        self.wire.clear()
        self.backlog.rewind()
        assert self.backlog.base <= self.daemon.next_seq
        self.backlog.resume(self.daemon.next_seq)

    def crash(self) -> None:
        self.daemon.crash()
        self.reconnect()

    def spill(self) -> None:
        self.backlog.spill()

    def relieve(self) -> None:
        self.backlog.relieve()

    def refill(self) -> None:
        self.journal.refill()

    def settle(self) -> None:
        """Let the two talk until nothing is left to say."""
        self.collect()
        for _ in range(200):
            self.send()
            while self.wire:
                self.deliver()
            self.acknowledge()

    def close(self) -> None:
        for file in (*self.journal.files(), *self.spool.files()):
            file.remove()


STEPS = [
    "pump", "deliver", "acknowledge", "commit_unheard", "reconnect", "crash", "spill", "relieve", "collect", "refill",
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(STEPS)), max_size=30))
def test_no_order_of_events_loses_or_doubles_a_record(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]):
    bench = Bench(tmp_path_factory.mktemp("bench"))
    for count, step in steps:
        bench.log(count)
        getattr(bench, step)()
        assert bench.backlog.base <= bench.daemon.durable_seq + 1, "what a crash of the daemon takes is still here"
    bench.settle()
    assert [first for first, _ in bench.daemon.received] == list(range(bench.count + 1))
    assert bench.backlog.empty
    assert bench.backlog.acked == bench.count + 1
    assert bench.spool.size == 0
    assert list((bench.path / "spool").iterdir()) == []
    bench.close()


@pytest.fixture
def bench(tmp_path: Path):
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_welcome_that_names_what_was_received_releases_nothing(bench: Bench):
    bench.log(100)
    bench.collect()
    bench.send()
    bench.deliver()
    bench.deliver()
    bench.reconnect()
    assert bench.backlog.base == 0
    bench.crash()
    bench.settle()
    assert bench.daemon.durable_seq == 100


def test_after_a_welcome_the_last_known_batch_is_sent_again_alone_so_that_it_is_acknowledged(bench: Bench):
    bench.log(100)
    bench.collect()
    bench.send()
    while bench.wire:
        bench.deliver()
    bench.commit_unheard()
    bench.log(10)
    bench.reconnect()
    bench.collect()
    again, new = bench.backlog.next_batch(), bench.backlog.next_batch()
    assert again is not None
    assert new is not None
    assert bench.daemon.take(again) == "duplicate"
    assert bench.daemon.take(new) == "append"
    assert bench.backlog.next_batch() is None


def test_a_chunk_of_which_a_part_is_known_is_cut_and_both_parts_count(bench: Bench):
    bench.log(30)
    bench.collect()
    bench.spill()
    size = bench.spool.size
    bench.backlog.resume(17)
    first, second = bench.backlog.next_batch(), bench.backlog.next_batch()
    assert first is not None
    assert second is not None
    assert (first.first_seq, first.records, second.first_seq, second.records) == (0, 17, 17, 14)
    assert bench.spool.size == size
    bench.backlog.acknowledge(16)
    assert 0 < bench.spool.size < size
    bench.backlog.acknowledge(30)
    assert bench.spool.size == 0
    assert list((bench.path / "spool").iterdir()) == []


def test_batches_are_bounded_and_never_split_a_chunk(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backlog_module, "BATCH_SIZE", 5000)
    monkeypatch.setattr(backlog_module, "MERGE_SIZE_MAX", 900)
    for _ in range(20):
        bench.log(10)
        bench.collect()
    sizes = []
    while (batch := bench.backlog.next_batch()) is not None:
        sizes.append(len(batch.frames))
    assert max(sizes) <= 5000
    assert min(sizes[:-1]) > 4000


def test_only_an_ack_that_covers_a_whole_chunk_releases_it(bench: Bench):
    bench.log(10)
    bench.collect()
    assert not bench.backlog.acknowledge(9)
    assert bench.backlog.acked == 0
    assert bench.backlog.acknowledge(10)
    assert bench.backlog.acked == 11


def test_what_the_spool_has_no_room_for_stays_in_the_journal_and_what_it_took_is_moved(tmp_path: Path):
    bench = Bench(tmp_path, spool_size_max=5000)
    bench.log(200)
    bench.collect()
    with pytest.raises(OSError, match="spool cap"):
        bench.spill()
    moved = bench.backlog.spooled_below()
    assert 20 < moved < 100
    with pytest.raises(OSError, match="spool cap"):
        bench.spill()
    assert bench.backlog.spooled_below() == moved, "nothing is moved twice"
    bench.settle()
    assert bench.daemon.durable_seq == 200
    bench.close()


def test_a_journal_that_is_relieved_has_room_at_once_and_is_not_called_durable_before_it_is(bench: Bench):
    bench.log(200)
    bench.collect()
    assert len(list((bench.path / "journal").iterdir())) > 3
    bench.backlog.relieve()
    assert logged(on_disk(bench.path / "spool")[WRITER], "n") == list(range(200))
    assert len(bench.backlog.files()) == 1
    assert bench.backlog.spooled_below() == 0
    bench.spill()
    assert bench.backlog.spooled_below() == 201
    bench.log(10)
    bench.collect()
    assert bench.backlog.spooled_below() == 201
    bench.settle()
    assert bench.daemon.durable_seq == 210


def test_what_is_logged_while_nothing_can_be_sent_is_one_chunk_for_each_file(bench: Bench):
    bench.send()
    for _ in range(100):
        bench.log(2)
        bench.collect()
    assert len(bench.backlog._chain) <= len(list((bench.path / "journal").iterdir())) + 1
    bench.settle()
    assert bench.daemon.durable_seq == 200


def test_neighbours_in_the_spool_are_joined_so_that_days_of_outage_stay_a_short_chain(bench: Bench):
    for _ in range(50):
        bench.log(5)
        bench.collect()
        bench.spill()
    assert len(bench.backlog._chain) == 1
    batch = bench.backlog.next_batch()
    assert batch is not None
    assert batch.records == 251
    bench.backlog.acknowledge(250)
    assert list((bench.path / "spool").iterdir()) == []


def test_while_batches_are_in_flight_nothing_is_joined(bench: Bench):
    for _ in range(3):
        bench.log(5)
        bench.collect()
        assert bench.backlog.next_batch() is not None
    bench.spill()
    assert len(bench.backlog._chain) == 3
    bench.backlog.acknowledge(5)
    assert bench.backlog.acked == 6


def test_a_file_that_became_shorter_is_an_error_and_not_a_batch(bench: Bench):
    bench.log(10)
    bench.collect()
    [file] = bench.backlog.files()
    os.truncate(file.fd, file.head_end + 20)
    with pytest.raises(OSError, match="is shorter than what was written"):
        bench.backlog.next_batch()
    bench.backlog.rewind()
    assert bench.backlog.in_flight == 0
    assert bench.backlog.base == 0
