"""The shipper as a child process: started, restarted with growing pauses, stopped. Killing it loses nothing.

Its configuration goes through stdin, so nothing of it is in argv, nor any secret in its environment; stdin stays open
as long as this process lives, so that the shipper sees when its parent is gone, and a line on it says "hurry". It
inherits neither the state lock nor the socket.
"""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress

from ranklogd.config import Config, environment
from ranklogd.secrecy import pack, shipper_environment
from ranklogd.statedir import StateDir

log = logging.getLogger("ranklogd")

RESTART_S_MIN = 0.5
RESTART_S_MAX = 30.0
SETTLED_S = 60.0
"""A shipper that lived so long was sound: its death starts no longer pause than a first one."""
EXIT_HUNG = 70
"""The shipper ended itself: a call to the store had not come back long after its deadline, and never would."""
HURRY = b"hurry\n"
"""What a line on its stdin asks for: upload now what waits."""


class ShipperProcess:
    """The one shipper of this daemon. Owned by the server loop."""

    def __init__(self, config_json: str) -> None:
        self.restarts = 0
        xet_cache = StateDir(Config.from_json(config_json).state_dir).xet
        self._environment, hidden = shipper_environment(environment(), xet_cache)
        self._told = pack(config_json, hidden).encode()
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at_s = self._started_s = 0.0
        self._pause_s = RESTART_S_MIN
        self._stopping = False

    @property
    def pid(self) -> int:
        """Process id, 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def tend(self, now_s: float) -> None:
        """Start it if it does not run and its pause is over; never again after `stop`."""
        if self._stopping:
            return
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._give_up(now_s, f"exit code {code}", hung=code == EXIT_HUNG)
        if now_s < self._start_at_s:
            return
        try:
            # -P: a file in the working directory must not stand in for a module.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ranklogd.ship.shipper"],
                stdin=subprocess.PIPE,
                env=self._environment,
                bufsize=0,
                process_group=0,
            )
        except OSError as exc:
            self._give_up(now_s, str(exc))  # No process or memory to be had: acks go on without it.
            return
        self._started_s = now_s
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(self._told + b"\n")
        except BrokenPipeError:
            return  # It died at once; the next call sees that.
        os.set_blocking(self._process.stdin.fileno(), False)

    def hurry(self) -> None:
        """Ask it to upload what waits without keeping its pace."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # Gone, or so many times asked that the pipe is full.
                self._process.stdin.write(HURRY)

    def _give_up(self, now_s: float, why: str, *, hung: bool = False) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            if hung or now_s - self._started_s >= SETTLED_S:
                self._pause_s = RESTART_S_MIN
        log.warning("shipper_down reason=%r pause_s=%g", why, self._pause_s)
        self._process = None
        self.restarts += 1
        self._start_at_s = now_s + self._pause_s
        self._pause_s = min(RESTART_S_MAX, self._pause_s * 2)

    def stop(self) -> None:
        """Ask it to upload what it can and exit; returns at once. It must have reported before, else it just dies."""
        self._stopping = True
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)

    def ended(self) -> bool:
        """Return whether it is gone."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End it now."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
