"""A real terminal for a command: it is the command's own, and what is written on it can be read."""

import fcntl
import os
import pty
import subprocess
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from node import wait_for


def start(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, *, columns: int = 120
) -> "tuple[subprocess.Popen[bytes], int]":
    """Start a command as a shell does in a terminal; return it and the terminal's other end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, columns))

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        env={**env, "COLUMNS": str(columns)},
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_the_terminal,
    )
    os.close(theirs)
    return process, ours


def read_until(fd: int, wanted: str) -> str:
    """Return what was written up to and with `wanted`, and perhaps more."""
    seen = b""

    def more() -> bool:
        nonlocal seen
        with suppress(BlockingIOError):
            seen += os.read(fd, 4096)
        return wanted in seen.decode("utf-8", "replace")

    os.set_blocking(fd, False)
    wait_for(more, f"{wanted!r} on the terminal")
    return seen.decode("utf-8", "replace")
