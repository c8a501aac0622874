"""What the shipper says of itself: shipper.json, one JSON object, replaced whole and never synced.

Counts go on where the last shipper's stopped, so that a restart hides no loss; they are for people. What is waiting
or uploaded is told by the names of files alone (`ranklogd.report`), and by the backlog and lsn fields here.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ranklog import fs


@dataclass(frozen=True, kw_only=True)
class ShipperReport:
    """One snapshot. Counts without a unit are since this state directory's first shipper."""

    pid: int = 0
    converted_segments: int = 0
    shards: int = 0
    rows: int = 0
    uploaded_shards: int = 0
    uploaded_bytes: int = 0
    quarantined_records: int = 0
    """Records that could not be read; each has a gap row, and its bytes are in quarantine/."""
    damaged_stretches: int = 0
    """Stretches of segments that were no entries, and whole segments in quarantine/."""
    quarantined_files: int = 0
    """Originals in quarantine/ now: segments, spool files and shards that were not what their names say."""
    dead_letters: int = 0
    """Shards in deadletter/ now: the store refused them for good."""
    last_error: str = ""
    """Why something waits now; empty while everything flows."""
    last_error_class: str = ""
    """transient, held, permanent, damaged, hung (upload), internal, conversion."""
    next_try_s: float = 0.0
    """Seconds until a failed upload is tried again; 0: none failed."""
    last_upload_s: float = 0.0
    """When a shard was last uploaded, in seconds since the epoch; 0: never."""
    backlog_segments: int = 0
    """Sealed segments not converted yet."""
    backlog_shards: int = 0
    """Shards in the outbox."""
    backlog_bytes: int = 0
    """Bytes of both."""
    uploaded_lsn: int = 0
    """Every record up to this lsn is in the store, in deadletter/ or in quarantine/. 0: none is, or none was."""


_COUNTS = (
    "converted_segments", "shards", "rows", "uploaded_shards", "uploaded_bytes", "quarantined_records",
    "damaged_stretches", "last_upload_s",
)  # fmt: skip


def write_report(path: Path, report: ShipperReport) -> None:
    """Replace the file; raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(asdict(report)))
    fs.rename(temporary, path)


def read_counts(path: Path) -> ShipperReport:
    """Return the counts of an earlier shipper, every other field at its default; zeros if there is no sound file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    types = {field.name: type(field.default) for field in fields(ShipperReport)}
    counts = found if isinstance(found, dict) else {}
    kept = {name: counts[name] for name in _COUNTS if isinstance(counts.get(name), types[name] | int)}
    return ShipperReport(**kept)


def read_hang(path: Path) -> str:
    """Return what an earlier shipper said of a store that did not answer; empty if it did not end for that."""
    try:
        found = json.loads(path.read_text())
        return str(found["last_error"]) if found["last_error_class"] == "hung" else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""
