"""Hostile neighbours: whatever others say on the socket, plant on disk or start beside it, a trainer's records arrive.

Rows of the fault matrix: 26 second daemon · 27 stale socket, lock and pid · 28 directories of the wrong owner or mode ·
38 what is no message · 39 too many connections · 40 bombs · 41 names · 52 planted files; and users among each other.

In nearly every case a real trainer (the victim, a witness) logs meanwhile. At the end the oracle judges it, and the
daemon must have made no mistake of its own (`internal`).
"""

import json
import os
import re
import resource
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import zmq

import oracle
from ingesting import NOW_NS, RawPeer, batch_message, frames, hello_message
from node import Node, wait_for
from ranklog import wire
from ranklog.frame import encode_frame, encode_gap
from ranklog.framefile import FileName, format_name
from ranklog.start import encode_start
from ranklog.wire import Type
from segments import frame, start_of, writer_id

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests with sudo")
STRANGER = 4242
"""Another user: a number is all the kernel wants."""
LOG_LINES_MAX = 60
"""What a flood may leave in the daemon's log."""


class Victim:
    """A witness that logs all the time; `check` ends it and has the oracle judge it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.process = subprocess.Popen(
            oracle.witness("victim", node, "--pause", "0.002", "--flush-every", "100"),
            env=node.env, cwd=node.path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: self.durable > 0, "the victim logs, and is heard")

    @property
    def durable(self) -> int:
        ledgers = oracle.read_ledgers(oracle.ledgers_of(self._node))
        return ledgers["victim"].durable if "victim" in ledgers else 0

    def goes_on(self) -> None:
        """See that records logged from now on become durable."""
        before = self.durable
        wait_for(lambda: self.durable > before + 100, "the victim is served meanwhile", 60)

    def check(self) -> oracle.Verdict:
        self.goes_on()
        (self._node.path / "enough").touch()
        _, words = self.process.communicate(timeout=60)
        (self._node.path / "enough").unlink()
        assert self.process.returncode == 0, words
        assert "warning" not in words
        verdict = oracle.check(self._node)
        assert self._node.status()["refused"].get("internal", 0) == 0, (self._node.path / "daemon.log").read_text()
        return verdict

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        node.env["RANKLOG_SEAL_AGE_S"] = "1"
        yield node


@pytest.fixture
def victim(node: Node) -> Iterator[Victim]:
    node.start_daemon()
    victim = Victim(node)
    yield victim
    victim.close()


@pytest.fixture
def peer(node: Node, victim: Victim) -> Iterator[RawPeer]:
    with RawPeer(path_of(node)) as peer:
        yield peer


def path_of(node: Node) -> Path:
    return Path(node.env["RANKLOG_RUNTIME_DIR"]) / "ranklog.sock"


def log_of(node: Node) -> str:
    return (node.path / "daemon.log").read_text()


def raw_connection(node: Node, data: bytes = b"") -> socket.socket:
    """Say `data` on a connection of its own: the greeting, and once that is answered the rest."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    wait_for(lambda: sock.connect_ex(str(path_of(node))) == 0, "it may connect")
    try:
        sock.sendall(data[: len(GREETING)])
        if data.startswith(GREETING):
            answer = b""
            while len(answer) < len(GREETING) and (more := sock.recv(len(GREETING) - len(answer))):
                answer += more
            sock.sendall(data[len(GREETING) :])
    except (BrokenPipeError, ConnectionResetError):
        pass  # Shut out already, in the middle of it.
    return sock


ONE = start_of(1)
WRITER = bytes.fromhex(ONE.writer)


# Row 38: garbage on the socket.

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)


def conversation(kind: bytes = b"DEALER") -> bytes:
    """What a client's socket says, byte for byte: greeting, READY, and a HELLO."""
    properties = b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind + b"\x08Identity" + bytes(4)
    ready = b"\x05READY" + properties
    header, body = hello_message(start_of(38))
    long = b"\x02" + struct.pack(">Q", len(body))
    return GREETING + b"\x04" + bytes([len(ready)]) + ready + b"\x01" + bytes([len(header)]) + header + long + body


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


def test_a_conversation_cut_off_at_every_length_disturbs_nobody(node: Node, victim: Victim) -> None:
    """Half of them hang up, the other half stay and say nothing more."""
    whole = conversation()
    with ExitStack() as held:
        sock = held.enter_context(raw_connection(node, whole))
        answer = b""
        while b"READY" not in answer or str(node.spool).encode() not in answer:
            data = sock.recv(1000)
            assert data, f"the whole conversation is answered by a WELCOME: {answer!r}"
            answer += data
        for length in range(len(whole)):
            half = raw_connection(node, whole[:length])
            half.close() if length % 2 else held.enter_context(half)
        assert node.ping()
        victim.goes_on()
    victim.check()
    assert set(node.status()["refused"]) <= {"malformed"}
    assert len(log_of(node).splitlines()) < LOG_LINES_MAX


def changed_conversations(every: int) -> Iterator[bytes]:
    whole = conversation()
    for place in range(len(whole)):
        for value in range(place % every, 256, every):
            yield whole[:place] + bytes([value]) + whole[place + 1 :]


def answer_to_all(node: Node, told: Iterator[bytes]) -> None:
    """Say them all, fifty at a time."""
    batch: list[socket.socket] = []
    for data in told:
        batch.append(raw_connection(node, data))
        if len(batch) == 50:
            assert node.ping()
            while batch:
                batch.pop().close()
    for sock in batch:
        sock.close()


def test_a_conversation_with_any_byte_changed_disturbs_nobody(node: Node, victim: Victim) -> None:
    answer_to_all(node, changed_conversations(every=250))
    victim.check()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_conversation_with_every_byte_changed_to_many_values_disturbs_nobody(node: Node, victim: Victim) -> None:
    answer_to_all(node, changed_conversations(every=9))
    victim.check()


def test_what_speaks_no_zeromq_disturbs_nobody(node: Node, victim: Victim) -> None:
    ready = b"\x04\x29\x05READY\x0bSocket-Type" + struct.pack(">I", 0xFFFFFFFF)
    rubbish = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(5000), b"\xff" * 5000, os.urandom(5000), GREETING + ready,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500), b"SSH-2.0-OpenSSH_9.2\r\n",
        GREETING[:12] + b"PLAIN" + GREETING[17:], GREETING[:12] + b"CURVE" + GREETING[17:], b"", GREETING,
    ]  # fmt: skip
    with ExitStack() as held:
        socks = [held.enter_context(raw_connection(node, data)) for data in rubbish]
        for data, sock in zip(rubbish, socks, strict=True):
            # What does not begin as this protocol's later versions do is taken for the first, which has no handshake
            # and so no deadline: it may stay, at the price of one descriptor.
            if data[:1] in (b"", b"\xff"):
                assert is_shut_out(sock), data[:30]
        victim.goes_on()
    victim.check()
    assert len(log_of(node).splitlines()) < LOG_LINES_MAX


def is_shut_out(sock: socket.socket) -> bool:
    """Whether the daemon hangs up on a peer that says no more."""
    try:
        while sock.recv(1 << 16):
            continue  # Its greeting.
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "kind",
    ["REQ", "SUB", "PUSH", "PAIR", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("PUB", "PULL", "ROUTER"))],
)
def test_a_socket_of_the_wrong_type_gets_nowhere(node: Node, victim: Victim, kind: str) -> None:
    with zmq.Context() as context, context.socket(getattr(zmq, kind)) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDTIMEO, 200)
        if kind == "SUB":
            sock.setsockopt(zmq.SUBSCRIBE, b"")
        sock.connect(f"ipc://{path_of(node)}")
        for part in hello_message(ONE):
            try:
                sock.send(part)
            except zmq.ZMQError:
                break  # SUB and PULL cannot send; the others find nobody who takes it.
        victim.goes_on()
    victim.check()
    assert set(node.status()["refused"]) <= {"malformed"}
    assert not [run for run in node.status()["runs"] if run["project"] == ONE.project]


def test_a_peer_that_asks_and_never_reads_costs_bounded_memory(node: Node, victim: Victim) -> None:
    """It talks the protocol by hand, and leaves every answer in the kernel's buffer."""
    header = wire.encode(Type.STATUS, 1)
    question = b"\x00" + bytes([len(header)]) + header
    with ExitStack() as held:
        for _ in range(20):
            sock = held.enter_context(raw_connection(node, conversation()))
            sock.settimeout(0.5)
            try:
                sock.sendall(question * 20_000)
            except (TimeoutError, BrokenPipeError, ConnectionResetError):
                continue  # Nobody reads from one that does not read: its own buffers are full, or it is shut out.
        victim.goes_on()
        oracle.check_bounds(node)
    victim.check()


def test_a_flood_of_garbage_leaves_others_their_turn_and_the_log_short(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    for _ in range(20_000):
        peer.send(*hello_message(ONE))
    for _ in range(200):
        peer.send(os.urandom(100_000))
    victim.check()
    assert node.status()["refused"]["malformed"] > 0
    assert len(log_of(node).splitlines()) < LOG_LINES_MAX


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


def test_256_writers_at_once_are_all_durable_and_nothing_is_refused(node: Node, victim: Victim) -> None:
    processes, each, records = 4, 64, 100
    with ThreadPoolExecutor(processes) as pool:
        jobs = [(str(n * each), str(each), str(records)) for n in range(processes)]
        done = list(pool.map(lambda job: node.python(WRITERS, *job, timeout_s=120), jobs))
    assert [process.returncode for process in done] == [0] * processes, done[0].stderr
    told = node.status()
    assert told["refused"] == {}
    run = next(run for run in told["runs"] if run["project"] == "many")
    assert (run["ranks"], run["records"], run["state"]) == (256, 256 * (records + 2), "finished")
    victim.check()
    rows = node.raw_rows("project = 'many' and kind = 'metrics'")
    assert Counter(row["rank"] for row in rows) == dict.fromkeys(range(256), records)
    assert len({(row["writer"], row["seq"]) for row in rows}) == 256 * records


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


# Row 39: connections.


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for ten thousand connections in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 12_000
    if 0 <= hard < wanted:
        if os.geteuid():
            pytest.skip(f"needs {wanted} open files, {hard} are allowed: run the tests with sudo")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, 2 * wanted))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 10_000),
        (conversation(), 2_000),
        pytest.param(b"", 10_000, marks=pytest.mark.full),
        pytest.param(conversation(), 10_000, marks=pytest.mark.full),
    ],
    ids=["no ZeroMQ", "established", "silent", "all established"],
)
def test_ten_thousand_connections_of_one_user_are_survived_and_given_back(
    node: Node, many_files: None, monkeypatch: pytest.MonkeyPatch, data: bytes, count: int
) -> None:
    """One that speaks ZeroMQ costs about 25 kB, in libzmq's buffers."""
    monkeypatch.setattr(oracle, "INGEST_RSS_MAX", oracle.INGEST_RSS_MAX + count * (16 << 10))
    daemon = node.start_daemon()
    victim = Victim(node)
    before = open_files(daemon.pid)
    with ExitStack() as held:
        held.callback(victim.close)
        socks = [held.enter_context(raw_connection(node, data)) for _ in range(count)]
        if data:
            wait_for(lambda: open_files(daemon.pid) > count, "all of them are open at one time")
        victim.goes_on()
        assert node.ping() == daemon.pid, "with all of them open"
        for sock in socks:
            sock.close()
        wait_for(lambda: open_files(daemon.pid) < before + 50, "the descriptors come back", 60)
        victim.check()
    assert daemon.poll() is None


def test_a_daemon_that_runs_out_of_descriptors_loses_nothing_and_starts_again(node: Node, many_files: None) -> None:
    """libzmq aborts the process then. The limit of the unit file is above what one user can open."""
    small = ["prlimit", "--nofile=200:200", sys.executable, "-m", "ranklogd"]
    with (node.path / "daemon.log").open("ab") as log:
        daemon = subprocess.Popen(small, env=node.env, stdout=log, stderr=log, cwd=node.path)
    node.daemons.append(daemon)
    wait_for(lambda: node.ping() == daemon.pid, "it answers")
    victim = Victim(node)
    with ExitStack() as held:
        held.callback(victim.close)
        for _ in range(400):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            if sock.connect_ex(str(path_of(node))):
                break
        died = daemon.poll() is not None or not survives(node, daemon)
        if died:
            node.start_daemon()
        victim.check()


def survives(node: Node, daemon: "subprocess.Popen[bytes]") -> bool:
    """Return whether the daemon is still there once it has met all that was opened."""
    wait_for(lambda: daemon.poll() is not None or node.ping() == daemon.pid, "it dies, or answers")
    return daemon.poll() is None


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


# Row 40: bombs.


def test_a_message_beyond_the_limit_costs_its_sender_the_connection(node: Node, victim: Victim) -> None:
    with RawPeer(path_of(node)) as rude:
        rude.send(bytes((16 << 20) + 1))
        assert rude.silent(0.5)
    with RawPeer(path_of(node)) as rude:
        assert rude.ask(bytes(16 << 20)).code == "MALFORMED"
    victim.check()


BOMBS = [
    b"\x91" * 400_000, b"\x81\xa1k" * 200_000, b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x95\x01",
    b"\x95\x01\x05\x00\xc0\xdf\xff\xff\xff\xff",
    b"\x95\x01\x06\x00\xc0" + b"\x91" * 300_000,
    b"\x95\x01\x07\x00\xc0\x81\xa1a\xdd" + struct.pack(">I", 1_000_000) + b"\xc0" * 1_000_000,
    b"\x95\x01\x08\x00\xc0\x81\xa1a\xc6\xff\xff\xff\xff",
    b"\x95\x01\x09\x00\xc0\x81\xa2\xff\xfe\x01",
    b"\x95\x01\x0a\x00\xc0\x82\xa1a\x01\xa1a\x02",
    b"\x95\x01\x0b\x00\xc0\x81\xa1a\xcf" + b"\xff" * 8,
    b"\x95\x01\x0c\x00\xcf" + b"\xff" * 8 + b"\x80",
    b"\x95\x01\x0d\xcf" + b"\xff" * 8 + b"\xc0\x81\xa1a\x01",
    b"\x95\x01\x0e\xd3\x80" + bytes(7) + b"\xc0\x81\xa1a\x01",
    b"\x95\x01\xd3\x80" + bytes(7) + b"\x00\xc0\x81\xa1a\x01",
    b"\x95\x01\x10\x00\xc0\x81\xd9\xff" + b"\xed\xa0\x80" * 85 + b"\x01",
    b"\x95\xcc\xff\x11\x00\xc0\x80", b"\x95\x07\x12\x00\xc0\xc4\x00", b"\x95\x09\x13\x00\xc0\xa4last",
    b"\x95\x01\x14\x00\xc0\xc8\xff\xff\x01" + bytes(65535), b"", b"\x80",
]  # fmt: skip
"""Bodies of frames whose checksum is right: too deep, too long, too large, no text, numbers beyond any column."""


def test_frames_that_nobody_can_read_become_gaps_and_their_neighbours_rows(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    peer.hello(ONE)
    assert peer.batch(ONE, 0, encode_start(ONE) + frames(1, 2), 3).durable == 2
    seq = 3
    for bomb in BOMBS:
        data = encode_frame(bomb) + frames(seq + 1, 1)
        assert peer.batch(ONE, seq, data, 2).durable == seq + 1, bomb[:40]
        seq += 2
    victim.check()
    rows = node.raw_rows("run = 'run-1' or project = '_lost'")
    found = {row["seq"] for row in rows if row["kind"] == "metrics" and row["key"] == "loss"}
    assert found >= {1, 2}
    assert [row for row in rows if row["kind"] == "gap"]
    status = node.status()["shipper"]
    assert status["quarantined_records"] or status["damaged_stretches"]
    assert list((node.state / "quarantine").iterdir()), "the originals are kept"
    covered = {row["seq"] for row in rows if row["writer"] == ONE.writer}
    for row in rows:
        if row["writer"] == ONE.writer and row["kind"] == "gap":
            gap = json.loads(row["text"])
            covered |= set(range(gap["first"], gap["last"] + 1))
    assert covered == set(range(seq)), "every seq has a row or lies in a gap"


def test_times_and_steps_beyond_any_calendar_poison_nothing(node: Node, victim: Victim, peer: RawPeer) -> None:
    """1960, 2262 and the ends of an int64: a trainer's clock can say anything."""
    peer.hello(ONE)
    years = [0, -1, -315_619_200, 9_223_372_036, 9_223_372_037, 9_214_646_400 * 30]
    times = [*(seconds * 10**9 for seconds in years), (1 << 63) - 1, -(1 << 63), (1 << 64) - 1]
    times = [ns for ns in times if -(1 << 63) <= ns < 1 << 64]
    data = b"".join(frame(1, seq, {"a": 1.0}, wall_ns=ns) for seq, ns in enumerate(times, 1))
    steps = [0, -1, (1 << 53) + 1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1]
    first = len(times) + 1
    data += b"".join(frame(1, seq, {"a": 1.0}, step=step) for seq, step in enumerate(steps, first))
    last = first + len(steps)
    assert peer.batch(ONE, 0, encode_start(ONE) + data + frames(last, 1), last + 1).durable == last
    victim.check()
    rows = node.raw_rows("run = 'run-1'")
    assert {row["seq"] for row in rows} >= set(range(1, last + 1)), "each has a row, of metrics or as a gap"
    assert [row for row in rows if row["key"] == "loss"], "the neighbour behind them is read"


BAD_VALUES = """
import math, sys
import ranklog
run = ranklog.init('bombs', id='b')
deep = []
for _ in range(100_000):
    deep = [deep]
nested = {}
for _ in range(5_000):
    nested = {'k': nested}
tangled = {}
tangled['self'] = tangled
endless = []
endless.append(endless)
for i, bad in enumerate([
    {'array': list(range(1_000_000))}, {'array': [0.5] * 3_000_000}, {'deep': deep}, nested, tangled, {'list': endless},
    {'nan': math.nan, 'inf': math.inf, 'ninf': -math.inf}, {'big': 2 ** 64}, {'huge': 10 ** 5000},
    {'a': {'b': 1.0}, 'a/b': 2.0}, {'bad': '\\ud800', '\\udcff': 1.0, b'\\xff\\xfe': 2.0}, {'text': 'x' * (20 << 20)},
    {'k' * (2 << 20): 1.0}, {f'name/{n}': float(n) for n in range(10_000)}, {f'n{n}': 'x' * 200 for n in range(10_000)},
    {None: 1.0, 3: 2.0, (1, 2): 3.0}, [1, 2], None, 'text', {'o': object()}, {'f': lambda: 0}, {'z': complex(1, 2)},
]):
    run.log(bad, step=i)
    run.log({'good': float(i)}, step=i)
run.finish()
print(i + 1)
"""


def test_what_a_trainer_should_not_log_is_refused_there_and_costs_that_record_at_most(
    node: Node, victim: Victim
) -> None:
    done = node.python(BAD_VALUES, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    count = int(done.stdout)
    assert len(done.stderr.splitlines()) < 60, "a warning each, not a flood"
    victim.check()
    assert node.status()["refused"] == {}, "the daemon never saw what was too large"
    rows = node.raw_rows("project = 'bombs'")
    good = sorted(row["value"] for row in rows if row["key"] == "good")
    assert good == [float(i) for i in range(count)]
    gaps = [row for row in rows if row["kind"] == "gap"]
    assert gaps, "a record over the limit is a gap"
    assert len([row for row in rows if row["key"].startswith("name/")]) == 10_000
    assert {row["value"] for row in rows if row["key"] in ("a/b", "a/b#2")} == {1.0, 2.0}
    assert {row["text"] for row in rows if row["key"] == "big"} == {str(2**64)}


# Row 41: names.

NAMES = [
    "../../../etc/passwd", "..", "/", "/etc/passwd", "🚂" * 60, "a" * 512, "nul\0byte", "project_id=x", "CON",
    "-rf", "--help", ".hidden", "Case", "case", "CASE", "run_id=1/run_id=2", "a\nb", "%2e%2e%2f", "~root", "tab\t", "ü", "u\u0308",
]  # fmt: skip


def paths_of(node: Node, project: str) -> set[str]:
    """Return the folders in the store that hold rows of a project."""
    import pyarrow.parquet

    found = set()
    for path in node.data.rglob("*.parquet"):
        if project in set(pyarrow.parquet.ParquetFile(path).read(["project"])["project"].to_pylist()):
            found.add(path.relative_to(node.data).parent.as_posix())
    return found


def check_paths(node: Node, names: list[str]) -> None:
    """Each name has a folder of its own, which is plain and inside the store; nothing else was made anywhere."""
    folders = {name: paths_of(node, name) for name in names}
    assert all(len(paths) == 1 for paths in folders.values()), folders
    plain = re.compile(r"v1/project_id=[a-z][a-z0-9-]*/run_id=[a-z][a-z0-9-]*")
    assert all(plain.fullmatch(path) for paths in folders.values() for path in paths), folders
    assert len({next(iter(paths)).casefold() for paths in folders.values()}) == len(names)
    assert {path.name for path in node.data.iterdir()} <= {"v1"}


def test_hostile_names_from_a_raw_peer_reach_the_rows_and_no_path(node: Node, victim: Victim, peer: RawPeer) -> None:
    names = [*NAMES, "", "\ud800"]
    for number, name in enumerate(names):
        start = replace(start_of(100 + number), project=name, run=name)
        assert peer.hello(start).kind == Type.WELCOME, name
        key = f"k/{name}".encode(errors="replace").decode()
        values = {"nan": float("nan"), "inf": float("inf"), "deep": 1.0, key: 2.0, "": 3.0}
        keys = 10 if number else 10_000
        data = encode_start(start) + frame(1, 1, values) + frame(1, 2, {f"k{i}": float(i) for i in range(keys)})
        assert peer.batch(start, 0, data, 3).durable == 2
    for field in ("project", "run"):
        assert peer.hello(replace(start_of(999), **{field: "p" * 4096})).code == "MALFORMED"
    victim.check()
    rows = node.raw_rows("project <> 'faults' and kind = 'metrics' and seq = 2")
    expected = {start_of(100 + n).writer: 10 if n else 10_000 for n in range(len(names))}
    assert Counter(row["writer"] for row in rows) == expected
    check_paths(node, NAMES)


MANY_INITS = """
import json, sys
import ranklog
for name in json.loads(sys.argv[1]):
    ranklog.init(project=name, id=name, name=name, group=name)
    ranklog.log({'here': 1.0})
    ranklog.finish()
"""


def test_hostile_names_through_the_client_are_kept_as_data(node: Node, victim: Victim) -> None:
    """But for control characters, which are replaced: not every reader of parquet takes a NUL."""
    names = NAMES
    done = node.python(MANY_INITS, json.dumps([*names, "p" * 4096, ""]), timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "4096 bytes" in done.stderr, "one that is too long is cut, with a warning"
    victim.check()
    rows = node.raw_rows("project <> 'faults' and key = 'here'")
    assert len(rows) == len(names) + 2
    kept = [re.sub("[\0-\x1f]", "_", name) for name in names]
    assert {row["project"] for row in rows} >= set(kept)
    check_paths(node, kept)


# Users among each other.

AS_STRANGER = f"""
import os, sys, json, time, zlib
import zmq, zmq.sugar
from pathlib import Path
import ingesting, segments, ranklog, ranklog.start, ranklog.control, ranklog.transport, ranklog.cli.ping
from ingesting import RawPeer, frames, batch_message, hello_message
from ranklog import control
from ranklog.config import Settings
from ranklog.errors import NoDaemon
from ranklog.start import encode_start
from segments import start_of
path, state, journal, spool = map(Path, sys.argv[1:5])
zmq.Context().destroy()
os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})
"""
"""Everything is imported before: the other user may not be able to read the interpreter's own files."""


def as_stranger(node: Node, source: str) -> "subprocess.CompletedProcess[str]":
    room = [str(path_of(node)), str(node.state), str(node.journal), str(node.spool)]
    return node.run([sys.executable, "-c", AS_STRANGER + source, *room])


@pytest.fixture
def open_house() -> Iterator[Node]:
    """A node whose directories can be entered by everybody: only what the product itself closes is closed."""
    with tempfile.TemporaryDirectory() as root, Node(Path(root)) as node:  # pytest's own are closed to others.
        node.env["RANKLOG_SEAL_AGE_S"] = "1"
        for path in (Path(node.env["RANKLOG_RUNTIME_DIR"]), node.journal, node.path):
            path.chmod(0o755)
        yield node


@NEEDS_ROOT
def test_another_user_cannot_append_to_a_writer_nor_take_its_place(open_house: Node) -> None:
    node = open_house
    node.start_daemon(RANKLOG_SOCKET_MODE="0666")
    victim = Victim(node)
    try:
        with RawPeer(path_of(node)) as mine:
            mine.hello(ONE)
            assert mine.batch(ONE, 0, encode_start(ONE) + frames(1, 2), 3).durable == 2
        done = as_stranger(
            node,
            "with RawPeer(path) as peer:\n"
            "    one, own = start_of(1), start_of(2)\n"
            "    print(peer.hello(one).code, peer.hello(one, 50).code, peer.batch(one, 3, frames(3, 5), 5).code)\n"
            "    peer.hello(own)\n"
            "    print(peer.batch(own, 0, encode_start(own) + frames(1, 2), 3).durable)\n"
            "    print(peer.ask(*batch_message(one, 3, frames(3, 5), 5)).code)\n",
        )
        assert done.stdout.split() == ["FOREIGN", "FOREIGN", "FOREIGN", "2", "FOREIGN"], done.stderr
        with RawPeer(path_of(node)) as mine:
            assert mine.hello(ONE).fields[2] == 3, "nothing was taken, and nothing was given up as lost"
            assert mine.batch(ONE, 3, frames(3, 2), 2).durable == 4
        assert node.status()["refused"]["foreign"] == 4
        victim.check()
    finally:
        victim.close()
    uids = {(row["writer"], row["uid"]) for row in node.raw_rows("project = 'demo'")}
    assert uids == {(ONE.writer, 0), (writer_id(2), STRANGER)}


@NEEDS_ROOT
def test_another_user_cannot_read_what_waits_here(open_house: Node) -> None:
    """State, journal and spool are closed, even in directories that everybody may enter."""
    node = open_house
    daemon = node.start_daemon(RANKLOG_SEAL_AGE_S="300")
    victim = Victim(node)
    for room in (node.spool, node.journal):
        room.chmod(0o755)
    look = (
        "for target in (state, state / 'wal', state / 'lock', *map(Path, sys.argv[5:]), *journal.iterdir(), *spool.iterdir()):\n"
        "    for open_it in (os.listdir, lambda p: os.open(p, os.O_RDONLY), lambda p: os.open(p, os.O_RDWR), os.unlink):\n"
        "        try:\n            open_it(target)\n            print('OPEN', open_it, target)\n"
        "        except (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError):\n            print('closed')\n"
    )
    try:
        done = as_stranger(node, look)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.splitlines()) == {"closed"}, done.stdout
        assert done.stdout.count("closed") >= 4 * 4, "three of the state, and the victim's journal at least"
        victim.check()
    finally:
        victim.close()
    assert daemon.poll() is None


@NEEDS_ROOT
def test_a_user_who_may_not_use_the_socket_is_told_so(open_house: Node) -> None:
    node = open_house
    node.start_daemon(RANKLOG_SOCKET_MODE="0600")
    source = (
        "try:\n    control.ping(Settings.from_env(), 1.0)\nexcept NoDaemon as exc:\n    print(exc)\n"
        "import ranklog\nrun = ranklog.init('p', id='r')\nrun.log({'a': 1.0})\nprint(run.flush(0.5))\n"
    )
    done = as_stranger(node, source)
    assert done.returncode == 0, done.stderr
    assert "you may not use it" in done.stdout
    assert "Traceback" not in done.stderr
    assert node.run(oracle.witness("one", node, "--count", "50")).returncode == 0
    oracle.check(node)


@NEEDS_ROOT
def test_a_file_of_another_user_is_adopted_as_that_users_or_not_at_all(
    node: Node, victim: Victim, peer: RawPeer
) -> None:
    peer.hello(ONE)
    assert peer.batch(ONE, 0, encode_start(ONE) + frames(1, 2), 3).durable == 2
    forged = planted(node, 1, encode_start(ONE) + frames(3, 5), room=node.spool, suffix="spool", uid=STRANGER)
    own = planted(node, 2, encode_start(start_of(2)) + frames(1, 4), room=node.spool, suffix="spool", uid=STRANGER)
    wait_for(lambda: str(forged) in node.status()["adoption_refused"], "it is reported")
    assert f"user {STRANGER}" in node.status()["adoption_refused"][str(forged)]
    wait_for(lambda: not own.exists(), "its own records are taken over")
    assert peer.batch(ONE, 3, frames(3, 1), 1).durable == 3, "the writer goes on where it was"
    assert forged.exists()
    forged.unlink()
    victim.check()
    rows = node.raw_rows("project = 'demo'")
    assert {(row["writer"], row["uid"]) for row in rows} == {(ONE.writer, 0), (writer_id(2), STRANGER)}
    assert {row["seq"] for row in rows if row["writer"] == ONE.writer} == set(range(4))


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


# Row 52: planted files.


def planted(
    node: Node, number: int, data: bytes, *, room: Path | None = None, suffix: str = "journal", uid: int = -1
) -> Path:
    """Leave a file named for writer `number`, complete from the first moment on."""
    path = (room or node.journal) / format_name(FileName(writer_id(number), 0, suffix))
    hidden = path.with_name(f"{path.name}.part")
    hidden.write_bytes(data)
    if uid >= 0:
        os.chown(hidden, uid, uid)
    hidden.rename(path)
    return path


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
    planted(node, 58, encode_start(start_of(58)) + frames(1, 5) + encode_start(start_of(58)) + frames(1 << 50, 5))
    planted(node, 70, encode_start(start_of(70)) + frames(1, 9), room=node.spool, suffix="spool")
    wait_for(lambda: len(node.status()["adoption_refused"]) == 8, "they are reported")
    for path in [named(number) for number in range(8)]:
        assert os.path.lexists(path)
    wait_for(lambda: not named(8).exists(), "what can be read of a mixed one is taken over")
    assert outside.read_bytes() == b"not yours"
    assert set(node.status()["adoption_refused"]) == {str(named(number)) for number in range(8)}
    assert log_of(node).count("adoption_refused") == 8
    for number in range(8):
        named(number).rmdir() if number == 3 else named(number).unlink()
    victim.check()
    assert len(node.raw_rows(f"writer = '{writer_id(70)}' and kind = 'metrics'")) == 9
    assert len(node.raw_rows(f"writer = '{writer_id(58)}' and kind = 'metrics'")) == 5


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(path.parent, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{here}/{path.name}")  # A socket's path may have 107 bytes only.
        os.close(here)


def make_device(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero, which never ends.


def make_huge(path: Path) -> None:
    path.write_bytes(os.urandom(100))
    os.truncate(path, 1 << 40)


def make_future(path: Path) -> None:
    path.write_bytes(b"x" * 100)
    os.utime(path, (1 << 33, 1 << 33))


def make_someones(path: Path) -> None:
    path.write_bytes(b"x" * 100)
    path.chmod(0o600)
    os.chown(path, STRANGER, STRANGER)


PLANTS: dict[str, Callable[[Path], None]] = {
    "link": lambda path: path.symlink_to("/etc/shadow"), "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name), "fifo": os.mkfifo, "socket": make_socket,
    "directory": Path.mkdir, "device": make_device, "a sparse terabyte": make_huge, "from the future": make_future,
    "of somebody else": make_someones,
}  # fmt: skip


@NEEDS_ROOT
def test_nothing_planted_in_spool_or_journal_blocks_is_read_or_removed(node: Node, victim: Victim) -> None:
    paths: list[Path] = []
    unseen: list[Path] = []
    odd: list[Path] = []
    for room, suffix in ((node.journal, "journal"), (node.spool, "spool")):
        room.mkdir(exist_ok=True)
        for number, make in enumerate(PLANTS.values()):
            paths.append(room / format_name(FileName(writer_id(500 + number), 0, suffix)))
            make(paths[-1])
            hidden = room / f".{paths[-1].name}"  # As a file that is not in view yet, and never will be.
            make(hidden)
            if not hidden.is_file():
                os.utime(hidden, (1, 1), follow_symlinks=False)
            unseen.append(hidden)
        for name in (b"\xff\xfe", b"a\nb", b"-rf", b"." * 200, b"x.journal.part", "ü.spool2".encode("latin-1")):
            odd.append(room / os.fsdecode(name))
            odd[-1].write_bytes(b"mine")
    sound = planted(node, 70, encode_start(start_of(70)) + frames(1, 9), room=node.spool, suffix="spool")
    expected = {str(path) for path in paths}
    wait_for(lambda: expected <= set(node.status()["adoption_refused"]), "all are reported")
    wait_for(lambda: not sound.exists(), "a sound neighbour is adopted")
    victim.goes_on()
    for path in (*paths, *unseen, *odd):
        assert os.path.lexists(path), f"{path} was removed"
    for path in paths:
        assert log_of(node).count(f"path={path} ") == 1
    for path in (*paths, *unseen):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    victim.check()
    assert len(node.raw_rows(f"writer = '{writer_id(70)}' and kind = 'metrics'")) == 9


def test_a_file_that_grows_all_the_time_does_not_keep_its_neighbours_waiting(node: Node, victim: Victim) -> None:
    """Nobody holds its lock, so it counts as a dead writer's; it is older than the neighbour, and comes first."""
    grower = subprocess.Popen(
        [sys.executable, "-c", GROWER, str(node.spool), writer_id(90)], env=node.env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert grower.stdout.readline() == b"up\n"
        neighbour = planted(node, 91, encode_start(start_of(91)) + frames(1, 9), room=node.spool, suffix="spool")
        wait_for(lambda: not neighbour.exists(), "the neighbour is adopted", 60)
        assert grower.poll() is None, "it grows still"
        victim.goes_on()
    finally:
        grower.kill()
        grower.communicate()
    wait_for(
        lambda: not node.leftovers() or node.leftovers() == list(node.journal.glob("*.journal")), "the rest, too", 60
    )
    victim.check()
    rows = node.raw_rows(f"writer = '{writer_id(90)}' and kind = 'metrics'")
    assert sorted(row["seq"] for row in rows) == list(range(1, len(rows) + 1))


GROWER = """
import os, sys
from pathlib import Path
from ingesting import frames
from ranklog.framefile import FileName, format_name
from ranklog.start import encode_start
from segments import start_of
room, writer = Path(sys.argv[1]), sys.argv[2]
path = room / format_name(FileName(writer, 0, 'spool'))
hidden = path.with_name('part')
with open(hidden, 'wb', buffering=0) as file:
    file.write(encode_start(start_of(90)) + frames(1, 100))
    os.rename(hidden, path)
    print('up', flush=True)
    seq = 101
    while seq < 50_000:
        file.write(frames(seq, 1))
        seq += 1
    sys.stdin.readline()
"""


@pytest.mark.parametrize("disk", ["the state's", "another"])
def test_a_sparse_terabyte_with_a_sound_head_is_taken_over_in_a_moment(node: Node, disk: str) -> None:
    """What lies behind its frames is evidence and goes to quarantine: by a rename, or by a copy of what is in it."""
    if disk == "another":
        node.spool = node.journal / "spool"
        node.env["RANKLOG_SPOOL_DIR"] = str(node.spool)
    node.start_daemon()
    victim = Victim(node)
    here = planted(node, 95, encode_start(start_of(95)) + frames(1, 9), room=node.spool, suffix="part")
    os.truncate(here, 1 << 40)
    target = here.with_suffix(".spool")
    here.rename(target)
    with ExitStack() as held:
        held.callback(victim.close)
        wait_for(lambda: not target.exists(), "it is taken over", 60)
        victim.check()
    assert len(node.raw_rows(f"writer = '{writer_id(95)}' and kind = 'metrics'")) == 9
    kept = [path for path in (node.state / "quarantine").iterdir() if path.name == target.name]
    assert [path.stat().st_size for path in kept] == [1 << 40]
    assert kept[0].stat().st_blocks * 512 <= 2 << 20
    assert kept[0].open("rb").read(100) == encode_start(start_of(95))[:100]


# Rows 26 to 28: other daemons and other people's directories.


def start_another(node: Node, **env: str) -> "subprocess.CompletedProcess[str]":
    return node.run([sys.executable, "-m", "ranklogd", "--lock-wait", "0.5"], **env)


def test_a_second_daemon_names_the_first_and_goes_and_the_first_serves_on(node: Node, victim: Victim) -> None:
    (first,) = node.daemons
    inode = path_of(node).stat().st_ino
    for env in ({}, {"RANKLOG_RUNTIME_DIR": str(node.path / "other")}, {"RANKLOG_STATE_DIR": str(node.path / "other")}):
        second = start_another(node, **env)
        assert second.returncode == 75, second.stderr
        assert f"pid {first.pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert path_of(node).stat().st_ino == inode
    assert node.ping() == first.pid
    victim.check()


def test_two_daemons_started_at_one_moment_are_one_in_the_end(node: Node) -> None:
    command = [sys.executable, "-m", "ranklogd", "--lock-wait", "0"]
    racers = [subprocess.Popen(command, env=node.env, stderr=subprocess.DEVNULL) for _ in range(4)]
    node.daemons += racers
    wait_for(lambda: sum(racer.poll() is None for racer in racers) == 1, "all but one have gone")
    (winner,) = [racer for racer in racers if racer.poll() is None]
    assert {racer.returncode for racer in racers if racer is not winner} == {75}
    wait_for(lambda: node.ping() == winner.pid, "the one that is left answers")
    assert node.run(oracle.witness("one", node, "--count", "300")).returncode == 0
    oracle.check(node)


def test_what_a_killed_daemon_left_is_no_obstacle_and_neither_is_its_pid_in_other_hands(node: Node) -> None:
    daemon = node.start_daemon()
    victim = Victim(node)
    try:
        for _ in range(2):
            daemon.kill()
            daemon.wait()
            assert path_of(node).is_socket()
            for lock in (node.state / "lock", Path(f"{path_of(node)}.lock")):
                assert json.loads(lock.read_text())["pid"] == daemon.pid
                lock.write_text(json.dumps({"pid": os.getpid()}))  # That number lives on, as another process.
            daemon = node.start_daemon("--lock-wait", "0")
        victim.check()
    finally:
        victim.close()


def heard_while(node: Node, **env: str) -> tuple["subprocess.CompletedProcess[str]", list[bytes]]:
    """Start a daemon that will not stay; return what it said to a person and what to the service manager."""
    address = node.path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.setblocking(False)
        done = start_another(node, NOTIFY_SOCKET=str(address), **env)
        heard = []
        with ExitStack() as stack:
            stack.callback(address.unlink)
            try:
                while True:
                    heard.append(manager.recv(1000))
            except BlockingIOError:
                return done, heard


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def a_file(path: Path) -> None:
    path.write_bytes(b"mine")


def a_strangers(path: Path) -> None:
    path.mkdir()
    os.chown(path, STRANGER, STRANGER)


def with_a_room_elsewhere(path: Path) -> None:
    path.mkdir()
    (path.parent / "elsewhere").mkdir()
    (path / "wal").symlink_to(path.parent / "elsewhere")


def with_a_strangers_room(path: Path) -> None:
    path.mkdir()
    a_strangers(path / "outbox")


REFUSED = {
    "RANKLOG_STATE_DIR": [a_link, a_file, a_strangers, with_a_room_elsewhere, with_a_strangers_room],
    "RANKLOG_RUNTIME_DIR": [a_link, a_file, a_strangers],
}


@NEEDS_ROOT
@pytest.mark.parametrize("variable", REFUSED)
def test_a_directory_that_is_not_ones_own_is_refused_in_one_line(node: Node, variable: str) -> None:
    for make in REFUSED[variable]:
        room = node.path / make.__name__
        room.mkdir()
        path = room / "given"
        make(path)
        before = set(room.rglob("*"))
        done, heard = heard_while(node, **{variable: str(path)})
        assert done.returncode == 78, (make, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert str(path) in done.stderr
        assert not [message for message in heard if b"READY" in message]
        elsewhere = room / "elsewhere"
        assert not elsewhere.exists() or not list(elsewhere.iterdir()), "nothing is written through a link"
        assert before <= set(room.rglob("*"))
    node.start_daemon()
    assert node.run(oracle.witness("one", node, "--count", "50")).returncode == 0
    oracle.check(node)


@pytest.mark.parametrize("variable", ["RANKLOG_STATE_DIR", "RANKLOG_RUNTIME_DIR"])
def test_ones_own_directory_that_is_open_to_all_is_closed_first(node: Node, variable: str) -> None:
    """An emptyDir volume is made with mode 0777: to refuse it would help nobody."""
    path = Path(node.env[variable])
    path.mkdir(exist_ok=True)
    path.chmod(0o777)
    node.start_daemon()
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert node.run(oracle.witness("one", node, "--count", "50")).returncode == 0
    oracle.check(node)
