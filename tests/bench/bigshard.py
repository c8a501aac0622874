"""A large shard of one run, sorted as compaction leaves it, written straight through the daemon's own encoder settings:
(kind, key, rank, step), row groups of 128k rows. One row group is in memory at a time.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.schema import SCHEMA
from ranklogd.ship.shard import ROW_GROUP_ROWS, ZSTD_LEVEL

_EPOCH_US = 1_700_000_000_000_000
_STRINGS = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
_DELTA = ("seq", "lsn", "rank", "attempt", "uid", "step", "ts", "recv_ts")


class Written(NamedTuple):
    """A shard, and what it cost."""

    rows: int
    write_s: float
    """In pyarrow alone, without the making of the arrays."""


def write_series_shard(path: Path, *, steps: int, metrics: int) -> Written:
    """Write `steps` records of one rank with random values; keys are `train/metric_<n>`."""
    dice = np.random.default_rng(1)
    ts = _EPOCH_US + np.cumsum(dice.integers(90_000, 110_000, steps))
    write_s = 0.0
    encodings = {"value": "BYTE_STREAM_SPLIT", **dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED")}
    file_schema = pa.schema(
        [f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in _STRINGS else f for f in SCHEMA]
    )
    with pq.ParquetWriter(
        path,
        file_schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=_STRINGS,
        column_encoding=encodings,
        write_page_index=True,
        store_schema=False,
    ) as file:
        keys = sorted(f"train/metric_{number}" for number in range(metrics))
        for start in range(0, steps * metrics, ROW_GROUP_ROWS):
            rows = np.arange(start, min(start + ROW_GROUP_ROWS, steps * metrics))
            table = pa.table(_columns(rows, steps, ts, keys, dice), schema=file_schema)
            began = time.perf_counter()
            file.write_table(table)
            write_s += time.perf_counter() - began
        began = time.perf_counter()
    return Written(steps * metrics, write_s + time.perf_counter() - began)


def _columns(rows: Any, steps: int, ts: Any, keys: list[str], dice: Any) -> dict[str, Any]:
    step, key = rows % steps, rows // steps
    first_key = int(key[0])
    zeros = np.zeros(len(rows), np.int32)

    def word(text: str) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(zeros), pa.array([text]))

    names = pa.array(keys[first_key : int(key[-1]) + 1])
    return {
        "project": word("bench"),
        "run": word("series"),
        "writer": word("ab" * 16),
        "seq": pa.array(step + 1),
        "lsn": pa.array(step + 2),
        "rank": pa.array(zeros),
        "role": word(""),
        "node": word("node-1"),
        "attempt": pa.array(zeros),
        "uid": pa.array(zeros),
        "step": pa.array(step),
        "ts": pa.array(ts[step]).cast(SCHEMA.field("ts").type),
        # A batch each 100 ms: its records arrive at one moment.
        "recv_ts": pa.array(ts[step] // 100_000 * 100_000 + 120_000).cast(SCHEMA.field("ts").type),
        "kind": word("metrics"),
        "key": pa.DictionaryArray.from_arrays(pa.array((key - first_key).astype(np.int32)), names),
        "value": pa.array(dice.random(len(rows))),
        "text": pa.DictionaryArray.from_arrays(pa.nulls(len(rows), pa.int32()), pa.array([], pa.string())),
    }
