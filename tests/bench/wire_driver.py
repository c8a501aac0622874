"""Bare sockets that speak the daemon's protocol: the load of many trainers without their CPU.

`saturate`: every writer keeps two batches in flight. `pace`: every writer sends a batch each `pace_s`, staggered, and
the time from sending to the ack is taken. Batches are made before the clock starts; their frames are real ones.
"""

import heapq
import json
import os
import sys
import time
import zlib
from typing import Any, NamedTuple

import msgpack
import zmq

from bench import load
from bench.trainer import say, tell
from ranklog import wire
from ranklog.frame import Kind, encode_frame
from ranklog.start import Start, encode_start

ACK_TIMEOUT_MS = 60_000


class Writer:
    """One connected writer with its batches."""

    def __init__(self, context: zmq.Context[Any], rank: int, arguments: dict[str, Any]) -> None:
        self.id = os.urandom(16)
        self.sent = self.acked = 0
        self.records = arguments["records"]
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{arguments['socket']}")
        start = Start(writer=self.id.hex(), project="bench", run="wire", rank=rank, world_size=arguments["writers"])
        self.batches = make_batches(rank, arguments["batches"], self.records, arguments["metrics"])
        self.socket.send_multipart(
            [wire.encode(wire.Type.HELLO, wire.VERSION_MIN, wire.VERSION, self.id, 1), encode_start(start)]
        )
        kind = self.hear()[0]
        assert kind == wire.Type.WELCOME, kind

    def hear(self) -> tuple[wire.Type, list[Any]]:
        """Return the next message; raises RuntimeError after a minute of silence."""
        if not self.socket.poll(ACK_TIMEOUT_MS):
            raise RuntimeError("no ack for a minute")
        return wire.decode(self.socket.recv())

    def send(self) -> None:
        """Send the next batch."""
        frames = self.batches[self.sent]
        header = wire.encode(
            wire.Type.BATCH, self.id, 1 + self.sent * self.records, self.records, zlib.crc32(frames), False
        )
        self.socket.send_multipart([header, frames], copy=False)
        self.sent += 1

    def take_ack(self) -> bool:
        """Take a message; False if it refuses something."""
        kind, fields = self.hear()
        if kind == wire.Type.ACK:
            self.acked = max(self.acked, fields[1] // self.records)
        return kind == wire.Type.ACK


def make_batches(rank: int, batches: int, size: int, metrics: int) -> list[bytes]:
    """Return the frames of consecutive batches from seq 1 on."""
    records = load.make_records(metrics, 64, seed=rank)
    pack, clock = msgpack.Packer().pack, time.time_ns()
    made = []
    for number in range(batches):
        seqs = range(1 + number * size, 1 + (number + 1) * size)
        made.append(
            b"".join(
                encode_frame(pack((int(Kind.METRICS), seq, clock + seq * 1_000_000, seq - 1, records[seq % 64])))
                for seq in seqs
            )
        )
    return made


def saturate(arguments: dict[str, Any]) -> None:
    """Send everything, two batches of each writer in flight."""
    context = zmq.Context()
    writers = [Writer(context, rank, arguments) for rank in range(arguments["writers"])]
    poller = zmq.Poller()
    by_socket = {writer.socket: writer for writer in writers}
    for writer in writers:
        poller.register(writer.socket, zmq.POLLIN)
    say("ready")
    began_s, refused = time.monotonic(), 0
    for writer in writers * wire.CREDIT:
        writer.send()
    while any(writer.acked < len(writer.batches) for writer in writers):
        for socket, _ in poller.poll(ACK_TIMEOUT_MS) or [(None, 0)]:
            if socket is None:
                raise RuntimeError("no ack for a minute")
            writer = by_socket[socket]
            refused += not writer.take_ack()
            while writer.sent < len(writer.batches) and writer.sent - writer.acked < wire.CREDIT:
                writer.send()
    say({"took_s": time.monotonic() - began_s, "refused": refused})
    tell(None)


class _Due(NamedTuple):
    due_s: float
    rank: int


def pace(arguments: dict[str, Any]) -> None:
    """Send a batch of each writer every `pace_s`; take the time of each ack."""
    context = zmq.Context()
    writers = [Writer(context, rank, arguments) for rank in range(arguments["writers"])]
    poller = zmq.Poller()
    by_socket = {writer.socket: rank for rank, writer in enumerate(writers)}
    for writer in writers:
        poller.register(writer.socket, zmq.POLLIN)
    say("ready")
    now_s, pace_s = time.monotonic(), arguments["pace_s"]
    due = [_Due(now_s + 0.2 + rank * pace_s / len(writers), rank) for rank in range(len(writers))]
    heapq.heapify(due)
    sent_ns: dict[tuple[int, int], int] = {}
    took_ns, refused = [], 0
    while due or sent_ns:
        wait_s = max(0.0, due[0].due_s - time.monotonic()) if due else ACK_TIMEOUT_MS / 1000
        ready = poller.poll(wait_s * 1000)
        if not ready and not due:
            raise RuntimeError("no ack for a minute")
        for socket, _ in ready:
            rank = by_socket[socket]
            writer, before = writers[rank], writers[rank].acked
            refused += not writer.take_ack()
            for number in range(before, writer.acked):
                took_ns.append(time.perf_counter_ns() - sent_ns.pop((rank, number)))
        while due and due[0].due_s <= time.monotonic():
            turn = heapq.heappop(due)
            writer = writers[turn.rank]
            sent_ns[turn.rank, writer.sent] = time.perf_counter_ns()
            writer.send()
            if writer.sent < len(writer.batches):
                heapq.heappush(due, _Due(turn.due_s + pace_s, turn.rank))
    say(load.latency(took_ns) | {"refused": refused})
    tell(None)


if __name__ == "__main__":
    {"saturate": saturate, "pace": pace}[sys.argv[1]](json.loads(sys.argv[2]))
