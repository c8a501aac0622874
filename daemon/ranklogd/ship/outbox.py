"""The outbox: shards to upload, found by their names; and where they go when they leave it.

    outbox/<segment>.tmp/       being written by the converter: not ours yet
    outbox/<segment>/<key>      a shard; its path below the segment's directory is its object key

A segment's directory is ours from the moment its WAL file is gone: until then the converter may still look whether
the directory is there. One thread uploads and so removes; any thread may `refresh` and read `totals`.

The index keeps, for each segment, how much lies in which folder (a run's prefix), so that a backlog of days costs a
look at the names of new segments only. It is a cache of names: whatever it says, the files decide.
"""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.failpoint import failpoint
from ranklog.stores.base import Upload
from ranklogd.statedir import StateDir


class Totals(NamedTuple):
    """What waits for its upload."""

    segments: int
    shards: int
    size_bytes: int


class Outbox:
    """An index of the outbox of one state directory."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._segments: dict[str, dict[str, tuple[int, int]]] = {}

    def refresh(self) -> None:
        """Read the names of segments again; raises OSError."""
        with self._lock:
            with os.scandir(self._state.outbox) as entries:
                names = {entry.name for entry in entries if entry.is_dir() and not entry.name.endswith(".tmp")}
            for name in self._segments.keys() - names:
                del self._segments[name]
            for name in names:
                if name not in self._segments and not (self._state.wal / name).exists():
                    self._segments[name] = self._measure(name)

    def forget(self) -> None:
        """Drop the index: somebody else took files away. The next refresh measures everything again."""
        with self._lock:
            self._segments.clear()

    def totals(self) -> Totals:
        """Return what waits, as of the last refresh."""
        with self._lock:
            rows = [row for folders in self._segments.values() for row in folders.values()]
            return Totals(len(self._segments), sum(shards for shards, _ in rows), sum(size for _, size in rows))

    def first_segment(self) -> str | None:
        """Return the oldest segment's name, which begins with its first lsn; None if nothing waits."""
        with self._lock:
            return min(self._segments, default=None)

    def folders(self) -> set[str]:
        """Return the key prefixes, without a slash at the end, under which something waits."""
        with self._lock:
            return {folder for folders in self._segments.values() for folder in folders}

    def pending(self, is_held: Callable[[str], bool]) -> Iterator[Upload]:
        """Yield what waits, oldest segment first, except for what lies in a folder that is held."""
        with self._lock:
            chosen = sorted(name for name, folders in self._segments.items() if not all(map(is_held, folders)))
        for name in chosen:
            for path in _files(self._state.outbox / name):
                key = str(path.relative_to(self._state.outbox / name))
                if not is_held(folder_of(key)):
                    yield Upload(path, key)

    def settle(self, left: list[Upload]) -> None:
        """Count again the segments that these have left, and remove those with nothing in them."""
        names = {upload.source.relative_to(self._state.outbox).parts[0] for upload in left}
        with self._lock:
            names |= {name for name, folders in self._segments.items() if not folders}
            for name in names:
                if fs.remove_empty_dirs(self._state.outbox / name):
                    self._segments.pop(name, None)
                else:
                    self._segments[name] = self._measure(name)
        if names:
            fs.sync_dir(self._state.outbox)

    def _measure(self, name: str) -> dict[str, tuple[int, int]]:
        folders: dict[str, tuple[int, int]] = {}
        for path in _files(self._state.outbox / name):
            folder = folder_of(str(path.relative_to(self._state.outbox / name)))
            shards, size_bytes = folders.get(folder, (0, 0))
            folders[folder] = (shards + 1, size_bytes + path.lstat().st_size)
        return folders


def folder_of(key: str) -> str:
    """Return the part of a key before its last slash: the run, for a shard."""
    return key.rpartition("/")[0]


def _files(directory: Path) -> list[Path]:
    return sorted(Path(room) / name for room, _, names in os.walk(directory) for name in names)


def set_aside(source: Path, target: Path, reason: str) -> None:
    """Move a file out of the line, durably, with a `.reason` beside it. The reason first: no file stays unexplained."""
    fs.make_dir(target.parent)
    told = target.with_name(f"{target.name}.reason")
    temporary = told.with_name(f".{told.name}.tmp")
    temporary.write_text(f"{reason}\n", encoding="utf-8", errors="replace")
    fs.publish(temporary, told)
    failpoint("aside.reason.after")
    fs.rename(source, target)
    fs.sync_dir(target.parent)
    fs.sync_dir(source.parent)
