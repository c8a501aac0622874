"""The demo's proof: what each rank says it logged against what is in the parquet files. Imports pyarrow.

A record counts as read back if a row with each of its keys is there. Rows are taken from the files as they are, without
the deduplication that `ranklog query` does: anything that is in them twice is counted as doubled.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

KEYS = ("loss", "acc", "grad_norm", "step_time")
_COLUMNS = ["rank", "attempt", "step", "kind", "key", "value"]


@dataclass(frozen=True)
class Attempt:
    """One process of one rank."""

    rank: int
    attempt: int
    killed: bool
    logged: int
    """log() calls that returned."""
    in_parquet: int
    """Of these, records that are in the files with all their keys."""
    lost: int
    doubled: int
    """Rows more than one for a record and key."""
    unreturned: int
    """Records in the files whose log() had not returned when the process was killed: 0 or 1."""


class Rows:
    """The metric rows of a run's shards: how often each (rank, attempt, step, key) is there, and the losses."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.count = 0
        self._seen: Counter[tuple[int, int, int, str]] = Counter()
        self._losses: dict[int, dict[int, float]] = defaultdict(dict)
        for path in paths:
            table = pq.read_table(path, columns=_COLUMNS, partitioning=None)
            columns = (table[name].to_pylist() for name in _COLUMNS)
            for rank, attempt, step, kind, key, value in zip(*columns, strict=True):
                if kind == "metrics" and rank is not None:
                    self.count += 1
                    self._seen[rank, attempt, step, key] += 1
                    if key == "loss":
                        self._losses[step][rank] = value

    def judge(self, rank: int, attempt: int, first: int, logged: int, *, killed: bool) -> Attempt:
        """Compare one process's own count with the rows."""
        said = range(first, first + logged)
        there = sum(all(self._seen[rank, attempt, step, key] for key in KEYS) for step in said)
        mine = [(key, times) for key, times in self._seen.items() if key[:2] == (rank, attempt)]
        doubled = sum(max(0, times - 1) for _, times in mine)
        others = {key[2] for key, times in mine if times and key[2] not in said}
        return Attempt(rank, attempt, killed, logged, there, logged - there, doubled, len(others))

    def loss(self) -> list[tuple[float, float]]:
        """Return (step, mean loss of the ranks)."""
        return [(step, sum(by_rank.values()) / len(by_rank)) for step, by_rank in sorted(self._losses.items())]
