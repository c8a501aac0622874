"""When to seal the open segment. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SealPolicy:
    """Larger and older segments make fewer, later shards."""

    size_bytes_max: int
    age_s_max: float

    def due(self, *, size_bytes: int, first_entry_s: float | None, now_s: float) -> bool:
        """Return whether to seal; `first_entry_s` is None for a segment without entries, which is never sealed."""
        if first_entry_s is None:
            return False
        return size_bytes >= self.size_bytes_max or now_s - first_entry_s >= self.age_s_max
