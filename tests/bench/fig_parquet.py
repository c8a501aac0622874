"""The whole way, from the first `log()` until a reader finds the rows: rates, CPU, bytes; and the shipper alone."""

import tempfile
import time
from pathlib import Path
from typing import Any

from bench import floors
from bench.bigshard import write_series_shard
from bench.ledger import Account, account
from bench.load import make_records
from bench.node import Node, Options, private_node
from bench.processes import cpu_s
from bench.rows import Row
from bench.trainers import run_all, trainers


def _flat_out(options: Options, node: Node, ranks: int, count: int) -> dict[str, Any]:
    """Let `ranks` processes log `count` records each, flat out; return rates, CPU and what is in the store."""
    floor = {"floor_dir": str(node.root)} if ranks == 1 else {}
    with trainers(node, "flat", ranks, count=count, distinct=count, **floor) as rank_list:
        for rank in rank_list:
            rank.hear()
        daemon_s = cpu_s(node.ingest_pid), cpu_s(node.shipper_pid)
        for rank in rank_list:
            rank.tell()
        said = [rank.hear() for rank in rank_list]
        uploaded_s = node.flush()
        ingest_s, shipper_s = cpu_s(node.ingest_pid) - daemon_s[0], cpu_s(node.shipper_pid) - daemon_s[1]
        for rank, one in zip(rank_list, said, strict=True):
            if floor:
                rank.tell()
                one |= rank.hear()
            rank.end()
    node.flush()
    found = account(node.store, dict.fromkeys(range(ranks), count + 20))
    total = ranks * count
    began_s = min(one["began_s"] for one in said)
    logged_s = max(one["logged_s"] for one in said) - began_s
    client_s = sum(one["cpu_s"] for one in said)
    trainer_us, ingest_us, shipper_us = (spent / total * 1e6 for spent in (client_s, ingest_s, shipper_s))
    return {
        "said": said,
        "found": found,
        "parquet_rate": total / (uploaded_s - began_s),
        "durable_rate": total / (max(one["durable_s"] for one in said) - began_s),
        "cpu_per_1k": (client_s + ingest_s + shipper_s) / total * 1000,
        "note": (
            f"{total:,} records of {ranks} process{'es' * (ranks > 1)}; logged after {logged_s:.2f} s, readable after "
            f"{uploaded_s - began_s:.2f} s; CPU µs a record: trainer {trainer_us:.1f}, ingest {ingest_us:.1f}, shipper "
            f"{shipper_us:.1f}; {found.records:,} found, {found.missing} missing, {found.in_gaps} in gaps, "
            f"{found.doubled} rows doubled, {sum(one['refused'] for one in said)} refused"
        ),
    }


def parquet_one(options: Options) -> list[Row]:
    """One process flat out, until its rows are readable."""
    count = options.pick(100_000, 20_000)
    with private_node(options) as node:
        result = _flat_out(options, node, 1, count)
        said = result["said"][0]
        arrow_cpu_s = -time.process_time()
        arrow_s = floors.long_parquet(node.root / "floor.parquet", count, 12)
        arrow_cpu_s += time.process_time()
    floor_rate, floor_cpu = count / (said["raw_s"] + arrow_s), (said["raw_cpu_s"] + arrow_cpu_s) / count * 1000
    name = "raw_write + pyarrow"
    return [
        Row(
            figure="one process flat out, log() to readable parquet",
            unit="records/s",
            measured=result["parquet_rate"],
            floor=floor_rate,
            floor_name=name,
            budget=60_000,
            at_least=True,
            note=result["note"],
        ),
        Row(
            figure="one process flat out, CPU s per 1k records, all processes",
            unit="s",
            measured=result["cpu_per_1k"],
            floor=floor_cpu,
            floor_name=name,
            budget=0.03,
        ),
        _whole("one process flat out", result),
    ]


def parquet_eight(options: Options) -> list[Row]:
    """Eight ranks flat out, until everything is durable and until it is readable."""
    count = options.pick(25_000, 5_000)
    with private_node(options) as node:
        result = _flat_out(options, node, 8, count)
    return [
        Row(
            figure="8 ranks flat out, log() to readable parquet",
            unit="records/s",
            measured=result["parquet_rate"],
            budget=60_000,
            at_least=True,
            note=result["note"],
        ),
        Row(
            figure="8 ranks flat out, log() to durable ack",
            unit="records/s",
            measured=result["durable_rate"],
            budget=200_000,
            at_least=True,
        ),
        Row(figure="8 ranks flat out, CPU s per 1k records, all processes", unit="s", measured=result["cpu_per_1k"]),
        _whole("8 ranks flat out", result),
    ]


def _whole(what: str, result: dict[str, Any]) -> Row:
    found = result["found"]
    lost = found.missing + found.in_gaps + found.doubled
    return Row(figure=f"{what}, records lost or doubled", unit="records", measured=lost, budget=0)


def shard_bytes(options: Options) -> list[Row]:
    """Bytes of a record in the shard of 10 s at 8 × 10 and 8 × 200 records a second, and in a large one."""
    rows = []
    for pace, precision in ((10, "double"), (200, "double"), (10, "single"))[: options.pick(3, 2)]:
        count = options.pick(10 * pace, min(10 * pace, 500))
        found, wide = _fresh_shard(options, pace, count, precision)
        bits = {"double": "53 random bits", "single": "float32"}[precision]
        rows.append(
            Row(
                figure=f"bytes per record, shard of 8 × {pace}/s × {count / pace:g} s, {bits}",
                unit="bytes",
                measured=found.size_bytes / found.records,
                floor=wide / (8 * count),
                floor_name="wide",
                budget=80,
                note=f"{found.records} records, {found.shards} shard; floor: one wide file, pyarrow's best encodings",
            )
        )
    return [*rows, _large_shard(options)]


def _fresh_shard(options: Options, pace: int, count: int, precision: str) -> tuple[Account, int]:
    """Log from 8 ranks, flush once; return what is in the store, and the size of the same values as a wide file."""
    load = {"pace_s": 1 / pace, "count": count, "distinct": count, "precision": precision, "flush": True}
    # One seal for all of it: an age that ends in the middle would measure two half shards.
    with private_node(options, RANKLOG_SEAL_AGE_S="60s") as node:
        with trainers(node, "counted", 8, counter=str(node.shm / "counter"), **load) as ranks:
            run_all(ranks)
            node.flush()
            found = account(node.store, dict.fromkeys(range(8), count))
            for rank in ranks:
                rank.end()
        return found, floors.wide_bytes(node.root / "wide.parquet", _wide(8 * count, precision))


def _large_shard(options: Options) -> Row:
    records = options.pick(500_000, 50_000)
    with tempfile.TemporaryDirectory(prefix="rlbench-", dir=options.directory) as name:
        path = Path(name) / "large.parquet"
        write_series_shard(path, steps=records, metrics=12)
        size = path.stat().st_size
    entropy = 12 * 53 / 8
    return Row(
        figure="bytes per record, one sorted shard as compacted, 53 random bits",
        unit="bytes",
        measured=size / records,
        floor=entropy,
        floor_name="entropy of the values alone",
        budget=72,
        note=f"{records:,} records of one rank, written directly",
    )


def _wide(records: int, precision: str) -> Any:
    import numpy as np
    import pyarrow as pa

    steps = np.arange(records) // 8
    jitter = np.random.default_rng(1).integers(0, 1000, records)
    ranks = (np.arange(records) % 8).astype(np.int32)
    columns: dict[str, Any] = {"step": steps, "rank": ranks, "ts": steps * 100_000 + jitter}
    record = make_records(count=records, precision=precision)
    return pa.table(columns | {key: [one[key] for one in record] for key in record[0]})


def convert(options: Options) -> list[Row]:
    """The shipper alone: CPU from a sealed segment to shards on disk."""
    from bench import bench_convert

    figures = bench_convert.measure(quick=options.quick)
    floor = figures["raw_parquet_us_per_value"]
    note = "; ".join(f"{name} {figure:g}" for name, figure in figures.items())
    return [
        Row(
            figure=f"shipper CPU per value, {metrics} metrics",
            unit="µs",
            measured=figures[f"us_per_value_{metrics}"],
            floor=floor,
            floor_name="one plain double column",
            budget=budget,
            note=note,
        )
        for metrics, budget in ((50, 0.5), (12, 0.9))
    ]
