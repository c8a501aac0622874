"""Who a process is, from the environments that launchers really make, and from a real torchrun-like process tree."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog import identity
from ranklog.identity import Identity, Machine, boot_id, identify, pid_namespace, process_start, this_machine

NODE = Machine(
    hostname="node-7", boot_id="boot", uid=1000, pid=50, pid_start=500, pid_ns=4, launcher_pid=40, launcher_start=400
)
OTHER_NODE = replace(NODE, hostname="node-8", boot_id="toob", launcher_pid=41, launcher_start=401, pid_ns=5)

Env = dict[str, str]


def torchrun(rank: int, world: int, local_world: int, **more: str) -> Env:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local_world), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world), "GROUP_RANK": str(rank // local_world), "ROLE_NAME": "default",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0", **more,
    }  # fmt: skip


def srun(rank: int, **more: str) -> Env:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 4),
        "SLURM_NTASKS": "8", "SLURM_NODEID": str(rank // 4), "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURMD_NODENAME": f"gpu{rank // 4}", **more,
    }  # fmt: skip


def openmpi(rank: int, **more: str) -> Env:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % 2), "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-node-7-123@1", **more,
    }  # fmt: skip


def who(env: Env, machine: Machine = NODE, project: str | None = "llama", **more: Any) -> Identity:
    return identify(env, project=project, machine=machine, **more)


def numbers(found: Identity) -> tuple[int, int, int, int, int]:
    return found.rank, found.local_rank, found.world_size, found.local_world_size, found.node_rank


TABLE: dict[str, tuple[Env, tuple[int, int, int, int, int], str]] = {
    "plain": ({}, (0, 0, 1, 1, 0), "new"),
    "torchrun on one node": (torchrun(3, 4, 4), (3, 3, 4, 4, 0), "launcher"),
    "torchrun --standalone": (torchrun(1, 2, 2, TORCHELASTIC_RUN_ID="6f1c"), (1, 1, 2, 2, 0), "torchrun"),
    "torchrun on nodes with --rdzv-id": (torchrun(5, 8, 4, TORCHELASTIC_RUN_ID="job"), (5, 1, 8, 4, 1), "torchrun"),
    "torchrun on nodes, static": (torchrun(5, 8, 4), (5, 1, 8, 4, 1), "address"),
    "torchrun with one rank": (torchrun(0, 1, 1), (0, 0, 1, 1, 0), "new"),
    "srun": (srun(5), (5, 1, 8, 4, 1), "slurm"),
    "srun torchrun": ({**srun(1), **torchrun(5, 8, 4)}, (5, 1, 8, 4, 1), "slurm"),
    "batch script": ({**srun(0), "SLURM_STEP_ID": ""}, (0, 0, 1, 1, 0), "new"),
    "interactive shell": ({**srun(0), "SLURM_STEP_ID": "4294967290"}, (0, 0, 1, 1, 0), "new"),
    "uneven nodes": (srun(6, SLURM_STEP_TASKS_PER_NODE="4,3(x2)", SLURM_NODEID="2"), (6, 2, 8, 3, 2), "slurm"),
    "mpirun": (openmpi(3), (3, 1, 4, 2, 0), "mpi"),
    "mpirun inside srun": ({**srun(1), **openmpi(3)}, (3, 1, 4, 2, 0), "mpi"),
    "mpiexec (hydra)": (
        {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4", **srun(0)},
        (2, 2, 4, 4, 0), "launcher",
    ),
    "srun --mpi=pmi2": ({**srun(5), "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 1, 8, 4, 1), "slurm"),
    "bare PMI": ({"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 2, 4, 1, 0), "address"),
    "by hand on one machine": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, (1, 1, 2, 2, 0), "launcher",
    ),
    "not distributed, the old way": ({"RANK": "-1", "LOCAL_RANK": "-1", "WORLD_SIZE": "1"}, (0, 0, 1, 1, 0), "new"),
    "rank without a size": ({"RANK": "3", "MASTER_ADDR": "localhost"}, (3, 3, 4, 4, 0), "launcher"),
    "RANKLOG_RUN_ID": ({"RANKLOG_RUN_ID": "mine", **srun(1)}, (1, 1, 8, 4, 0), "environment"),
    "hint for a plain process": ({"RANKLOG_RUN_ID_HINT": "h"}, (0, 0, 1, 1, 0), "hint"),
    "hint beside a job": ({"RANKLOG_RUN_ID_HINT": "h", **srun(1)}, (1, 1, 8, 4, 0), "slurm"),
    "hint beside torchrun": ({"RANKLOG_RUN_ID_HINT": "h", **torchrun(1, 2, 2)}, (1, 1, 2, 2, 0), "launcher"),
}  # fmt: skip


@pytest.mark.parametrize(("env", "sizes", "source"), TABLE.values(), ids=TABLE)
def test_each_launcher_is_understood(env: Env, sizes: tuple[int, ...], source: str) -> None:
    found = who(env)
    assert (numbers(found), found.source) == (sizes, source)
    assert found.is_local_rank0 == (found.local_rank == 0)
    assert (found.warning is not None) == (source == "address")


JOBS = {
    "one node": ([torchrun(rank, 4, 4) for rank in range(4)], [NODE] * 4),
    "standalone": ([torchrun(rank, 2, 2, TORCHELASTIC_RUN_ID="6f1c") for rank in range(2)], [NODE] * 2),
    "rendezvous": ([torchrun(rank, 4, 2, TORCHELASTIC_RUN_ID="x") for rank in range(4)], [NODE] * 2 + [OTHER_NODE] * 2),
    "static": ([torchrun(rank, 4, 2) for rank in range(4)], [NODE] * 2 + [OTHER_NODE] * 2),
    "srun": ([srun(rank) for rank in range(8)], [NODE] * 4 + [OTHER_NODE] * 4),
    "srun torchrun": (
        [{**srun(0, SLURMD_NODENAME=f"gpu{rank // 2}"), **torchrun(rank, 4, 2)} for rank in range(4)],
        [NODE] * 2 + [OTHER_NODE] * 2,
    ),
    "mpirun": ([openmpi(rank) for rank in range(4)], [NODE] * 2 + [OTHER_NODE] * 2),
}


@pytest.mark.parametrize(("envs", "machines"), JOBS.values(), ids=JOBS)
def test_all_ranks_of_a_job_are_one_run_with_one_name(envs: list[Env], machines: list[Machine]) -> None:
    pairs = enumerate(zip(envs, machines, strict=True))
    found = [who(env, replace(machine, pid=index)) for index, (env, machine) in pairs]
    assert len({(one.run, one.name, one.source) for one in found}) == 1
    assert re.fullmatch("r[0-9a-f]{24}", found[0].run)
    assert [one.rank for one in found] == list(range(len(envs)))
    assert len({one.node for one in found}) == len({machine.hostname for machine in machines})


@pytest.mark.parametrize(("envs", "machines"), JOBS.values(), ids=JOBS)
def test_two_projects_in_one_job_are_two_runs(envs: list[Env], machines: list[Machine]) -> None:
    assert who(envs[0], machines[0], "llama").run != who(envs[0], machines[0], "mistral").run


@pytest.mark.parametrize(("envs", "machines"), JOBS.values(), ids=JOBS)
def test_a_job_that_its_launcher_restarts_keeps_its_run_and_counts(envs: list[Env], machines: list[Machine]) -> None:
    again = {**envs[0], "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "1"}
    restarted = who(again, replace(machines[0], pid=99, pid_start=999))
    assert restarted.run == who(envs[0], machines[0]).run
    assert (who(envs[0], machines[0]).attempt, restarted.attempt) == (0, 3)


@pytest.mark.parametrize(
    "change", [{"launcher_pid": 42}, {"launcher_start": 402}, {"boot_id": "later"}, {"pid_ns": 9}], ids=str
)
def test_two_plain_torchruns_of_one_project_are_two_runs(change: dict[str, Any]) -> None:
    env = torchrun(0, 4, 4)
    assert who(env, NODE).run != who(env, replace(NODE, **change)).run


def test_a_new_master_port_after_a_restart_changes_nothing_on_one_node() -> None:
    assert who(torchrun(0, 4, 4)).run == who(torchrun(0, 4, 4, MASTER_PORT="41234")).run


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME"])
def test_other_jobs_steps_and_array_tasks_are_other_runs(name: str) -> None:
    assert who(srun(0)).run != who(srun(0, **{name: "99"})).run


def test_static_jobs_that_differ_in_what_is_known_are_other_runs() -> None:
    runs = {
        who(torchrun(0, 4, 2)).run, who(torchrun(0, 8, 2)).run, who(torchrun(0, 4, 2, MASTER_PORT="1")).run,
        who(torchrun(0, 4, 2, MASTER_ADDR="10.0.0.2")).run, who(torchrun(0, 4, 2), name="x").run,
        who(torchrun(0, 4, 2), replace(NODE, uid=1)).run,
    }  # fmt: skip
    assert len(runs) == 6


def test_a_job_that_nothing_identifies_is_warned_about_with_the_remedy() -> None:
    warning = who(torchrun(0, 4, 2)).warning
    assert warning is not None
    assert "RANKLOG_RUN_ID" in warning
    assert "--rdzv-id" in warning


def test_a_plain_process_is_a_run_of_its_own() -> None:
    one, other = who({}), who({})
    assert one.run != other.run
    assert re.fullmatch("r[0-9a-z]{26}", one.run)
    assert who({}, fresh_id="r1").run == "r1"


def test_an_id_that_is_given_is_taken_as_it_is() -> None:
    env = {"RANKLOG_RUN_ID": "from-env", "RANKLOG_RUN_ID_HINT": "hint", **srun(3)}
    assert who(env, id="mine").run == "mine"
    assert who(env, id="mine").source == "init"
    assert who(env).run == "from-env"
    assert who({"RANKLOG_RUN_ID": " "}).source == "new"
    assert len(who({}, id="x" * 9999).run) == 512


def test_a_hint_connects_what_nothing_else_connects() -> None:
    env = {"RANKLOG_RUN_ID_HINT": "h1"}
    assert who(env).run == who(env, OTHER_NODE).run
    assert who(env).run != who({"RANKLOG_RUN_ID_HINT": "h2"}).run
    assert who(env).run != who(env, project="mistral").run


def test_a_rank_given_to_init_wins() -> None:
    assert numbers(who({}, rank=5)) == (5, 5, 6, 1, 0)
    assert who(srun(5), rank=7).rank == 7
    assert who(srun(5), rank=7).local_rank == 1
    assert who({}, rank=5).source == "new"


def test_children_of_multiprocessing_with_ranks_are_one_run() -> None:
    spawned = replace(NODE, spawned=True)
    runs = {who({}, replace(spawned, pid=rank), rank=rank).run for rank in range(4)}
    assert len(runs) == 1
    assert len({who({}, replace(spawned, pid=rank)).run for rank in range(4)}) == 4
    assert who({}, replace(spawned, launcher_pid=9), rank=0).run not in runs


@pytest.mark.parametrize("rank", [-1, 1 << 31, "3", 1.5, None, object()])
def test_a_rank_that_is_none_is_ignored(rank: Any) -> None:
    found = who(srun(5), rank=rank)
    assert found.rank == 5
    assert (found.warning is None) == (rank is None)


@pytest.mark.parametrize("value", ["abc", "1.0", "0x1", "-2", "9" * 20, "٣", "1 2", "+1"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_a_number_that_is_none_is_ignored_with_a_warning(name: str, value: str) -> None:
    found = who({**torchrun(0, 2, 2), name: value})
    assert found.warning is not None
    assert f"{name}={value[:40]!r}" in found.warning
    assert found.rank == 0


def test_roles_and_nodes_have_words() -> None:
    assert who({}).role == ""
    assert who({"ROLE_NAME": "default"}).role == ""
    assert who({"ROLE_NAME": "rollout"}).role == "rollout"
    assert who({"ROLE_NAME": "rollout"}, role="trainer").role == "trainer"
    assert who({"ROLE_NAME": "rollout"}, role="").role == ""
    assert who({}).node == "node-7"
    assert who({"SLURMD_NODENAME": "gpu1"}).node == "gpu1"
    assert who({"NODE_NAME": "jenkins"}).node == "node-7"
    assert who({"NODE_NAME": "k8s-1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}).node == "k8s-1"


@pytest.mark.parametrize("project", [None, "", "\n", "x" * 9999, "../x", "\ud800", 7])
def test_any_project_is_a_project(project: Any) -> None:
    found = who({}, project=project)
    assert found.project
    assert len(found.project.encode()) <= 512


def test_a_name_is_kept_and_a_missing_one_is_made_of_the_run() -> None:
    assert who({}, name="my run").name == "my run"
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d+", who({}).name)


_NAMES = st.sampled_from(sorted({name for env, _, _ in TABLE.values() for name in env} | {"SLURM_RESTART_COUNT"}))
_WORDS = st.sampled_from(["none", "4(x2)", "4(x", "4,", "4294967295", "localhost", "127.0.0.1", "::1"])
_VALUES = st.text(alphabet=st.characters(exclude_characters="\0"), max_size=12) | st.integers().map(str) | _WORDS


@given(st.dictionaries(_NAMES, _VALUES), st.none() | st.integers(), st.booleans())
def test_no_environment_makes_it_raise(env: Env, rank: int | None, spawned: bool) -> None:
    found = who(env, replace(NODE, spawned=spawned), rank=rank)
    assert 0 <= found.rank < found.world_size <= 1 << 31
    assert found.run
    assert min(found.local_rank, found.node_rank, found.attempt, found.local_world_size - 1) >= 0


def test_this_machine_is_described() -> None:
    found = this_machine()
    assert found.pid == os.getpid()
    assert found.pid_start == process_start(os.getpid())
    assert re.fullmatch("[0-9a-f-]{36}", boot_id())
    assert found.boot_id == boot_id()
    assert found.pid_ns == pid_namespace() == pid_namespace(os.getpid())
    assert found.launcher_pid > 0
    assert not found.spawned


def test_a_process_that_is_gone_has_no_start() -> None:
    child = subprocess.Popen(["true"])
    assert process_start(child.pid) is not None
    child.wait()
    assert process_start(child.pid) is None
    assert pid_namespace(child.pid) is None


@pytest.mark.parametrize("command", ["a b", ") 1 2 (", "))))", "x\n) S 1"])
def test_a_process_may_have_any_name(command: str) -> None:
    script = f"import pathlib, os; pathlib.Path('/proc/self/comm').write_text({command!r}); print(flush=True); input()"
    command_line, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command_line, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        renamed = process_start(child.pid)
        own = process_start(os.getpid())
        assert Path(f"/proc/{child.pid}/comm").read_text() == command + "\n"
        child.communicate("\n")
    assert own is not None
    assert renamed is not None
    assert own <= renamed


LAUNCHER = """
import os, subprocess, sys
worker = "import json; from ranklog.identity import this_machine; print(json.dumps(this_machine().launcher_pid))"
inside = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, worker]  # A script around each rank, as with --no-python.
for rank in range(2):
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    subprocess.run(inside, env=env, check=True)
    subprocess.run([sys.executable, "-c", worker], env=env, check=True)
print(os.getpid())
"""


def test_the_launcher_is_found_above_a_script_around_each_rank() -> None:
    env = {key: value for key, value in os.environ.items() if "RANK" not in key}
    env["PYTHONPATH"] = str(Path(identity.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", LAUNCHER], env=env, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    assert len(set(found)) == 1


SPAWN = """
import json, multiprocessing
from ranklog.identity import identify, this_machine
def rank(number):
    machine = this_machine()
    found = identify({}, project="p", machine=machine, rank=number)
    return machine.spawned, found.run, found.source
if __name__ == "__main__":
    assert not this_machine().spawned
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(json.dumps(pool.map(rank, range(4))))
"""


def test_children_of_multiprocessing_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(SPAWN)
    env = {**os.environ, "PYTHONPATH": str(Path(identity.__file__).parent.parent)}
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        found = {tuple(one) for one in json.loads(line)}
        assert len(found) == 1
        assert next(iter(found))[::2] == (True, "launcher")


TORCHRUN_WORKER = """
import json, os, sys
from ranklog.identity import identify, this_machine
found = identify(os.environ, project="p", machine=this_machine())
with open(sys.argv[1], "a") as file:
    line = [found.run, found.source, found.rank, found.world_size, found.attempt, found.warning]
    file.write(json.dumps(line) + chr(10))
sys.exit(found.attempt == 0 and found.rank == 1)
"""


@pytest.mark.skipif(find_spec("torch") is None, reason='needs torch: pip install "ranklog[test-all]"')
def test_a_real_torchrun_gives_one_run_that_outlives_its_restarts(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(TORCHRUN_WORKER)
    env = {**os.environ, "PYTHONPATH": str(Path(identity.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    found = []
    for number in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
        command += ["--master-port", str(port), "worker.py", f"out{number}"]
        subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120, check=True)
        found.append([json.loads(line) for line in (tmp_path / f"out{number}").read_text().splitlines()])
    one, other = found
    assert {(source, size, warning) for _, source, _, size, _, warning in one} == {("launcher", 2, None)}
    assert {(rank, attempt) for _, _, rank, _, attempt, _ in one} >= {(1, 0), (0, 1), (1, 1)}
    assert len({run for run, *_ in one}) == len({run for run, *_ in other}) == 1
    assert one[0][0] != other[0][0]
