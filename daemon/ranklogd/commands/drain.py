"""Bringing everything in: dead writers adopted, then every record the daemon has received uploaded.

The daemon answers these two requests when they are done, however long that takes. So they are asked in a thread of
their own while this one shows how far things are and watches for the deadline and for somebody who calls it off. A
daemon that dies meanwhile is asked again once it is back.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from ranklog import control
from ranklog.cli.progress import Asking, Progress
from ranklog.config import Settings
from ranklog.control import Flushed
from ranklog.errors import NoDaemon
from ranklog.wire import Wait
from ranklogd.commands.launcher import Launcher, Pause

LOOK_INTERVAL_S = 0.02
RETRY_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Drained:
    """How a drain ended."""

    done: bool
    """Every dead writer is adopted, and every record that the daemon had received is in the store."""
    pending: int
    """Records that the daemon has and the store has not."""
    adopted: int
    """Writers whose files were taken over."""
    uploaded: int
    """Records that reached the store meanwhile."""
    reason: str
    """Why it is not done; empty if it is."""


def drain(
    launcher: Launcher, *, timeout_s: float, pause: Pause, progress: Progress, since_lsn: int | None = None
) -> Drained:
    """Bring everything in, within `timeout_s` or until `pause` calls it off; never raises for what the daemon does.

    `since_lsn`: count what the daemon did from there on before this call, too, for it was started for nothing else.
    """
    settings = launcher.settings
    deadline_s = time.monotonic() + timeout_s
    before = snapshot(settings)
    adopted_before = before.get("adopted", 0) if since_lsn is None else 0
    uploaded_before = _mark(before, "uploaded") if since_lsn is None else since_lsn
    done, stopped_by = False, "the time was not enough"
    while (left_s := deadline_s - time.monotonic()) > 0:
        asking = Asking(partial(_both, settings, left_s))
        asking.start()
        called_off = _watch(asking, launcher, deadline_s, pause, progress)
        done = asking.answer is not None and asking.answer.done
        if called_off:
            stopped_by = "it was interrupted"
        if done or called_off or asking.answer is not None:
            break
        launcher.tend()
        if pause(RETRY_INTERVAL_S):
            stopped_by = "it was interrupted"
            break
    progress.clear()
    after = snapshot(settings)
    pending = _waiting(after)
    reason = "" if done else why_pending(after) or stopped_by
    if not after and launcher.started:
        reason += f"; see {launcher.log_path}"
    uploaded = max(0, _mark(after, "uploaded") - uploaded_before)
    return Drained(done, pending, max(0, after.get("adopted", 0) - adopted_before), uploaded, reason)


def _both(settings: Settings, timeout_s: float) -> Flushed:
    deadline_s = time.monotonic() + timeout_s
    synced = control.sync(settings, timeout_s)
    if not synced.done:
        return synced
    return control.flush(settings, Wait.UPLOADED, max(0.0, deadline_s - time.monotonic()))


def _watch(asking: Asking, launcher: Launcher, deadline_s: float, pause: Pause, progress: Progress) -> bool:
    """Wait for the answer or the deadline; True if it was called off."""
    while asking.is_alive() and time.monotonic() < deadline_s:
        if pause(LOOK_INTERVAL_S):
            return True
        launcher.tend()
        if progress.due():
            progress.show(snapshot(launcher.settings))
    return False


def snapshot(settings: Settings) -> dict[str, Any]:
    """Return the daemon's status, empty if nobody answers."""
    try:
        return control.status(settings)
    except NoDaemon:
        return {}


def _waiting(status: dict[str, Any]) -> int:
    return _mark(status, "received") - _mark(status, "uploaded")


def _mark(status: dict[str, Any], name: str) -> int:
    return int(status.get("watermarks", {}).get(name, 0))


def why_pending(status: dict[str, Any]) -> str:
    """Return what the daemon itself says about records that do not move; "" if nothing."""
    if not status:
        return "no daemon answers"
    return str(status.get("full") or status.get("shipper", {}).get("last_error") or "")
