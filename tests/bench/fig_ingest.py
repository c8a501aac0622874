"""The daemon's front: CPU of a record, time to an ack, and 256 writers at once.

The first two are driven by bare sockets that speak the protocol (`bench.wire_driver`): real trainers would take the
same two cores. The floor is a router of thirty lines under the same load: receive, crc32, append, one fdatasync every
20 ms, ack. The writers of the last figure are whole ones (journal, sender thread, connection each), 32 in a process.
"""

import subprocess
import sys
from typing import Any

from bench.ledger import account
from bench.node import Node, Options, private_node
from bench.processes import cpu_s
from bench.rows import Row
from bench.trainers import Trainer, run_all, trainers
from ranklog import control

_DRIVER = "bench.wire_driver"
WRITERS, PROCESSES = 256, 8


def ingest(options: Options) -> list[Row]:
    """CPU of the ingest process per record, batches of 64, as fast as it acknowledges."""
    batches = options.pick(600, 100)
    with private_node(options) as node:
        records, spent_s, ours = _saturate(node, str(node.root / "run/ranklog.sock"), node.ingest_pid, batches)
        floor_socket = str(node.root / "floor.sock")
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.floor_server", floor_socket, str(node.root / "floor.wal")],
            env=node.env,
            cwd=node.root,
        )
        try:
            _, floor_s, bare = _saturate(node, floor_socket, server.pid, batches)
        finally:
            server.kill()
            server.wait()
    note = (
        f"{records:,} records of 12 metrics from 8 sockets; {records / ours['took_s']:,.0f} records/s, "
        f"the bare router {records / bare['took_s']:,.0f}"
    )
    return [
        Row(
            figure="ingest CPU per record, batches of 64",
            unit="µs",
            measured=spent_s / records * 1e6,
            floor=floor_s / records * 1e6,
            floor_name="bare router",
            budget=1.5,
            note=note,
        )
    ]


def _saturate(node: Node, socket: str, pid: int, batches: int) -> tuple[int, float, dict[str, Any]]:
    driver = Trainer(
        node, "saturate", module=_DRIVER, socket=socket, writers=8, batches=batches, records=64, metrics=12
    )
    driver.hear()
    spent_s = cpu_s(pid)
    driver.tell()
    said = driver.hear()
    spent_s = cpu_s(pid) - spent_s
    driver.end()
    return 8 * batches * 64, spent_s, said


def ack_latency(options: Options) -> list[Row]:
    """Time from a batch's arrival to its ack at 1,600 records/s × 50 metrics, conversions running beside."""
    with private_node(options, RANKLOG_SEAL_AGE_S="2s") as node:
        load = {"writers": 8, "batches": options.pick(150, 40), "records": 20, "metrics": 50, "pace_s": 0.1}
        driver = Trainer(node, "pace", module=_DRIVER, socket=str(node.root / "run/ranklog.sock"), **load)
        driver.go()
        said = driver.hear()
        driver.end()
    note = (
        f"{said['calls']} batches of 20 records, 8 writers, 80 batches/s, a segment sealed and converted every 2 s; "
        f"max {said['max'] / 1000:.0f} ms; {said['refused']} refused"
    )
    return [
        Row(
            figure=f"ack after arrival, 1,600 records/s × 50 metrics, {name}",
            unit="ms",
            measured=said[name] / 1000,
            budget=40 if name == "p99" else None,
            note=note if name == "p99" else "",
        )
        for name in ("p50", "p99")
    ]


def writers_256(options: Options) -> list[Row]:
    """256 writers × 100 records/s for 10 s: nothing refused, nothing lost."""
    seconds = options.pick(10, 3)
    each = WRITERS // PROCESSES
    load = {"writers": each, "seconds": seconds, "rate": 100}
    with private_node(options) as node:
        with trainers(node, "many", PROCESSES, module="bench.many_writers", **load) as ranks:
            said = run_all(ranks)
            for rank in ranks:
                rank.end()
        node.flush()
        found = account(node.store, dict.fromkeys(range(WRITERS), 100 * seconds))
        status = control.status(node.settings)
    refused = sum(one["refused"] for one in said) + sum(status["refused"].values())
    took_s, durable_s = (max(one[name] for one in said) for name in ("took_s", "durable_s"))
    p50, p99 = (max(one["log"][name] for one in said) for name in ("p50", "p99"))
    note = (
        f"whole writers, {each} in each of {PROCESSES} processes with one pacing thread; {found.records:,} found, "
        f"{found.doubled} rows doubled; logged in {took_s:.2f} s, all durable {durable_s:.2f} s later; slowest "
        f"process: a write p50 {p50:.0f}, p99 {p99:.0f} µs; refusals by the daemon: {status['refused'] or 'none'}"
    )
    return [
        Row(figure="256 writers × 100 records/s, refused", unit="records", measured=refused, budget=0, note=note),
        Row(
            figure="256 writers × 100 records/s, lost", unit="records", measured=found.missing + found.in_gaps, budget=0
        ),
        Row(
            figure="256 writers × 100 records/s, achieved",
            unit="records/s",
            measured=WRITERS * 100 * seconds / took_s,
            budget=25_500,
            at_least=True,
        ),
    ]
