"""Questions to the daemon from a tool: ping, status, flush, sync. Blocking, with a deadline; imports zmq.

Not for the path of records: a trainer's records go through `sender`. A context of its own is made for each question,
so that nothing here can disturb a run in the same process.
"""

import json
import time
from pathlib import Path
from typing import Any

from ranklog import autostart, places, wire
from ranklog.config import Settings
from ranklog.errors import NoDaemon
from ranklog.transport import Transport, Up
from ranklog.wire import Type, Wait

CONNECT_TIMEOUT_S = 2.0
POLL_S = 0.2


class Pong:
    """A daemon's answer to a ping."""

    def __init__(self, version: str, pid: int, socket: Path, took_s: float) -> None:
        self.version = version
        self.pid = pid
        self.socket = socket
        self.took_s = took_s


class Flushed:
    """The answer to a flush: `done`, or how many records are not there yet."""

    def __init__(self, *, done: bool, pending: int) -> None:
        self.done = done
        self.pending = pending


def ping(settings: Settings, timeout_s: float = CONNECT_TIMEOUT_S) -> Pong:
    """Return who answers on the socket; raises NoDaemon."""
    began = time.monotonic()
    socket, fields, _ = _ask(settings, Type.PONG, wire.encode(Type.PING, 1), timeout_s)
    return Pong(fields[1], fields[2], socket, time.monotonic() - began)


def status(settings: Settings, timeout_s: float = CONNECT_TIMEOUT_S) -> dict[str, Any]:
    """Return the daemon's status snapshot; raises NoDaemon."""
    socket, _, body = _ask(settings, Type.REPORT, wire.encode(Type.STATUS, 1), timeout_s)
    try:
        snapshot = json.loads(body)
    except ValueError:
        snapshot = None
    if not isinstance(snapshot, dict):
        raise NoDaemon(f"what answers on {socket} gives no status: it is no ranklogd, or one of another version")
    return snapshot


def flush(settings: Settings, wait: Wait, timeout_s: float) -> Flushed:
    """Wait until everything the daemon has received is durable, sealed or uploaded; raises NoDaemon."""
    ping(settings)  # Tells "no daemon" at once from "not done in time".
    _, fields, _ = _ask(
        settings, Type.FLUSHED, wire.encode(Type.FLUSH, 1, int(wait), float(timeout_s)), timeout_s + CONNECT_TIMEOUT_S
    )
    return Flushed(done=fields[1], pending=fields[2])


def sync(settings: Settings, timeout_s: float) -> Flushed:
    """Have the daemon adopt what lies on this node, offline writers included; raises NoDaemon."""
    ping(settings)
    _, fields, _ = _ask(settings, Type.FLUSHED, wire.encode(Type.SYNC, 1), timeout_s)
    return Flushed(done=fields[1], pending=fields[2])


def wait_uploaded(timeout_s: float) -> bool:
    """Wait until this process's daemon has uploaded what it has; False if it did not in time, or is gone."""
    try:
        return flush(Settings.from_env(), Wait.UPLOADED, timeout_s).done
    except NoDaemon:
        return False


def _ask(settings: Settings, wanted: Type, question: bytes, timeout_s: float) -> tuple[Path, list[Any], bytes]:
    socket = places.find_socket(settings)
    if not autostart.is_listening(socket):
        raise NoDaemon(
            f"no daemon: nobody listens on {socket}, or you may not use it. "
            "Start one with `ranklogd`, or run the job with `ranklog run -- CMD`"
        )
    transport = Transport(socket)
    deadline = time.monotonic() + timeout_s
    try:
        while (left := deadline - time.monotonic()) > 0:
            for event in transport.events(min(left, POLL_S)):
                if isinstance(event, Up):
                    transport.send(question)
                elif isinstance(event, tuple) and event[0] == wanted:
                    return socket, event[1], event[2]
    finally:
        transport.close()
    raise NoDaemon(
        f"nobody answers on {socket} within {timeout_s:g} s. "
        "Is the daemon running, and may you use its socket? Try `ranklogd`"
    )
