"""What the writers of a node make of its runs."""

import os
from dataclasses import replace

import pytest

from ranklog.identity import boot_id, pid_namespace, process_start
from ranklog.start import Start, encode_start
from ranklogd.report import RunStatus
from ranklogd.runs import RUNS_SHOWN_MAX, Runs
from ranklogd.sequence import Writers, WriterState
from segments import start_of, writer_id

NOW_S = 1000.0


class Node:
    """Writers, and the runs they make."""

    def __init__(self) -> None:
        self.writers = Writers()
        self.runs = Runs(self.writers)

    def add(self, number: int, *, ended: str = "", records: int = 3, **fields: object) -> WriterState:
        """Bring in a writer: alive, `killed`, or `finished` by an end record."""
        start = replace(start_of(number, wall_ns=number), **fields)  # type: ignore[arg-type]
        welcome = self.writers.hello(1000, start, encode_start(start), 0)
        assert welcome is not None
        state = welcome.state
        state.next_seq = records
        state.ending = ended == "finished"
        self.writers.synced([state], 5)
        state.ended_s = 5 if ended else 0
        return state

    def rows(self, now_s: float = NOW_S) -> list[RunStatus]:
        self.runs.update(now_s)
        return self.runs.status(now_s)


@pytest.fixture
def node() -> Node:
    return Node()


def test_a_run_is_all_its_ranks_together(node: Node) -> None:
    for rank in range(4):
        node.add(rank, rank=rank, world_size=8, name="grand-ocean-1")
    (row,) = node.rows()
    assert (row.project, row.run, row.name, row.state) == ("demo", "run-1", "grand-ocean-1", "running")
    assert (row.ranks, row.world_size, row.records) == (4, 8, 12)


@pytest.mark.parametrize(
    ("ends", "state"),
    [(["", "finished"], "running"), (["finished", "finished"], "finished"), (["finished", "killed"], "ended"), (["killed", "killed"], "ended")],
)  # fmt: skip
def test_only_end_records_of_all_ranks_finish_a_run(node: Node, ends: list[str], state: str) -> None:
    for rank, ended in enumerate(ends):
        node.add(rank, rank=rank, ended=ended)
    assert node.rows()[0].state == state


def test_the_last_attempt_of_a_rank_decides(node: Node) -> None:
    node.add(1, ended="killed")
    node.add(2, ended="finished")
    assert node.rows()[0].state == "finished"
    node.add(3, ended="killed")
    assert node.rows()[0].state == "ended"


def test_a_forked_worker_without_an_end_record_does_not_unfinish_a_run(node: Node) -> None:
    node.add(1, ended="finished")
    node.add(2, ended="killed", parent=writer_id(1), role="worker")
    assert node.rows()[0].state == "finished"
    node.add(3, parent=writer_id(1), role="worker")
    assert node.rows()[0].state == "running", "but while it lives, the run does"


def test_the_daemons_own_writers_neither_count_nor_keep_a_run_alive(node: Node) -> None:
    node.add(1, ended="finished")
    node.add(2, rank=None, role="node")
    (row,) = node.rows()
    assert (row.ranks, row.records, row.state) == (1, 3, "finished")
    assert node.runs.live() == {}


def test_the_newest_record_comes_first_and_ages(node: Node) -> None:
    node.add(1, run="old")
    node.rows(now_s=0.0)
    state = node.add(2, run="new")
    assert [(row.run, row.last_s) for row in node.rows(now_s=10.0)] == [("new", 0.0), ("old", 10.0)]
    state.next_seq += 1
    assert [(row.run, row.last_s) for row in node.rows(now_s=15.0)] == [("new", 0.0), ("old", 15.0)]


def test_a_writer_that_has_not_said_who_it_is_since_the_restart_is_in_no_run(node: Node) -> None:
    node.add(1).start = None
    assert node.rows() == []


def test_what_is_shown_has_a_bound(node: Node) -> None:
    for number in range(RUNS_SHOWN_MAX + 50):
        node.add(number, run=f"run-{number}")
    assert len(node.rows()) == RUNS_SHOWN_MAX


def test_a_forgotten_writer_leaves_nothing_behind(node: Node) -> None:
    node.add(1, ended="killed")
    node.rows()
    node.writers.forget(1000, 1.0, set())
    assert node.rows() == []
    assert node.runs._seen == {}


def test_a_run_lives_while_a_process_of_it_may(node: Node) -> None:
    pid = os.getpid()
    here: dict[str, object] = {
        "boot": boot_id(),
        "pid_ns": pid_namespace(),
        "pid": pid,
        "pid_start": process_start(pid),
    }
    node.add(1, run="alive", **here)
    node.add(2, run="dead", **{**here, "pid_start": 1})
    node.add(3, run="ended", ended="killed", **here)
    node.add(4, run="elsewhere", pid_ns=7, pid=1)
    live = node.runs.live()
    assert set(live) == {("demo", "alive"), ("demo", "elsewhere")}
    assert isinstance(live["demo", "alive"][0], Start)
