"""The load: records as a trainer logs them, and calls of them flat out or paced. Runs inside the measured process, so
it imports nothing but the standard library.

Paced means 200 calls a second with a sleep before each: the core has been idle or somebody else's meanwhile, caches
are cold, and that is what a training step sees. Percentiles are of calls.
"""

import random
import struct
import time
from collections.abc import Callable, Sequence

Record = dict[str, float]

PACE_S = 1 / 200
DISTINCT = 512


def make_records(metrics: int = 12, count: int = DISTINCT, seed: int = 1, *, precision: str = "double") -> list[Record]:
    """Return records with equal keys, as the same line of a script logs them, and mantissas of random bits.

    `precision`: all 53 bits of them (`double`), or the 24 bits that a float32 loss has (`single`).
    """
    dice = random.Random(seed)
    keys = [f"train/metric_{number}" for number in range(metrics)]
    if precision == "double":
        return [{key: dice.random() for key in keys} for _ in range(count)]
    packer = struct.Struct("<f")
    return [{key: packer.unpack(packer.pack(dice.random()))[0] for key in keys} for _ in range(count)]


def flat(call: Callable[[Record], object], records: Sequence[Record], count: int) -> list[int]:
    """Call as fast as possible; return what each call took, in nanoseconds."""
    clock, took, distinct = time.perf_counter_ns, [0] * count, len(records)
    for index in range(count):
        record = records[index % distinct]
        began = clock()
        call(record)
        took[index] = clock() - began
    return took


def paced(
    call: Callable[[Record], object],
    records: Sequence[Record],
    count: int,
    pace_s: float = PACE_S,
    before: Callable[[], object] = lambda: None,
) -> list[int]:
    """Call every `pace_s` seconds; return what each call took, in nanoseconds. `before` runs just before each."""
    clock, took, distinct = time.perf_counter_ns, [0] * count, len(records)
    due_s = time.monotonic()
    for index in range(count):
        due_s += pace_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        before()
        record = records[index % distinct]
        began = clock()
        call(record)
        took[index] = clock() - began
    return took


def busy_step(size_bytes: int = 8 << 20) -> Callable[[], object]:
    """Return a training step in small: it walks memory and keeps the GIL, so that nothing of ours stays in a cache."""
    source, target = bytes(size_bytes), bytearray(size_bytes)
    return lambda: target.__setitem__(slice(None), source)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie; the largest for 1."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def latency(took_ns: Sequence[int]) -> dict[str, float]:
    """Return p50, p99 and max in microseconds, and how many calls they are of."""
    return {
        "p50": quantile(took_ns, 0.5) / 1000,
        "p99": quantile(took_ns, 0.99) / 1000,
        "max": max(took_ns) / 1000,
        "calls": len(took_ns),
    }
