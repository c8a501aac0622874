"""Many nodes on one token, with an injected clock: `python -m tests.bench.fleet` prints the table of the README.

The pace is the daemon's own (`ranklogd.ship.pace`); simulated are the clock, the nodes' dice and the Hub's rate limit:
so many calls in fixed windows of five minutes, a 429 with the rest of the window beyond them, and the RateLimit headers
that the Hub sends. An upload costs three calls; a shard is ready every ten seconds on each node.
"""

import heapq
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / part) for part in ("client", "daemon", "tests")]

from ranklog.stores.base import Allowance  # noqa: E402
from ranklogd.retry import backoff_s  # noqa: E402
from ranklogd.ship.pace import Pace  # noqa: E402

NODES = (1, 16, 64, 256, 1024)
LIMIT = 1000
WINDOW_S = 300.0
CALLS = 3
SEAL_S = 10.0
FLOOR_S, CEILING_S = 10.0, 1800.0


@dataclass
class Hub:
    """The rate limit of one user."""

    limit: int = LIMIT
    headers: bool = True
    calls: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)

    def call(self, now_s: float) -> bool:
        """Count a call; False if it is one too many."""
        window = int(now_s // WINDOW_S)
        if self.calls[window] >= self.limit:
            self.refused[window] += 1
            return False
        self.calls[window] += 1
        return True

    def reset_s(self, now_s: float) -> float:
        """Return the rest of the window."""
        return WINDOW_S - now_s % WINDOW_S

    def allowance(self, now_s: float) -> Allowance | None:
        """Return what the headers say."""
        left = self.limit - self.calls[int(now_s // WINDOW_S)]
        return Allowance(left, self.reset_s(now_s), self.limit, WINDOW_S) if self.headers else None


@dataclass
class Outcome:
    """What came of one simulation, the first quarter left out, for a fleet that has just started is no fleet yet."""

    nodes: int
    calls: float
    """A window."""
    refused: float
    """A window."""
    lags_s: list[float]
    """How old the oldest record was when an upload came through."""
    drained_s: float
    """How long after the outage every node had uploaded what had piled up."""
    drained_nodes: int

    def lag_s(self, share: float) -> float:
        """Return a quantile of the lags."""
        return sorted(self.lags_s)[round(share * (len(self.lags_s) - 1))] if self.lags_s else 0.0


def simulate(
    nodes: int, *, hours: float = 6, headers: bool = True, outage_s: tuple[float, float] = (0, 0), seed: int = 0
) -> Outcome:
    """Let so many nodes upload for so many hours; in `outage_s` the Hub does not answer at all."""
    rng, hub, end_s = random.Random(seed), Hub(headers=headers), hours * 3600
    paces = [Pace(FLOOR_S, CEILING_S) for _ in range(nodes)]
    last_s, failures, lags_s, drained_s = [0.0] * nodes, [0] * nodes, [], dict[int, float]()
    turns = [(rng.uniform(0, FLOOR_S), node) for node in range(nodes)]
    heapq.heapify(turns)
    while turns[0][0] <= end_s:
        now_s, node = heapq.heappop(turns)
        if outage_s[0] <= now_s < outage_s[1]:
            failures[node] += 1
            paces[node].spent(now_s, rng.random())
            wait_s = backoff_s(failures[node], base_s=1.0, max_s=300.0, dice=rng.random())
            wait_s = max(wait_s, paces[node].wait_s(now_s))
        elif all(hub.call(now_s) for _ in range(CALLS)):
            if now_s > end_s / 4 and not outage_s[1]:
                lags_s.append(now_s - last_s[node])
            if now_s >= outage_s[1]:
                drained_s.setdefault(node, now_s - outage_s[1])
            last_s[node], failures[node] = now_s, 0
            paces[node].accepted(now_s, hub.allowance(now_s), rng.random())
            wait_s = max(paces[node].wait_s(now_s), SEAL_S)
        else:
            paces[node].refused(now_s, hub.reset_s(now_s), rng.random())
            wait_s = paces[node].wait_s(now_s)
        heapq.heappush(turns, (now_s + wait_s, node))
    windows = range(int(end_s / 4 // WINDOW_S), int(end_s // WINDOW_S))
    calls = statistics.mean(hub.calls[window] for window in windows)
    refused = statistics.mean(hub.refused[window] for window in windows)
    return Outcome(nodes, calls, refused, lags_s, max(drained_s.values(), default=0.0), len(drained_s))


def joint_stop(nodes: int, deadline_s: float, seed: int = 0) -> float:
    """Return the share of the nodes that upload their last shards if all of them stop at once, with a deadline."""
    rng, hub = random.Random(seed), Hub()
    done, turns = 0, [(rng.uniform(0, 5), node) for node in range(nodes)]
    heapq.heapify(turns)
    while turns and turns[0][0] <= deadline_s:
        now_s, node = heapq.heappop(turns)
        if all(hub.call(now_s) for _ in range(CALLS)):
            done += 1
        else:
            heapq.heappush(turns, (now_s + hub.reset_s(now_s) + rng.uniform(0, FLOOR_S), node))
    return done / nodes


def table() -> str:
    """Return the table, in Markdown."""
    lines = [
        "| nodes | calls in 5 min | refused (429) in 5 min | lag p50 | lag p99 | drain after 6 h outage | uploaded when all stop at once, 60 s |",
        "|---|---|---|---|---|---|---|",
    ]
    for nodes in NODES:
        steady = simulate(nodes)
        outage = simulate(nodes, hours=9, outage_s=(3600, 7 * 3600))
        assert outage.drained_nodes == nodes, "the simulation was too short"
        lags = f"{steady.lag_s(0.5):.0f} s | {steady.lag_s(0.99):.0f} s"
        lines.append(
            f"| {nodes:,} | {steady.calls:.0f} | {steady.refused:.1f} | {lags} | {outage.drained_s:.0f} s "
            f"| {100 * joint_stop(nodes, 60):.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
