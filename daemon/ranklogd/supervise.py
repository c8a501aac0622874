"""The shipper as a child process: started, restarted with growing pauses, stopped. Killing it at any time loses nothing.

Its configuration goes through stdin, so nothing of it is in argv; stdin stays open as long as this process lives, so
that the shipper sees when its parent is gone. It inherits neither the state lock nor the socket.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

RESTART_S_MAX = 30.0


class ShipperProcess:
    """The one shipper of this daemon. Owned by the server loop."""

    def __init__(self, config_json: str, *, log_path: Path | None = None) -> None:
        self.restarts = 0
        self._config = config_json.encode()
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at_s = 0.0
        self._pause_s = 0.5

    @property
    def pid(self) -> int:
        """Process id, 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def tend(self, now_s: float) -> None:
        """Start it if it does not run and its pause is over."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._process = None
            self.restarts += 1
            self._start_at_s = now_s + self._pause_s
            self._pause_s = min(RESTART_S_MAX, self._pause_s * 2)
        if now_s < self._start_at_s:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ranklogd.ship.shipper"], stdin=subprocess.PIPE, close_fds=True, process_group=0,
        )  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(self._config + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # It died at once; the next call sees that.

    def settled(self) -> None:
        """It has worked for a while: forget earlier deaths."""
        self._pause_s = 0.5

    def stop(self) -> None:
        """Ask it to upload what it can and exit; returns at once."""
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
