"""Which buckets this node has seen: one in each line of a file in its state directory.

A bucket that was seen once is never created again by itself: it would stand empty in the place of a lost one.
"""

import secrets
from pathlib import Path

from ranklog import fs
from ranklog.errors import StoreError


def read_seen(marker: Path) -> list[str]:
    """Return every bucket in the file, none if there is no file; raises StoreError."""
    try:
        return marker.read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise StoreError(f"{marker} cannot be read: {exc}", permanent=False) from exc


def note_seen(marker: Path, bucket: str) -> None:
    """Add a bucket to the file, durably; raises StoreError."""
    seen = read_seen(marker)
    if bucket in seen:
        return
    temporary = marker.with_name(f".{marker.name}-{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text("".join(f"{name}\n" for name in [*seen, bucket]), encoding="utf-8")
        fs.publish(temporary, marker)
    except OSError as exc:
        raise StoreError(f"{marker} cannot be written: {exc}", permanent=False) from exc
