"""The converter: CPU per value from a sealed segment to committed parquet, bytes per record, peak memory.

    PYTHONPATH=client:daemon:tests python tests/bench/bench_convert.py        prints the figures as JSON

`raw_parquet_us_per_value` is the floor, taken in the same run: pyarrow writing the same number of values as one plain
double column with the same compression. Records are full doubles with random mantissas unless the name says f32
(what a float32 loss looks like once it is a Python float).
"""

import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.frame import Kind
from ranklogd.ship.convert import Converted, convert_segment
from ranklogd.statedir import StateDir
from segments import T0_NS, SegmentBuilder, frame, make_state, start_of, writer_id

RANKS = 8
BATCH = 64
SEGMENT_SIZE = 64 << 20


def build(records: int, metrics: int, draw: Callable[[], float]) -> tuple[SegmentBuilder, int]:
    """Return a segment of `records` records of 8 ranks, or as many as fit into a full one, and their number."""
    keys = [f"train/metric_{number}" for number in range(metrics)]
    jitter = random.Random(2)
    segment, seq, count, batch = SegmentBuilder(), 0, 0, min(BATCH, records // RANKS)
    for rank in range(RANKS):
        segment.writer(start_of(rank + 1, rank=rank))
    while count < records and len(segment.data) < SEGMENT_SIZE:
        for rank in range(RANKS):
            frames = b"".join(
                frame(
                    Kind.METRICS, seq + i, {key: draw() for key in keys}, step=seq + i,
                    wall_ns=T0_NS + (seq + i) * 100_000_000 + jitter.randrange(20_000_000),
                )
                for i in range(batch)
            )  # fmt: skip
            segment.batch(writer_id(rank + 1), seq, batch, frames)
        seq += batch
        count = seq * RANKS
    return segment, count


def convert(segment: SegmentBuilder, repeat: int = 1) -> tuple[Converted, float]:
    """Return what the last of `repeat` conversions did, and the least CPU seconds one took."""
    best = float("inf")
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            state = make_state(Path(folder) / "state")
            path = segment.seal(state)
            before = time.process_time()
            converted = convert_segment(path, state)
            best = min(best, time.process_time() - before)
    return converted, best


def measure(*, quick: bool = False) -> dict[str, float]:
    """Return the figures; about 15 s, or 3 s with `quick` (smaller segments, no peak memory)."""
    draw = random.Random(1).gauss
    figures: dict[str, float] = {}
    for metrics in (12, 50):
        records = (120_000 if quick else 600_000) // metrics
        segment, count = build(records, metrics, lambda: draw(0, 1))
        converted, cpu_s = convert(segment, 3)
        assert (converted.records, converted.values) == (count, count * metrics)
        figures[f"us_per_value_{metrics}"] = cpu_s / converted.values * 1e6
        figures[f"us_per_record_{metrics}"] = cpu_s / count * 1e6
    for name, draw_one in (("f64", lambda: draw(0, 1)), ("f32", lambda: _as_f32(draw(0, 1)))):
        segment, count = build(800, 12, draw_one)
        figures[f"bytes_per_record_800_{name}"] = convert(segment)[0].size_bytes / count
    figures["raw_parquet_us_per_value"] = _raw_parquet_s() / 600_000 * 1e6
    if not quick:
        for metrics in (1, 12):
            figures[f"rss_max_mb_64_mib_{metrics}"] = _rss_max_mb(metrics)
    return {name: round(figure, 3) for name, figure in figures.items()}


def _as_f32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _raw_parquet_s() -> float:
    table = pa.table({"value": np.random.default_rng(1).normal(size=600_000)})
    best = float("inf")
    for _ in range(3):
        before = time.process_time()
        pq.write_table(table, pa.BufferOutputStream(), compression="zstd", compression_level=1, use_dictionary=False)
        best = min(best, time.process_time() - before)
    return best


def _rss_max_mb(metrics: int) -> float:
    """Return the peak memory of a process that converts one full segment, which another one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        state = make_state(Path(folder) / "state")
        segment, _ = build(1 << 30, metrics, random.Random(1).random)
        path = segment.seal(state)
        del segment
        command = [sys.executable, __file__, str(state.root), str(path)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=env)
        return float(done.stdout)


def _convert_alone(root: str, path: str) -> None:
    convert_segment(Path(path), StateDir(Path(root)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    if sys.argv[1:]:
        _convert_alone(*sys.argv[1:])
    else:
        print(json.dumps(measure(), indent=2))
