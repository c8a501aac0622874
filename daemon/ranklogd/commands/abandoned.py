"""A directory that a daemon and its clients left behind, perhaps copied from another machine: what is in it.

    DIR, or a directory in it, has wal/   a state directory: its segments and shards go up under their own names
    *.journal, *.spool anywhere in DIR    records of dead writers: adopted into that state directory, which knows
                                          what it has of them; where there is none, into a new one, DIR/ranklog-sync

Records leave DIR only once the store has been asked for them: what was adopted is in the WAL until then, also in DIR.
A directory that somebody still uses is refused; so is one that cannot be written to.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ranklog import fs
from ranklog.errors import UsageError
from ranklog.framefile import parse_name
from ranklogd.orphan import Refused, open_orphan
from ranklogd.statedir import StateDir
from ranklogd.wal import segment

OWN_STATE = "ranklog-sync"
DEPTH_MAX = 3
_NAMED_MAX = 5


class Abandoned(NamedTuple):
    """What a directory holds."""

    root: Path
    state: StateDir
    """May not exist yet."""
    journals: tuple[Path, ...]
    """Directories with journal or spool files."""


def look_into(root: Path) -> Abandoned:
    """Return what is in a directory; raises UsageError where nothing of ours is, or too much."""
    if not root.is_dir():
        raise UsageError(f"{root} is no directory. Name a state, journal or spool directory, or one that holds them")
    states: list[Path] = []
    journals: list[Path] = []
    for directory, names in _walk(root):
        if "wal" in names and (directory / "wal").is_dir():
            states.append(directory)
        if any(parse_name(name) is not None for name in names):
            journals.append(directory)
    if len(states) > 1:
        named = ", ".join(map(str, states[:_NAMED_MAX]))
        raise UsageError(f"{root} holds {len(states)} state directories: {named}. Sync each of them by itself")
    if not states and not journals:
        raise UsageError(f"{root} holds nothing of ranklog: no wal/, no *.journal and no *.spool file")
    return Abandoned(root, StateDir(states[0] if states else root / OWN_STATE), tuple(journals))


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield (directory, all names in it) down to a depth, the rooms of a state directory left out."""
    for place, rooms, files in os.walk(root):
        directory = Path(place)
        names = [*rooms, *files]
        yield directory, names
        depth = len(directory.relative_to(root).parts)
        inner = {room.name for room in StateDir(directory).rooms} if "wal" in rooms else set()
        rooms[:] = [] if depth >= DEPTH_MAX else sorted(set(rooms) - inner)


def require_free(found: Abandoned) -> None:
    """Raise UsageError where somebody still uses the directory, or where this user cannot change it."""
    for directory in (found.root, found.state.root, *found.journals):
        if directory.exists() and not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(
                f"{directory} is read-only for you, and what is uploaded is removed from it. "
                f"Sync a copy of it: cp -a {found.root} /var/tmp/copy && ranklog sync /var/tmp/copy"
            )
    if found.state.root.exists():
        uid = found.state.root.stat().st_uid
        if uid != os.geteuid():
            raise UsageError(f"{found.state.root} belongs to user {uid}: run this as that user, or sync a copy of it")
        _require_unlocked(found.state)
    alive = list(_alive(found.journals))
    if alive:
        pids = ", ".join(map(str, alive[:_NAMED_MAX]))
        raise UsageError(
            f"processes still write to {found.root} (pid {pids}): sync it when they have ended. "
            "What dead ones left on this node comes in with: ranklog sync"
        )


def _require_unlocked(state: StateDir) -> None:
    try:
        fd = os.open(state.lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if fs.try_lock(fd):
            return
        try:
            owner = f" (pid {json.loads(os.pread(fd, 256, 0))['pid']})"
        except (ValueError, KeyError, TypeError):
            owner = ""
    finally:
        os.close(fd)
    raise UsageError(f"a running ranklogd{owner} owns {state.root}. It uploads by itself; see: ranklog status")


def _alive(directories: tuple[Path, ...]) -> Iterator[int]:
    """Yield the pids of writers that still hold a file here."""
    for directory in directories:
        for entry in sorted(os.listdir(directory)):
            name = parse_name(entry)
            try:
                orphan = open_orphan(directory / entry, name.writer) if name is not None else None
            except Refused:
                continue  # The daemon will say why.
            if orphan is not None:
                os.close(orphan.fd)
                if orphan.alive:
                    yield orphan.start.pid


def uploaded_lsn(state: StateDir) -> int:
    """Return the lsn below everything that waits in a state directory no daemon has, as far as names tell."""
    firsts = []
    for room in (state.wal, state.outbox):
        for name in os.listdir(room) if room.is_dir() else ():
            sealed, first = segment.parse_sealed(name.removesuffix(".tmp")), segment.parse_open(name)
            firsts += [sealed[0]] if sealed else [] if first is None else [first]
    return max(0, min(firsts, default=1) - 1)
