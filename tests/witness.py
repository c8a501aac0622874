"""A trainer that leaves proof of what it did: deterministic records, and a ledger that survives whatever kills it.

    python -m witness NAME LEDGERS [--count N] [--seconds S] [--pause S] [--flush-every N] [--no-finish]

Record `n` of trainer `name` is a pure function of both, so no copy of what was logged is needed: `oracle` compares
what was delivered with what `record` says. The ledger is one small file, LEDGERS/NAME.ledger, overwritten in place:

    returned u64 | durable u64 | slowest_ns u64 | raised u64        calls of log() that returned; how many of them a
                                                                    flush() then called durable
"""

import argparse
import math
import os
import struct
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

_LEDGER = struct.Struct("<QQQQ")
_ODD = (0.0, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1.7976931348623157e308, 0.1)


class Account(NamedTuple):
    """What a ledger says."""

    returned: int
    """Calls of `log()` that returned: records 0 … returned - 1. One more may have been under way."""
    durable: int
    """Records that were logged before a `flush()` that returned True."""
    slowest_s: float
    raised: int
    """Calls of `log()` that raised: always a failure."""


def record(name: str, n: int) -> dict[str, Any]:
    """Return what trainer `name` logs as its record number `n`: every type, and doubles with random bits."""
    rng = Random(f"{name}:{n}")
    metrics: dict[str, Any] = {"by": name, "n": n, "bits": struct.unpack("<d", rng.randbytes(8))[0]}
    if math.isnan(metrics["bits"]):
        metrics["bits"] = 1 / 3  # Which NaN it was is checked with `odd`: not every parquet reader keeps the payload.
    metrics["odd"] = _ODD[n % len(_ODD)]
    if n % 3 == 0:
        metrics |= {"loss": {"train": rng.random(), "eval": rng.gauss(0, 1e9)}, "flag": bool(n % 2)}
    if n % 5 == 0:
        metrics |= {"huge": rng.getrandbits(90) | 1 << 89, "edge": (1 << 53) + n % 2, "note": f"né\n{n}", "none": None}
    if n % 7 == 0:
        metrics["list"] = [n, "two", None, 0.5]
    return metrics


def read_ledgers(directory: Path) -> dict[str, Account]:
    """Return what every trainer proved, by name."""
    accounts = {}
    for path in directory.glob("*.ledger"):
        returned, durable, slowest_ns, raised = _LEDGER.unpack(path.read_bytes() or bytes(_LEDGER.size))
        accounts[path.stem] = Account(returned, durable, slowest_ns / 1e9, raised)
    return accounts


class Witness:
    """Logs records and keeps the ledger. One for each trainer process, and name."""

    def __init__(self, name: str, ledgers: Path) -> None:
        import ranklog

        self.name = name
        self.returned = self.durable = self._slowest_ns = self._raised = 0
        ledgers.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(ledgers / f"{name}.ledger", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._note()
        self._log = ranklog.log
        self._flush = ranklog.flush

    def _note(self) -> None:
        os.pwrite(self._fd, _LEDGER.pack(self.returned, self.durable, self._slowest_ns, self._raised), 0)

    def log(self) -> None:
        """Log the next record and note that the call returned."""
        metrics = record(self.name, self.returned)
        began_ns = time.perf_counter_ns()
        try:
            self._log(metrics)
        except BaseException:
            self._raised += 1
            self._note()
            raise
        self._slowest_ns = max(self._slowest_ns, time.perf_counter_ns() - began_ns)
        self.returned += 1
        self._note()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Flush, and note down what is durable now; return whether that came about."""
        logged = self.returned
        done = bool(self._flush(timeout_s))
        if done:
            self.durable = logged
            self._note()
        return done


def main() -> None:
    """Log until the count is reached, the time is over, or a file named `enough` appears in the working directory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("ledgers", type=Path)
    parser.add_argument("--count", type=int, default=1 << 60)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two calls")
    parser.add_argument("--flush-every", type=int, default=0, help="flush() after so many records")
    parser.add_argument("--run", default="job")
    parser.add_argument("--no-finish", action="store_true", help="leave without finish(), as os._exit does")
    options = parser.parse_args()
    import ranklog

    ranklog.init(project="faults", id=options.run, name=options.name)
    witness = Witness(options.name, options.ledgers)
    end_s = time.monotonic() + options.seconds
    while witness.returned < options.count and time.monotonic() < end_s and not Path("enough").exists():
        witness.log()
        if options.flush_every and witness.returned % options.flush_every == 0:
            witness.flush()
        if options.pause:
            time.sleep(options.pause)
    if options.no_finish:
        os._exit(0)
    logged = witness.returned
    ranklog.finish(timeout=10)
    assert logged == witness.returned


if __name__ == "__main__":
    main()
