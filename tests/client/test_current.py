"""`import ranklog` and its module-level functions, in processes of their own."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Rig, logged, on_disk
from ranklog.frame import Kind


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("ranklog: warning:")]


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("ranklog:")]


# What a person sees.


def test_two_lines_are_printed_at_the_beginning_and_at_the_end(rig: Rig):
    rig.start_daemon()
    output = rig.client("import ranklog\nranklog.init(project='llama', name='first')\nranklog.finish()")
    begin, end = lines(output)
    assert re.fullmatch(r"ranklog: run first \(\w+\) · project llama · 1 rank · daemon at \S+", begin)
    assert end == "ranklog: run first finished · durable on this node · ranklog status"


def test_without_a_daemon_the_lines_say_so_and_name_the_command(rig: Rig):
    output = rig.client("import ranklog\nranklog.init(project='llama')\nranklog.log({'a': 1})\nranklog.finish()")
    begin, end = lines(output)
    assert "no daemon yet: records are kept on this node" in begin
    assert end.endswith("Bring them in: ranklog sync")


def test_only_local_rank_0_prints(rig: Rig):
    torchrun = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node-0", "MASTER_PORT": "1"}
    source = "import ranklog\nranklog.init(project='p', id='job')\nranklog.log({'a': 1})\nranklog.finish()"
    for rank, local_rank, expected in ((0, 0, 2), (8, 0, 2), (1, 1, 0), (15, 7, 0)):
        output = rig.client(source, **torchrun, RANK=str(rank), LOCAL_RANK=str(local_rank))
        assert len(lines(output)) == expected, output


@pytest.mark.parametrize("env", [{"RANKLOG_QUIET": "1"}, {"RANKLOG_MODE": "disabled"}])
def test_nothing_is_printed_where_that_is_asked_for(rig: Rig, env: dict[str, str]):
    source = "import ranklog\nranklog.init(project='p')\nranklog.log({'a': 1})\nranklog.finish()"
    assert rig.client(source, **env) == ""


def test_a_forked_child_that_starts_a_run_of_its_own_does_not_announce_the_end_of_its_parents(rig: Rig):
    rig.start_daemon()
    output = rig.client("""
import os, ranklog
ranklog.init(project="p", name="parent")
pid = os.fork()
if pid == 0:
    ranklog.init(project="p", name="child")
    ranklog.log({"child": 1})
    ranklog.finish()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
ranklog.log({"parent": 1})
ranklog.finish()
""")
    said = [re.sub(r"\(.*|·.*", "", line).strip() for line in lines(output)]
    assert said == ["ranklog: run parent", "ranklog: run child", "ranklog: run child finished", "ranklog: run parent finished"]
    written = rig.written().values()
    assert sorted(len(logged(records, key)) for records in written for key in ("child", "parent")) == [0, 0, 1, 1]


# Around a run.


def test_log_before_init_and_after_finish_costs_one_warning_each_and_no_exception(rig: Rig):
    output = rig.client("""
import ranklog
for turn in range(2):
    for _ in range(3):
        ranklog.log({"a": 1}); ranklog.log_system({"a": 1}); ranklog.alert("t"); ranklog.define_metric("a")
        ranklog.config["a"] = 1
        assert ranklog.config.get("a") is None
        assert ranklog.flush()
        ranklog.finish()
    assert ranklog.current_run() is None
    if turn == 0:
        run = ranklog.init(project="p")
        assert ranklog.current_run() is run
        ranklog.finish()
        run.log({"a": 1}); run.log({"a": 1})
""")
    told = [line.split()[2] for line in warnings(output)]
    assert sorted(told) == ["alert()", "config.update()", "define_metric()", "flush()", "log()", "log()", "log_system()"]


def test_init_again_finishes_the_run_before(rig: Rig):
    rig.start_daemon()
    rig.client("""
import ranklog
first = ranklog.init(project="p", id="one")
ranklog.log({"n": 1})
second = ranklog.init(project="p", id="two")
ranklog.log({"n": 2})
first.log({"n": 3})
with ranklog.init(project="p", id="three") as outer:
    outer.log({"n": 4})
    with ranklog.init(project="p", id="four") as inner:
        ranklog.log({"n": 5})
    outer.log({"n": 6})
ranklog.log({"n": 7})
""")
    rig.adopted()
    found = {rig.starts()[writer].run: records for writer, records in rig.written().items()}
    assert {run: logged(records, "n") for run, records in found.items()} == {
        "one": [1], "two": [2], "three": [4], "four": [5],
    }  # fmt: skip
    assert all(records[-1].kind == Kind.END for records in found.values())


def test_module_functions_work_from_threads(rig: Rig):
    rig.start_daemon()
    rig.client("""
import asyncio, threading, ranklog
from concurrent.futures import ThreadPoolExecutor
ranklog.init(project="p")
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda n: ranklog.log({"pool": n}), range(100)))
async def work(n):
    ranklog.log({"task": n})
    await asyncio.sleep(0)
async def main(): await asyncio.gather(*map(work, range(100)))
asyncio.run(main())
thread = threading.Thread(target=ranklog.finish)
thread.start(); thread.join()
assert ranklog.current_run() is None
""")
    [records] = rig.written().values()
    assert sorted(logged(records, "pool")) == sorted(logged(records, "task")) == list(range(100))


# Arguments.


def test_unknown_keywords_cost_one_warning(rig: Rig):
    output = rig.client("""
import ranklog
for _ in range(2):
    ranklog.init(project="p", entity="me", sync_tensorboard=True, mode="disabled")
""")
    [text] = warnings(output)
    assert "entity, sync_tensorboard" in text


@pytest.mark.parametrize(
    "call", ["init(mode='onlin')", "init(resume='perhaps')", "init(mode=3)"],
)  # fmt: skip
def test_a_word_that_cannot_be_understood_is_an_error_at_once(rig: Rig, call: str):
    output = rig.client(f"""
import ranklog
try:
    ranklog.{call}
except ranklog.RanklogError as error:
    print(type(error).__name__, error)
""")
    assert re.match(r"UsageError init\((mode|resume)=", output)
    assert "use" in output


def test_a_bad_variable_is_an_error_at_once_and_names_itself(rig: Rig):
    done = rig.python("import ranklog\nranklog.init(project='p')", RANKLOG_JOURNAL_SIZE_BYTES="lots")
    assert done.returncode == 1
    assert "RANKLOG_JOURNAL_SIZE_BYTES='lots' is not a size" in done.stderr


def test_whatever_the_names_are_made_of_the_run_starts(rig: Rig):
    rig.start_daemon()
    output = rig.client("""
import ranklog
for n, name in enumerate(["../../x", "é" * 4000, "🚀", "", " ", "a\\0b", "\\ud800", "x" * 5000, 5, None]):
    run = ranklog.init(project=name, name=name, group=name, job_type=name, notes=name, role=name, tags=[name, 5, None] * 50, id=f"r{n}")
    ranklog.log({"n": n})
    ranklog.finish()
""")
    assert "Traceback" not in output
    rig.adopted()
    assert sorted(n for records in rig.written().values() for n in logged(records, "n")) == list(range(10))


def test_init_config_is_the_first_record(rig: Rig):
    rig.start_daemon()
    rig.client("import ranklog\nranklog.init(project='p', config={'lr': 0.1, 'm': {'d': 2}})\nranklog.finish()")
    [records] = rig.written().values()
    assert (records[1].kind, records[1].payload) == (Kind.CONFIG, {"lr": 0.1, "m/d": 2})


def test_the_directory_of_a_run_is_where_its_spool_goes(rig: Rig, tmp_path: Path):
    rig.client("""
import ranklog
ranklog.init(project="p", dir="mine", mode="offline")
ranklog.log({"n": 1})
ranklog.finish()
""")
    [records] = on_disk(tmp_path / "mine").values()
    assert logged(records, "n") == [1]


# Modes.


def test_disabled_makes_no_file_no_thread_and_imports_no_zmq(rig: Rig):
    rig.client("""
import os, sys, threading, ranklog
before = set(os.listdir("/proc/self/fd"))
run = ranklog.init(project="p", mode="disabled", config={"a": 1})
for i in range(100):
    ranklog.log({"i": i}); ranklog.log_system({"i": i}); ranklog.alert("t")
pid = os.fork()
ranklog.log({"i": 1})
assert ranklog.flush()
if pid == 0: os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert run.config["a"] == 1
assert threading.active_count() == 1
assert set(os.listdir("/proc/self/fd")) == before
ranklog.finish()
assert not {"zmq", "ranklog.transport", "multiprocessing", "subprocess"} & set(sys.modules)
""")
    assert rig.leftovers() == []
    assert not rig.spool.exists() or not list(rig.spool.iterdir())


def test_offline_imports_no_zmq_and_never_calls_the_daemon(rig: Rig):
    rig.start_daemon()
    rig.client("""
import sys, ranklog
ranklog.init(project="p", mode="offline")
for i in range(100): ranklog.log({"i": i})
ranklog.finish()
assert "zmq" not in sys.modules
""")
    assert rig.status()["writers"] == 0
    [records] = on_disk(rig.spool).values()
    assert logged(records, "i") == list(range(100))
    assert records[-1].kind == Kind.END


def test_a_daemon_that_cannot_be_had_does_not_hold_up_init(rig: Rig):
    rig.start_daemon()
    for state in ("running", "dead"):
        rig.client("""
import time, ranklog
began = time.monotonic()
ranklog.init(project="p")
assert time.monotonic() - began < 0.5
""")
        if state == "running":
            rig.kill(rig.daemons[-1])
