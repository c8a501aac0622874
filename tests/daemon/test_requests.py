"""What tools ask: answered at once, or once it has become true."""

import os

import pytest

from ingesting import Answer, answers
from ranklog import wire
from ranklog.version import __version__
from ranklog.wire import Type, Wait
from ranklogd.ingest import Peer
from ranklogd.requests import REQUESTS_MAX, Progress, Requests

PEER = Peer(b"tool", 1000)


class Daemon:
    """What `Requests` asks of its daemon."""

    def __init__(self) -> None:
        self.sealed = 0
        self.scans: list[bool] = []
        self.requests = Requests(status=lambda: '{"pid": 1}', seal=self._seal, scan=self.scans.append)
        self.progress = Progress(received=100, durable=90, sealed=50, uploaded=20, adopting=False, stuck=False)

    def _seal(self) -> None:
        self.sealed += 1

    def ask(self, kind: Type, *fields: object, now_s: float = 0.0) -> list[Answer]:
        return answers(self.requests.handle(PEER, kind, list(fields), self.progress, now_s))

    def answer(self, now_s: float = 0.0, **progress: object) -> list[Answer]:
        self.progress = self.progress._replace(**progress)
        return answers(self.requests.answer(self.progress, now_s))


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


def test_a_ping_is_answered_at_once_with_version_and_pid(daemon: Daemon) -> None:
    (pong,) = daemon.ask(Type.PING, 77)
    assert (pong.kind, pong.fields) == (Type.PONG, [77, __version__, os.getpid()])


def test_status_is_json_in_the_body(daemon: Daemon) -> None:
    (report,) = daemon.ask(Type.STATUS, 78)
    assert (report.kind, report.fields, report.body) == (Type.REPORT, [78], b'{"pid": 1}')


@pytest.mark.parametrize(
    ("wait", "mark", "seals"),
    [(Wait.DURABLE, "durable", 0), (Wait.SEALED, "sealed", 1), (Wait.UPLOADED, "uploaded", 1)],
)
def test_a_flush_is_answered_when_what_was_received_by_then_has_come_so_far(
    daemon: Daemon, wait: Wait, mark: str, seals: int
) -> None:
    assert daemon.ask(Type.FLUSH, 5, int(wait), 60.0) == []
    assert (daemon.sealed, daemon.requests.waiting) == (seals, True)
    assert daemon.answer(received=500, **{mark: 99}) == []
    (flushed,) = daemon.answer(**{mark: 100})
    assert (flushed.kind, flushed.fields) == (Type.FLUSHED, [5, True, 0])
    assert not daemon.requests.waiting


def test_a_flush_that_is_not_done_in_time_says_how_much_is_missing(daemon: Daemon) -> None:
    daemon.ask(Type.FLUSH, 5, int(Wait.UPLOADED), 10.0, now_s=100.0)
    assert daemon.answer(109.9) == []
    (flushed,) = daemon.answer(110.0, uploaded=60)
    assert flushed.fields == [5, False, 40]


@pytest.mark.parametrize("limit_s", [-5.0, 0, float("-inf")])
def test_a_deadline_that_is_over_already_is_answered_on_the_next_turn(daemon: Daemon, limit_s: float) -> None:
    daemon.ask(Type.FLUSH, 5, int(Wait.UPLOADED), limit_s)
    assert daemon.answer()[0].fields == [5, False, 80]


def test_a_wait_that_nobody_knows_is_the_nearest_that_is_known(daemon: Daemon) -> None:
    daemon.ask(Type.FLUSH, 5, 99, 60.0)
    assert daemon.answer(uploaded=100)[0].fields == [5, True, 0]


def test_a_deadline_of_ages_ends_after_a_day(daemon: Daemon) -> None:
    daemon.ask(Type.FLUSH, 5, int(Wait.UPLOADED), float("inf"))
    assert daemon.answer(86399.0) == []
    assert len(daemon.answer(86401.0)) == 1


def test_sync_scans_with_offline_writers_and_waits_for_the_adoption(daemon: Daemon) -> None:
    daemon.progress = daemon.progress._replace(adopting=True)
    assert daemon.ask(Type.SYNC, 9) == []
    assert daemon.scans == [True]
    assert daemon.answer() == []
    assert daemon.answer(adopting=False)[0].fields == [9, True, 0]


def test_sync_says_when_files_had_to_stay(daemon: Daemon) -> None:
    daemon.ask(Type.SYNC, 9)
    assert daemon.answer(stuck=True)[0].fields == [9, False, 0]


def test_more_than_a_bound_of_waiting_requests_are_answered_as_not_done(daemon: Daemon) -> None:
    for token in range(REQUESTS_MAX):
        assert daemon.ask(Type.FLUSH, token, int(Wait.UPLOADED), 60.0) == []
    assert daemon.ask(Type.FLUSH, 999, int(Wait.UPLOADED), 60.0)[0].fields == [999, False, 100]
    assert daemon.ask(Type.PING, 1)[0].kind == Type.PONG
    assert len(daemon.answer(uploaded=100)) == REQUESTS_MAX


def test_every_answer_goes_to_who_asked(daemon: Daemon) -> None:
    for name in (b"one", b"two"):
        daemon.requests.handle(Peer(name, 0), Type.FLUSH, [1, 0, 5.0], daemon.progress, 0.0)
    replies = daemon.requests.answer(daemon.progress._replace(durable=100), 0.0)
    assert [reply.identity for reply in replies] == [b"one", b"two"]
    assert wire.decode(replies[0].header)[0] == Type.FLUSHED
