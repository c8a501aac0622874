"""A message in, replies out: what is taken, what is refused, and that a refusal costs nobody else anything."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingesting import NOW_NS, OTHER_UID, UID, Half, batch_message, end_frame, frames, hello_message, kept, seqs
from ranklog import wire
from ranklog.frame import encode_frame, encode_gap
from ranklog.start import encode_start
from ranklog.wire import Type
from ranklogd.ingest import Peer
from ranklogd.sequence import GAP_MAX
from segments import frame, make_state, start_of

ONE, TWO = start_of(1), start_of(2)
WRITER = bytes.fromhex(ONE.writer)


@pytest.fixture
def half(tmp_path: Path) -> Half:
    return Half(make_state(tmp_path / "state"))


def test_hello_is_answered_with_where_to_begin_and_what_this_daemon_offers(half: Half) -> None:
    (welcome,) = half.hello(ONE)
    assert welcome.kind == Type.WELCOME
    assert welcome.fields == [1, WRITER, 0, "/spool", "/journal", "/cookie", wire.CREDIT]
    assert half.hello(TWO, 12)[0].fields[2] == 12, "never below what the writer still holds"


def test_a_batch_is_acknowledged_by_the_commit_and_not_before(half: Half) -> None:
    half.hello(ONE)
    assert half.batch(ONE, 0, encode_start(ONE) + frames(1, 2), 3) == []
    (ack,) = half.commit()
    assert ack.fields == [WRITER, 2, wire.CREDIT]
    assert half.commit() == []


def test_a_repeated_batch_is_acknowledged_again_and_written_once(half: Half) -> None:
    half.log(ONE, 0, 5)
    (ack,) = half.batch(ONE, 2, frames(2, 3), 3)
    assert (ack.durable, half.ingest.duplicates, half.commit()) == (4, 1, [])
    half.batch(ONE, 5, frames(5, 2), 2)
    assert half.batch(ONE, 5, frames(5, 2), 2) == [], "what it repeats is not durable yet"
    assert [ack.durable for ack in half.commit()] == [6]
    assert seqs(kept(half.state), ONE) == list(range(7))


def test_a_jump_is_answered_with_the_seq_that_is_due(half: Half) -> None:
    half.log(ONE, 0, 5)
    for first in (3, 6, 1 << 40):
        (refusal,) = half.batch(ONE, first, frames(first, 4), 4)
        assert (refusal.code, refusal.fields[3:]) == ("SEQUENCE", [True, 5])
    half.log(ONE, 5, 1)


def test_a_batch_without_hello_is_told_to_say_it(half: Half) -> None:
    (refusal,) = half.batch(ONE, 0, encode_start(ONE), 1)
    assert (refusal.code, refusal.fields[0], refusal.fields[3]) == ("UNKNOWN_WRITER", WRITER, True)


def test_another_user_can_neither_greet_nor_write_nor_draw_an_ack(half: Half) -> None:
    half.log(ONE, 0, 5)
    assert half.hello(ONE, uid=OTHER_UID)[0].code == "FOREIGN"
    assert half.batch(ONE, 5, frames(5, 1), 1, uid=OTHER_UID)[0].code == "FOREIGN"
    assert half.batch(ONE, 0, frames(0, 1), 1, uid=OTHER_UID)[0].code == "FOREIGN"
    assert half.ingest.refused == {"foreign": 3}
    half.log(ONE, 5, 1)


@pytest.mark.parametrize(
    ("versions", "answer"),
    [((1, 1), 1), ((0, 1), 1), ((1, 2), 1), ((0, 9), 1), ((0, 0), None), ((2, 2), None), ((2, 9), None)],
)
def test_a_version_in_common_is_chosen_or_both_sides_are_named(
    half: Half, versions: tuple[int, int], answer: int | None
) -> None:
    (reply,) = half.hello(ONE, versions=versions)
    if answer is not None:
        assert reply.fields[0] == answer
    else:
        assert (reply.code, reply.fields[3]) == ("VERSION", False)
        assert f"{versions[0]}..{versions[1]}" in reply.fields[2]
        assert "upgrade" in reply.fields[2]


def test_the_older_of_two_versions_is_spoken(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will be once there is a version 2: a client that knows only version 1 is answered in version 1."""
    monkeypatch.setattr(wire, "VERSION", 2)
    assert half.hello(ONE, versions=(1, 1))[0].fields[0] == 1
    assert half.hello(TWO, versions=(1, 3))[0].fields[0] == 2
    assert half.hello(start_of(3), versions=(0, 0))[0].code == "VERSION"
    assert half.hello(start_of(3), versions=(3, 3))[0].code == "VERSION"


BAD_HELLOS: dict[str, tuple[bytes, ...]] = {
    "no body": hello_message(ONE)[:1],
    "empty body": (hello_message(ONE)[0], b""),
    "cut body": (hello_message(ONE)[0], encode_start(ONE)[:-1]),
    "more behind the frame": (hello_message(ONE)[0], encode_start(ONE) + b"\0"),
    "a metrics frame": (hello_message(ONE)[0], frames(0, 1)),
    "another writer's start frame": (hello_message(ONE)[0], encode_start(TWO)),
    "not msgpack": (hello_message(ONE)[0], encode_frame(b"\xc1\xc1\xc1\xc1")),
    "a nested bomb": (hello_message(ONE)[0], encode_frame(b"\x91" * 100_000)),
    "a wide bomb": (hello_message(ONE)[0], encode_frame(b"\x95\x00\x00\xdd\xff\xff\xff\xff")),
    "a name of 4 KiB": (hello_message(ONE)[0], encode_start(replace(ONE, project="p" * 4096))),
    "a rank of 2^31": (hello_message(ONE)[0], encode_start(replace(ONE, rank=1 << 31))),
    "a writer id that is none": (
        hello_message(ONE)[0],
        frame(0, 0, {"writer": "../../etc/passwd", "project": "p", "run": "r"}),
    ),
    "a start frame of 128 KiB": (hello_message(ONE)[0], encode_start(replace(ONE, notes="n" * (128 << 10)))),
}


@pytest.mark.parametrize("parts", BAD_HELLOS.values(), ids=BAD_HELLOS)
def test_a_hello_that_says_nothing_usable_is_refused_in_words_and_leaves_no_trace(
    half: Half, parts: tuple[bytes, ...]
) -> None:
    (refusal,) = half.handle(*parts)
    assert refusal.code == "MALFORMED"
    assert refusal.fields[2]
    assert half.ingest.refused == {"malformed": 1}
    assert len(half.writers) == 0


BAD_HEADERS = {
    "empty": b"",
    "text": b"GET / HTTP/1.1",
    "nothing in it": b"\x90",
    "a map": b"\x81\x01\x02",
    "an unknown type": msgpack.packb([99, 1]),
    "an answer": wire.encode(Type.ACK, WRITER, 5, 2),
    "too few fields": msgpack.packb([2, WRITER]),
    "a short writer": msgpack.packb([2, b"w" * 15, 0, 1, 0, False]),
    "a negative seq": msgpack.packb([2, WRITER, -1, 1, 0, False]),
    "a count of 2^62": msgpack.packb([2, WRITER, 0, 1 << 62, 0, False]),
    "a float for a seq": msgpack.packb([2, WRITER, 0.0, 1, 0, False]),
    "nine kilobytes": msgpack.packb([2, b"w" * 9000]),
    "a nested bomb": b"\x91" * 8000,
    "a length bomb": b"\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_is_none_is_refused_and_counted(half: Half, header: bytes) -> None:
    half.log(ONE, 0, 3)
    assert half.handle(header, b"body")[0].code == "MALFORMED"
    assert half.ingest.refused == {"malformed": 1}
    half.log(ONE, 3, 1)


def test_a_third_part_is_one_too_many(half: Half) -> None:
    assert half.handle(*hello_message(ONE), b"more")[0].code == "MALFORMED"


def test_a_batch_that_was_damaged_on_the_way_is_asked_for_again(half: Half) -> None:
    half.log(ONE, 0, 3)
    header, body = batch_message(ONE, 3, frames(3, 5), 5)
    (refusal,) = half.handle(header, body[:40] + bytes([body[40] ^ 1]) + body[41:])
    assert (refusal.code, refusal.fields[3:]) == ("DAMAGED", [True, 3])
    assert half.handle(header, body) == []


@pytest.mark.parametrize(
    ("count", "data"),
    [(0, b""), (0, frames(3, 1)), (1, b""), (1, b"x"), (3, frames(3, 1)[:20]), (5_000, frames(3, 5)), (1 << 31, frames(3, 1)),
     (1 << 40, frames(3, 1)), (10, encode_gap(3, 11, "full", NOW_NS)), (GAP_MAX + 1, encode_gap(3, GAP_MAX + 3, "full", NOW_NS))],
    ids=["nothing", "count 0", "no bytes", "one byte", "too many for the bytes", "5000 in 5 frames", "2^31 in one frame",
         "2^40 in one frame", "not the gap's own count", "a gap without end"],
)  # fmt: skip
def test_a_count_that_the_bytes_cannot_hold_is_refused(half: Half, count: int, data: bytes) -> None:
    half.log(ONE, 0, 3)
    (refusal,) = half.batch(ONE, 3, data, count)
    assert (refusal.code, refusal.fields[3]) == ("MALFORMED", False)
    assert half.wal.next_lsn == 4
    half.log(ONE, 3, 2)


def test_gap_frames_may_stand_for_more_records_than_there_are_bytes(half: Half) -> None:
    half.log(ONE, 0, 3)
    data = frames(3, 1) + encode_gap(4, 1_000_003, "journal full", NOW_NS) + frames(1_000_004, 2)
    assert half.batch(ONE, 3, data, 1_000_003) == []
    assert half.commit()[0].durable == 1_000_005
    assert half.wal.next_lsn == 1_000_007


def test_what_a_writer_no_longer_holds_is_recorded_as_a_gap(half: Half) -> None:
    half.log(ONE, 0, 5)
    assert half.hello(ONE, 9)[0].fields[2] == 9
    assert half.ingest.pending
    half.log(ONE, 9, 2)
    assert [(r.seq, r.last, r.kind.name) for r in kept(half.state)][5:] == [
        (5, 8, "GAP"), (9, 9, "METRICS"), (10, 10, "METRICS"),
    ]  # fmt: skip


@pytest.mark.parametrize("base", [5 + GAP_MAX + 1, (1 << 62) - 1])
def test_a_hello_that_claims_an_impossible_loss_is_refused(half: Half, base: int) -> None:
    """Its gap would use up the lsns, and its count has no room in a WAL entry."""
    half.log(ONE, 0, 5)
    assert half.hello(ONE, base)[0].code == "MALFORMED"
    assert half.wal.next_lsn == 6
    half.log(ONE, 5, 1)
    assert half.hello(TWO, base)[0].kind == Type.WELCOME, "of a writer nobody knows nothing is lost"
    half.batch(TWO, base, frame(1, base, {}), 1)
    half.commit()


def test_a_gap_that_found_no_room_is_recorded_before_the_next_batch(half: Half) -> None:
    half.log(ONE, 0, 5)
    half.full = "the disk is full"
    assert half.hello(ONE, 9)[0].fields[2] == 9
    half.writers.revert([half.writers.get(WRITER)])  # As the commit does that finds no room.
    half.ingest._touched.clear()
    half.wal._give_back()
    assert half.batch(ONE, 9, frames(9, 1), 1)[0].code == "FULL", "and not a jump back to what the client has not got"
    half.full = ""
    half.log(ONE, 9, 1)
    assert seqs(kept(half.state), ONE) == list(range(10))


def test_a_full_disk_refuses_for_now_but_still_acknowledges_what_is_durable(half: Half) -> None:
    half.log(ONE, 0, 5)
    half.full = "the daemon's disk is full"
    (refusal,) = half.batch(ONE, 5, frames(5, 1), 1)
    assert (refusal.code, refusal.fields[2], refusal.fields[3]) == ("FULL", "the daemon's disk is full", True)
    assert half.batch(ONE, 3, frames(3, 2), 2)[0].durable == 4
    half.full = ""
    half.log(ONE, 5, 1)


def test_one_users_quota_refuses_that_user_alone(tmp_path: Path) -> None:
    half = Half(make_state(tmp_path / "state"), quota_per_uid_bytes=2000)
    half.log(ONE, 0, 50)
    (refusal,) = half.batch(ONE, 50, frames(50, 1), 1)
    assert (refusal.code, refusal.fields[3]) == ("FULL", True)
    assert f"user {UID}" in refusal.fields[2]
    assert "quota_per_uid_bytes" in refusal.fields[2]
    half.hello(TWO, uid=OTHER_UID)
    assert half.batch(TWO, 0, encode_start(TWO), 1, uid=OTHER_UID) == []
    half.commit()
    half.wal.roll()
    half.ingest.shares.sealed(half.wal.first_lsn - 1)
    assert half.batch(ONE, 50, frames(50, 1), 1)[0].code == "FULL"
    half.ingest.shares.uploaded(half.wal.first_lsn - 1)
    half.log(ONE, 50, 1)


def test_writers_max_refuses_new_writers_and_serves_the_known(tmp_path: Path) -> None:
    half = Half(make_state(tmp_path / "state"), writers_max=3)
    for number in (1, 2, 3):
        half.log(start_of(number), 0, 2)
    (refusal,) = half.hello(start_of(4))
    assert (refusal.code, refusal.fields[3]) == ("FULL", True)
    assert "writers_max" in refusal.fields[2]
    assert half.hello(ONE)[0].kind == Type.WELCOME
    half.log(ONE, 2, 1)


def test_a_flood_of_hellos_keeps_nobody_out(tmp_path: Path) -> None:
    half = Half(make_state(tmp_path / "state"), writers_max=10)
    half.log(ONE, 0, 2)
    half.hello(TWO)
    for number in range(100, 150):
        assert half.hello(start_of(number), uid=OTHER_UID)[0].kind == Type.WELCOME
    assert len(half.writers) <= 10
    half.log(ONE, 2, 1)
    # The flood may have pushed out who had only said HELLO: then it says it again.
    replies = half.batch(TWO, 0, encode_start(TWO), 1)
    assert [reply.code for reply in replies] in ([], ["UNKNOWN_WRITER"])
    half.log(TWO, 0, 2)


def test_a_flood_of_hellos_reaches_no_segment_header(tmp_path: Path) -> None:
    half = Half(make_state(tmp_path / "state"))
    half.log(ONE, 0, 2)
    for number in range(100, 200):
        half.hello(start_of(number), uid=OTHER_UID)
    half.wal.roll()
    found = half.crash()
    assert [mark.writer for mark in found.marks.values()] == [WRITER]


def test_an_end_that_the_header_announces_is_durable_with_the_commit(half: Half) -> None:
    half.log(ONE, 0, 3)
    half.batch(ONE, 3, frames(3, 1) + end_frame(4), 2, last=True)
    state = half.writers.get(WRITER)
    assert state is not None
    assert not state.finished
    half.commit()
    assert state.finished


def test_a_commit_waits_for_its_interval_only_while_little_is_pending(half: Half) -> None:
    half.hello(ONE)
    assert not half.ingest.pending
    half.batch(ONE, 0, encode_start(ONE), 1)
    assert (half.ingest.pending, half.ingest.urgent) == (True, False)
    big = b"".join(frame(1, seq, {"x": "y" * 100_000}) for seq in range(1, 100))
    half.batch(ONE, 1, big, 99)
    assert half.ingest.urgent


def test_frames_that_nobody_can_decode_are_kept_and_disturb_no_neighbour(half: Half) -> None:
    half.log(ONE, 0, 2)
    bombs = [b"\x91" * 200_000, b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x95\x01\x02\x00\xc0" + b"\x81\xa1k" * 50_000]
    data = b"".join(encode_frame(bomb) for bomb in bombs)
    assert half.batch(ONE, 2, data, len(bombs)) == []
    half.hello(TWO)
    half.batch(TWO, 0, encode_start(TWO) + frames(1, 2), 3)
    assert sorted(ack.durable for ack in half.commit()) == [2, 5]


messages = st.one_of(
    st.binary(max_size=64),
    st.lists(st.one_of(st.integers(-(1 << 63), (1 << 64) - 1), st.binary(max_size=20), st.booleans(), st.none(),
                       st.floats(), st.text(max_size=5)), max_size=9).map(lambda v: bytes(msgpack.packb(v))),
    st.tuples(st.sampled_from([1, 2]), st.lists(st.one_of(st.integers(0, 1 << 33), st.just(WRITER), st.booleans()), max_size=7))
    .map(lambda v: bytes(msgpack.packb([v[0], *v[1]]))),
)  # fmt: skip


@given(
    st.lists(st.tuples(messages, st.one_of(st.none(), st.binary(max_size=80), st.just(encode_start(ONE)))), max_size=8)
)
@settings(max_examples=300)
def test_no_message_at_all_raises_or_loses_a_neighbours_record(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[bytes, bytes | None]]
) -> None:
    half = Half(make_state(tmp_path_factory.mktemp("state")))
    half.log(TWO, 0, 3)
    for header, body in sent:
        half.handle(header, *([] if body is None else [body]), uid=4242)
    half.commit()
    half.log(TWO, 3, 4)
    half.crash()
    assert seqs(kept(half.state), TWO) == list(range(7))
    half.wal.close()


def test_a_record_costs_ingest_little(half: Half, record_property: Callable[[str, object], None]) -> None:
    """The budget is 1.5 µs of CPU in batches of 64; a busy machine gets four times that before this fails."""
    start = start_of(1)
    half.hello(start)
    half.batch(start, 0, encode_start(start), 1)
    half.commit()
    batches = []
    for index in range(2000):
        data = b"".join(frame(1, 1 + index * 64 + i, {f"m/{k}": 0.5 for k in range(12)}, step=i) for i in range(64))
        batches.append(list(batch_message(start, 1 + index * 64, data, 64)))
    began = time.process_time()
    for index, parts in enumerate(batches):
        half.ingest.handle(Peer(b"peer", UID), parts, NOW_NS)
        if index % 25 == 24:
            half.ingest.commit(NOW_NS)
    us = (time.process_time() - began) / (2000 * 64) * 1e6
    record_property("us_per_record", us)
    print(f"{us:.2f} µs of CPU for each record")
    assert us < 6
