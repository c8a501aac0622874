"""How often to upload, where the store counts requests. Pure: time, dice and the store's headers are arguments.

All nodes of a user share one limit of the Hub (1,000 calls in five minutes on the free plan), and no node knows the
others. What each of them sees is the answer to its own calls: how much of the limit is left, and when it is refused.

    refused (429)                     the rate halves, and the node stays away until the window is over, plus its share
                                      of the next one at random: a thousand nodes must not come back in one second
    accepted, more used than is due   the rate shrinks a little: the others are many
    accepted, less used than is due   the rate grows by a fixed step, a fraction of the last rate that was refused
    failed otherwise                  the rate stays, and the next call keeps the least distance, for it is a call, too;
                                      how long to stay away from a store that fails is another question (`holds`)

Additive growth and multiplicative cuts let nodes that started apart meet (AIMD). Without headers, refusals alone steer.
More shards never mean more calls: they mean larger batches.
"""

from dataclasses import dataclass

from ranklog.stores.base import Allowance

CUT = 0.5
SHRINK = 0.85
STEP = 0.05
"""Growth after an accepted upload, as a share of the rate that was last too much."""
USE_MAX = 0.8
"""The share of the limit that all uploads together aim at: readers and people have the rest."""


@dataclass
class Pace:
    """One node's pace. `interval_s` is what lies between the starts of two uploads."""

    floor_s: float
    ceiling_s: float

    def __post_init__(self) -> None:
        assert 0 < self.floor_s <= self.ceiling_s
        self.interval_s = self.floor_s
        self._refused_rate = 1.0 / self.floor_s
        self._due_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Return seconds until the next upload may start."""
        return max(0.0, self._due_s - now_s)

    def accepted(self, now_s: float, allowance: Allowance | None, dice: float) -> None:
        """An upload went through; `dice` is random in 0..1."""
        rate = 1.0 / self.interval_s
        rate = rate * SHRINK if _crowded(allowance) else rate + STEP * self._refused_rate
        self._set(rate)
        self._due_s = now_s + self.interval_s * (0.75 + 0.5 * dice)

    def spent(self, now_s: float, dice: float) -> None:
        """A call was made that says nothing about the limit: it failed otherwise. It counts there all the same."""
        self._due_s = max(self._due_s, now_s + self.floor_s * (0.75 + 0.5 * dice))

    def refused(self, now_s: float, retry_after_s: float, dice: float) -> None:
        """A request was refused because there were too many."""
        self._refused_rate = max(1.0 / self.interval_s, 1.0 / self.ceiling_s)
        self._set(self._refused_rate * CUT)
        self._due_s = now_s + retry_after_s + dice * max(self.interval_s, 1.0)

    def _set(self, rate: float) -> None:
        self.interval_s = min(self.ceiling_s, max(self.floor_s, 1.0 / rate))


def _crowded(allowance: Allowance | None) -> bool:
    """Whether more of the limit is used than is due at this point of the window."""
    if allowance is None or not allowance.limit:
        return False
    used = (allowance.limit - allowance.left) / allowance.limit
    elapsed = 1.0 - min(1.0, allowance.reset_s / allowance.window_s)
    return used > USE_MAX * (0.1 + 0.9 * elapsed)
