"""One metric of one run out of a compacted shard: 1 M steps × 50 metrics, sorted; plain DuckDB into Arrow, warm."""

import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from bench.bigshard import write_series_shard
from bench.load import quantile
from bench.node import Options
from bench.rows import Row


def series(options: Options) -> list[Row]:
    """Read one of 50 series; the floor is pyarrow reading just the row groups that hold it."""
    steps = options.pick(1_000_000, 100_000)
    with tempfile.TemporaryDirectory(prefix="rlbench-", dir=options.directory) as name:
        path = Path(name) / "series.parquet"
        written = write_series_shard(path, steps=steps, metrics=50)
        took = _query(path, steps)
        floor = _row_groups(path)
        size = path.stat().st_size
    note = (
        f"{written.rows:,} values, {size / written.rows * 50:.0f} bytes per record of 50; {steps:,} points read; "
        f"best {min(took):.0f}, p90 {quantile(took, 0.9):.0f} ms; floor: pyarrow reading those row groups"
    )
    return [
        Row(
            figure=f"one metric of one run out of {written.rows / 1e6:g} M values, warm, DuckDB",
            unit="ms",
            measured=statistics.median(took),
            floor=floor,
            floor_name="pyarrow",
            budget=60,
            note=note,
        )
    ]


def _query(path: Path, steps: int) -> list[float]:
    con = duckdb.connect()
    con.execute("SET parquet_metadata_cache = true")
    wanted = "run = 'series' AND kind = 'metrics' AND key = 'train/metric_17'"
    query = f"SELECT step, value FROM read_parquet('{path}') WHERE {wanted}"
    took = []
    for number in range(12):
        began = time.perf_counter()
        table = con.sql(query).to_arrow_table()
        if number > 1:
            took.append((time.perf_counter() - began) * 1000)
        assert table.num_rows == steps, table.num_rows
    con.close()
    return took


def _row_groups(path: Path) -> float:
    took = []
    file = pq.ParquetFile(path)
    column = file.schema_arrow.get_field_index("key")
    wanted = "train/metric_17"
    for _ in range(5):
        began = time.perf_counter()
        statistic = [file.metadata.row_group(group).column(column).statistics for group in range(file.num_row_groups)]
        groups = [group for group, one in enumerate(statistic) if one.min <= wanted <= one.max]
        file.read_row_groups(groups, columns=["step", "value"])
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)
