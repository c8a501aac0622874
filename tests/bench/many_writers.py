"""Many whole writers in one process, paced by one thread: journals, sender threads and connections are those of as many
trainers, and only their interpreters are missing. `python -m bench.many_writers many JSON`.
"""

import dataclasses
import json
import os
import resource
import sys
import threading
import time
from typing import Any

from bench import load
from bench.trainer import say, tell
from ranklog import places
from ranklog.config import Settings
from ranklog.frame import Kind
from ranklog.identity import process_start, this_machine
from ranklog.shield import warn
from ranklog.start import Start
from ranklog.writer import Places, Writer

threading.stack_size(256 << 10)


def many(arguments: dict[str, Any]) -> None:
    """Log `rate` records a second with each of `writers` writers, for `seconds`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    settings, records, each = Settings.from_env(), load.make_records(), arguments["writers"]
    found = Places(places.journal_dirs(settings), places.spool_dirs(settings), lambda: places.find_socket(settings))
    for directory in (*found.journal_dirs, *found.spool_dirs):
        directory.mkdir(parents=True, exist_ok=True)
    machine = this_machine()
    first = Start(writer="0" * 32, project="bench", run="bench-run", node=machine.hostname, boot=machine.boot_id)
    first = dataclasses.replace(
        first,
        world_size=each * arguments["world"],
        pid=os.getpid(),
        pid_start=process_start(os.getpid()) or 0,
        pid_ns=machine.pid_ns,
    )
    ranks = range(arguments["rank"] * each, (arguments["rank"] + 1) * each)
    writers = [
        Writer(dataclasses.replace(first, writer=os.urandom(16).hex(), rank=rank), settings, found, warn)
        for rank in ranks
    ]
    deadline_s = time.monotonic() + 30
    connected = sum(writer.connects(max(0.0, deadline_s - time.monotonic())) for writer in writers)
    assert connected == each, f"{connected} of {each} writers are connected"
    say("ready")
    took, began_s, pace_s = [], time.monotonic(), 1 / arguments["rate"]
    for tick in range(arguments["rate"] * arguments["seconds"]):
        time.sleep(max(0.0, began_s + tick * pace_s - time.monotonic()))
        for writer in writers:
            began = time.perf_counter_ns()
            writer.write(int(Kind.METRICS), records[tick % len(records)], None, counted=True)
            took.append(time.perf_counter_ns() - began)
    logged_s = time.monotonic()
    durable = all(writer.flush(60) for writer in writers)
    said = {
        "log": load.latency(took),
        "took_s": logged_s - began_s,
        "durable_s": time.monotonic() - logged_s,
        "durable": durable,
    }
    say(said | {"refused": sum(writer.refused for writer in writers)})
    for writer in writers:
        writer.end(0)
    for writer in writers:
        writer.flush(30)
        writer.close(10)
    tell(None)


if __name__ == "__main__":
    many(json.loads(sys.argv[2]))
