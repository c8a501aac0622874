"""The filesystem that forgets is right itself: literal cases of what a power cut takes and leaves."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from model.simfs import SECTOR, SYNCS, Crash, SimFS, failing, full
from ranklog import fs


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[SimFS]:
    root = tmp_path / "disk"
    root.mkdir()
    with SimFS(root) as made:
        yield made


def write(path: Path, data: bytes, offset: int = 0, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fs.write_all(fd, data, offset)
        if sync:
            fs.sync_data(fd)
    finally:
        os.close(fd)


def durable(path: Path, data: bytes) -> None:
    write(path, data, sync=True)
    fs.sync_dir(path.parent)


Tree = tuple[tuple[str, bytes], ...]


def outcomes(sim: SimFS, prepare: Callable[[Path], None], tries: int = 80) -> set[Tree]:
    """Return every tree that a power cut after `prepare` left in so many tries."""
    found = set()
    for seed in range(tries):
        room = sim.root / f"{seed}"
        fs.make_dir(room)
        prepare(room)
        sim.power_cut(Random(seed))
        files = [path for path in room.rglob("*") if path.is_file()]
        found.add(tuple(sorted((str(path.relative_to(room)), path.read_bytes()) for path in files)))
        fs.remove_tree(room)
        fs.sync_dir(sim.root)
    return found


def test_what_was_synced_with_its_name_stays(sim: SimFS):
    assert outcomes(sim, lambda room: durable(room / "a", b"bytes")) == {(("a", b"bytes"),)}


def test_bytes_that_were_not_synced_may_be_gone_cut_or_there(sim: SimFS):
    def append(room: Path) -> None:
        durable(room / "a", b"old")
        write(room / "a", b"new", 3)

    found = outcomes(sim, append)
    assert {(("a", b"old"),), (("a", b"oldnew"),), (("a", b"oldn"),)} <= found
    assert all(data.startswith(b"old") for tree in found for _, data in tree)


def test_an_overwritten_page_is_torn_at_sectors(sim: SimFS):
    size = 4 * SECTOR

    def overwrite(room: Path) -> None:
        durable(room / "a", b"o" * size)
        write(room / "a", b"n" * size)

    found = {data for tree in outcomes(sim, overwrite, 200) for _, data in tree}
    assert {b"o" * size, b"n" * size} <= found
    mixes = [data for data in found if len(set(data)) == 2]
    assert mixes
    assert all(len(set(data[at : at + SECTOR])) == 1 for data in mixes for at in range(0, size, SECTOR))


def test_a_name_without_a_sync_of_its_directory_may_be_gone_and_bytes_without_a_sync_too(sim: SimFS):
    assert outcomes(sim, lambda room: write(room / "a", b"x", sync=True)) == {(), (("a", b"x"),)}

    def named_only(room: Path) -> None:
        write(room / "a", b"x")
        fs.sync_dir(room)

    assert outcomes(sim, named_only) == {(("a", b""),), (("a", b"x"),), (("a", b"\0"),)}, (
        "lost, there, or its size only"
    )


def test_a_rename_without_a_sync_of_its_directory_happened_or_not(sim: SimFS):
    def rename(room: Path) -> None:
        durable(room / "a.tmp", b"x")
        fs.rename(room / "a.tmp", room / "a")

    assert outcomes(sim, rename) == {(("a.tmp", b"x"),), (("a", b"x"),)}


def test_a_published_file_stays(sim: SimFS):
    def publish(room: Path) -> None:
        (room / "a.tmp").write_bytes(b"x")
        fs.publish(room / "a.tmp", room / "a")

    assert outcomes(sim, publish) == {(("a", b"x"),)}


def test_an_unlink_without_a_sync_of_its_directory_comes_back(sim: SimFS):
    def unlink(room: Path) -> None:
        durable(room / "a", b"x")
        fs.unlink(room / "a")

    assert outcomes(sim, unlink) == {(), (("a", b"x"),)}


def test_between_directories_the_one_that_is_synced_takes_its_half_along(sim: SimFS):
    def move(room: Path, first: str) -> None:
        fs.make_dir(room / "from")
        fs.make_dir(room / "to")
        durable(room / "from/a", b"x")
        fs.rename(room / "from/a", room / "to/a")
        fs.sync_dir(room / first)

    assert outcomes(sim, lambda room: move(room, "to")) == {
        (("to/a", b"x"),),
        (("from/a", b"x"), ("to/a", b"x")),
    }
    assert outcomes(sim, lambda room: move(room, "from")) == {(("to/a", b"x"),), ()}, "a lost file: the wrong order"


def test_operations_on_different_names_are_independent(sim: SimFS):
    def two(room: Path) -> None:
        write(room / "a", b"1", sync=True)
        write(room / "b", b"2", sync=True)

    assert outcomes(sim, two) == {(), (("a", b"1"),), (("b", b"2"),), (("a", b"1"), ("b", b"2"))}


def test_a_renamed_file_that_is_renamed_again_is_never_at_both_ends(sim: SimFS):
    def chain(room: Path) -> None:
        durable(room / "a", b"x")
        fs.rename(room / "a", room / "b")
        fs.rename(room / "b", room / "c")

    assert outcomes(sim, chain) == {(("a", b"x"),), (("b", b"x"),), (("c", b"x"),)}


def test_after_an_fsync_error_the_next_one_succeeds_and_lies(sim: SimFS):
    def retry(room: Path) -> None:
        durable(room / "a", b"old")
        fd = os.open(room / "a", os.O_RDWR)
        fs.write_all(fd, b"new", 0)
        sim.faults = [failing(SYNCS, room)]
        with sim.acting("daemon"):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                fs.sync_data(fd)
            fs.sync_data(fd)
        os.close(fd)
        assert (room / "a").read_bytes() == b"new", "the live view shows it"

    assert outcomes(sim, retry) == {(("a", b"old"),)}


def test_after_an_fsync_error_bytes_that_are_written_again_do_arrive(sim: SimFS):
    def rewrite(room: Path) -> None:
        durable(room / "a", b"old" * SECTOR)
        fd = os.open(room / "a", os.O_RDWR)
        fs.write_all(fd, b"new", 0)
        sim.faults = [failing(SYNCS, room)]
        with sim.acting("daemon"), suppress(OSError):
            fs.sync_data(fd)
        fs.write_all(fd, b"NEW", 0)
        fs.sync_data(fd)
        os.close(fd)

    assert outcomes(sim, rewrite) == {(("a", b"NEW" + (b"old" * SECTOR)[3:]),)}


def test_a_full_disk_takes_nothing_until_it_has_room_and_lets_go_of_files(sim: SimFS):
    durable(sim.root / "a", b"x")
    fault = full(sim.root)
    sim.faults = [fault]
    with sim.acting("daemon"):
        for attempt in (lambda: write(sim.root / "b", b"x"), lambda: (sim.root / "c").write_text("x")):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                attempt()
        fs.unlink(sim.root / "a")
    write(sim.root / "b", b"x")  # Nobody's doing.
    assert fault.met == 2
    assert [path.name for path in sim.root.iterdir()] == ["b"]


def test_a_killed_actor_does_nothing_more_not_even_tidy_up(sim: SimFS):
    with pytest.raises(Crash), sim.acting("daemon", fuse=1):
        fd = os.open(sim.root / "a", os.O_RDWR | os.O_CREAT)
        assert fs.try_lock(fd)
        try:
            fs.write_all(fd, b"x", 0)
        finally:
            fs.unlink(sim.root / "a")
    assert (sim.root / "a").read_bytes() == b""
    other = os.open(sim.root / "a", os.O_RDWR)
    assert not fs.try_lock(other)
    sim.bury("daemon")
    assert fs.try_lock(other), "the kernel closed what it held"
    os.close(other)


def test_what_is_durable_can_be_told_before_the_power_goes(sim: SimFS):
    durable(sim.root / "a", b"x")
    write(sim.root / "a", b"y")
    write(sim.root / "b", b"z", sync=True)
    assert sim.durable(sim.root) == {"a": b"x"}
    assert sim.durable(sim.root, live_names=True) == {"a": b"x", "b": b"z"}
