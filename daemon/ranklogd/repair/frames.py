"""Journal and spool files: whose they are, what is in them, and what lies behind damage.

The daemon takes the frames up to one that does not check, goes on behind it if its size can still be told, and keeps
the spool file. Where a sector is lost, that ends there; but whole frames follow, and are found here by their checksums.
A repair writes them to a new spool file, behind a gap frame for what lies between, and adoption does the rest: it
takes what the WAL does not have by (writer, seq), so nothing can come in twice.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ranklog import fs
from ranklog.frame import HEADER, Kind, Span, body_at, encode_gap, spans
from ranklog.framefile import FileName, format_name, parse_name
from ranklog.start import Start
from ranklogd.orphan import Orphan, Refused, open_orphan, pieces
from ranklogd.repair.finding import Finding, Mend, Severity, Step
from ranklogd.repair.wal import aside, names_in
from ranklogd.sequence import GAP_MAX
from ranklogd.statedir import StateDir

BLANK = "not one byte of it reached the disk"
_LOOK_SIZE = 4096
SEARCH_SIZE_MAX = 128 << 20
"""What is searched for frames behind damage; a client's spool file is half as large, and anybody can plant one."""
_UPGRADE = "upgrade ranklog"
GAP_REASON = "damaged spool file"
_ARRAY_OF_5 = b"\x95"


@dataclass
class Frames:
    """What one journal or spool file holds."""

    path: Path
    name: FileName
    size_bytes: int = 0
    start: Start | None = None
    start_frame: bytes = b""
    alive: bool = False
    """Its writer lives: nothing else was looked at."""
    refused: str = ""
    """Why the daemon leaves it alone."""
    first_seq: int = -1
    last_seq: int = -1
    end: int = 0
    """Offset behind the frames that follow each other."""
    ended: bool = False
    damaged_at: int = -1
    """Offset of the first damaged frame that the daemon passes over."""
    behind: int = 0
    """Records of a spool file behind `end`, which the daemon does not find."""

    @property
    def is_spool(self) -> bool:
        """Whether its frames should reach to its end."""
        return self.name.kind == "spool"


def frame_files(directories: list[Path]) -> Iterator[Frames]:
    """Yield what the files of all writers hold; those that go away meanwhile are left out."""
    for directory in directories:
        try:
            names = names_in(directory)
        except PermissionError:
            continue  # Another user's: their daemon looks there.
        for name in names:
            parsed = parse_name(name)
            if parsed is not None:
                found = read_frame_file(directory / name, parsed)
                if found is not None:
                    yield found


def read_frame_file(path: Path, name: FileName) -> Frames | None:
    """Return what is in one file; None if it is gone."""
    found = Frames(path, name)
    if _is_blank(path):
        found.refused = BLANK  # Opened as an orphan, it would be removed.
        return found
    try:
        orphan = open_orphan(path, name.writer)
    except Refused as exc:
        found.refused = str(exc)
        return found
    if orphan is None:
        return None
    try:
        found.size_bytes, found.start, found.start_frame = orphan.size, orphan.start, orphan.start_frame
        found.alive = orphan.alive
        if not orphan.alive:
            _read(found, orphan)
    except (Refused, OSError) as exc:
        found.refused = str(exc)
    finally:
        os.close(orphan.fd)
    return found


def _read(found: Frames, orphan: Orphan) -> None:
    found.first_seq, found.last_seq, found.end = orphan.first_seq, 0, len(orphan.start_frame)
    for piece in pieces(orphan, 1 << 63):
        found.last_seq, found.end, found.ended = piece.next_seq - 1, piece.end, piece.ended
        found.damaged_at = piece.damaged_at
    if found.is_spool and 0 < orphan.size - found.end <= SEARCH_SIZE_MAX:
        rest = memoryview(os.pread(orphan.fd, orphan.size - found.end, found.end))
        found.behind = sum(span.last - span.first + 1 for span in sound_frames(rest, found.last_seq + 1))


def sound_frames(buffer: memoryview, due: int) -> Iterator[Span]:
    """Yield the whole frames with seqs from `due` on, wherever they begin; each begins behind the one before."""
    data, offset = bytes(buffer), 0
    while (body := data.find(_ARRAY_OF_5, offset + HEADER.size)) >= 0:
        offset = body - HEADER.size
        if body_at(buffer, offset) is None:
            offset += 1
            continue
        end = offset + 1
        for span in spans(buffer, offset):
            if span.kind == Kind.START or not due <= span.first <= due + GAP_MAX or span.last - span.first >= GAP_MAX:
                break
            yield span
            due, end = span.last + 1, span.end
        offset = end


def mended(data: bytes, head: bytes, due: int, wall_ns: int) -> bytes:
    """Return a spool file of the sound frames in `data` with seqs from `due` on, and gap frames between them.

    What is missing from `due` to the first frame is adoption's to tell.
    """
    parts, expected = [head], -1
    buffer = memoryview(data)
    for span in sound_frames(buffer, due):
        if 0 <= expected < span.first:
            parts.append(encode_gap(expected, span.first - 1, GAP_REASON, wall_ns))
        parts.append(bytes(buffer[span.offset : span.end]))
        expected = span.last + 1
    return b"".join(parts)


def check_frames(
    state: StateDir, directories: list[Path], start_of: Callable[[str], bytes], *, running: bool
) -> Iterator[Finding]:
    """Yield what is wrong with journal and spool files.

    `start_of` returns the start frame of a writer as the WAL has it, empty if it does not.
    """
    files = list(frame_files(directories))
    heads = {found.name.writer: found.start_frame for found in files if found.start_frame}
    for found in files:
        if found.alive:
            continue
        if found.refused:
            head = heads.get(found.name.writer) or start_of(found.name.writer)
            yield _refused(state, found, head)
        elif found.behind:
            what = f"damaged at offset {found.end:,}; {found.behind:,} records behind that can be read"
            daemon = "takes what is before the damage, and keeps the file in quarantine/"
            mend = Mend(Step.RESPOOL, found.path, found.path, f"{found.path.name}: {what}", found.start_frame)
            yield Finding(Severity.DAMAGE, found.path, what, daemon, mend)
        elif found.is_spool and found.damaged_at >= 0:
            what = f"a frame at offset {found.damaged_at:,} is damaged"
            daemon = "takes what is before and behind, a gap row stands for the rest; it keeps the file in quarantine/"
            yield Finding(Severity.DAMAGE, found.path, what, daemon)
        elif found.is_spool and found.end < found.size_bytes:
            what = f"its last {found.size_bytes - found.end:,} bytes are no frame: its writer died while it wrote"
            daemon = "takes what is before, and keeps the file in quarantine/"
            yield Finding(Severity.NOTE, found.path, what, daemon)
        elif not running:
            what = "left behind by a writer that is dead"
            offline = found.start is not None and found.start.mode == "offline"
            yield Finding(Severity.NOTE, found.path, what, "waits for ranklog sync" if offline else "takes it over")


def _refused(state: StateDir, found: Frames, head: bytes) -> Finding:
    daemon = "leaves it alone, and says so in ranklog status"
    if found.refused == BLANK:
        return Finding(Severity.NOTE, found.path, found.refused, "removes it: its writer was born before a power cut")
    if _UPGRADE in found.refused:
        return Finding(Severity.WARNING, found.path, found.refused, daemon)
    data = _untrusted(found.path)
    if data is None:
        return Finding(Severity.WARNING, found.path, f"refused: {found.refused}; remove it by hand", daemon)
    records = sum(span.last - span.first + 1 for span in sound_frames(memoryview(data), 1))
    what = f"{found.refused}; {records:,} records in it can be read"
    reason = f"{found.path.name}: {what}"
    if head and records:
        target = found.path.with_name(format_name(found.name._replace(kind="spool")))
        if target == found.path or not target.exists():
            mend = Mend(Step.RESPOOL, found.path, target, reason, head)
            return Finding(Severity.DAMAGE, found.path, what, daemon, mend)
    mend = aside(state, found.path, f"{reason}; nothing tells whose they are.")
    return Finding(Severity.DAMAGE, found.path, f"{what}, and nothing tells whose they are", daemon, mend)


def _is_blank(path: Path) -> bool:
    data = _untrusted(path, _LOOK_SIZE)
    if data is None or data.strip(b"\0"):
        return False
    return not (_untrusted(path) or b"").strip(b"\0")


def _untrusted(path: Path, size: int = SEARCH_SIZE_MAX) -> bytes | None:
    try:
        fd = fs.open_untrusted(path)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(size)
