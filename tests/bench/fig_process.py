"""What ranklog adds to the trainer's life: the time of import, init() and finish(), and memory; and a node's memory."""

import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bench.node import Node, Options, private_node
from bench.processes import memory_bytes
from bench.rows import Row
from bench.trainers import Trainer, trainers

_LOOK_S = 0.1

_SCRIPT = """
import sys, time, os
sys.stdout.write("0\\n"); sys.stdout.flush(); sys.stdin.readline()
cpu = time.process_time()
a = time.perf_counter()
import ranklog
b = time.perf_counter()
cpu = time.process_time() - cpu
ranklog.init(project="bench")
c = time.perf_counter()
for i in range(10):
    ranklog.log({f"train/metric_{n}": i / 7 for n in range(12)})
d = time.perf_counter()
ranklog.finish()
e = time.perf_counter()
sys.stdout.write(f"[{b - a}, {c - b}, {e - d}, {cpu}]\\n")
"""
# A real trainer has loaded these long before; in a bare interpreter they are two fifths of the import.
_STDLIB = "dataclasses, enum, hashlib, json, pathlib, re, threading, typing"
_LOADED = _SCRIPT.replace("import sys, time, os", f"import sys, time, os, {_STDLIB}")
_FLOOR = """
import sys, time
sys.stdout.write("0\\n"); sys.stdout.flush(); sys.stdin.readline()
a = time.perf_counter()
import msgpack
b = time.perf_counter()
sys.stdout.write(f"[{b - a}, 0, 0, 0]\\n")
"""


def _together(node: Node, script: str, count: int) -> list[list[float]]:
    """Start `count` processes, let them go at one moment.

    Return the seconds of import, init() and finish() of each, and the CPU seconds of import.
    """
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "RANKLOG_RUN_ID": f"start-{count}"}
        env = node.env | own
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=node.root,
            )
        )
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.communicate(timeout=60)[0]) for process in started]


def startup(options: Options) -> list[Row]:
    """`import ranklog`, `init()`, `finish()` with the daemon up; then 8 ranks at one moment."""
    with private_node(options) as node:
        _together(node, _SCRIPT, 1)  # Writes the bytecode.
        alone = [_together(node, _SCRIPT, 1)[0] for _ in range(options.pick(15, 5))]
        loaded = [_together(node, _LOADED, 1)[0][0] * 1000 for _ in range(options.pick(9, 5))]
        floor = [_together(node, _FLOOR, 1)[0][0] * 1000 for _ in range(options.pick(9, 5))]
        eight = [_together(node, _SCRIPT, 8) for _ in range(options.pick(5, 2))]
    imported, initialised, finished, spent = ([times[part] * 1000 for times in alone] for part in range(4))
    slowest = [max(i + n for i, n, *_ in ranks) * 1000 for ranks in eight]
    everything = [max(i + n + f for i, n, f, _ in ranks) * 1000 for ranks in eight]
    count = (
        f"median of {len(alone)} processes, bytecode warm; CPU {statistics.median(spent):.1f} ms, "
        f"least {min(imported):.1f} ms, {min(spent):.1f} ms of CPU"
    )
    return [
        Row(
            figure="import ranklog",
            unit="ms",
            measured=statistics.median(imported),
            budget=15,
            floor=statistics.median(floor),
            floor_name="import msgpack",
            note=count,
        ),
        Row(
            figure="import ranklog in a process that has the standard library",
            unit="ms",
            measured=statistics.median(loaded),
            note=f"loaded before, as in every real trainer: {_STDLIB}",
        ),
        Row(figure="init()", unit="ms", measured=statistics.median(initialised), budget=20),
        Row(figure="finish(), daemon up, 10 records", unit="ms", measured=statistics.median(finished), budget=150),
        Row(
            figure="8 ranks together, import + init()",
            unit="ms",
            measured=statistics.median(slowest),
            budget=300,
            note=f"the slowest rank; median of {len(eight)} starts",
        ),
        Row(
            figure="8 ranks together, import + init() + finish()",
            unit="ms",
            measured=statistics.median(everything),
            budget=300,
        ),
    ]


def memory(options: Options) -> list[Row]:
    """Memory that logging adds to a process, beside what zmq and msgpack alone add."""
    grown: dict[str, dict[str, Any]] = {}
    with private_node(options) as node:
        for kind in ("zmq", "log"):
            found = []
            for _ in range(options.pick(3, 2)):
                rank = Trainer(
                    node, "memory", kind=kind, count=2000, rank=0, world=1, socket=str(node.root / "run/ranklog.sock")
                )
                found.append(rank.hear())
                rank.end()
            grown[kind] = {name: statistics.median(one[name] for one in found) / 1e6 for name in found[0]}
    note = "growth from bare python with the harness to 2,000 records logged and acknowledged"
    return [
        Row(
            figure=f"memory added to the trainer, {name.upper()}",
            unit="MB",
            measured=grown["log"][name],
            floor=grown["zmq"][name],
            floor_name="zmq + msgpack",
            budget=8 if name == "uss" else None,
            note=note if name == "uss" else "",
        )
        for name in ("uss", "pss", "rss")
    ]


def node_memory(options: Options) -> list[Row]:
    """Memory of 8 ranks, ingest and shipper while they log 50 times a second each and then flat out, in rounds."""
    rounds, count, burst = options.pick(4, 2), options.pick(250, 50), options.pick(20_000, 4_000)
    peaks: list[dict[str, int]] = []
    with private_node(options) as node, trainers(node, "steady", 8, rounds=rounds, count=count, burst=burst) as ranks:
        for rank in ranks:
            rank.go()
        for _ in range(rounds):
            with _watched(node, ranks) as peak:
                for rank in ranks:
                    rank.hear()
                node.flush()
            peaks.append(peak)
            for rank in ranks:
                rank.tell()
        for rank in ranks:
            rank.hear()
    rows = []
    for name, budget in (("ranks", 150), ("ingest", 60), ("shipper", 350)):
        values = [peak[name] / 1e6 for peak in peaks]
        rows.append(
            Row(
                figure=f"memory of a node with 8 ranks, {name}, PSS",
                unit="MB",
                measured=max(values),
                budget=budget,
                note="peaks of the rounds: "
                + ", ".join(f"{value:.0f}" for value in values)
                + " MB; hours were not measured",
            )
        )
    return rows


@contextmanager
def _watched(node: Node, ranks: list[Trainer]) -> Iterator[dict[str, int]]:
    """Look at everybody's memory again and again meanwhile; give the peaks."""
    peak = {"ranks": 0, "ingest": 0, "shipper": 0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_S):
            with suppress(OSError):
                seen = (sum(memory_bytes(rank.pid)["pss"] for rank in ranks), memory_bytes(node.ingest_pid)["pss"])
                shipper = node.shipper_pid
                for name, value in zip(peak, (*seen, memory_bytes(shipper)["pss"] if shipper else 0), strict=True):
                    peak[name] = max(peak[name], value)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
