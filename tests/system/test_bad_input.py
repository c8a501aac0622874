"""Hostile and broken peers against a real daemon while a real client logs: refused, counted, seen in the status.

After each attack: the client's records are all in the shards once, the daemon still answers, and it made no mistake of
its own (`internal`).
"""

import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from ingesting import NOW_NS, RawPeer, batch_message, frames, hello_message
from node import Node, wait_for
from ranklog import wire
from ranklog.frame import encode_frame, encode_gap
from ranklog.framefile import FileName, format_name
from ranklog.start import encode_start
from ranklog.wire import Type
from segments import frame, start_of, writer_id

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)

LOGGING = """
import ranklog, select, sys
run = ranklog.init('victim', id='v', config={'a': 1})
print('up', flush=True)
i = 0
while i < 300 or not select.select([sys.stdin], [], [], 0.002)[0]:
    run.log({'i': float(i)})
    i += 1
run.finish()
print(i, flush=True)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


class Victim:
    """A real client that logs all the time; `check` ends it and looks for each of its records."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._client = subprocess.Popen(
            [sys.executable, "-c", LOGGING], env=node.env, cwd=node.path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._client.stdout is not None
        assert self._client.stdout.readline() == "up\n"

    def check(self) -> None:
        told, words = self._client.communicate("\n", timeout=60)
        assert self._client.returncode == 0, words
        assert "warning" not in words
        count = int(told)
        self._node.upload()
        rows = self._node.raw_rows("project = 'victim'")
        values = [row["value"] for row in rows if row["key"] == "i"]
        assert sorted(values) == [float(i) for i in range(count)]
        assert "gap" not in {row["kind"] for row in rows}
        assert self._node.status()["refused"].get("internal", 0) == 0


@pytest.fixture
def victim(node: Node) -> Iterator[Victim]:
    node.start_daemon(RANKLOG_SEAL_AGE_S="1")
    victim = Victim(node)
    yield victim
    if victim._client.poll() is None:
        victim._client.kill()
        victim._client.wait()
    for pipe in (victim._client.stdin, victim._client.stdout, victim._client.stderr):
        pipe.close()


def path_of(node: Node) -> Path:
    return Path(node.env["RANKLOG_RUNTIME_DIR"]) / "ranklog.sock"


@pytest.fixture
def peer(node: Node, victim: Victim) -> Iterator[RawPeer]:
    with RawPeer(path_of(node)) as peer:
        yield peer


ONE = start_of(1)
WRITER = bytes.fromhex(ONE.writer)


def test_malformed_and_impossible_messages_are_refused_and_counted(node: Node, victim: Victim, peer: RawPeer) -> None:
    headers = [
        b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xc1", b"\x90", b"\x91" * 8000, b"\xdd\xff\xff\xff\xff",
        msgpack.packb([99]), msgpack.packb([2, WRITER]), msgpack.packb([2, WRITER, -1, 1, 0, False]),
        msgpack.packb([2, WRITER, 0, 1 << 63, 0, False]), msgpack.packb([1, 1, 1, b"short", 0]), os.urandom(9000),
        wire.encode(Type.ACK, WRITER, 1, 2), msgpack.packb({1: 2}), msgpack.packb([5, 1, 2, float("nan")]),
    ]  # fmt: skip
    for header in headers:
        assert peer.ask(header).code == "MALFORMED"
        assert peer.ask(header, b"body").code == "MALFORMED"
    assert peer.ask(*hello_message(ONE), b"third").code == "MALFORMED"
    assert node.status()["refused"] == {"malformed": 2 * len(headers) + 1}
    victim.check()


def test_every_kind_of_refusal_is_counted_by_its_name(node: Node, victim: Victim, peer: RawPeer) -> None:
    assert peer.batch(ONE, 0, encode_start(ONE), 1).code == "UNKNOWN_WRITER"
    assert peer.ask(*hello_message(ONE, versions=(2, 9))).code == "VERSION"
    assert peer.hello(ONE).kind == Type.WELCOME
    assert peer.batch(ONE, 5, frames(5, 1), 1).code == "SEQUENCE"
    header, body = batch_message(ONE, 0, encode_start(ONE), 1)
    assert peer.ask(header, body[:-1] + bytes([body[-1] ^ 1])).code == "DAMAGED"
    assert peer.batch(ONE, 0, encode_start(ONE), 5_000).code == "MALFORMED"
    assert peer.batch(ONE, 0, encode_start(ONE), 1).durable == 0
    assert peer.batch(ONE, 0, encode_start(ONE), 1).durable == 0
    assert node.status()["refused"] == {"unknown_writer": 1, "version": 1, "sequence": 1, "damaged": 1, "malformed": 1}
    assert node.status()["duplicates"] == 1
    victim.check()


def test_a_claimed_loss_becomes_a_gap_and_an_impossible_one_is_refused(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    peer.hello(ONE)
    peer.batch(ONE, 0, encode_start(ONE) + frames(1, 9), 10)
    assert peer.hello(ONE, base=(1 << 62) - 1).code == "MALFORMED"
    assert peer.hello(ONE, base=20).fields[2] == 20
    assert peer.batch(ONE, 20, frames(20, 5), 5).durable == 24
    victim.check()
    rows = node.raw_rows("run = 'run-1'")
    assert {row["seq"] for row in rows if row["kind"] == "metrics"} == {*range(1, 10), *range(20, 25)}
    assert [row["seq"] for row in rows if row["kind"] == "gap"] == [10]


def test_frames_that_nobody_can_read_become_gaps_and_their_neighbours_rows(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    bombs = [
        b"\x91" * 400_000, b"\x81\xa1k" * 200_000, b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x95\x01", b"\x95\x01\x05\x00\xc0\xdf\xff\xff\xff\xff",
        b"\x95\x01\x06\x00\xc0" + b"\x91" * 300_000,
    ]  # fmt: skip
    peer.hello(ONE)
    data = encode_start(ONE) + frames(1, 2) + b"".join(encode_frame(bomb) for bomb in bombs) + frames(10, 2)
    assert peer.batch(ONE, 0, data, 12).durable == 11
    victim.check()
    rows = node.raw_rows("run = 'run-1' or project = '_lost'")
    assert {row["seq"] for row in rows if row["kind"] == "metrics" and row["run"] == "run-1"} >= {1, 2}
    assert [row for row in rows if row["kind"] == "gap"]


def test_names_and_values_of_every_kind_reach_the_shards_and_no_path(node: Node, victim: Victim, peer: RawPeer) -> None:
    names = ["../../../etc/passwd", "..", "", "/", "🚂" * 60, "a" * 512, "nul\0byte", "project_id=x", "CON", "\ud800"]
    for number, name in enumerate(names):
        start = replace(start_of(100 + number), project=name, run=name)
        assert peer.hello(start).kind == Type.WELCOME, name
        values = {
            "nan": float("nan"),
            "inf": float("inf"),
            "deep": 1.0,
            f"k/{name}".encode(errors="replace").decode(): 2.0,
            "": 3.0,
        }
        data = encode_start(start) + frame(1, 1, values) + frame(1, 2, {f"k{i}": float(i) for i in range(10_000)})
        assert peer.batch(start, 0, data, 3).durable == 2
    assert peer.hello(replace(start_of(999), project="p" * 4096)).code == "MALFORMED"
    victim.check()
    rows = node.raw_rows("project <> 'victim' and kind = 'metrics' and seq = 2")
    assert Counter(row["writer"] for row in rows) == {start_of(100 + n).writer: 10_000 for n in range(len(names))}
    keys = [path.relative_to(node.data).as_posix() for path in node.data.rglob("*.parquet")]
    assert all(key.startswith("v1/project_id=") and ".." not in key for key in keys)


def test_a_message_beyond_the_limit_costs_its_sender_the_connection(node: Node, victim: Victim) -> None:
    with RawPeer(path_of(node)) as rude:
        rude.send(bytes((16 << 20) + 1))
        assert rude.silent(0.5)
    with RawPeer(path_of(node)) as rude:
        assert rude.ask(bytes(16 << 20)).code == "MALFORMED"
    victim.check()


def test_sockets_that_speak_no_zeromq_and_a_thousand_connections_disturb_nobody(node: Node, victim: Victim) -> None:
    ready = b"\x04\x29\x05READY\x0bSocket-Type" + struct.pack(">I", 0xFFFFFFFF)
    strangers = []
    for data in (
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(5000),
        b"\xff" * 5000,
        os.urandom(5000),
        GREETING,
        GREETING + ready,
    ):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path_of(node)))
        sock.sendall(data)
        strangers.append(sock)
    for number in range(1000):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path_of(node)))
        if number % 2:
            sock.sendall(GREETING[: number % len(GREETING)])
        strangers.append(sock)
    assert node.ping(), "with all of them open"
    for sock in strangers:
        sock.close()
    victim.check()


def test_a_thousand_real_peers_at_once_are_served(node: Node, victim: Victim) -> None:
    peers = [RawPeer(path_of(node)) for _ in range(200)]
    for number, peer in enumerate(peers):
        for turn in range(5):
            peer.send(*hello_message(start_of(1000 + 5 * number + turn)))
    for peer in peers:
        assert {peer.receive(30).kind for _ in range(5)} == {Type.WELCOME}
    for peer in peers:
        peer.__exit__()
    victim.check()


def test_a_flood_without_end_from_one_peer_leaves_the_others_their_turn(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    for _ in range(20_000):
        peer.send(*hello_message(ONE))
    for _ in range(200):
        peer.send(os.urandom(100_000))
    victim.check()
    assert node.status()["refused"]["malformed"] > 0


def test_a_peer_that_takes_anothers_name_gets_neither_its_acks_nor_its_place(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    """An identity can change hands on a ROUTER; the writer is what counts, and its user."""
    peer.hello(ONE)
    assert peer.batch(ONE, 0, encode_start(ONE), 1).durable == 0
    with RawPeer(path_of(node)) as other:
        assert other.hello(ONE).fields[2] == 1, "the same user may go on from elsewhere"
        assert other.batch(ONE, 1, frames(1, 2), 2).durable == 2
    assert peer.batch(ONE, 1, frames(1, 2), 2).durable == 2
    victim.check()


def test_hostile_files_are_reported_once_and_their_neighbours_adopted(node: Node, victim: Victim) -> None:
    def named(number: int) -> Path:
        return node.journal / format_name(FileName(writer_id(50 + number), 0, "journal"))

    outside = node.journal / "outside"
    outside.write_bytes(b"not yours")
    named(0).symlink_to(outside)
    os.mkfifo(named(1))
    os.link(outside, named(2))
    named(3).mkdir()
    named(4).write_bytes(os.urandom(100_000))
    named(5).write_bytes(encode_start(start_of(55))[:-1])
    named(6).write_bytes(encode_start(start_of(1)))
    named(7).write_bytes(encode_start(start_of(57)) + encode_gap(1, 1 << 40, "x", NOW_NS))
    named(8).write_bytes(encode_start(start_of(58)) + frames(1, 5) + encode_start(start_of(58)) + frames(1 << 50, 5))
    (node.spool / format_name(FileName(writer_id(70), 0, "spool"))).write_bytes(
        encode_start(start_of(70)) + frames(1, 9)
    )
    wait_for(lambda: len(node.status()["adoption_refused"]) == 8, "they are reported")
    victim.check()
    assert len(node.raw_rows(f"writer = '{writer_id(70)}' and kind = 'metrics'")) == 9
    assert len(node.raw_rows(f"writer = '{writer_id(58)}' and kind = 'metrics'")) == 5
    assert outside.read_bytes() == b"not yours"
    assert set(node.status()["adoption_refused"]) == {str(named(number)) for number in range(8)}
    assert (node.path / "daemon.log").read_text().count("adoption_refused") == 8


WRITERS = """
import sys, ranklog
from ranklog.config import Settings
from ranklog.current import _open_writer
from ranklog.shield import warn
from ranklog.start import Start
from ranklog.frame import Kind
import os, time
settings = Settings.from_env()
first, count, records = map(int, sys.argv[1:])
writers = []
for rank in range(first, first + count):
    start = Start(writer=os.urandom(16).hex(), project='many', run='m', rank=rank, world_size=256, wall_ns=time.time_ns(), pid=os.getpid())
    writers.append(_open_writer(start, settings, 'online', None))
for i in range(records):
    for writer in writers:
        assert writer.write(Kind.METRICS, {'i': float(i)}, None, True)
for writer in writers:
    writer.end(0)
assert all(writer.flush(60) for writer in writers), 'not durable'
for writer in writers:
    writer.close(10)
"""


def test_256_writers_at_once_are_all_durable_and_nothing_is_refused(node: Node, victim: Victim) -> None:
    processes, each, records = 4, 64, 100
    with ThreadPoolExecutor(processes) as pool:
        done = list(
            pool.map(
                lambda n: node.python(WRITERS, str(n * each), str(each), str(records), timeout_s=120), range(processes)
            )
        )
    assert [process.returncode for process in done] == [0] * processes, done[0].stderr
    told = node.status()
    assert told["refused"] == {}
    run = next(run for run in told["runs"] if run["project"] == "many")
    assert (run["ranks"], run["records"], run["state"]) == (256, 256 * (records + 2), "finished")
    victim.check()
    rows = node.raw_rows("project = 'many' and kind = 'metrics'")
    assert Counter(row["rank"] for row in rows) == dict.fromkeys(range(256), records)
    assert len({(row["writer"], row["seq"]) for row in rows}) == 256 * records
