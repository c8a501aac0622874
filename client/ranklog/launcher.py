"""What the program that started this process says about it: torchrun, mpirun, srun. Pure: an environment goes in.

    launcher   rank             local rank        ranks             ranks on this node     node
    torchrun   RANK             LOCAL_RANK        WORLD_SIZE        LOCAL_WORLD_SIZE       GROUP_RANK
    openmpi    OMPI_COMM_WORLD_RANK, …_LOCAL_RANK, …_SIZE, …_LOCAL_SIZE
    hydra      PMI_RANK         MPI_LOCALRANKID   PMI_SIZE          MPI_LOCALNRANKS        (MPICH, Intel MPI)
    slurm      SLURM_PROCID     SLURM_LOCALID     SLURM_NTASKS      SLURM_STEP_TASKS_PER_NODE   SLURM_NODEID
    pmi        PMI_RANK                           PMI_SIZE

The first that gives a rank decides. MPI stands before SLURM because mpirun starts its own daemons with srun: their
ranks inherit SLURM variables that count nodes. SLURM counts only inside a step of srun: in the batch script itself
its variables describe the allocation, and trainings that run there one after the other are several jobs.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

_NUMBER = re.compile(r"[0-9]{1,9}")
_TASKS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
_STEP_MAX = 0xFFFF_FFF0  # Slurm numbers the batch script, interactive shells and its own steps from here on.


class Variables:
    """An environment whose values may be anything; keeps a list of the numbers that were none."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.malformed: list[str] = []

    def text(self, name: str) -> str:
        """Return the variable without surrounding space, "" if it is missing."""
        return self._env.get(name, "").strip()

    def count(self, name: str) -> int | None:
        """Return the variable if it is a count, None if it is missing; anything else is None and noted."""
        text = self.text(name)
        if _NUMBER.fullmatch(text):
            return int(text)
        if text not in ("", "-1"):  # -1 is the old way to say "not distributed".
            self.malformed.append(f"{name}={text[:40]!r}")
        return None


class World(NamedTuple):
    """A process's place among its siblings; None where the launcher does not say."""

    launcher: str
    rank: int
    local_rank: int | None
    world_size: int | None
    local_world_size: int | None
    node_rank: int | None


_OMPI = "OMPI_COMM_WORLD"
_TABLE = (
    ("torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    ("openmpi", f"{_OMPI}_RANK", f"{_OMPI}_LOCAL_RANK", f"{_OMPI}_SIZE", f"{_OMPI}_LOCAL_SIZE", ""),
    ("hydra", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS", ""),
    ("slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "", "SLURM_NODEID"),
    ("pmi", "PMI_RANK", "", "PMI_SIZE", "", ""),
)


def find_world(variables: Variables) -> World | None:
    """Return what the innermost launcher says, or None for a process that was started on its own."""
    for launcher, rank_name, local_name, size_name, local_size_name, node_name in _TABLE:
        applies = {"slurm": _slurm_step(variables) is not None, "hydra": variables.text(local_name) != ""}
        if not applies.get(launcher, True):
            continue
        rank = variables.count(rank_name)
        if rank is None:
            continue
        node = variables.count(node_name)
        local_size = variables.count(local_size_name)
        if launcher == "slurm":
            local_size = _tasks_on_node(variables.text("SLURM_STEP_TASKS_PER_NODE"), node or 0)
        return World(launcher, rank, variables.count(local_name), variables.count(size_name), local_size, node)
    return None


def job_key(variables: Variables, world: World | None) -> tuple[str, list[str]] | None:
    """Return (source, words) that are the same for every process of this job and differ between jobs, or None."""
    elastic = variables.text("TORCHELASTIC_RUN_ID")
    if elastic not in ("", "none"):  # torchrun's own default is the word "none".
        return "torchrun", [elastic]
    if world is not None and world.launcher in ("openmpi", "hydra", "pmi"):
        space = variables.text("PMIX_NAMESPACE") or variables.text("OMPI_MCA_ess_base_jobid")
        return ("mpi", [space, variables.text("SLURM_JOB_ID")]) if space else None
    step = _slurm_step(variables)
    if step is None or not variables.text("SLURM_JOB_ID"):
        return None
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")
    return "slurm", [*map(variables.text, names), str(step)]


def _slurm_step(variables: Variables) -> int | None:
    """Return the number of the srun step this process belongs to."""
    text = variables.text("SLURM_STEP_ID") or variables.text("SLURM_STEPID")
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        return None
    return int(text) if int(text) < _STEP_MAX else None


def _tasks_on_node(text: str, node: int) -> int | None:
    """Return the node's entry of Slurm's list such as `4(x2),3`: four ranks on nodes 0 and 1, three on node 2."""
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            return None
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    return None
