"""Adoption: the records of writers that are dead, taken from the journal and spool files they left behind.

    found ─▶ owner dead? ─▶ locked, rechecked ─▶ replayed into the WAL, piece by piece ─▶ durable ─▶ unlinked

The owner is dead if its flock is free, or if its process is gone although somebody holds the lock: a forked worker
inherits its parent's. Files are replayed in seq order from the first seq that the WAL does not have, so what lies in
both journal and spool, or was acknowledged already, is taken once. A file is unlinked only after the commit that
holds its last record. Hostile files (links, FIFOs, foreign content) are left alone and reported once.

One piece at a time, driven by the server loop: a backlog of gigabytes neither delays an ack nor fills the memory.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.framefile import Contents, parse_name, read_head, read_pieces
from ranklog.identity import boot_id, pid_namespace, process_start
from ranklog.start import Start
from ranklogd.ingest import Ingest
from ranklogd.sequence import Welcome, WriterState


class _Orphan(NamedTuple):
    """One locked file of a dead writer."""

    path: Path
    fd: int
    uid: int
    contents: Contents


class Adopter:
    """Finds and replays the files of dead writers. Owned by the server loop."""

    def __init__(self, ingest: Ingest, directories: list[Path]) -> None:
        self.adopted = 0
        """Writers whose files were taken over."""
        self.refused: dict[str, str] = {}
        """Path -> why it was left alone."""
        self.waiting_offline: set[str] = set()
        """Offline writers that `ranklog sync` would bring in."""
        self.held: set[bytes] = set()
        """Writers that have a file in one of the directories."""
        self._ingest = ingest
        self._directories = directories
        self._queue: list[tuple[str, list[Path]]] = []
        self._current: Iterator[None] | None = None
        self._include_offline = False

    def scan(self, *, include_offline: bool = False) -> None:
        """Look for files again. With `include_offline`, this scan also takes writers in offline mode."""
        self._include_offline = self._include_offline or include_offline
        found: dict[str, list[Path]] = defaultdict(list)
        for directory in self._directories:
            try:
                entries = sorted(os.listdir(directory))
            except OSError:
                continue  # Not there yet, or not ours to read: nothing to adopt.
            for entry in entries:
                name = parse_name(entry)
                if name is not None:
                    found[name.writer].append(directory / entry)
        self.held = {bytes.fromhex(writer) for writer in found}
        self.waiting_offline &= set(found)
        self._queue = sorted(found.items(), key=lambda item: _written_ns(item[1]))

    @property
    def busy(self) -> bool:
        """True while there is something to look at or to replay."""
        return bool(self._queue) or self._current is not None

    def step(self) -> bool:
        """Do one piece of work; False if there is none. Raises OSError only for the WAL."""
        if self._current is None:
            if not self._queue:
                self._include_offline = False
                return False
            self._current = self._adopt(*self._queue.pop(0))
        try:
            next(self._current)
        except StopIteration:
            self._current = None
        return True

    def _adopt(self, writer: str, paths: list[Path]) -> Iterator[None]:
        orphans: list[_Orphan] = []
        try:
            for path in paths:
                if not self._open(path, writer, orphans):
                    return
            if orphans and self._wanted(orphans[0].contents.start):
                yield from self._replay(orphans)
        finally:
            for orphan in orphans:
                os.close(orphan.fd)

    def _wanted(self, start: Start) -> bool:
        if start.mode == "offline" and not self._include_offline:
            self.waiting_offline.add(start.writer)
            return False
        return True

    def _open(self, path: Path, writer: str, orphans: list[_Orphan]) -> bool:
        """Open and lock a file of a dead owner, into `orphans`; False if the owner is alive.

        A file that is refused or gone does not keep its neighbours from being adopted.
        """
        try:
            fd = fs.open_untrusted(path)
        except FileNotFoundError:
            return True
        except OSError as exc:
            self.refused[str(path)] = exc.strerror or str(exc)
            return True
        alive = False
        try:
            info = os.fstat(fd)
            free = fs.try_lock(fd)
            contents = read_head(fd)
            if contents.start.writer != writer:
                raise FormatError(f"the file says writer {contents.start.writer}, its name says {writer}")
            named = os.stat(path, follow_symlinks=False)
            same = (named.st_ino, named.st_dev, named.st_nlink) == (info.st_ino, info.st_dev, 1)
            alive = not free and not owner_gone(contents.start)
            if same and not alive:
                orphans.append(_Orphan(path, fd, info.st_uid, contents))
                return True
        except FileNotFoundError:
            pass
        except (FormatError, OSError) as exc:
            self.refused[str(path)] = str(exc)
        os.close(fd)
        return not alive

    def _replay(self, orphans: list[_Orphan]) -> Iterator[None]:
        first = orphans[0]
        orphans.sort(key=lambda orphan: (orphan.contents.first_seq, str(orphan.path)))
        starts = [o.contents.first_seq for o in orphans if o.contents.first_seq >= 0]
        base = min(starts, default=0)
        base = 0 if base <= 1 else base  # The start frame at the head of the oldest file is record 0.
        known = self._ingest.writers.get(bytes.fromhex(first.contents.start.writer))
        if base == 0 and known is not None and not starts:
            base = known.next_seq  # Empty files of a writer that is known: nothing is missing.
        welcome = self._ingest.writers.hello(first.uid, first.contents.start, first.contents.start_frame, base)
        if welcome is None:
            self.refused[str(first.path)] = "its writer belongs to another user"
            return
        state = welcome.state
        self._ingest.lose(welcome, _now_ns())
        for orphan in orphans:
            if not (yield from self._replay_file(state, orphan)):
                return  # The disk was full and the commit was undone: the files stay, a later scan tries again.
        while state.durable < state.next_seq - 1:
            yield  # Unlinked only after the commit that holds the last record.
        failpoint("adopt.sync.after")
        for orphan in orphans:
            fs.unlink(orphan.path)
        failpoint("adopt.unlink.after")
        for directory in {orphan.path.parent for orphan in orphans}:
            fs.sync_dir(directory)
        if not state.ended_s:
            state.ended_s = _now_ns() // 1_000_000_000
        self.adopted += 1

    def _replay_file(self, state: WriterState, orphan: _Orphan) -> Generator[None, None, bool]:
        """Append what this file holds beyond the writer's last seq; False if a commit on the way had no room."""
        contents = orphan.contents
        whole = state.next_seq == 0 and contents.first_seq in (-1, 0, 1)
        offset = 0 if whole else len(contents.start_frame)
        for piece in read_pieces(orphan.fd, offset, state.next_seq):
            if piece.next_seq <= state.next_seq:
                continue
            if piece.first_seq > state.next_seq:
                self._ingest.lose(Welcome(state, piece.first_seq, (state.next_seq, piece.first_seq - 1)), _now_ns())
            count = piece.next_seq - piece.first_seq
            self._ingest.append(state, piece.first_seq, count, piece.frames, _now_ns())
            failpoint("adopt.copy.after")
            before = state.next_seq
            yield
            if state.next_seq < before:
                return False
        return True


def owner_gone(start: Start) -> bool:
    """Return whether the process that a start frame names is surely dead, whoever holds its lock."""
    if start.boot and start.boot != boot_id():
        return True
    if not start.pid or start.pid_ns != pid_namespace():
        return False
    now = process_start(start.pid)
    return now is None or start.pid_start not in (0, now)


def _written_ns(paths: list[Path]) -> int:
    """Return when the newest of these files was written: an earlier attempt of a rank is adopted before a later one."""
    newest = 0
    for path in paths:
        with contextlib.suppress(OSError):
            newest = max(newest, os.lstat(path).st_mtime_ns)
    return newest


def _now_ns() -> int:
    return time.time_ns()
