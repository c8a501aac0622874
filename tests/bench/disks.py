"""Disks that misbehave: one that fills up, one that freezes, one that a checkpoint is being written to. Needs root.

Each is a context manager that leaves nothing mounted or frozen behind, also when the measurement fails.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.node import Options
from bench.rows import Skipped

_CHUNK_BYTES = 64 << 20


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as exc:
        raise Skipped(f"needs the command {command[0]}") from exc
    except subprocess.CalledProcessError as exc:
        raise Skipped(f"{' '.join(command)}: {exc.stderr.strip()}") from exc


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Skipped("needs root, to mount a filesystem")


@contextmanager
def small_tmpfs(size_bytes: int) -> Iterator[Path]:
    """Give a filesystem of this size; raises Skipped where it cannot be mounted."""
    _require_root()
    with tempfile.TemporaryDirectory(prefix="rlbench-") as name:
        _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "rlbench", name)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def fill(path: Path) -> None:
    """Take every byte that is left on the filesystem of `path` with the file `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    piece, offset = 64 << 20, 0
    while piece >= 4096:
        try:
            os.posix_fallocate(fd, offset, piece)
            offset += piece
        except OSError:
            piece //= 2
    os.close(fd)


@contextmanager
def loop_ext4(options: Options, size_bytes: int) -> Iterator[Path]:
    """Give an ext4 of its own, in a file on the measured disk; raises Skipped where it cannot be made."""
    _require_root()
    with tempfile.TemporaryDirectory(prefix="rlbench-", dir=options.directory) as name:
        image, mount = Path(name) / "image", Path(name) / "mount"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        mount.mkdir()
        _run("mkfs.ext4", "-q", "-F", str(image))
        _run("mount", "-o", "loop", str(image), str(mount))
        try:
            yield mount
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=True)


@contextmanager
def frozen(mount: Path) -> Iterator[None]:
    """Freeze a filesystem: every write and sync on it waits until the end of the block."""
    _run("fsfreeze", "-f", str(mount))
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(mount)], check=False, capture_output=True)


class Checkpoint:
    """A checkpoint being written by another process, over and over until `stop`; at least once in full."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        command = [sys.executable, "-c", _WRITER, str(path), str(size_bytes), str(_CHUNK_BYTES)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._began_s = time.monotonic()

    def await_written(self, size_bytes: int, timeout_s: float = 120.0) -> None:
        """Wait until so much is written that the page cache does not hide the disk."""
        part, deadline = Path(f"{self._path}.tmp"), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (part.exists() and part.stat().st_size >= size_bytes) or self._path.exists():
                return
            time.sleep(0.05)

    def stop(self) -> str:
        """Have it finish its first file at least, remove what it wrote, and say how fast it was."""
        try:
            said, _ = self._process.communicate(b"stop\n", timeout=900)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = b"did not end in 900 s"
        for path in (self._path, Path(f"{self._path}.tmp")):
            path.unlink(missing_ok=True)
        return said.decode().strip()


_WRITER = """
import os, select, sys, time
path, size, piece = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chunk, written, began, files = os.urandom(piece), 0, time.monotonic(), 0
def stopped():
    return bool(select.select([sys.stdin], [], [], 0)[0])
while not files or not stopped():
    fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    offset = 0
    while offset < size and not (files and stopped()):
        offset += os.write(fd, chunk[: min(piece, size - offset)])
    written += offset
    os.fsync(fd)
    os.close(fd)
    os.rename(path + ".tmp", path)
    files += 1
took = time.monotonic() - began
print(f"{written / 1e9:.1f} GB written and synced in {took:.0f} s, {written / took / 1e6:.0f} MB/s")
"""
