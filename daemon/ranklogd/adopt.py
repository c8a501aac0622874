"""Adoption: the records of writers that are dead, taken from the journal and spool files they left behind.

    found ─▶ owner dead? ─▶ locked, rechecked ─▶ replayed into the WAL, piece by piece ─▶ durable ─▶ unlinked

Files of one writer are replayed in seq order from the first seq that the WAL does not have, so what lies in both
journal and spool, or was acknowledged already, is taken once. What is missing between two files becomes a gap, but
not while a file or a directory cannot be read: it may lie there, and later files wait for it. A file goes only after
the commit that holds its last record; without room, files stay and a later scan goes on. A spool file whose frames end
before the file does may hold more than could be read: it goes to quarantine/. Hostile files (links, FIFOs, foreign
content; see `orphan`) are left alone and reported once; their neighbours are adopted.

One piece at a time, driven by the server loop: a backlog of gigabytes neither delays an ack nor fills the memory.
"""

import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from ranklog import fs
from ranklog.failpoint import failpoint
from ranklog.framefile import parse_name
from ranklog.start import Start
from ranklogd.ingest import Ingest
from ranklogd.orphan import Orphan, Refused, Unreadable, behind, keep_evidence, open_orphan, pieces, remove_unborn
from ranklogd.sequence import GAP_MAX, WriterState

log = logging.getLogger("ranklogd")

REFUSED_MAX = 1000  # Anybody can litter a directory; what is told about it has an end.


class Adopter:
    """Finds and replays the files of dead writers. Owned by the server loop."""

    def __init__(
        self, ingest: Ingest, directories: Callable[[], list[Path]], quarantine: Path, *, any_owner: bool = False
    ) -> None:
        """`any_owner`: in a copied tree all files belong to whoever copied it."""
        self.directories: list[Path] = []
        """Where the last scan looked."""
        self.adopted = 0
        """Writers whose files were taken over."""
        self.quarantined = 0
        """Spool files that could not be read to their end."""
        self.refused: dict[str, str] = {}
        """Path -> why it was left alone."""
        self.waiting_offline: set[str] = set()
        """Offline writers that `ranklog sync` would bring in."""
        self.stuck: set[str] = set()
        """Writers whose files stay for now: there is no room."""
        self.held: set[bytes] = set()
        """Writers that have a file in one of the directories."""
        self._ingest = ingest
        self._find = directories
        self._quarantine = quarantine
        self._any_owner = any_owner
        self._queue: list[tuple[str, list[Path]]] = []
        self._current: Iterator[None] | None = None
        self._include_offline = False
        self._complete = True
        """Every directory could be listed."""
        self._spent: dict[str, tuple[int, int]] = {}
        """Path -> inode and end of the frames of files that are safe in the WAL and could not be removed."""

    def scan(self, *, include_offline: bool = False) -> None:
        """Look for files again. With `include_offline`, this scan also takes writers in offline mode."""
        self._include_offline = self._include_offline or include_offline
        self.directories = self._find()
        found: dict[str, list[Path]] = defaultdict(list)
        self._complete = True
        for directory in self.directories:
            try:
                entries = sorted(os.listdir(directory))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # Not there yet, or not ours to read: nothing to adopt.
            except OSError:
                self._complete = False
                continue
            for entry in entries:
                name = parse_name(entry)
                if name is not None:
                    found[name.writer].append(directory / entry)
                elif entry.startswith(".") and parse_name(entry[1:]) is not None:
                    with contextlib.suppress(OSError):
                        remove_unborn(directory / entry, time.time())
        held = {bytes.fromhex(writer) for writer in found}
        self.held = held if self._complete else held | self.held
        self.waiting_offline &= set(found)
        self.stuck &= set(found)
        paths = {str(path) for group in found.values() for path in group}
        self.refused = {path: why for path, why in self.refused.items() if path in paths}
        self._spent = {path: known for path, known in self._spent.items() if path in paths}
        self._queue = sorted(found.items(), key=lambda item: _written_ns(item[1]))

    @property
    def busy(self) -> bool:
        """True while there is something to look at or to replay."""
        return bool(self._queue) or self._current is not None

    def step(self) -> bool:
        """Do one piece of work; False if there is none."""
        if self._current is None:
            if not self._queue:
                self._include_offline = False
                return False
            self._current = self._adopt(*self._queue.pop(0))
        current, self._current = self._current, None
        with contextlib.suppress(StopIteration):
            next(current)
            self._current = current
        return True

    def _adopt(self, writer: str, paths: list[Path]) -> Iterator[None]:
        known = self._ingest.writers.get(bytes.fromhex(writer))
        uid = None if known is None else known.uid
        orphans: list[Orphan] = []
        whole = self._complete
        try:
            for path in paths:
                try:
                    orphan = open_orphan(path, writer)
                except Refused as exc:
                    self._refuse(path, str(exc))
                    whole = whole and not isinstance(exc, Unreadable)
                    continue
                if orphan is None:
                    continue
                uid = orphan.uid if uid is None else uid
                if self._any_owner:
                    orphan = orphan._replace(uid=uid)
                orphans.append(orphan)
                if orphan.uid == uid and orphan.alive:
                    return
            yield from self._replay([orphan for orphan in orphans if self._is_due(orphan, uid)], whole=whole)
        finally:
            for orphan in orphans:
                os.close(orphan.fd)

    def _is_due(self, orphan: Orphan, uid: int | None) -> bool:
        if orphan.uid != uid:
            self._refuse(orphan.path, f"it belongs to user {orphan.uid}, its writer to user {uid}")
            return False
        inode, end = self._spent.get(str(orphan.path), (0, 0))
        if inode != os.fstat(orphan.fd).st_ino:
            return True
        self._let_go([(orphan, end)])  # Perhaps it can be removed by now.
        return False

    def _wanted(self, start: Start) -> bool:
        if start.mode == "offline" and not self._include_offline:
            self.waiting_offline.add(start.writer)
            return False
        self.waiting_offline.discard(start.writer)
        return True

    def _replay(self, orphans: list[Orphan], *, whole: bool) -> Iterator[None]:
        """Replay one writer's files; unless these are the `whole` of them, only up to the first gap."""
        if not orphans or not self._wanted(orphans[0].start):
            return
        state = self._greet(orphans, whole=whole)
        if state is None:
            return
        self.stuck.add(orphans[0].start.writer)  # Until it is done.
        ends: list[tuple[Orphan, int]] = []
        finished = state.finished
        for orphan in sorted(orphans, key=lambda orphan: (orphan.first_seq, str(orphan.path))):
            try:
                read = yield from self._replay_file(state, orphan, whole=whole)
            except Refused as exc:
                self._refuse(orphan.path, str(exc))
                whole = whole and not isinstance(exc, Unreadable)
                continue
            if read is None:
                return  # There was no room, or what was appended had to be taken back, or what comes first is missing.
            ends.append((orphan, read[0]))
            finished = finished or read[1]
        goal = state.next_seq
        while state.durable < goal - 1:
            if state.next_seq < goal:
                return
            yield
        failpoint("adopt.sync.after")
        self._let_go(ends)
        failpoint("adopt.unlink.after")
        state.finished = finished
        state.ended_s = state.ended_s or int(time.time())
        self.stuck.discard(orphans[0].start.writer)
        self.adopted += 1

    def _greet(self, orphans: list[Orphan], *, whole: bool) -> WriterState | None:
        """Make the writer known, as its HELLO would have; None if it cannot be taken now, or at all."""
        start, uid = orphans[0].start, orphans[0].uid
        writers = self._ingest.writers
        known = writers.get(bytes.fromhex(start.writer))
        if self._ingest.full_reason(uid) or (known is None and not self._ingest.has_room()):
            self.stuck.add(start.writer)
            return None
        begins = [orphan.first_seq for orphan in orphans if orphan.first_seq >= 0]
        base = min(begins, default=0 if known is None else known.next_seq)
        if not whole and base > max(1, 0 if known is None else known.next_seq):
            self.stuck.add(start.writer)
            return None
        if known is not None and base - known.next_seq > GAP_MAX:
            self._refuse(orphans[0].path, f"it begins with record {base}, {known.next_seq} is due")
            return None
        # The start frame at the head of the oldest file is record 0.
        welcome = writers.hello(uid, start, orphans[0].start_frame, base if base > 1 else 0)
        assert welcome is not None, "the uid was compared before"
        self._ingest.lose(welcome.state, time.time_ns())
        if welcome.state.next_seq == 0:
            self._ingest.append(welcome.state, 0, 1, orphans[0].start_frame, time.time_ns())
        return welcome.state

    def _replay_file(
        self, state: WriterState, orphan: Orphan, *, whole: bool
    ) -> Generator[None, None, tuple[int, bool] | None]:
        """Append what this file holds beyond the writer's last seq. Raises Refused.

        Returns where its sound frames end and whether the end record is among them; None if it has to wait.
        """
        end, ended = len(orphan.start_frame), False
        for piece in pieces(orphan, state.next_seq):
            end, ended = piece.end if piece.damaged_at < 0 else piece.damaged_at, piece.ended
            if piece.next_seq > state.next_seq:
                if self._ingest.full_reason(state.uid) or (piece.first_seq > state.next_seq and not whole):
                    return None
                if piece.first_seq - state.next_seq > GAP_MAX:
                    raise Refused(f"record {piece.first_seq} where {state.next_seq} is due")
                now_ns = time.time_ns()
                if piece.first_seq > state.next_seq:
                    self._ingest.append_gap(state, piece.first_seq - 1, now_ns)
                if piece.first_seq < state.next_seq:
                    piece = behind(piece, state.next_seq)  # noqa: PLW2901
                count = piece.next_seq - piece.first_seq
                self._ingest.append(state, piece.first_seq, count, piece.frames, now_ns, ending=piece.ended)
                failpoint("adopt.copy.after")
            before = state.next_seq
            yield
            if state.next_seq < before:
                return None
        return end, ended

    def _let_go(self, ends: list[tuple[Orphan, int]]) -> None:
        """Remove files of which every record is durable, or keep them as evidence."""
        damaged = [orphan for orphan, end in ends if orphan.is_spool and end < orphan.size]
        for orphan, end in sorted(ends, key=lambda item: item[0] not in damaged):
            try:
                if orphan in damaged:
                    keep_evidence(orphan, end, self._quarantine)
                    self.quarantined += 1
                    log.warning("spool_quarantined name=%s read_bytes=%d of=%d", orphan.path.name, end, orphan.size)
                else:
                    fs.unlink(orphan.path)
                failpoint("adopt.unlink.mid")
            except OSError as exc:
                self._refuse(orphan.path, f"its records are safe, but it cannot be removed: {exc.strerror}")
                if exc.errno not in fs.NO_SPACE:
                    self._spent[str(orphan.path)] = (os.fstat(orphan.fd).st_ino, end)
        for directory in {orphan.path.parent for orphan, _ in ends}:
            with contextlib.suppress(OSError):  # A name that comes back is adopted again, for nothing.
                fs.sync_dir(directory)

    def _refuse(self, path: Path, why: str) -> None:
        if str(path) not in self.refused and len(self.refused) < REFUSED_MAX:
            self.refused[str(path)] = why
            log.warning("adoption_refused path=%s reason=%r", path, why)


def _written_ns(paths: list[Path]) -> int:
    """Return when the newest of these files was written: an earlier attempt of a rank is adopted before a later one."""
    newest = 0
    for path in paths:
        with contextlib.suppress(OSError):
            newest = max(newest, os.lstat(path).st_mtime_ns)
    return newest
