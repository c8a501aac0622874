"""How much goes into one call to the store. Pure.

    refused for good    one file may be the culprit: the next call takes the older half, until it stands alone
    too late            half as many bytes: on a slow line something must get through before the deadline
    went through        twice as much again, up to the limits

Halving from call to call, instead of at once, keeps the pace: a Hub that suddenly says no to everything is asked no
more often for it, and a person has time to notice before much is set aside.
"""

LATE_SHARE = 0.9
"""A call that failed after so much of its deadline failed because of its size, as far as we can know."""


class Portion:
    """The limits of the next call."""

    def __init__(self, *, count_max: int, size_max: int) -> None:
        self._count_max = count_max
        self._size_max = size_max
        self.count = count_max
        """Files at most."""
        self.size_bytes = size_max
        """No further file once there are so many bytes; so one file always goes, however large."""

    def refused(self, count: int) -> None:
        """A call with so many files will never be taken as it is."""
        self.count = max(1, count // 2)

    def failed(self, size_bytes: int, took_s: float, deadline_s: float) -> None:
        """A call with so many bytes failed after `took_s`."""
        if took_s >= LATE_SHARE * deadline_s:
            self.size_bytes = max(1, size_bytes // 2)

    def accepted(self) -> None:
        """A call went through."""
        self.count = min(self._count_max, 2 * self.count)
        self.size_bytes = min(self._size_max, 2 * self.size_bytes)
