"""One daemon per directory: the lock falls with the process that holds it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranklogd.lock import Busy, take_lock

HOLD = (
    "import sys; sys.path[:0] = sys.argv[2:]\nfrom pathlib import Path\nfrom ranklogd.lock import take_lock\n"
    "take_lock(Path(sys.argv[1]), Path('/state'), '--state-dir', wait_s=0, stopped=lambda _: False)\n"
    "print('held', flush=True)\nsys.stdin.read()"
)


def never(_: float) -> bool:
    return False


def holder(path: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.stdout.close()
    return process


def test_the_lock_says_who_holds_it_and_what_to_do(tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    with pytest.raises(Busy, match=rf"pid {process.pid}.*--state-dir"):
        take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    process.kill()
    process.wait()
    process.stdin.close()


def test_a_killed_holder_leaves_no_lock_behind(tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    process.kill()
    process.wait()
    process.stdin.close()
    fd = take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not os.get_inheritable(fd), "a child must not hold it on"
    os.close(fd)


def test_it_waits_for_a_holder_that_goes(tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    waits = []

    def stopped(wait_s: float) -> bool:
        waits.append(wait_s)
        if len(waits) == 2:
            process.kill()
            process.wait()
        return False

    os.close(take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=30, stopped=stopped))
    assert len(waits) == 2
    process.stdin.close()


def test_a_wait_that_is_called_off_ends_at_once(tmp_path: Path) -> None:
    fd = take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    began = time.monotonic()
    with pytest.raises(Busy):
        take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=60, stopped=lambda _: True)
    assert time.monotonic() - began < 5
    os.close(fd)


@pytest.mark.parametrize("text", ["", "half {", "[]", '{"pid"', '"x"'])
def test_whatever_stands_in_the_file_the_refusal_has_words(tmp_path: Path, text: str) -> None:
    fd = take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    (tmp_path / "lock").write_text(text)
    with pytest.raises(Busy, match="pid unknown"):
        take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    os.close(fd)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        take_lock(tmp_path / "lock", tmp_path, "--state-dir", wait_s=0, stopped=never)
    assert not (tmp_path / "elsewhere").exists()
