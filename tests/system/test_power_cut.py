"""Power cuts of a real kernel: what was acknowledged as durable survives on ext4; without fdatasync it would not.

The state and the spool lie on an ext4 in a loop device. A cut is that filesystem's own shutdown ioctl, which drops
everything not on disk yet, with the journal unflushed; the node's memory (tmpfs) is gone as well. SIGKILL alone proves
nothing here: the page cache survives it.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node import Node, wait_for

EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = b"\x02\0\0\0"
CUTS = 5

TRAINER = """
import os, sys, time
import ranklog
proof = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
ranklog.init(project="cut", id="job", name="x")
count = 0
while True:
    for _ in range(20):
        ranklog.log({"n": count})
        count += 1
    if ranklog.flush(5):
        os.write(proof, b"%d\\n" % count)
"""

NO_SYNC = """
import os
os.fdatasync = os.fsync = lambda fd: None
"""


@pytest.fixture
def disk(tmp_path):
    """An ext4 in a file, mounted; yields (mount point, cut)."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a loop device: run as root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4: apt-get install e2fsprogs")
    image, point = tmp_path / "disk.img", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)

    def mount() -> None:
        subprocess.run(["mount", "-o", "loop,commit=60", str(image), str(point)], check=True)

    def cut() -> None:
        fd = os.open(point, os.O_RDONLY)
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NOLOGFLUSH)
        os.close(fd)

    def power_on() -> None:
        umounted = lambda: subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0  # noqa: E731
        wait_for(umounted, "the disk is let go of")
        mount()

    mount()
    yield point, cut, power_on
    subprocess.run(["umount", "-l", str(point)], check=False)


def acknowledged_and_lost(node: Node, disk: tuple[Path, object, object], **env: str) -> tuple[int, int]:
    """Log, flush, cut the power, start again; return how many records were acknowledged, and how many of them are lost."""
    point, cut, power_on = disk
    proof = node.path / f"proof-{time.monotonic_ns()}"
    shutil.rmtree(node.data, ignore_errors=True)
    daemon = node.start_daemon("--disk-free-min", "1MiB", **env)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(proof)], env=node.env, stderr=subprocess.DEVNULL)
    wait_for(lambda: proof.exists() and len(proof.read_bytes()) > 40, "some flushes returned")
    acknowledged = int(proof.read_text().split()[-1])
    cut()
    for process in (trainer, daemon):
        process.kill()
        process.wait()
    for file in node.journal.iterdir():
        file.unlink()  # tmpfs does not survive a power cut.
    power_on()
    again = node.start_daemon("--disk-free-min", "1MiB")
    node.upload()
    again.terminate()
    again.wait(30)
    found = {int(row["value"]) for row in node.raw_rows("key = 'n'")} if node.data.exists() else set()
    return acknowledged, len(set(range(acknowledged)) - found)


@pytest.fixture
def node(tmp_path, disk):
    with Node(tmp_path) as node:
        node.state, node.spool = disk[0] / "state", disk[0] / "spool"
        node.env |= {"RANKLOG_STATE_DIR": str(node.state), "RANKLOG_SPOOL_DIR": str(node.spool)}
        yield node


def test_a_power_cut_takes_nothing_that_was_acknowledged(node, disk):
    for _ in range(CUTS):
        acknowledged, lost = acknowledged_and_lost(node, disk)
        assert acknowledged > 100
        assert lost == 0


def test_without_fdatasync_a_power_cut_takes_acknowledged_records(node, disk):
    """The negative control: this tier can see a missing sync."""
    blind = node.path / "blind"
    blind.mkdir()
    (blind / "sitecustomize.py").write_text(NO_SYNC)
    path = f"{blind}{os.pathsep}{node.env['PYTHONPATH']}"
    losses = [acknowledged_and_lost(node, disk, PYTHONPATH=path)[1] for _ in range(CUTS)]
    assert any(losses), losses
