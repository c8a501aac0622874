"""A daemon for as long as a command needs one: joined, or else started; kept alive; stopped by its last user.

    <socket>.lease      shared flock of every `ranklog run` and `ranklog sync` that uses the daemon; who leaves last
                        holds it alone for a moment, and stops the daemon in it
    <socket>.starter    held by a daemon that one of them started (`ranklog.autostart`); its pid is in it

Both are flocks, so a user that is killed leaves at once and nothing has to be cleaned up. Only a daemon that such a
command started is restarted when it dies, and stopped in the end; one of systemd's or a person's is never touched.
If all users are killed, the daemon ends by itself after `IDLE_EXIT`.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ranklog import control, fs, places
from ranklog.autostart import (
    LOG_NAME,
    Starter,
    daemon_command,
    daemon_environment,
    is_listening,
    lock_starter,
    missing_package,
    note_starter,
    open_log,
    read_starter,
)
from ranklog.config import Settings
from ranklog.control import Pong
from ranklog.errors import MissingExtra, NoDaemon, RanklogError
from ranklog.identity import pid_namespace, process_start
from ranklogd.commands.process import Child, Children
from ranklogd.config import load_config

IDLE_EXIT = "1h"
LOOK_INTERVAL_S = 0.05
PING_TIMEOUT_S = 2.0
RESTART_PAUSE_S_MAX = 60.0
TEND_INTERVAL_S = 1.0
START_TIMEOUT_S = 30.0
"""For recovery and Python's imports on a slow disk, beyond the wait for the state directory's lock."""
DRAIN_S_MIN = 1.0
STOP_GRACE_S = 5.0
"""What a daemon gets to stop in once it must not upload any longer: what is left is safe on disk."""
_LOG_TAIL_SIZE = 4096
_LOG_TAIL_LINES = 8

Pause = Callable[[float], bool]
"""Waits so many seconds, or returns True earlier: somebody called the whole thing off."""


class CannotStart(RanklogError):
    """There is no daemon and none could be started; the text says why."""


class CalledOff(Exception):
    """A pause said that nobody wants this any more."""


class Launcher:
    """One command's hold on this node's daemon. `join` first, `leave` in the end."""

    def __init__(
        self,
        flags: Mapping[str, str],
        children: Children,
        pause: Pause,
        *,
        lock_wait_s: float,
        bring_in: Sequence[Path] = (),
    ) -> None:
        """`flags` are fields of the daemon's config as text; raises UsageError where they are no config.

        `bring_in`: the one purpose of a daemon that is started is what lies in these directories.
        """
        self.config = load_config(flags)
        self.settings: Settings = self.config.settings()
        self.started = False
        """A command such as this one started the daemon; so it may be restarted and stopped."""
        self.fresh = False
        """This very command started the daemon."""
        self.at_home = True
        """The daemon is at the place of `config`, not one found elsewhere on this node."""
        self.flags = dict(flags)
        self._bring_in = [part for path in bring_in for part in ("--bring-in", str(path))]
        self._children = children
        self._pause = pause
        self._lock_wait_s = lock_wait_s
        self._lease = -1
        self._process: Child | None = None
        self._log_offset = 0
        self._look_at_s = self._restart_pause_s = 0.0

    @property
    def log_path(self) -> Path:
        """Where a daemon that we start writes."""
        return self.config.runtime_dir / LOG_NAME

    def join(self) -> Pong:
        """Return the daemon that answers, started if there was none. Raises CannotStart, CalledOff, UsageError."""
        abroad = self._abroad()
        if abroad is not None:
            return abroad
        deadline_s = time.monotonic() + self._lock_wait_s + START_TIMEOUT_S
        try:
            places.ensure_private_dir(self.config.runtime_dir)
            fs.make_dir(self.config.socket.parent)
            self._share_lease(deadline_s)
            return self._join_or_start(deadline_s)
        except OSError as exc:
            self.leave(0)
            raise CannotStart(f"the daemon could not be started: {exc}") from exc
        except (CannotStart, CalledOff):
            self.leave(0)
            raise

    def _abroad(self) -> Pong | None:
        """Look for a daemon at a place that is not where ours would be, such as the system's."""
        settings = Settings.from_env()
        found = places.find_socket(settings)
        if "runtime_dir" in self.flags or found == self.config.socket or is_listening(self.config.socket):
            return None
        try:
            pong = control.ping(settings, PING_TIMEOUT_S) if is_listening(found) else None
        except NoDaemon:
            return None
        if pong is not None:
            self.settings, self.at_home = settings, False
        return pong

    def _share_lease(self, deadline_s: float) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lease = os.open(f"{self.config.socket}.lease", flags, 0o600)
        while True:
            try:
                fcntl.flock(self._lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                # The last user of a daemon stops it right now, and may have a lot to upload.
                if time.monotonic() > deadline_s:
                    text = f"another ranklog command has been stopping the daemon of {self.config.socket} for too long"
                    raise CannotStart(f"{text}. Try again") from exc
                self._wait()
            else:
                return

    def _join_or_start(self, deadline_s: float) -> Pong:
        while time.monotonic() < deadline_s:
            if is_listening(self.config.socket):
                pong = self._ping()
                if pong is not None:
                    return self._joined(pong)
            elif self._process is None:
                self._start()
            self._children.reap()
            if self._process is not None and self._process.exit_code is not None:
                raise CannotStart(self._epitaph(f"it ended with code {self._process.exit_code}"))
            self._wait()
        raise CannotStart(self._epitaph(f"nobody answers on {self.config.socket}"))

    def _joined(self, pong: Pong) -> Pong:
        if self._process is not None and self._process.pid != pong.pid:
            # Ours still waits for the state directory of one that was started by hand at the same moment.
            self._process.signal_group(signal.SIGKILL)
            self._process = None
        starter = read_starter(self.config.socket)
        self.started = starter is not None and starter.by == "run"
        self.fresh = self._process is not None
        return pong

    def _start(self) -> bool:
        """Start a daemon unless somebody else just does."""
        package = missing_package()
        if package:
            raise MissingExtra("no daemon runs here, and to start one ranklog", "daemon", package)
        lock = lock_starter(self.config.socket)
        if lock is None:
            return False
        log = open_log(self.log_path)
        try:
            note_starter(lock, Starter("run"))
            self._log_offset = os.fstat(log).st_size
            os.set_inheritable(lock, True)  # noqa: FBT003
            flags = [part for name, value in self.flags.items() for part in (f"--{name.replace('_', '-')}", value)]
            idle = [] if self.config.idle_exit_s else ["--idle-exit", IDLE_EXIT]
            command = [*daemon_command(), "--lock-wait", f"{self._lock_wait_s:g}", *idle, *self._bring_in, *flags]
            self._process = self._children.spawn(command, daemon_environment(), output_fd=log)
            pid = self._process.pid
            note_starter(lock, Starter("run", pid, process_start(pid) or 0, pid_namespace() or 0))
        finally:
            os.close(log)
            os.close(lock)
        return True

    def _ping(self) -> Pong | None:
        try:
            return control.ping(self.settings, PING_TIMEOUT_S)
        except NoDaemon:
            return None

    def _wait(self) -> None:
        if self._pause(LOOK_INTERVAL_S):
            raise CalledOff

    def tend(self) -> None:
        """Start the daemon again if it died. Looks about once a second, and at once if the one we started died."""
        now_s = time.monotonic()
        fell = self._process is not None and self._process.exit_code is not None
        if not self.started or (now_s < self._look_at_s and not (fell and not self._restart_pause_s)):
            return
        try:
            restarted = self._start()
        except OSError as exc:
            sys.stderr.write(f"ranklog: the daemon ended and could not be started again: {exc}\n")
            restarted = True
        # One that dies as soon as it is started would otherwise be started for ever.
        self._restart_pause_s = min(RESTART_PAUSE_S_MAX, max(1.0, self._restart_pause_s * 2)) if restarted else 0.0
        self._look_at_s = now_s + (self._restart_pause_s or TEND_INTERVAL_S)

    def leave(self, timeout_s: float) -> None:
        """Stop the daemon if this was its last user and such a command started it; let go of it in any case.

        It has `timeout_s` to upload what it has, a few seconds at least, and loses nothing by being cut short.
        """
        if self._lease < 0:
            return
        try:
            if fs.try_lock(self._lease):
                self._stop(timeout_s)
        finally:
            os.close(self._lease)
            self._lease = -1

    def _stop(self, timeout_s: float) -> None:
        starter = read_starter(self.config.socket)
        ours = starter is not None and starter.by == "run" and starter.pid_ns == (pid_namespace() or 0)
        if starter is None or not ours or starter.start != process_start(starter.pid):
            return
        # The first signal asks for a drain, the second for an exit at once.
        waits_s = (max(timeout_s, DRAIN_S_MIN), STOP_GRACE_S, STOP_GRACE_S)
        for number, wait_s in zip((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL), waits_s, strict=True):
            try:
                os.kill(starter.pid, number)
            except ProcessLookupError:
                return
            deadline_s = time.monotonic() + wait_s
            while time.monotonic() < deadline_s:
                self._children.reap()
                if read_starter(self.config.socket) is None:
                    return
                if self._pause(LOOK_INTERVAL_S):
                    break  # Somebody is in a hurry: the next signal.

    def _epitaph(self, what: str) -> str:
        try:
            with self.log_path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_offset, size - _LOG_TAIL_SIZE))
                lines = file.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]
        except OSError:
            lines = []
        said = " | ".join(line.strip() for line in lines if line.strip()) or "nothing"
        return f"the daemon could not be started: {what}. It said: {said} (log: {self.log_path})"
