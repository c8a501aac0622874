"""The measured process: `python -m bench.trainer WHAT JSON`. Each function below is one kind of training script.

It keeps itself small, for its own memory and CPU are what is measured: nothing is imported that the measurement does
not need. What it says and hears is described in `bench.trainers`.
"""

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import load
from bench.load import Record

Arguments = dict[str, Any]


def say(what: Any) -> None:
    """Tell the parent, then wait for its word."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


def tell(what: Any) -> None:
    """Tell the parent and go on."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def start_run(arguments: Arguments) -> Any:
    """Start this rank's run and return it."""
    import ranklog

    os.environ["RANKLOG_RUN_ID"] = arguments.get("run", "bench-run")
    os.environ |= {"RANK": str(arguments["rank"]), "WORLD_SIZE": str(arguments["world"])}
    return ranklog.init(project="bench")


def blocks(arguments: Arguments) -> None:
    """Time `log()` and raw_write paced, in alternating blocks, so that the machine's moods hit both."""
    import ranklog
    from bench.floors import raw_write

    records = load.make_records()
    run = start_run(arguments)
    calls: dict[str, Callable[[Record], object]] = {"log": ranklog.log, "raw": raw_write(Path(arguments["raw_path"]))}
    took: dict[str, list[int]] = {"log": [], "raw": []}
    pace_s, before = load.PACE_S, load.busy_step() if arguments.get("busy") else lambda: None
    for call in calls.values():
        load.paced(call, records, 50)
    say("ready")
    for number in range(arguments["blocks"]):
        for name in ("log", "raw") if number % 2 else ("raw", "log"):
            took[name] += load.paced(calls[name], records, arguments["calls"], pace_s, before)
    say({name: load.latency(values) for name, values in took.items()})
    logged = run._writer.written
    refused = run._writer.refused
    ranklog.finish(timeout=120)
    tell({"logged": logged, "refused": refused})


def flat(arguments: Arguments) -> None:
    """Log flat out; tell latencies, the moments of begin, last return and last ack, and CPU. Then floors, if asked."""
    import ranklog
    from bench import floors

    count = arguments["count"]
    # For rates into parquet no value may come twice: a compressor would find it.
    records = load.make_records(count=arguments.get("distinct", load.DISTINCT), seed=arguments["rank"])
    run = start_run(arguments)
    load.paced(ranklog.log, records, 20, 0.01)
    ranklog.flush()
    before = run._writer.written
    say("ready")
    cpu_s, began_s = time.process_time(), time.monotonic()
    took = load.flat(ranklog.log, records, count)
    logged_s = time.monotonic()
    durable = run._writer.flush(120)  # By the daemon's ack; `run.flush` would take a copy in the spool, too.
    durable_s = time.monotonic()
    said: dict[str, Any] = {
        "log": load.latency(took),
        "began_s": began_s,
        "logged_s": logged_s,
        "durable_s": durable_s,
        "durable": durable,
        "cpu_s": time.process_time() - cpu_s,
        "refused": run._writer.refused,
        "logged": run._writer.written - before,
    }
    say(said)
    if "floor_dir" in arguments:
        pwrite = floors.packed_pwrite(Path(os.environ["RANKLOG_JOURNAL_DIR"]) / "floor", 32 << 20)
        floor: dict[str, Any] = {"pwrite": load.latency(load.flat(pwrite, records, count))}
        raw_write = floors.raw_write(Path(arguments["floor_dir"]) / "raw")
        began_s, cpu_s = time.monotonic(), time.process_time()
        floor["raw"] = load.latency(load.flat(raw_write, records, count))
        say(floor | {"raw_s": time.monotonic() - began_s, "raw_cpu_s": time.process_time() - cpu_s})
    ranklog.finish(timeout=120)
    tell(None)


def cpu(arguments: Arguments) -> None:
    """Measure the CPU time of the whole process over blocks of paced calls of one kind: `null`, `raw` or `log`."""
    kind, records = arguments["kind"], load.make_records()
    call: Callable[[Record], object] = lambda record: None  # noqa: E731
    if kind == "raw":
        from bench.floors import raw_write

        call = raw_write(Path(arguments["raw_path"]))
    elif kind == "log":
        import ranklog

        start_run(arguments)
        call = ranklog.log
    load.paced(call, records, 100)
    say("ready")
    for _ in range(arguments["blocks"]):
        began_s = time.process_time()
        load.paced(call, records, arguments["count"])
        time.sleep(0.15)  # What the last calls still cause belongs to them.
        say(time.process_time() - began_s)


def memory(arguments: Arguments) -> None:
    """Measure what this process has before and after it begins to log, or (`zmq`) connects a bare zmq socket."""
    from bench.processes import memory_bytes

    records = load.make_records()
    load.paced(lambda record: None, records, 10, 0.001)
    memory_bytes()
    before = memory_bytes()
    if arguments["kind"] == "zmq":
        import msgpack
        import zmq

        socket = zmq.Context().socket(zmq.DEALER)
        socket.connect(f"ipc://{arguments['socket']}")
        socket.send(msgpack.packb(records[0]))
    else:
        import ranklog

        start_run(arguments)
        load.paced(ranklog.log, records, arguments["count"], 0.001)
        ranklog.flush()
    after = memory_bytes()
    say({name: after[name] - before[name] for name in after})
    tell(None)
    os._exit(0)


def steady(arguments: Arguments) -> None:
    """Log paced for a while, then flat out, again and again; the parent looks at the memory meanwhile."""
    import ranklog

    records = load.make_records()
    start_run(arguments)
    say("ready")
    for _ in range(arguments["rounds"]):
        load.paced(ranklog.log, records, arguments["count"], 0.02)
        load.flat(ranklog.log, records, arguments["burst"])
        ranklog.flush(120)
        say("round")
    ranklog.finish(timeout=120)
    tell(None)


def counted(arguments: Arguments) -> None:
    """Log until killed, or `count` times; after each return the number of returned calls is in a shared file.

    With `raw_path`, raw_write runs half a pace after each call, so that its maximum stands beside ours.
    """
    import ranklog

    pace_s = arguments["pace_s"]
    distinct, precision = arguments.get("distinct", load.DISTINCT), arguments.get("precision", "double")
    records = load.make_records(count=distinct, seed=arguments["rank"], precision=precision)
    counter = memoryview(shared_counter(Path(arguments["counter"]))).cast("Q")
    raw: Callable[[Record], object] | None = None
    if arguments.get("raw_path"):
        from bench.floors import raw_write

        raw = raw_write(Path(arguments["raw_path"]))
    run = start_run(arguments)
    say("ready")
    took, raw_took, raised, raw_raised = [], [], 0, 0
    due_s = time.monotonic()
    for index in range(arguments.get("count", 1 << 40)):
        if pace_s:
            due_s += pace_s
            time.sleep(max(0.0, due_s - time.monotonic()))
        record = records[index % len(records)]
        began = time.perf_counter_ns()
        try:
            ranklog.log(record)
        except Exception:  # noqa: BLE001 - what is measured: no exception may come
            raised += 1
        took.append(time.perf_counter_ns() - began)
        counter[0] = index + 1
        if raw is not None:
            time.sleep(pace_s / 2)
            began = time.perf_counter_ns()
            try:
                raw(record)
            except OSError:
                raw_raised += 1
            raw_took.append(time.perf_counter_ns() - began)
    if arguments.get("flush"):
        ranklog.flush(60)
    logged = {"log": load.latency(took), "raised": raised, "refused": run._writer.refused}
    say(logged | ({"raw": load.latency(raw_took), "raw_raised": raw_raised} if raw is not None else {}))
    began_s = time.monotonic()
    ranklog.finish(timeout=arguments.get("finish_s", 60))
    tell({"finish_s": time.monotonic() - began_s})


def shared_counter(path: Path) -> mmap.mmap:
    """Return eight bytes that outlive this process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 8)
    try:
        return mmap.mmap(fd, 8)
    finally:
        os.close(fd)


KINDS = {f.__name__: f for f in (blocks, flat, cpu, memory, steady, counted)}

if __name__ == "__main__":
    KINDS[sys.argv[1]](json.loads(sys.argv[2]))
