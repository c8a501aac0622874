"""Notices when somebody sets the clock. Pure: both clocks are arguments.

Intervals are measured on the monotonic clock, but what must outlive the process (when a writer ended, when a shard was
uploaded) is kept as a time of day. NTP may set that one by decades at any moment, and an age that jumps by decades
would let go of everything at once.
"""

DRIFT_MAX_S = 60.0
"""Clocks that differ by less than this between two looks were not set."""


class ClockStep:
    """Compares the time of day with the monotonic clock."""

    def __init__(self, wall_s: float, steady_s: float) -> None:
        self._ahead_s = wall_s - steady_s
        self._ahead_first_s = self._ahead_s

    def look(self, wall_s: float, steady_s: float) -> float:
        """Return by how many seconds the clock was set since the last look: 0 if it was not, negative if back."""
        step_s = wall_s - steady_s - self._ahead_s
        if abs(step_s) < DRIFT_MAX_S:
            return 0.0
        self._ahead_s += step_s
        return step_s

    def earliest(self, wall_s: float, steady_s: float) -> float:
        """Return the time of day, or the one it would be had nobody set the clock: whichever makes things younger."""
        return min(wall_s, self._ahead_first_s + steady_s)
