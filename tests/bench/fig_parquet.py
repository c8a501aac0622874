"""The whole way: from the first `log()` until a reader finds the rows. Rate, CPU of everybody, bytes; and the shipper alone."""

import time
from typing import Any

from bench import floors
from bench.ledger import account
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
        for rank in rank_list:
            rank.end()
    found = account(node.store, dict.fromkeys(range(ranks), count + 20))
    total = ranks * count
    began_s = min(one["began_s"] for one in said)
    client_s = sum(one["cpu_s"] for one in said)
    return {
        "said": said,
        "found": found,
        "parquet_rate": total / (uploaded_s - began_s),
        "durable_rate": total / (max(one["durable_s"] for one in said) - began_s),
        "cpu_per_1k": (client_s + ingest_s + shipper_s) / total * 1000,
        "note": (
            f"{total:,} records of {ranks} process{'es' * (ranks > 1)}; logged after {max(one['logged_s'] for one in said) - began_s:.2f} s, "
            f"readable after {uploaded_s - began_s:.2f} s; CPU ms/1k: trainer {client_s / total * 1e6:.1f}, ingest {ingest_s / total * 1e6:.1f}, "
            f"shipper {shipper_s / total * 1e6:.1f}; found {found.records:,} records, missing {found.missing}, in gaps {found.in_gaps}, "
            f"doubled {found.doubled}, refused {sum(one['refused'] for one in said)}"
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
    """Bytes of a record in the shard of 10 s, at 8 × 10 and 8 × 200 records a second."""
    rows = []
    for pace, count in ((10, 100), (200, 2000)):
        count = options.pick(count, min(count, 500))
        # One seal for all of it: an age that ends in the middle would measure two half shards.
        with private_node(options, RANKLOG_SEAL_AGE_S="60s") as node:
            sizes = {"pace_s": 1 / pace, "count": count, "distinct": count, "flush": True}
            with trainers(node, "counted", 8, counter=str(node.shm / "counter"), **sizes) as ranks:
                run_all(ranks)
                node.flush()
                found = account(node.store, dict.fromkeys(range(8), count))
                for rank in ranks:
                    rank.end()
            wide = floors.wide_bytes(node.root / "wide.parquet", _wide(8 * count))
        seconds = count / pace
        note = f"{found.records} records, {found.shards} shard; floor: one wide file of the same values by pyarrow's best encodings"
        rows.append(
            Row(
                figure=f"bytes per record, fresh shard of 8 × {pace}/s × {seconds:g} s",
                unit="bytes",
                measured=found.size_bytes / found.records,
                floor=wide / (8 * count),
                floor_name="wide",
                budget=80,
                note=note,
            )
        )
    return rows


def _wide(records: int) -> Any:
    import numpy as np
    import pyarrow as pa

    steps = np.arange(records) // 8
    jitter = np.random.default_rng(1).integers(0, 1000, records)
    columns: dict[str, Any] = {
        "step": steps,
        "rank": (np.arange(records) % 8).astype(np.int32),
        "ts": steps * 100_000 + jitter,
    }
    record = make_records(count=records)
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
