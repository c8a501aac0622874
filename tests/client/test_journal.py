"""The journal as its two users see it, and as whoever finds its files after a kill does."""

import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog import framefile, fs, journal
from ranklog.backlog import Backlog
from ranklog.frame import FRAME_SIZE_MAX, HEADER, Kind, body_at, decode_body, spans
from ranklog.journal import WAKE_SIZE, Chunk, Journal
from ranklog.spool import Spool
from ranklog.start import Start, encode_start

WRITER = "ab" * 16
START = encode_start(Start(writer=WRITER, project="p", run="r"))
FILE_SIZE = 4 << 10


class Found(NamedTuple):
    """A frame in a file."""

    first: int
    last: int
    kind: int
    payload: Any


class Bench:
    """A journal, and a backlog that plays the sender."""

    def __init__(self, directory: Path, *, size_max: int = 64 * FILE_SIZE, file_size: int = FILE_SIZE) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.woken = 0
        self.journal = Journal(
            WRITER, START, [directory], file_size=file_size, size_max=size_max, wake=self._wake
        )  # fmt: skip
        self.backlog = Backlog(self.journal, Spool(WRITER, START, [directory], size_max=1 << 30))
        self.taken: list[Found] = []
        """What was acknowledged, as it was read for sending."""

    def _wake(self) -> None:
        self.woken += 1

    def log(self, payload: Any, step: int | None = None) -> bool:
        return self.journal.append(Kind.METRICS, step, payload)

    def fill(self) -> int:
        """Log until a record is refused; return how many were not."""
        return next(count for count in itertools.count() if not self.log({"pad": "x" * 100}))

    def send(self) -> None:
        """Read all that is there as a sender would, and have it acknowledged."""
        self.backlog.collect()
        while (batch := self.backlog.next_batch()) is not None:
            found = list(frames(batch.frames))
            assert (found[0].first, found[-1].last) == (batch.first_seq, batch.first_seq + batch.records - 1)
            self.taken += found
            self.backlog.acknowledge(found[-1].last)

    def left(self) -> list[Found]:
        """What an adopter finds that has everything up to the last acknowledged record."""
        return adopt(self.directory, self.backlog.acked)

    def close(self) -> None:
        for file in self.journal.files():
            file.remove()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "journal")
    yield made
    made.close()


def frames(data: bytes) -> Iterator[Found]:
    """The frames that follow each other from the head of `data` on."""
    buffer = memoryview(data)
    for span in spans(buffer):
        body = body_at(buffer, span.offset)
        assert body is not None
        yield Found(span.first, span.last, span.kind, decode_body(body)[4])


def adopt(directory: Path, expected: int) -> list[Found]:
    """Read the files of a writer in the order of their first seqs, each up to the first frame that does not follow."""
    files = []
    for path in directory.glob("[!.]*.journal"):
        first, *rest = frames(path.read_bytes())
        assert first.kind == Kind.START
        files.append(rest)
    taken: list[Found] = [Found(0, 0, Kind.START, None)] if expected == 0 else []
    for found in sorted(filter(None, files)):
        for frame in found:
            due = taken[-1].last + 1 if taken else expected
            if frame.first >= due:
                assert frame.first == due, f"{frame.first} where {due} was due"
                taken.append(frame)
    return taken


def payloads(found: list[Found]) -> list[Any]:
    return [frame.payload for frame in found if frame.kind == Kind.METRICS]


def in_order(found: list[Found]) -> None:
    due = 0
    for frame in found:
        assert frame.first == due
        due = frame.last + 1


# What log() leaves behind.


def test_a_record_is_in_the_file_when_append_returns(bench: Bench):
    for number in range(100):
        assert bench.log({"n": number}, step=number)
        assert payloads(bench.left())[-1] == {"n": number}
    in_order(bench.left())


def test_the_journal_goes_on_in_further_files_and_the_sender_sees_one_range(bench: Bench):
    sent = [{"n": number, "pad": "x" * 100} for number in range(300)]
    for payload in sent:
        assert bench.log(payload)
    assert len(list(bench.directory.iterdir())) > 5
    bench.send()
    in_order(bench.taken)
    assert payloads(bench.taken) == sent
    assert bench.left() == []


def test_files_are_used_again_once_they_are_acknowledged(bench: Bench):
    for number in range(3000):
        assert bench.log({"n": number, "pad": "x" * 100})
        if number % 20 == 0:
            bench.send()
            bench.journal.refill()
    assert len(list(bench.directory.iterdir())) <= 4
    bench.send()
    assert [p["n"] for p in payloads(bench.taken)] == list(range(3000))


def test_a_journal_that_emptied_gives_its_files_back_but_for_a_few(bench: Bench):
    for number in range(1000):
        bench.log({"n": number, "pad": "x" * 100})
    assert len(list(bench.directory.iterdir())) > 30
    bench.send()
    assert len(list(bench.directory.iterdir())) <= 1 + journal.SPARES_MAX
    assert len(bench.journal.files()) == len(list(bench.directory.iterdir()))


def test_the_sender_is_woken_once_in_so_many_bytes_and_never_once_per_record(tmp_path: Path):
    bench = Bench(tmp_path, file_size=4 * WAKE_SIZE, size_max=8 * WAKE_SIZE)
    for _ in range(3 * WAKE_SIZE // 200):
        bench.log({"pad": "x" * 170})
    assert 2 <= bench.woken <= 3
    bench.close()


def test_a_payload_that_cannot_be_packed_uses_nothing_up(bench: Bench):
    assert bench.log({"n": 0})
    for bad in ({"n": object()}, {"n": 1 << 70}, {"n": "\ud800"}):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            bench.log(bad)
    assert bench.log({"n": 1})
    assert payloads(bench.left()) == [{"n": 0}, {"n": 1}]
    assert bench.journal.next_seq == 3


action = st.one_of(
    st.tuples(st.just("log"), st.integers(1, 60)),
    st.tuples(st.just("send"), st.none()),
    st.tuples(st.just("collect"), st.none()),
    st.tuples(st.just("ack"), st.integers(0, 40)),
    st.tuples(st.just("refill"), st.none()),
)


@given(st.lists(action, max_size=25), st.sampled_from([2, 3, 6, 64]))
def test_stale_frames_of_equal_size_never_come_back(tmp_path_factory: pytest.TempPathFactory, actions, files: int):
    """Whatever the writer, the sender and the daemon do: a kill now would leave exactly what was not acknowledged."""
    bench = Bench(tmp_path_factory.mktemp("journal"), size_max=files * FILE_SIZE)
    for _ in range(300):  # From seq 256 on, every frame has the same size.
        bench.log({"n": 0, "pad": "x" * 90})
        bench.send()
    logged: list[tuple[int, int]] = []
    number = 10000
    for verb, count in actions:
        if verb == "log":
            for _ in range(count):
                number += 1
                if bench.log({"n": number, "pad": "x" * 90}):
                    logged.append((bench.journal.next_seq - 1, number))
        elif verb == "send":
            bench.send()
        elif verb == "collect":
            bench.backlog.collect()
        elif verb == "ack":
            bench.backlog.collect()
            bench.backlog.acknowledge(bench.backlog.acked + count)
        else:
            bench.journal.refill()
        found = bench.left()
        assert [(f.first, f.payload["n"]) for f in found if f.kind == Kind.METRICS] == [
            (seq, n) for seq, n in logged if seq >= bench.backlog.acked
        ]
        assert (found[-1].last + 1 if found else bench.backlog.acked) == bench.journal.next_seq
    bench.close()


# No room.


def test_a_full_journal_refuses_the_newest_records_and_one_gap_stands_for_them(tmp_path: Path):
    bench = Bench(tmp_path, size_max=3 * FILE_SIZE)
    taken = bench.fill()
    for _ in range(499):
        assert not bench.log({"pad": "x" * 100})
    assert bench.journal.refused == 500
    assert bench.journal.next_seq == 1 + taken + 500
    assert bench.left()[-1] == (taken + 1, taken + 500, Kind.GAP, {"first": taken + 1, "last": taken + 500, "reason": "journal full"})
    bench.send()
    assert bench.taken[-1].last == taken, "an open gap is not sent: it may still grow"
    assert bench.log({"n": 1})
    bench.send()
    assert [frame.kind for frame in bench.taken[-2:]] == [Kind.GAP, Kind.METRICS]
    in_order(bench.taken)
    assert bench.taken[-2][:2] == (taken + 1, taken + 500)
    bench.close()


def test_a_gap_that_is_closed_by_hand_is_sent(tmp_path: Path):
    bench = Bench(tmp_path, size_max=2 * FILE_SIZE)
    taken = bench.fill()
    bench.send()
    assert bench.journal.closed_seq == taken + 1
    bench.journal.close_gap()
    bench.send()
    assert bench.taken[-1][:3] == (taken + 1, taken + 1, Kind.GAP)
    assert bench.journal.closed_seq == bench.journal.next_seq == bench.backlog.acked
    bench.close()


def test_a_record_over_the_limit_is_a_gap_of_its_own_between_its_neighbours(bench: Bench):
    assert bench.log({"n": 0})
    assert not bench.log({"big": "x" * FRAME_SIZE_MAX})
    assert bench.log({"n": 1})
    found = bench.left()
    assert [frame.kind for frame in found[1:]] == [Kind.METRICS, Kind.GAP, Kind.METRICS]
    assert found[2].payload["reason"].startswith("record of 1048")
    assert bench.journal.refused == 1
    in_order(found)


def test_the_largest_record_fits_although_it_is_larger_than_a_file(tmp_path: Path):
    bench = Bench(tmp_path / "journal", size_max=4 << 20)
    largest = "x" * (FRAME_SIZE_MAX - HEADER.size - 30)
    assert bench.log({"n": 0})
    assert bench.log({"big": largest}, step=1)
    assert bench.log({"n": 1})
    bench.send()
    assert payloads(bench.taken) == [{"n": 0}, {"big": largest}, {"n": 1}]
    for _ in range(20):
        bench.log({"pad": "x" * 100})
    bench.send()
    assert max(path.stat().st_size for path in bench.directory.iterdir()) == FILE_SIZE, "a large file is not kept"
    bench.close()


def test_an_oversize_record_while_the_journal_is_full_is_counted_once(tmp_path: Path):
    bench = Bench(tmp_path, size_max=2 * FILE_SIZE)
    bench.fill()
    bench.log({"big": "x" * FRAME_SIZE_MAX})
    assert bench.journal.refused == 2
    assert bench.left()[-1].last == bench.journal.next_seq - 1
    bench.close()


def test_a_write_that_fails_is_a_gap_and_the_next_one_that_works_closes_it(bench: Bench):
    assert bench.log({"n": 0})
    file = bench.journal.files()[0]
    working, broken = os.dup(file.fd), os.open(os.devnull, os.O_RDONLY)
    os.dup2(broken, file.fd)
    assert not bench.log({"n": 1})
    assert not bench.log({"n": 2})
    os.dup2(working, file.fd)
    for fd in (working, broken):
        os.close(fd)
    assert bench.log({"n": 3})
    found = bench.left()
    assert [(frame.first, frame.last, frame.kind) for frame in found[1:]] == [(1, 1, 1), (2, 3, 7), (4, 4, 1)]
    assert found[2].payload["reason"] == "io"


def test_where_no_directory_takes_a_file_memory_does(tmp_path: Path):
    (tmp_path / "file").touch()
    made = Journal(WRITER, START, [tmp_path / "file"], file_size=FILE_SIZE, size_max=8 * FILE_SIZE, wake=lambda: None)
    assert made.anonymous
    for number in range(200):
        assert made.append(Kind.METRICS, None, {"n": number, "pad": "x" * 100})
    found = [frame for chunk in made.collect() for frame in frames(os.pread(chunk.file.fd, *size_of(chunk)))]
    in_order(found)
    assert [p["n"] for p in payloads(found)] == list(range(200))
    for file in made.files():
        file.close()


def size_of(chunk: Chunk) -> tuple[int, int]:
    return chunk.end - chunk.offset, chunk.offset


def test_the_next_directory_is_tried_once_and_then_kept(tmp_path: Path):
    (tmp_path / "file").touch()
    bench = Bench(tmp_path / "second")
    made = Journal(
        WRITER, START, [tmp_path / "file", tmp_path / "second"], file_size=FILE_SIZE, size_max=1 << 20, wake=lambda: None
    )  # fmt: skip
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    for _ in range(100):
        made.append(Kind.METRICS, None, {"pad": "x" * 100})
    assert list((tmp_path / "file").iterdir()) == []
    for file in made.files():
        file.remove()
    bench.close()


def test_half_full_is_crowded_and_empty_is_not(tmp_path: Path):
    bench = Bench(tmp_path, size_max=8 * FILE_SIZE)
    assert not bench.journal.crowded
    bench.fill()
    assert bench.journal.crowded
    bench.send()
    assert not bench.journal.crowded
    bench.close()


# Ctrl-C, anywhere.

CALLER_SIDE = {journal.__file__, framefile.__file__, fs.__file__}


def interrupt_at(nth: int) -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt before the nth bytecode of the caller's side."""
    passed = itertools.count(1)

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in CALLER_SIDE:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(passed) == nth:
            raise KeyboardInterrupt
        return trace

    return trace


def full(bench: Bench) -> None:
    bench.fill()


def full_then_drained(bench: Bench) -> None:
    bench.fill()
    bench.send()


def nearly_rotating(bench: Bench) -> None:
    while bench.journal._position[1] < FILE_SIZE - 200:
        bench.log({"pad": "x" * 10})


def nearly_rotating_with_a_spare(bench: Bench) -> None:
    bench.journal.refill()
    nearly_rotating(bench)


def nothing(bench: Bench) -> None:
    pass


@pytest.mark.parametrize("before", [nothing, nearly_rotating, nearly_rotating_with_a_spare, full, full_then_drained])
def test_ctrl_c_at_any_bytecode_of_append_loses_and_doubles_nothing(tmp_path: Path, before: Callable[[Bench], None]):
    """The interrupted record may be there or not, for log() did not return; every other one is there once."""
    for nth in itertools.count(1):
        bench = Bench(tmp_path / str(nth), size_max=4 * FILE_SIZE)
        before(bench)
        returned = []
        interrupted = False
        sys.settrace(interrupt_at(nth))
        try:
            bench.log({"n": -1, "pad": "x" * 100})
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        for number in range(150):
            if bench.log({"n": number, "pad": "x" * 100}):
                returned.append(number)
            if number % 7 == 0:
                check_left(bench, returned)
                bench.send()
        bench.send()
        in_order(bench.taken)
        assert [p["n"] for p in payloads(bench.taken) if p.get("n", -1) >= 0] == returned
        assert len(returned) > 100
        bench.close()
        assert not list(bench.directory.glob(".*")), "no hidden file is left, for nobody would look at it again"
        assert adopt(bench.directory, bench.backlog.acked) == [], "nor one that holds a record"
        if not interrupted:
            break
    assert nth > 50


def check_left(bench: Bench, returned: list[int]) -> None:
    found = [p["n"] for p in payloads(bench.taken + bench.left()) if p.get("n", -1) >= 0]
    assert found == returned
