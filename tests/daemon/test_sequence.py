"""Who may append what: the rules against a model of plain lists, and each rule by itself."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ranklog.start import Start, encode_start
from ranklogd.sequence import GAP_MAX, Verdict, Writers, WriterState, run_key
from segments import start_of, writer_id

NOW_S = 1_700_000_000
KEEP_S = 100.0


def hello(writers: Writers, start: Start, base: int = 0, uid: int = 1000) -> WriterState:
    welcome = writers.hello(uid, start, encode_start(start), base)
    assert welcome is not None
    assert welcome.expected >= base
    return welcome.state


def received(state: WriterState, count: int) -> None:
    """What ingest does with an accepted batch."""
    state.next_seq += count


def id_of(number: int) -> bytes:
    return bytes.fromhex(writer_id(number))


class ClientAndDaemon(RuleBasedStateMachine):
    """One client that resends from what was acknowledged, and a daemon that commits, fails and restarts at will."""

    @initialize()
    def begin(self) -> None:
        self.writers = Writers()
        self.start = start_of(1)
        self.log: list[int] = []  # Seqs in the order of the log: what is durable …
        self.pending: list[int] = []  # … and what is not yet.
        self.next = 1  # The client's next unused seq; 0 is its start frame.
        self.acked = -1
        self.base = 0
        self.greeted = False

    @property
    def state(self) -> WriterState | None:
        return self.writers.get(id_of(1))

    @rule(count=st.integers(1, 5))
    def client_logs(self, count: int) -> None:
        self.next += count

    @rule()
    def client_says_hello(self) -> None:
        state = hello(self.writers, self.start, self.base)
        if state.lost:
            first, last = state.lost
            self.pending += range(first, last + 1)
            received(state, last - first + 1)
        assert state.next_seq == len(self.log) + len(self.pending)
        self.greeted = True

    @rule(back=st.integers(0, 6), count=st.integers(1, 6))
    def client_sends(self, back: int, count: int) -> None:
        """From somewhere between its base and its end; the daemon takes it only where it is due."""
        first = max(self.base, min(self.next - 1, len(self.log) + len(self.pending)) - back)
        count = min(count, self.next - first)
        if count <= 0:
            return
        due = len(self.log) + len(self.pending)
        verdict = self.writers.judge(id_of(1), 1000, first, count)
        if not self.greeted:
            assert verdict == Verdict.UNKNOWN
        elif first == due:
            assert verdict == Verdict.APPEND
            self.pending += range(first, first + count)
            assert self.state is not None
            received(self.state, count)
        elif first + count <= due:
            assert verdict == Verdict.DUPLICATE
        else:
            assert verdict == Verdict.JUMP

    @rule()
    def somebody_else_sends(self) -> None:
        verdict = self.writers.judge(id_of(1), 1001, len(self.log), 1)
        assert verdict == (Verdict.FOREIGN if self.greeted else Verdict.UNKNOWN)
        if self.state is not None:
            assert self.writers.hello(1001, self.start, b"", 0) is None

    @rule()
    def daemon_commits(self) -> None:
        if self.state is not None and self.pending:
            self.log += self.pending
            self.pending = []
            self.writers.synced([self.state], NOW_S)
            self.acked = self.state.durable
            self.base = max(self.base, self.acked + 1)
            assert self.acked == self.log[-1]

    @rule()
    def the_disk_is_full(self) -> None:
        if self.state is not None and self.pending:
            self.pending = []
            self.writers.revert([self.state])

    @rule()
    def daemon_restarts(self) -> None:
        """With the marks of its last segment header: what is durable, and nothing else."""
        marks = self.writers.marks()
        assert len(marks) == bool(self.log)
        self.writers = Writers(marks)
        self.pending = []
        self.greeted = False

    @precondition(lambda self: self.log and self.next - self.base > 3)
    @rule()
    def client_drops_its_oldest(self) -> None:
        """Its memory went. The daemon knows the writer, so it can tell what is missing."""
        self.base += 2

    @invariant()
    def nothing_is_lost_doubled_or_out_of_order(self) -> None:
        if hasattr(self, "log"):
            assert self.log == list(range(len(self.log)))
            assert self.acked < len(self.log)


TestClientAndDaemon = ClientAndDaemon.TestCase
TestClientAndDaemon.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_batch_for_a_writer_that_has_not_said_hello_is_unknown_even_with_a_mark() -> None:
    writers = Writers()
    state = hello(writers, start_of(1))
    received(state, 3)
    writers.synced([state], NOW_S)
    again = Writers(writers.marks())
    assert again.judge(id_of(1), 1000, 3, 1) == Verdict.UNKNOWN
    hello(again, start_of(1), 3)
    assert again.judge(id_of(1), 1000, 3, 1) == Verdict.APPEND


def test_a_batch_that_overlaps_what_is_there_is_a_jump_to_where_it_should_begin() -> None:
    writers = Writers()
    received(hello(writers, start_of(1)), 10)
    assert writers.judge(id_of(1), 1000, 8, 5) == Verdict.JUMP
    assert writers.judge(id_of(1), 1000, 8, 2) == Verdict.DUPLICATE
    assert writers.judge(id_of(1), 1000, 12, 2) == Verdict.JUMP


def test_the_first_uid_owns_a_writer_over_restarts() -> None:
    writers = Writers()
    state = hello(writers, start_of(1), uid=1000)
    received(state, 1)
    writers.synced([state], NOW_S)
    again = Writers(writers.marks())
    assert again.hello(1001, start_of(1), b"", 0) is None
    assert again.hello(1000, start_of(1), b"", 1) is not None


def test_seqs_below_the_base_of_an_unknown_writer_are_not_lost() -> None:
    writers = Writers()
    state = hello(writers, start_of(1), base=500)
    assert (state.next_seq, state.lost) == (500, None)
    assert writers.judge(id_of(1), 1000, 500, 1) == Verdict.APPEND


def test_what_a_known_writer_does_not_hold_any_more_is_lost_until_it_is_recorded() -> None:
    writers = Writers()
    state = hello(writers, start_of(1))
    received(state, 10)
    writers.synced([state], NOW_S)
    assert hello(writers, start_of(1), base=15).lost == (10, 14)
    received(state, 5)
    assert state.lost is None
    writers.revert([state])  # There was no room for the gap: it is due again.
    assert state.lost == (10, 14)


def attempts(*starts: Start) -> list[int]:
    """The attempts that the writers of these start frames get, in this order of HELLO."""
    writers = Writers()
    return [hello(writers, start).attempt for start in starts]


def test_each_restart_of_a_rank_is_one_attempt_more() -> None:
    first = start_of(1, wall_ns=10)
    second, third = replace(first, writer=writer_id(2), wall_ns=20), replace(first, writer=writer_id(3), wall_ns=30)
    assert attempts(first, second, third) == [0, 1, 2]
    assert attempts(first, first) == [0, 0], "a reconnect is no restart"


def test_attempts_are_told_apart_by_rank_role_and_run() -> None:
    first = start_of(1, wall_ns=10)
    others = [
        replace(first, writer=writer_id(2), wall_ns=20, rank=1),
        replace(first, writer=writer_id(3), wall_ns=30, role="rollout"),
        replace(first, writer=writer_id(4), wall_ns=40, run="other"),
        replace(first, writer=writer_id(5), wall_ns=50, project="other"),
    ]
    assert attempts(first, *others) == [0, 0, 0, 0, 0]
    assert len({run_key(start) for start in (first, *others)}) == 5


def test_the_environments_count_of_attempts_is_never_lowered() -> None:
    first = start_of(1, wall_ns=10, attempt=4)
    assert attempts(first, replace(first, writer=writer_id(2), wall_ns=20, attempt=1)) == [4, 5]


def test_an_earlier_attempt_that_is_adopted_later_does_not_count_the_later_one() -> None:
    later, earlier = start_of(1, wall_ns=20), start_of(2, wall_ns=10)
    assert attempts(later, earlier) == [0, 0]


def test_a_forked_child_shares_its_parents_attempt() -> None:
    parent = start_of(2, wall_ns=20)
    child = replace(parent, writer=writer_id(3), parent=parent.writer, wall_ns=30)
    assert attempts(start_of(1, wall_ns=10), parent, child) == [0, 1, 1]
    assert attempts(start_of(1, wall_ns=10), child) == [0, 0], "of a parent nobody knows: what the environment says"
    assert attempts(replace(child, parent="not hex")) == [0]


def test_attempts_go_on_after_a_restart_of_the_daemon() -> None:
    writers = Writers()
    state = hello(writers, start_of(1, wall_ns=10))
    received(state, 1)
    writers.synced([state], NOW_S)
    again = Writers(writers.marks())
    assert hello(again, start_of(2, wall_ns=20)).attempt == 1
    assert hello(again, start_of(1, wall_ns=10)).attempt == 0


def ended(writers: Writers, number: int, at_s: int) -> None:
    state = hello(writers, start_of(number))
    received(state, 1)
    state.ending = True
    writers.synced([state], at_s)
    assert (state.ended_s, state.finished) == (at_s, True)


def test_a_writer_is_forgotten_when_it_has_ended_long_ago_and_no_file_is_left() -> None:
    writers = Writers()
    for number in (1, 2, 3):
        ended(writers, number, NOW_S)
    assert writers.forget(NOW_S + 100, KEEP_S, set()) == 0
    assert writers.forget(NOW_S + 101, KEEP_S, {id_of(2)}) == 2
    assert [state.writer for state in writers] == [id_of(2)]


def test_a_writer_whose_end_nobody_saw_is_forgotten_after_as_long_a_silence() -> None:
    writers = Writers()
    state = hello(writers, start_of(1))
    received(state, 1)
    writers.synced([state], NOW_S)
    assert writers.forget(NOW_S + 60, KEEP_S, set()) == 0
    received(state, 1)
    writers.synced([state], NOW_S + 60)
    assert writers.forget(NOW_S + 160, KEEP_S, set()) == 0
    assert writers.forget(NOW_S + 161, KEEP_S, {id_of(1)}) == 0, "not while it has a file here"
    assert writers.forget(NOW_S + 161, KEEP_S, set()) == 1


def test_silence_begins_anew_with_each_daemon() -> None:
    writers = Writers()
    ended_never = hello(writers, start_of(1))
    received(ended_never, 1)
    writers.synced([ended_never], NOW_S)
    again = Writers(writers.marks())
    assert again.forget(NOW_S + 1000, KEEP_S, set()) == 0
    assert again.forget(NOW_S + 1101, KEEP_S, set()) == 1


def test_a_revert_takes_back_an_end() -> None:
    writers = Writers()
    state = hello(writers, start_of(1))
    received(state, 1)
    state.ending = True
    writers.revert([state])
    received(state, 1)
    writers.synced([state], NOW_S)
    assert (state.ended_s, state.finished) == (0, False)


def test_who_only_said_hello_is_in_no_header_and_makes_room() -> None:
    writers = Writers()
    received(hello(writers, start_of(1)), 1)
    hello(writers, start_of(2))
    hello(writers, start_of(3), base=7)
    assert writers.marks() == ()
    writers.drop_greeted()
    assert [state.writer for state in writers] == [id_of(1)]
    writers.synced(writers, NOW_S)
    assert [mark.writer for mark in writers.marks()] == [id_of(1)]


def test_a_forgotten_writer_does_not_count_as_an_attempt() -> None:
    writers = Writers()
    ended(writers, 1, NOW_S)
    writers.forget(NOW_S + 1000, KEEP_S, set())
    assert hello(writers, start_of(2, wall_ns=5)).attempt == 0


@pytest.mark.parametrize("uid", [0, 1000, (1 << 32) - 2])
def test_any_uid_may_own_a_writer(uid: int) -> None:
    assert hello(Writers(), start_of(1), uid=uid).uid == uid
    assert GAP_MAX < 1 << 32, "a batch's count has 32 bits"
