"""What a call of `log()` costs the training: flat out; paced, whatever happens to daemon and disk; and in CPU.

Paced calls are compared with raw_write in blocks that alternate within one process, so that both meet the same machine.
"""

import shutil
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import sub
from typing import Any

from bench.disks import Checkpoint, frozen, loop_ext4
from bench.ledger import account
from bench.load import PACE_S
from bench.node import Node, Options, private_node
from bench.rows import Row, Skipped
from bench.trainers import trainers

P50_RATIO, P99_RATIO = 1.4, 2.5


def log_flat(options: Options) -> list[Row]:
    """`log()` flat out, the daemon running."""
    count = options.pick(20_000, 5_000)
    runs: list[dict[str, Any]] = []
    for _ in range(options.pick(5, 2)):
        with private_node(options) as node, trainers(node, "flat", 1, count=count, floor_dir=str(node.root)) as (rank,):
            rank.go()
            said = rank.hear()
            rank.tell()
            runs.append(said | rank.hear())
            rank.end()

    def middle(call: str, figure: str) -> float:
        return statistics.median(run[call][figure] for run in runs)

    note = f"median of {len(runs)} processes of {count} calls each; floor: packb + crc32 + pwrite in tmpfs"
    alone = "raw_write alone: " + ", ".join(f"{name} {middle('raw', name):.3g} µs" for name in ("p50", "p99", "max"))
    return [
        Row(
            figure="log() flat out, p50",
            unit="µs",
            measured=middle("log", "p50"),
            floor=middle("pwrite", "p50"),
            floor_name="pwrite",
            budget=1.5,
            of_floor=True,
            note=note,
        ),
        Row(
            figure="log() flat out, p99",
            unit="µs",
            measured=middle("log", "p99"),
            floor=middle("pwrite", "p99"),
            floor_name="pwrite",
            budget=60,
        ),
        Row(
            figure="log() flat out, max",
            unit="µs",
            measured=middle("log", "max"),
            floor=middle("pwrite", "max"),
            floor_name="pwrite",
            note=alone,
        ),
        Row(
            figure="log() flat out beside raw_write, p50",
            unit="µs",
            measured=middle("log", "p50"),
            floor=middle("raw", "p50"),
            floor_name="raw_write",
        ),
    ]


def log_paced(options: Options) -> list[Row]:
    """`log()` at 200 calls a second, beside raw_write in the same process: the daemon running, stopped, frozen."""
    rows = []
    for name, arrange in (("running", nullcontext), ("stopped", _stopped), ("frozen", _sigstopped)):
        with private_node(options) as node:
            rows += _paced_rows(f"daemon {name}", *_blocks(options, node, arrange))
    with private_node(options) as node:
        measured, lost = _blocks(options, node, nullcontext, busy=True)
    more = "8 MB are copied before each call, with the GIL held: what a busy trainer leaves in the caches"
    return rows + _paced_rows("daemon running, busy trainer", measured, lost, more)


def log_checkpoint(options: Options) -> list[Row]:
    """The same beside a checkpoint that is written to the disk of spool, state and raw_write."""
    size = options.pick(options.checkpoint_bytes, min(options.checkpoint_bytes, 2_000_000_000))
    if shutil.disk_usage(options.directory).free < 2 * size + (4 << 30):
        raise Skipped(
            f"needs {2 * size / 1e9:.0f} GB free below {options.directory}, and 4 GB to spare; see --checkpoint-bytes"
        )
    said = ""

    @contextmanager
    def beside(node: Node) -> Iterator[None]:
        nonlocal said
        checkpoint = Checkpoint(node.root / "checkpoint", size)
        try:
            checkpoint.await_written(min(size // 4, 1 << 30))
            yield
        finally:
            said = checkpoint.stop()

    with private_node(options) as node:
        measured, lost = _blocks(options, node, beside)
    return _paced_rows(f"beside a {size / 1e9:g} GB checkpoint", measured, lost, said)


def log_frozen_disk(options: Options) -> list[Row]:
    """The same while the disk of spool and state is frozen for 10 s; raw_write has another disk."""
    with loop_ext4(options, 512 << 20) as mount, private_node(options, disk=mount) as node:
        calls = int(10 / PACE_S / 2 / 5)
        measured, lost = _blocks(options, node, lambda _: frozen(mount), blocks=5, calls=calls)
    return _paced_rows("state disk frozen for 10 s", measured, lost, "raw_write on a disk that is not frozen")


def _blocks(
    options: Options,
    node: Node,
    arrange: Callable[[Node], AbstractContextManager[None]],
    blocks: int = 0,
    calls: int = 100,
    busy: bool = False,
) -> tuple[dict[str, Any], str]:
    """Measure while `arrange` holds; return the latencies and what became of the records afterwards."""
    blocks = blocks or options.pick(12, 2)
    load = {"blocks": blocks, "calls": calls, "busy": busy}
    with trainers(node, "blocks", 1, raw_path=str(node.root / "raw"), **load) as (rank,):
        rank.hear()
        with arrange(node):
            rank.tell()
            measured: dict[str, Any] = rank.hear()
        last = rank.end()
    node.bring_in()
    found = account(node.store, {0: last["logged"]})
    lost = found.missing + found.in_gaps
    return measured, f"lost {lost} of {last['logged']}, doubled {found.doubled}, refused {last['refused']}"


@contextmanager
def _stopped(node: Node) -> Iterator[None]:
    node.stop()
    try:
        yield
    finally:
        node.start()


@contextmanager
def _sigstopped(node: Node) -> Iterator[None]:
    node.signal(signal.SIGSTOP, shipper=True)
    try:
        yield
    finally:
        node.signal(signal.SIGCONT, shipper=True)


def _paced_rows(what: str, measured: dict[str, Any], lost: str, more: str = "") -> list[Row]:
    log, raw = measured["log"], measured["raw"]
    note = f"{log['calls']} calls of each; max {log['max']:,.0f} µs, raw_write's {raw['max']:,.0f}; {lost}"
    return [
        Row(
            figure=f"log() paced, {what}, {name}",
            unit="µs",
            measured=log[name],
            floor=raw[name],
            floor_name="raw_write",
            budget=budget,
            of_floor=True,
            note="; ".join(filter(None, [note, more])) if name == "p99" else "",
        )
        for name, budget in (("p50", P50_RATIO), ("p99", P99_RATIO))
    ]


def log_cpu(options: Options) -> list[Row]:
    """CPU of the trainer for each paced call, all its threads, beside raw_write; the harness is subtracted."""
    blocks, count = options.pick(15, 4), 200
    spent: dict[str, list[float]] = {"null": [], "raw": [], "log": []}
    with private_node(options) as node, ExitStack() as stack:
        ranks = {}
        for kind in spent:
            load = {"kind": kind, "blocks": blocks, "count": count, "raw_path": str(node.root / "raw")}
            (ranks[kind],) = stack.enter_context(trainers(node, "cpu", 1, **load))
            ranks[kind].hear()
        for number in range(blocks):
            for kind in spent if number % 2 else reversed(spent):
                ranks[kind].tell()
                spent[kind].append(ranks[kind].hear() / count * 1e6)
    null = statistics.median(spent["null"])
    raw, log = (statistics.median(map(sub, spent[kind], spent["null"])) for kind in ("raw", "log"))
    note = f"median of {blocks} blocks of {count} calls in turn, {null:.3g} µs of harness subtracted"
    return [
        Row(
            figure="trainer CPU per paced call, all threads",
            unit="µs",
            measured=log,
            floor=raw,
            floor_name="raw_write",
            budget=2.0,
            of_floor=True,
            note=note,
        )
    ]
