"""Named points at which a test can make this process die, fail or wait. No-ops in production.

    RANKLOG_FAILPOINT="name[:nth]=kill|exit|err|sleep[,…]"     nth counts the passes of that point, from 1
    RANKLOG_FAILPOINT_LOG=/path                                one line per reached armed point: proof that it was hit

Every point is listed here once, and the crash tests loop over this list: a new point is tested from the day it is
added. SIGKILL proves the order of steps only; the page cache survives it, so fsync itself needs a power-cut test.
"""

import os
import signal
import time

FAILPOINTS = frozenset({
    # client
    "journal.write.before", "journal.write.after", "journal.rotate.mid", "journal.create.after",
    "journal.gap.after", "journal.recycle.after",
    "spool.create.after", "spool.write.after", "spool.sync.after", "finish.end.after", "finish.remove.mid",
    # ingest
    "recv.after", "wal.append.before", "wal.append.after", "wal.sync.before", "wal.sync.after",
    "ack.before", "ack.after",
    "seg.sync.after", "seg.create.after", "seg.header.after", "seg.seal.after", "seg.dirsync.after",
    "poison.truncate.after", "poison.rewrite.after",
    "recover.cut.after", "recover.seal.mid", "recover.quarantine.mid", "reserve.unlink.after", "reserve.create.mid",
    "adopt.copy.after", "adopt.sync.after", "adopt.quarantine.mid", "adopt.unlink.mid", "adopt.unlink.after",
    "shutdown.seal.after",
    # shipper
    "tries.create.after", "shard.write.mid", "shard.sync.after", "evidence.publish.after",
    "outbox.rename.after", "outbox.dirsync.after", "evidence.move.after", "trim.unlink.after", "trim.dirsync.after",
    "upload.before", "store.put.mid", "store.sync.after", "store.publish.after", "upload.sent.before_reply",
    "upload.verified.before_mark", "mark.rename.after", "mark.sync.after", "aside.reason.after", "retain.delete.mid",
})  # fmt: skip

DELAY_S = 0.5  # Long enough that another actor overtakes, short enough for a sweep over all points.


def _parse(spec: str) -> dict[str, tuple[int, str]]:
    armed = {}
    for part in filter(None, spec.split(",")):
        where, _, action = part.partition("=")
        name, _, nth = where.partition(":")
        assert name in FAILPOINTS, f"unknown failpoint {name!r}"
        assert action in ("kill", "exit", "err", "sleep"), f"unknown failpoint action {action!r}"
        armed[name] = (int(nth or 1), action)
    return armed


_armed = _parse(os.environ.get("RANKLOG_FAILPOINT", ""))
ARMED = bool(_armed)
"""Whether any point is armed: lets the caller's path of `log()` skip the call."""
_passes: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die, fail or wait here if a test has armed `name`; raises OSError for the action `err`."""
    if not _armed:
        return
    assert name in FAILPOINTS, f"failpoint {name!r} is not in the list"
    if name in _armed:
        _hit(name)


def _hit(name: str) -> None:
    nth, action = _armed[name]
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] != nth:
        return
    log = os.environ.get("RANKLOG_FAILPOINT_LOG")
    if log:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, f"{name} {action} {os.getpid()}\n".encode())
        os.close(fd)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(86)
    elif action == "sleep":
        time.sleep(DELAY_S)
    else:
        raise OSError(5, f"failpoint {name}")
