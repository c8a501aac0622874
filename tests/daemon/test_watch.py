"""Waking up when a file appears: an optimisation, so nothing may fail where it does not work."""

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranklogd.watch import Watch


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    (tmp_path / "there").mkdir()
    watch = Watch([tmp_path / "there", tmp_path / "later"])
    yield watch
    watch.close()


def wakes(watch: Watch, timeout_s: float = 5.0) -> bool:
    return bool(select.select([watch.fd], [], [], timeout_s)[0])


def calm(watch: Watch) -> None:
    while wakes(watch, 0.2):
        watch.clear()


def test_a_file_that_is_created_moved_in_or_closed_wakes(watch: Watch, tmp_path: Path) -> None:
    path = tmp_path / "there" / "a"
    path.touch()
    assert wakes(watch)
    calm(watch)
    (tmp_path / "outside").touch()
    (tmp_path / "outside").rename(tmp_path / "there" / "b")
    assert wakes(watch)
    calm(watch)
    fd = os.open(path, os.O_WRONLY)
    calm(watch)
    os.close(fd)
    assert wakes(watch)


def test_writing_into_a_file_does_not_wake(watch: Watch, tmp_path: Path) -> None:
    """Every `log()` of every rank writes into one."""
    fd = os.open(tmp_path / "there" / "a", os.O_WRONLY | os.O_CREAT)
    calm(watch)
    for _ in range(100):
        os.write(fd, b"x")
    assert not wakes(watch, 0.3)
    os.close(fd)


def test_a_directory_that_appears_later_is_watched_from_then_on(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "later").mkdir()
    watch.follow([tmp_path / "there", tmp_path / "later"])
    calm(watch)
    (tmp_path / "later" / "a").touch()
    assert wakes(watch)


def test_many_events_are_one_wake_up(watch: Watch, tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / "there" / str(number)).touch()
    assert wakes(watch)
    calm(watch)
    watch.clear()  # One too many is no error.


def test_a_directory_that_cannot_be_watched_is_left_to_the_rescan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from watchdog.observers.inotify import InotifyEmitter

    def no_more(self: InotifyEmitter) -> None:
        raise OSError(24, "inotify instance limit reached")

    with monkeypatch.context() as patch:
        patch.setattr(InotifyEmitter, "on_thread_start", no_more)
        watch = Watch([tmp_path])
    assert not wakes(watch, 0.05)
    watch.close()
