"""What tools ask the daemon: PING, STATUS, FLUSH, SYNC. Answers that have to wait are kept here until they are true."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ranklog import wire
from ranklog.version import __version__
from ranklog.wire import Type, Wait
from ranklogd.ingest import Peer, Reply

REQUESTS_MAX = 256
"""Waiting requests at most; one more is answered at once as not done."""


class Progress(NamedTuple):
    """Where records are now."""

    received: int
    durable: int
    sealed: int
    uploaded: int
    adopting: bool
    stuck: bool
    """Dead writers' files wait for room."""


class _Waiting(NamedTuple):
    identity: bytes
    token: int
    wait: Wait
    lsn: int
    deadline_s: float
    adoption: bool


class Requests:
    """Tools' requests. Owned by the server loop."""

    def __init__(self, *, status: Callable[[], str], seal: Callable[[], None], scan: Callable[[bool], None]) -> None:
        self._status = status
        self._seal = seal
        self._scan = scan
        self._waiting: list[_Waiting] = []

    @property
    def waiting(self) -> bool:
        """True while somebody waits for an answer."""
        return bool(self._waiting)

    def handle(self, peer: Peer, kind: Type, fields: list[Any], progress: Progress, now_s: float) -> list[Reply]:
        """Take a request; return what can be answered now."""
        token = fields[0]
        if kind == Type.PING:
            return [Reply(peer.identity, wire.encode(Type.PONG, token, __version__, os.getpid()))]
        if kind == Type.STATUS:
            return [Reply(peer.identity, wire.encode(Type.REPORT, token), self._status().encode())]
        if len(self._waiting) >= REQUESTS_MAX:
            return [Reply(peer.identity, wire.encode(Type.FLUSHED, token, False, progress.received))]  # noqa: FBT003
        if kind == Type.SYNC:
            self._scan(True)  # noqa: FBT003
            self._waiting.append(_Waiting(peer.identity, token, Wait.DURABLE, 0, now_s + 3600, adoption=True))
        elif kind == Type.FLUSH:
            _, wait, limit_s = fields
            wait = Wait(min(max(wait, Wait.DURABLE), Wait.UPLOADED))
            self._waiting.append(
                _Waiting(peer.identity, token, wait, progress.received, now_s + min(limit_s, 86400), adoption=False)
            )
            if wait != Wait.DURABLE:
                self._seal()
        return []

    def answer(self, progress: Progress, now_s: float) -> list[Reply]:
        """Return the answers that have become true, or too late."""
        replies, still = [], []
        for request in self._waiting:
            reached = {Wait.DURABLE: progress.durable, Wait.SEALED: progress.sealed, Wait.UPLOADED: progress.uploaded}[
                request.wait
            ]
            if request.adoption:
                over, done = not progress.adopting, not progress.adopting and not progress.stuck
            else:
                over = done = reached >= request.lsn
            if over or now_s >= request.deadline_s:
                header = wire.encode(Type.FLUSHED, request.token, done, max(0, request.lsn - reached))
                replies.append(Reply(request.identity, header))
            else:
                still.append(request)
        self._waiting = still
        return replies
