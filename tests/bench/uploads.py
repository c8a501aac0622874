"""Thousands of uploads by one process: does it grow? `python -m tests.bench.uploads [--count 5000] [--png F] [--json F]`.

A process of its own, with the environment of a shipper, puts small shards one by one into a bucket on loopback and
looks each up again, as the uploader does. The Hub, in this process, fails now and then: an upload that was broken off
must leave nothing behind either. What must be flat: memory, descriptors, threads, the cache, logs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / part) for part in ("client", "daemon", "tests")]

from hub.server import Hub  # noqa: E402
from ranklogd.secrecy import shipper_environment  # noqa: E402

SHARD_SIZE = 4000
DEADLINE_S = 4.0
FAULT_EVERY = 50
"""Of so many uploads one meets a fault."""
SAMPLES = 100
WARM_UP = 0.2
"""The first part of the run, which is not judged: libraries load, pools fill."""
GROWTH_MAX = {"rss_bytes": 8 << 20, "fds": 4, "threads": 4, "cache_bytes": 64 << 10, "log_bytes": 0}
"""How much more the end may have than what came after the warm-up."""


class Sample(NamedTuple):
    """The uploading process after so many uploads."""

    uploads: int
    failures: int
    at_s: float
    rss_bytes: int
    fds: int
    threads: int
    cache_bytes: int
    log_bytes: int


def upload(count: int, room: Path) -> None:
    """Be the uploading process: put `count` shards, print a sample now and then."""
    from ranklog.errors import StoreError
    from ranklog.stores.base import StoreOptions, Upload, open_store

    store = open_store("hf://buckets/user/b/logs", StoreOptions(deadline_s=DEADLINE_S, token_file=room / "token"))
    source, failures, began_s = room / "shard", 0, time.monotonic()
    for number in range(1, count + 1):
        source.write_bytes(os.urandom(SHARD_SIZE))
        key = f"v1/{number:06}.parquet"
        while True:
            try:
                errors = store.put([Upload(source, key)])
                assert errors == {key: None}, errors
                assert store.heads([key])[key].size_bytes == SHARD_SIZE
                break
            except StoreError:
                failures += 1
        if number % max(1, count // SAMPLES) == 0 or number == count:
            sys.stdout.write(json.dumps(_sample(number, failures, time.monotonic() - began_s, room)) + "\n")
            sys.stdout.flush()


def _sample(uploads: int, failures: int, at_s: float, room: Path) -> Sample:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    cache, logs = _size(room / "xet"), sum(_size(room / place) for place in ("home", "xet/logs"))
    return Sample(
        uploads,
        failures,
        at_s,
        int(fields["VmRSS"].split()[0]) * 1024,
        len(os.listdir("/proc/self/fd")),
        int(fields["Threads"]),
        cache,
        logs,
    )


def _size(path: Path) -> int:
    sizes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                sizes += (Path(folder) / name).stat().st_size
            except FileNotFoundError:
                continue  # Pruned meanwhile.
    return sizes


def measure(count: int) -> list[Sample]:
    """Run the uploading process against a Hub in this one; return its samples."""
    with tempfile.TemporaryDirectory() as name, Hub(Path(name) / "hub") as hub:
        room = Path(name)
        hub.buckets.create("user/b", private=True)
        token = room / "token"
        token.touch(0o600)
        token.write_text(hub.token())
        for number in range(FAULT_EVERY // 2, count, FAULT_EVERY):
            route, fault = [("batch", {"status": 503}), ("put", {"hang": True}), ("paths", {"drop": True})][number % 3]
            hub.fault(route, skip=number, times=1, **fault)
        env, _ = shipper_environment(os.environ, room / "xet")
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(room / "home"), "HOME": name}
        command = [sys.executable, "-m", "tests.bench.uploads", "--count", str(count), "--inside", name]
        done = subprocess.run(command, env=env, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
        bucket = hub.buckets.get("user/b")
        assert bucket is not None
        assert len(bucket.files) == count, "every shard is there"
        assert all(len(hashes) == 1 for hashes in bucket.writes.values()), "and was registered once"
    return [Sample(*json.loads(line)) for line in done.stdout.splitlines()]


def growth(samples: Sequence[Sample]) -> dict[str, int]:
    """Return how much more of each there is at the end than behind the warm-up: medians of a few samples."""
    judged = samples[int(len(samples) * WARM_UP) :]
    few = max(1, len(judged) // 8)

    def middle(part: Sequence[Sample], name: str) -> int:
        return int(median(getattr(sample, name) for sample in part))

    return {name: middle(judged[-few:], name) - middle(judged[:few], name) for name in GROWTH_MAX}


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draw what must be flat into a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    last = samples[-1]
    figure, plots = pyplot.subplots(4, 1, figsize=(9, 10), sharex=True, layout="constrained")
    figure.suptitle(f"{last.uploads:,} uploads in {last.at_s:.0f} s, {last.failures} of them failed on the way")
    shown = [("rss_bytes", "RSS [MiB]", 1 << 20), ("fds", "descriptors", 1), ("threads", "threads", 1)]
    x = [sample.uploads for sample in samples]
    for plot, (name, label, unit) in zip(plots, shown, strict=False):
        plot.plot(x, [getattr(sample, name) / unit for sample in samples], marker=".")
        plot.set_ylabel(label)
        plot.set_ylim(bottom=0)
    for name, label in (("cache_bytes", "cache"), ("log_bytes", "logs")):
        plots[3].plot(x, [getattr(sample, name) / 1024 for sample in samples], marker=".", label=label)
    plots[3].set_ylabel("on disk [KiB]")
    plots[3].legend()
    plots[3].set_xlabel("uploads")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run, report, judge; exit code 1 if something grows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.uploads", description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        upload(arguments.count, arguments.inside)
        return 0
    samples = measure(arguments.count)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([sample._asdict() for sample in samples]))
    if arguments.png is not None:
        draw(samples, arguments.png)
    last, grown = samples[-1], growth(samples)
    sys.stdout.write(
        f"{last.uploads} uploads, {last.failures} failures on the way, {1000 * last.at_s / last.uploads:.0f} ms each\n"
    )
    for name, limit in GROWTH_MAX.items():
        sys.stdout.write(f"{name:12} {getattr(last, name):>12,}   grown by {grown[name]:>10,}   limit {limit:>10,}\n")
    return int(any(grown[name] > limit for name, limit in GROWTH_MAX.items()))


if __name__ == "__main__":
    sys.exit(main())
