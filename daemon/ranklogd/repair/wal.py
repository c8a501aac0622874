"""The WAL directory, checked: each segment, how they follow each other, and what else lies there."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from ranklogd.repair.finding import Finding, Mend, Severity, Step
from ranklogd.repair.header import rebuild
from ranklogd.repair.segments import Segment, read_segment
from ranklogd.ship.tries import SUFFIX
from ranklogd.statedir import StateDir
from ranklogd.wal.salvage import find_salt
from ranklogd.wal.segment import parse_open, parse_sealed, sealed_name

_CONVERTS_AROUND = "converts around it: gap rows stand for what cannot be read, the original is kept in quarantine/"


def read_bytes(path: Path) -> memoryview | None:
    """Return a file's bytes; None if it is gone, or is no file."""
    try:
        return memoryview(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        return None


def names_in(directory: Path) -> list[str]:
    """Return the sorted names in a directory; none if there is no such directory."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def segment_names(state: StateDir) -> list[str]:
    """Return the names of open and sealed segments, by first lsn."""
    return [name for name in names_in(state.wal) if parse_open(name) is not None or parse_sealed(name) is not None]


def check_wal(state: StateDir, node: str, *, running: bool) -> Iterator[Finding]:
    """Yield what is wrong in wal/. `running`: a daemon owns the directory, so the newest bytes are on their way."""
    segments: list[Segment] = []
    for name in names_in(state.wal):
        path = state.wal / name
        if parse_open(name) is None and parse_sealed(name) is None:
            yield from _stray(state, name, running=running)
            continue
        buffer = read_bytes(path)
        if buffer is None:
            continue
        found = read_segment(name, buffer)
        segments.append(found)
        yield from _check_segment(state, found, buffer, node, running=running)
    yield from _follow(state, segments, running=running)


def _stray(state: StateDir, name: str, *, running: bool) -> Iterator[Finding]:
    path = state.wal / name
    if name.endswith(SUFFIX):
        if not path.with_suffix(".wal").exists():
            yield Finding(Severity.NOTE, path, "notes on a segment that is gone", "removes it at its next start")
    elif name.startswith("."):
        if not running:
            what = "a segment that was being created when the daemon died; nothing was acknowledged in it"
            yield Finding(Severity.NOTE, path, what, "removes it at its next start")
    else:
        mend = aside(state, path, f"{path}: no name of a segment; the daemon never looked at it.")
        yield Finding(Severity.WARNING, path, "no name of a segment", "never looks at it", mend)


def _check_segment(
    state: StateDir, found: Segment, buffer: memoryview, node: str, *, running: bool
) -> Iterator[Finding]:
    path = state.wal / found.name
    is_open = parse_open(found.name) is not None
    if found.header is None:
        yield _headless(state, path, found, buffer, node)
        return
    first = (parse_sealed(found.name) or (parse_open(found.name), 0))[0]
    if first != found.first_lsn and not is_open:
        target = state.wal / sealed_name(found.first_lsn, max(found.last_lsn, found.first_lsn))
        taken = target.exists() or (state.outbox / target.name).exists()
        mend = None if taken or not found.records else Mend(Step.RENAME, path, target, "")
        what = f"its name says that it begins with lsn {first:,}, its header {found.first_lsn:,}"
        yield Finding(Severity.DAMAGE, path, what, "converts it as far as name and header agree", mend)
        return
    for text in found.troubles:
        yield Finding(Severity.DAMAGE, path, text, _CONVERTS_AROUND)
    for text in found.bad_frames:
        daemon = "converts the others: a gap row stands for these, their bytes are kept in quarantine/"
        yield Finding(Severity.WARNING, path, text, daemon)
    if is_open and found.tail_bytes and not running:
        what = f"{found.tail_bytes:,} bytes behind the last whole entry, which were never acknowledged"
        yield Finding(Severity.NOTE, path, what, "cuts them off at its next start")


def _headless(state: StateDir, path: Path, found: Segment, buffer: memoryview, node: str) -> Finding:
    lsns = _lsns(path.name) or (0,)
    is_open = len(lsns) == 1
    later = sorted(other for name in names_in(path.parent) if (other := _lsns(name)) and other[0] > lsns[0])
    if found.later_format:
        daemon = (
            "does not start: install a newer ranklog" if is_open else "leaves it until a newer ranklog is installed"
        )
        return Finding(Severity.DAMAGE, path, found.error, daemon)
    if find_salt(buffer, lsns[0]) is not None:
        return Finding(Severity.DAMAGE, path, found.error, "reads its entries without the header")
    # Where the next segment begins, an open one ends: what follows was never acknowledged, or was written again.
    limit = later[0][0] - 1 if is_open and later else None
    mend = headless_mend(path.parent, path, buffer, node, limit)
    if mend is not None and (state.outbox / mend.target.name).exists():
        return Finding(Severity.DAMAGE, path, found.error, "believes it converted: its shards are in the outbox")
    if mend is None:
        what = f"{found.error}; no entry in it can be read either"
        return Finding(Severity.DAMAGE, path, what, "counts its lsns as lost, and keeps it in quarantine/")
    what = f"{found.error}; {mend.reason.partition(': ')[2]}"
    return Finding(Severity.DAMAGE, path, what, "does not find them: it counts its lsns as lost, and keeps it", mend)


def _lsns(name: str) -> tuple[int, ...] | None:
    first = parse_open(name)
    return parse_sealed(name) if first is None else (first,)


def headless_mend(wal: Path, path: Path, buffer: memoryview, node: str, limit: int | None = None) -> Mend | None:
    """Return the step that gives a segment a new header and its place in `wal`; None if nothing in it can be read."""
    name = path.name.partition(".open.")[0] + ".open" if ".open." in path.name else path.name
    sealed = parse_sealed(name)
    first = sealed[0] if sealed else parse_open(name)
    found = None if first is None else rebuild(buffer, first, node)
    if found is None or not found.records:
        return None
    last = max(sealed[1], found.first_lsn) if sealed else min(found.last_lsn, limit or found.last_lsn)
    target = wal / sealed_name(found.first_lsn, last)
    reason = f"{path.name}: {found.records:,} records behind the header can be read"
    return Mend(Step.REBUILD, path, target, reason)


def _follow(state: StateDir, segments: list[Segment], *, running: bool) -> Iterator[Finding]:
    """Compare the ranges that the names claim."""
    ranges: list[tuple[int, int, Segment]] = []
    for found in segments:
        sealed, first = parse_sealed(found.name), parse_open(found.name)
        begin, end = sealed or (first or 0, max(found.last_lsn, first or 0))
        ranges.append((begin, end, found))
    ranges.sort(key=lambda item: item[:2])
    for (_, end, left), (begin, _, right) in pairwise(ranges):
        path = state.wal / right.name
        if begin <= end and parse_open(left.name) is None:
            what = f"its lsns overlap those of {left.name}"
            yield Finding(Severity.DAMAGE, path, what, "converts both: readers may see records of one twice")
        elif begin > end + 1 and not running:  # One may have been converted while we looked.
            what = f"lsns {end + 1:,}..{begin - 1:,} before it are not in the WAL: converted out of turn, or lost"
            yield Finding(Severity.NOTE, path, what, "nothing")


def aside(state: StateDir, path: Path, reason: str) -> Mend:
    """Return the step that moves a file to quarantine/, under a name that is free there."""
    name = path.name.lstrip(".")
    free, number = state.quarantine / name, 2
    while free.exists():
        free, number = state.quarantine / f"{name}.{number}", number + 1
    return Mend(Step.SET_ASIDE, path, free, reason)
