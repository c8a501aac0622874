"""What the client says and believes when the daemon refuses, forgets, falls silent or comes back. The daemon is a
script here; the real one is in tests/system.
"""

import zlib
from pathlib import Path

import pytest

from harness import Heard, Peer, Sending, wait_for
from ranklog import link, wire
from ranklog.frame import spans
from ranklog.link import State
from ranklog.wire import Code, Type

RAW = bytes.fromhex(Sending.WRITER)


@pytest.fixture
def client(tmp_path: Path):
    made = Sending(tmp_path, lambda: tmp_path / "s")
    yield made
    made.sender.stop(5)


@pytest.fixture
def peer(tmp_path: Path):
    with Peer(tmp_path / "s") as made:
        yield made


def batch(heard: Heard) -> tuple[int, int]:
    """Check a BATCH and return (first, last) seq."""
    writer, first, count, crc, _ = heard.fields
    assert heard.kind == Type.BATCH
    assert writer == RAW
    assert crc == zlib.crc32(heard.body)
    found = list(spans(memoryview(heard.body)))
    assert (found[0].first, found[-1].last, found[-1].end) == (first, first + count - 1, len(heard.body))
    return first, first + count - 1


def attach(peer: Peer, expected: int = 0) -> None:
    assert peer.expect(Type.HELLO).fields == [wire.VERSION_MIN, wire.VERSION, RAW, 0]
    peer.welcome(RAW, expected)


def test_a_client_greets_with_its_start_frame_and_sends_what_is_asked_for(client: Sending, peer: Peer):
    client.log(1, 2, 3)
    hello = peer.expect(Type.HELLO)
    assert hello.body == Sending.START
    assert client.sender.state == State.CONNECTING, "a connection is no welcome"
    peer.welcome(RAW)
    first, last = batch(peer.expect(Type.BATCH))
    assert first == 0
    peer.say(Type.ACK, RAW, last, wire.CREDIT)
    wait_for(lambda: client.sender.acked == last + 1, "the ack is heard")


def test_two_batches_at_most_are_on_the_way(client: Sending, peer: Peer):
    attach(peer)
    for number in range(4):
        client.log(number)
        if number < 2:
            batch(peer.expect(Type.BATCH)) if number else [peer.expect(Type.BATCH)]
    heard = peer.hear(0.4)
    assert heard is None, f"a third before the first was acknowledged: {heard}"
    peer.say(Type.ACK, RAW, client.journal.next_seq - 3, wire.CREDIT)
    assert batch(peer.expect(Type.BATCH))[1] == client.journal.next_seq - 1, "what gathered goes together"


def test_a_daemon_that_forgot_the_writer_is_greeted_again_and_gets_what_is_not_acknowledged(client: Sending, peer: Peer):
    attach(peer)
    client.log(1, 2)
    batch(peer.expect(Type.BATCH))
    peer.say(Type.REFUSE, RAW, Code.UNKNOWN_WRITER, "say HELLO first", True, -1)
    peer.next_of(Type.HELLO)  # A second batch may have been on the way.
    peer.welcome(RAW)
    assert batch(peer.expect(Type.BATCH))[0] == 0


def test_a_jump_is_answered_from_the_seq_that_is_due(client: Sending, peer: Peer):
    attach(peer)
    client.log(*range(10))
    first, last = batch(peer.expect(Type.BATCH))
    wait_for(lambda: client.journal.next_seq == 11, "all are logged")
    peer.say(Type.REFUSE, RAW, Code.SEQUENCE, "out of order", True, 0)
    assert batch(peer.expect(Type.BATCH))[0] == first == 0
    assert last <= 10


def test_a_daemon_without_room_gets_nothing_more_until_it_welcomes_again(
    client: Sending, peer: Peer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(link, "ASK_INTERVAL_S", 0.3)
    attach(peer)
    client.log(1, 2)
    batch(peer.expect(Type.BATCH))
    peer.say(Type.REFUSE, RAW, Code.FULL, "the disk is full", True, -1)
    client.reaches(State.SILENT)
    client.log(3)
    wait_for(lambda: client.spooled() == [1, 2, 3], "they wait on disk", 5)
    peer.expect(Type.HELLO)  # It asks now and then.
    peer.say(Type.REFUSE, RAW, Code.FULL, "the disk is full", True, -1)
    peer.expect(Type.HELLO)
    peer.welcome(RAW)
    first, last = batch(peer.next_of(Type.BATCH))
    assert (first, last) == (0, 3)
    peer.say(Type.ACK, RAW, last, wire.CREDIT)
    wait_for(lambda: not list((client.path / "spool").iterdir()), "the spool is empty again")
    assert client.told == ["the daemon takes no records for now (the disk is full); they are kept on this node and sent later"]


def test_a_writer_that_is_refused_for_good_spools_and_says_so_once(client: Sending, peer: Peer):
    client.log(1)
    peer.expect(Type.HELLO)
    peer.say(Type.REFUSE, RAW, Code.FOREIGN, "this writer belongs to another user", False, -1)
    client.reaches(State.REJECTED)
    client.log(2)
    wait_for(lambda: client.spooled() == [1, 2], "they are on disk", 5)
    assert peer.hear(0.2) is None, "nothing more is sent"
    [text] = client.told
    assert "refused this writer for good: this writer belongs to another user" in text


def test_a_refusal_of_somebody_elses_writer_is_none_of_ours(client: Sending, peer: Peer):
    attach(peer)
    client.log(1)
    batch(peer.expect(Type.BATCH))
    for code in Code:
        peer.say(Type.REFUSE, bytes(16), code, "not for you", False, -1)
    peer.say(Type.ACK, bytes(16), 1000, wire.CREDIT)
    peer.welcome(bytes(16), 1000)
    client.log(2)
    batch(peer.expect(Type.BATCH))
    assert client.sender.state == State.ATTACHED
    assert client.sender.acked == 0


def test_a_daemon_that_acknowledges_nothing_is_taken_for_absent_until_it_does(
    client: Sending, peer: Peer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(link, "ACK_TIMEOUT_S", 0.3)
    attach(peer)
    client.log(1)
    _, last = batch(peer.expect(Type.BATCH))
    client.reaches(State.SILENT)
    client.log(2)
    wait_for(lambda: client.spooled() == [1, 2], "they are safe on disk", 5)
    assert client.sender.wait(3, 1, spooled=True)
    assert not client.sender.wait(3, 0.1)
    peer.say(Type.ACK, RAW, last, wire.CREDIT)
    client.reaches(State.ATTACHED)
    assert batch(peer.expect(Type.BATCH))[0] == last + 1, "what was on the way is not sent twice"


def test_when_the_daemon_comes_back_it_decides_from_where_to_go_on(client: Sending, tmp_path: Path):
    with Peer(tmp_path / "s") as first:
        attach(first)
        client.log(*range(1, 6))
        batch(first.expect(Type.BATCH))
    client.reaches(State.CONNECTING)
    client.log(6, 7)
    with Peer(tmp_path / "s") as second:
        assert second.expect(Type.HELLO).fields[3] == 0, "the base: nothing was acknowledged"
        second.welcome(RAW, 3)
        assert batch(second.expect(Type.BATCH))[1] == 2, "what it has is sent once more, alone, to draw the ack"
        first_seq, last = batch(second.expect(Type.BATCH))
        assert (first_seq, last) == (3, 7)
        second.say(Type.ACK, RAW, last, wire.CREDIT)
        wait_for(lambda: client.sender.acked == 8, "all is acknowledged")


def test_a_socket_that_appears_elsewhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "LOOK_INTERVAL_S", 0.2)
    places = [tmp_path / "old"]
    client = Sending(tmp_path, lambda: places[0])
    client.log(1)
    client.reaches(State.CONNECTING)
    places[0] = tmp_path / "new"
    with Peer(tmp_path / "new") as peer:
        attach(peer)
        assert batch(peer.expect(Type.BATCH)) == (0, 1)
    client.sender.stop(5)


def test_the_last_flag_marks_the_batch_with_the_end_record_and_no_other(client: Sending, peer: Peer):
    attach(peer)
    client.log(1)
    heard = peer.expect(Type.BATCH)
    while batch(heard)[1] < 1:
        heard = peer.expect(Type.BATCH)
    assert heard.fields[4] is False
    peer.say(Type.ACK, RAW, 1, wire.CREDIT)
    client.sender.expect_end(2)
    client.log(2)
    heard = peer.expect(Type.BATCH)
    assert (batch(heard), heard.fields[4]) == ((2, 2), True)
