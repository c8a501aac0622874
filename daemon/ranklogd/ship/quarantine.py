"""Evidence of what could not be read. Nothing here is ever deleted by the daemon.

    quarantine/<segment>                    the whole segment: it has damaged stretches, or could not be converted
    quarantine/<segment>.reason             why
    quarantine/<segment>.excerpt            a segment with only the entries that hold bad frames, and their writers
    quarantine/<segment>.excerpt.reason     a line for each: writer, seq, lsn, records lost, reason

Both originals are segments. A whole one that is moved back to `wal/` under its own name is converted again, by a newer
ranklog perhaps. An excerpt is not, for its lsns lie within those of shards that exist, and a reader ignores a shard
within another's range: its records must come in through the WAL once more, with fresh lsns.

A whole segment is moved here, not copied, in the place of being unlinked after its shards are committed: that takes
no room on a disk that may be full. The `.reason` is published before that and says which of the two is due, so a
crash in between changes nothing.
"""

import os
from pathlib import Path

from ranklog import fs
from ranklog.failpoint import failpoint
from ranklogd.ship.walk import REASONS_MAX, Evidence
from ranklogd.statedir import StateDir

UNCONVERTED = "Nothing of this segment was converted; its records are still in it."
"""The line of a `.reason` by which `ranklog requeue` knows a segment that may come back under its own name."""


def keep_evidence(path: Path, state: StateDir, buffer: memoryview, entries_offset: int, evidence: Evidence) -> None:
    """Publish what was wrong with the segment `path`, if anything; doing it again replaces it by the same."""
    reason = state.quarantine / f"{path.name}.reason"
    if evidence.damaged_stretches:
        _publish(reason, [_told(evidence)])
        return
    # Left from an earlier try on the same segment, it would send a sound one to quarantine.
    fs.unlink(reason)
    if evidence.reasons_count:
        spans = sorted(evidence.spans.items())
        parts = [buffer[:entries_offset], *(buffer[offset:end] for offset, end in spans)]
        _publish(state.quarantine / f"{path.name}.excerpt.reason", [_told(evidence)])
        _publish(state.quarantine / f"{path.name}.excerpt", parts)


def discard_segment(path: Path, state: StateDir) -> None:
    """Take a segment whose shards are committed out of the WAL, durably: unlinked, or moved here if it is evidence."""
    if os.path.lexists(path) and (state.quarantine / f"{path.name}.reason").exists():
        fs.rename(path, state.quarantine / path.name)
        failpoint("evidence.move.after")
        fs.sync_dir(state.quarantine)
    fs.unlink(path)
    failpoint("trim.unlink.after")
    fs.sync_dir(path.parent)


def quarantine_segment(path: Path, state: StateDir, reason: str) -> None:
    """Move a whole segment that cannot be converted here, with `reason`, durably; one that is gone is no error.

    None of its records reaches a shard.
    """
    if os.path.lexists(path):
        text = f"{reason}\n{UNCONVERTED}\n"
        remedy = f"To try again: mv {state.quarantine / path.name} {state.wal}/\n"
        _publish(state.quarantine / f"{path.name}.reason", [(text + remedy).encode("utf-8", "backslashreplace")])
    discard_segment(path, state)


def _told(evidence: Evidence) -> bytes:
    lines = [
        f"damaged_stretches={evidence.damaged_stretches} records={evidence.records}",
        *evidence.reasons,
    ]
    if evidence.reasons_count > REASONS_MAX:
        lines.append(f"… and {evidence.reasons_count - REASONS_MAX} more")
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _publish(target: Path, parts: list[bytes] | list[memoryview]) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        offset = 0
        for part in parts:
            fs.write_all(fd, part, offset)
            offset += len(part)
    finally:
        os.close(fd)
    fs.publish(temporary, target)
