"""The floor of ingest: a router that receives, checks crc32, appends, syncs every 20 ms, acknowledges; no rules at all.

python -m bench.floor_server SOCKET FILE
"""

import os
import sys
import time
import zlib

import msgpack
import zmq

from ranklog import wire

_INTERVAL_S = 0.020


def main(path: str, file: str) -> None:
    """Serve until killed."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(f"ipc://{path}")
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pending: list[bytes] = []
    acks: list[tuple[bytes, bytes, int]] = []
    due_s = 0.0
    while True:
        if socket.poll(max(0, round((due_s - time.monotonic()) * 1000)) if pending else 1000):
            identity, header, body = socket.recv_multipart()
            kind, *fields = msgpack.unpackb(header)
            if kind == wire.Type.HELLO:
                socket.send_multipart(
                    [identity, wire.encode(wire.Type.WELCOME, wire.VERSION, fields[2], 1, "", "", "", wire.CREDIT)]
                )
            elif kind == wire.Type.BATCH and zlib.crc32(body) == fields[3]:
                pending.append(body)
                acks.append((identity, fields[0], fields[1] + fields[2] - 1))
        if pending and time.monotonic() >= due_s:
            os.writev(fd, pending[:1000])
            os.fdatasync(fd)
            due_s = time.monotonic() + _INTERVAL_S
            for identity, writer, last in acks:
                socket.send_multipart([identity, wire.encode(wire.Type.ACK, writer, last, wire.CREDIT)])
            pending, acks = [], []


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
