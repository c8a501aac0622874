"""An ext4 of a test's own, in a file on a loop device: its power can be cut, it can be frozen, it can break. Needs root.

A cut is the filesystem's own shutdown ioctl, which drops everything that is not on disk yet and leaves its journal
unflushed: what a mount finds afterwards is what a machine finds after its power came back. SIGKILL proves nothing
here, for the page cache survives it.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node import wait_for

EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = b"\x02\0\0\0"


def require_root() -> None:
    """Skip where no filesystem can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root: run the tests with sudo")


class LoopDisk:
    """An ext4 in the file `image`, mounted on `point`."""

    def __init__(self, image: Path, point: Path, size_bytes: int) -> None:
        self.point = point
        self._image = image
        point.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        self.mount()

    def mount(self) -> None:
        """Switch it on. Commits of its own are rare, so that only a sync makes anything durable."""
        options = "loop,commit=600,errors=remount-ro"
        subprocess.run(["mount", "-o", options, str(self._image), str(self.point)], check=True)

    def cut(self) -> None:
        """Cut the power: from now on it answers with errors."""
        fd = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NOLOGFLUSH)
        finally:
            os.close(fd)

    def power_on(self) -> None:
        """Mount it again; whoever had files open must be gone."""
        wait_for(self._let_go, "the disk is let go of")
        wait_for(self._comes_back, "it answers: a mount namespace that somebody made meanwhile holds what was cut")

    def _let_go(self) -> bool:
        return subprocess.run(["umount", str(self.point)], capture_output=True, check=False).returncode == 0

    def _comes_back(self) -> bool:
        self.mount()
        try:
            (self.point / ".alive").touch()
            (self.point / ".alive").unlink()
        except OSError:
            self._let_go()
            return False
        return True

    def break_down(self) -> None:
        """Meet an error inside: ext4 then makes itself read-only, with files open for writing or not."""
        found = subprocess.run(["findmnt", "-n", "-o", "SOURCE", str(self.point)], capture_output=True, check=True)
        device = Path(found.stdout.decode().strip()).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let every write and sync wait until the end of the block."""
        subprocess.run(["fsfreeze", "--freeze", str(self.point)], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", str(self.point)], check=True)

    def close(self) -> None:
        """Leave nothing mounted."""
        subprocess.run(["umount", "-l", str(self.point)], check=False)


@contextmanager
def loop_disk(path: Path, name: str, size_bytes: int = 64 << 20) -> Iterator[LoopDisk]:
    """Give an ext4 on `path/name`."""
    require_root()
    for command in ("mkfs.ext4", "umount"):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}: apt-get install e2fsprogs mount")
    disk = LoopDisk(path / f"{name}.img", path / name, size_bytes)
    try:
        yield disk
    finally:
        disk.close()


@contextmanager
def small_tmpfs(point: Path, size_bytes: int) -> Iterator[Path]:
    """Give a tmpfs of this size on `point`."""
    require_root()
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "none", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def fill(path: Path) -> None:
    """Take every byte that is left on its filesystem with the file `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    piece, offset = 64 << 20, 0
    while piece >= 4096:
        try:
            os.posix_fallocate(fd, offset, piece)
            offset += piece
        except OSError:
            piece //= 2
    os.close(fd)
