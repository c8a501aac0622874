"""The daemon's state directory: its rooms and what a file in each of them asks for.

lock                     flock of the one daemon that owns this directory
wal/<first>.open         being written;  wal/<first>-<last>.wal   sealed: "convert me"
wal/<first>-<last>.tries how its conversion fared so far; removed with the segment
outbox/<segment>.tmp/    being built, removed at start
outbox/<segment>/<key>   shards of one segment: "upload me"; the path below is the object key
cache/<key>              uploaded and verified shards, kept for local readers until retention removes them
deadletter/<key>         shards the store will never take, with a .reason beside each; sent again on request only
quarantine/              originals of what could not be read, with a .reason beside each; never deleted by the daemon
reserve                  bytes given back when the disk is full, so that deletes and renames still work
xet/                     the Hub library's own cache; wiped whenever a shipper starts
shipper.json             the shipper's counters, replaced whole; rebuilt at any time
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StateDir:
    """Paths of one daemon's state."""

    root: Path

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.root / "lock"

    @property
    def wal(self) -> Path:
        """Open and sealed segments."""
        return self.root / "wal"

    @property
    def outbox(self) -> Path:
        """Shards to upload, in a directory for each segment."""
        return self.root / "outbox"

    @property
    def cache(self) -> Path:
        """Verified shards."""
        return self.root / "cache"

    @property
    def deadletter(self) -> Path:
        """Shards refused for good, by key."""
        return self.root / "deadletter"

    @property
    def quarantine(self) -> Path:
        """Evidence of damage."""
        return self.root / "quarantine"

    @property
    def reserve(self) -> Path:
        """The reserve file."""
        return self.root / "reserve"

    @property
    def xet(self) -> Path:
        """The content store's cache."""
        return self.root / "xet"

    @property
    def shipper_report(self) -> Path:
        """The shipper's counters."""
        return self.root / "shipper.json"

    @property
    def rooms(self) -> tuple[Path, ...]:
        """The directories to create at start."""
        return (self.wal, self.outbox, self.cache, self.deadletter, self.quarantine)
