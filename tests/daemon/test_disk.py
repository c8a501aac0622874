"""Room on the disk: when records are refused, and the reserve that keeps deletes working."""

import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklogd.disk import LOOK_ENTRIES, Disk, Shares, file_sizes, full_reason
from ranklogd.statedir import StateDir
from segments import make_state

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root: run the tests with sudo")


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


def disk_of(state: StateDir, quota: int = 1 << 40, free_min: int = 0, reserve: int = 0) -> Disk:
    return Disk(state, quota_bytes=quota, free_min_bytes=free_min, reserve_bytes=reserve)


@given(used=st.integers(0, 100), free=st.integers(0, 100), quota=st.integers(1, 100), least=st.integers(0, 100))
def test_records_are_refused_at_the_quota_or_below_the_free_minimum(
    used: int, free: int, quota: int, least: int
) -> None:
    reason = full_reason(used_bytes=used, free_bytes=free, quota_bytes=quota, free_min_bytes=least)
    assert bool(reason) == (used >= quota or free < least)
    if reason:
        assert ("disk_quota_bytes" in reason) == (used >= quota), "the option that says so is named"
        assert ("disk_free_min_bytes" in reason) == (used < quota)


def test_a_look_counts_wal_and_outbox_and_nothing_else(state: StateDir) -> None:
    (state.wal / "a").write_bytes(bytes(100))
    (state.outbox / "s" / "v1" / "p").mkdir(parents=True)
    (state.outbox / "s" / "v1" / "p" / "k.parquet").write_bytes(bytes(1000))
    (state.cache / "c").write_bytes(bytes(10_000))
    (state.wal / "link").symlink_to("/dev/zero")
    disk = disk_of(state, quota=1100)
    disk.look()
    assert disk.used_bytes == 1100 + len("/dev/zero")
    assert "disk_quota_bytes" in disk.reason
    (state.wal / "a").unlink()
    (state.wal / "link").unlink()
    disk.look()
    assert (disk.used_bytes, disk.reason) == (1000, "")


def test_a_huge_backlog_is_counted_over_several_looks_each_of_them_short(state: StateDir) -> None:
    for number in range(3 * LOOK_ENTRIES // 2):
        directory = state.outbox / f"{number:06}"
        directory.mkdir()
        (directory / "k").write_bytes(b"1234567890")
    disk = disk_of(state)
    longest, looks = 0.0, 0
    while not disk.used_bytes:
        began = time.perf_counter()
        disk.look()
        longest, looks = max(longest, time.perf_counter() - began), looks + 1
    assert disk.used_bytes == 15 * LOOK_ENTRIES
    assert looks == 2 * 3 // 2 + 1
    assert longest < 0.2


def test_what_vanishes_while_it_is_counted_counts_nothing(state: StateDir) -> None:
    for name in "abc":
        (state.wal / name).write_bytes(bytes(10))
    sizes = file_sizes(state.wal, state.root / "never was")
    next(sizes)
    for name in "abc":
        (state.wal / name).unlink()
    assert sum(sizes) <= 20


def test_a_reserve_is_kept_while_there_is_room_and_given_back_when_a_write_met_the_end(state: StateDir) -> None:
    disk = disk_of(state, reserve=1 << 20)
    disk.look()
    assert state.reserve.stat().st_size == 1 << 20
    assert state.reserve.stat().st_blocks * 512 >= 1 << 20, "really reserved"
    disk.mark_full("no space")
    assert (disk.reason, state.reserve.exists()) == ("no space", False)
    disk.look()
    assert (disk.reason, state.reserve.exists()) == ("", True)


def test_without_a_size_there_is_no_reserve(state: StateDir) -> None:
    disk_of(state).look()
    assert not state.reserve.exists()


@NEEDS_ROOT
def test_on_a_small_disk_the_reserve_goes_when_room_runs_out_and_does_not_eat_what_it_gave_back(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
    try:
        state = make_state(mount / "state")
        disk = disk_of(state, free_min=64 << 10, reserve=256 << 10)
        disk.look()
        assert (disk.reason, state.reserve.exists()) == ("", True)
        ballast = mount / "ballast"
        ballast.write_bytes(bytes(720 << 10))
        disk.look()
        assert "disk_free_min_bytes" in disk.reason
        assert not state.reserve.exists()
        disk.look()
        assert disk.reason, "the room it left is not for records"
        assert not state.reserve.exists()
        ballast.unlink()
        disk.look()
        assert state.reserve.exists()
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_shares_count_what_a_user_has_until_it_is_uploaded() -> None:
    shares = Shares(100)
    shares.add(Counter({1: 60, 2: 10}))
    shares.sealed(10)
    shares.add(Counter({1: 50}))
    assert (shares.reason(1)[:6], shares.reason(2), shares.reason(3)) == ("user 1", "", "")
    shares.uploaded(9)
    assert shares.reason(1)
    shares.uploaded(10)
    assert shares.reason(1) == ""
    shares.sealed(20)
    shares.uploaded(30)
    shares.add(Counter({1: 99}))
    assert shares.reason(1) == ""


def test_without_a_limit_nobody_is_refused() -> None:
    shares = Shares(0)
    shares.add(Counter({1: 1 << 50}))
    assert shares.reason(1) == ""
