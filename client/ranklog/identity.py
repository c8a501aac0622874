"""Who this process is: run, rank, node, attempt. The rules are pure; `this_machine` and below read /proc.

One job is one run, and rank is a column: so every rank must come to the same run id, on every node, without talking
to the others. The first source that exists decides.

    run id     init(id=…); RANKLOG_RUN_ID                              taken as they are
               TORCHELASTIC_RUN_ID, unless "none"                      hashed with the project, as all that follow
               the job id of MPI or, inside a step of srun, of SLURM
               boot, launcher's pid and start time                     if all ranks are on this node: the torchrun
                                                                       agent lives through restarts of its workers
               MASTER_ADDR, MASTER_PORT, world size, name, uid         otherwise; weak, hence a warning
               RANKLOG_RUN_ID_HINT, from `ranklog run`                 for a process on its own
               a new id
    rank …     init(rank=…); the tables of `launcher`; 0 of 1
    attempt    TORCHELASTIC_RESTART_COUNT + SLURM_RESTART_COUNT; the daemon raises it by what it saw
    node       NODE_NAME in Kubernetes, SLURMD_NODENAME, the host name: a word for people, not an identity
    role       init(role=…); ROLE_NAME, unless "default"

Nothing in the environment is an error here: a number that is none is ignored, with a warning.
"""

import operator
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ranklog.launcher import Variables, World, find_world, job_key
from ranklog.names import derived_run_id, display_name, fit_name, new_run_id

DEFAULT_PROJECT = "default"

_LOOPBACK = re.compile(r"localhost|127\.[0-9.]+|\[?::1\]?")
_ANCESTORS_MAX = 16
_RANK_VARIABLES = (b"RANK=", b"LOCAL_RANK=", b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system says about this process."""

    hostname: str = ""
    boot_id: str = ""
    uid: int = 0
    pid: int = 0
    pid_start: int = 0
    pid_ns: int = 0
    launcher_pid: int = 0
    """The nearest ancestor that was started without a rank of its own: torchrun's agent, mpirun, a shell."""
    launcher_start: int = 0
    spawned: bool = False
    """Started by Python's multiprocessing: the launcher started its siblings too."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who one writer is; fields are as in `ranklog.start.Start`."""

    project: str
    run: str
    name: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    role: str
    node: str
    attempt: int
    source: str
    """What decided the run id, for messages: init, environment, torchrun, mpi, slurm, launcher, address, hint, new."""
    warning: str | None = None

    @property
    def is_local_rank0(self) -> bool:
        """Whether this process speaks for its node: the others print nothing."""
        return self.local_rank == 0


def identify(
    env: Mapping[str, str] | None,
    *,
    project: str | None,
    machine: Machine,
    name: str | None = None,
    id: str | None = None,  # noqa: A002  The name users know from init().
    rank: int | None = None,
    role: str | None = None,
    fresh_id: str | None = None,
) -> Identity:
    """Return who this process is, by the table above; never raises for anything the environment may hold.

    `env` is by default this process's. The other arguments are those of `init()`; `fresh_id` is the id for a process on
    its own, by default a new one.
    """
    variables = Variables(os.environ if env is None else env)
    given_rank = _rank(rank, variables)
    world = find_world(variables)
    place = _place(world, given_rank, variables)
    project = fit_name(str(project or "")) or DEFAULT_PROJECT
    name = fit_name(str(name or ""))
    # Siblings started by multiprocessing have their ranks from their parent, and tell us only through init(rank=…).
    siblings = place.world_size > 1 if world is not None else given_rank is not None and machine.spawned
    source, words = _run_source(variables, world, machine, place, siblings=siblings, name=name, given=str(id or ""))
    if source == "new":
        run = fresh_id or new_run_id(time.time_ns(), os.urandom(10))
    else:
        run = fit_name(words[0]) if source in ("init", "environment") else derived_run_id(project, source, *words)
    role_name = variables.text("ROLE_NAME")
    return Identity(
        project=project,
        run=run,
        name=name or display_name(run),
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=max(place.world_size, place.rank + 1),
        local_world_size=place.local_world_size,
        node_rank=place.node_rank,
        role=fit_name(str(role)) if role is not None else fit_name("" if role_name == "default" else role_name),
        node=fit_name(_node(variables, machine)),
        attempt=sum(variables.count(count) or 0 for count in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")),
        source=source,
        warning=_warning(variables, source),
    )


class _Place(NamedTuple):
    """`World` with every hole filled."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    one_node: bool


def _rank(rank: int | None, variables: Variables) -> int | None:
    if rank is None:
        return None
    try:
        number = operator.index(rank)  # An int of any library, too.
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 31:
        variables.malformed.append(f"init(rank={str(rank)[:40]!r})")
        return None
    return number


def _place(world: World | None, given_rank: int | None, variables: Variables) -> _Place:
    if world is None:
        rank = given_rank or 0
        return _Place(rank, rank, rank + 1, 1, 0, one_node=True)
    size = max(world.world_size or 1, world.rank + 1)
    one_node = world.local_world_size == size or _LOOPBACK.fullmatch(variables.text("MASTER_ADDR")) is not None
    rank = world.rank if given_rank is None else given_rank
    return _Place(
        rank=rank,
        # Where the launcher does not count the ranks of a node, only rank 0 of all speaks.
        local_rank=world.rank if world.local_rank is None else world.local_rank,
        world_size=size,
        local_world_size=world.local_world_size or (size if one_node else 1),
        node_rank=world.node_rank or 0,
        one_node=one_node,
    )


def _run_source(
    variables: Variables, world: World | None, machine: Machine, place: _Place, *, siblings: bool, name: str, given: str
) -> tuple[str, list[str]]:
    """Return what decides the run id and the words that go into it, from the table above."""
    if given:
        return "init", [given]
    if text := variables.text("RANKLOG_RUN_ID"):
        return "environment", [text]
    if job := job_key(variables, world):
        return job
    if siblings and place.one_node:
        # A pid alone comes again: in the next boot, in another container, and in time.
        numbers = (machine.pid_ns, machine.launcher_pid, machine.launcher_start)
        return "launcher", [machine.boot_id, *map(str, numbers)]
    if siblings:
        address = [variables.text("MASTER_ADDR"), variables.text("MASTER_PORT")]
        return "address", [*address, str(place.world_size), name, str(machine.uid)]
    if text := variables.text("RANKLOG_RUN_ID_HINT"):
        return "hint", [text]
    return "new", []


def _node(variables: Variables, machine: Machine) -> str:
    # NODE_NAME means a node only where Kubernetes' own variable is beside it: others use the word too.
    pod = variables.text("NODE_NAME") if variables.text("KUBERNETES_SERVICE_HOST") else ""
    return pod or variables.text("SLURMD_NODENAME") or machine.hostname


def _warning(variables: Variables, source: str) -> str | None:
    warnings = []
    if variables.malformed:
        warnings.append(f"{', '.join(dict.fromkeys(variables.malformed))} is not a count and was ignored")
    if source == "address":
        warnings.append(
            "this job spans several nodes, and neither a scheduler nor a rendezvous gives it an id: jobs of this "
            "project with the same MASTER_ADDR, MASTER_PORT and world size count as one run. Set RANKLOG_RUN_ID to "
            "the same value on every node, or give torchrun --rdzv-id"
        )
    return "; ".join(warnings) or None


def this_machine() -> Machine:
    """Return what the operating system says about this process; what it does not say is 0 or ""."""
    pid = os.getpid()
    launcher = _launcher(os.getppid())
    processes = sys.modules.get("multiprocessing.process")  # Loaded in every process that multiprocessing started.
    return Machine(
        hostname=os.uname().nodename,
        boot_id=boot_id(),
        uid=os.getuid(),
        pid=pid,
        pid_start=process_start(pid) or 0,
        pid_ns=pid_namespace() or 0,
        launcher_pid=launcher,
        launcher_start=process_start(launcher) or 0,
        spawned=processes is not None and processes.parent_process() is not None,
    )


def boot_id() -> str:
    """Return the kernel's id of this boot; "" without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def pid_namespace(pid: int | None = None) -> int | None:
    """Return the inode of a process's pid namespace (default: our own), or None where it cannot be seen."""
    try:
        return os.stat(f"/proc/{pid or 'self'}/ns/pid").st_ino
    except OSError:
        return None


def time_namespace(pid: int | None = None) -> int | None:
    """Return the inode of a process's time namespace (default: our own), or None where it cannot be seen."""
    try:
        return os.stat(f"/proc/{pid or 'self'}/ns/time").st_ino
    except OSError:
        return None


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (field 22 of its stat), or None if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else None


def _stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third on; none where there is no such process."""
    try:
        # The second field is the command in parentheses, and may hold spaces and parentheses itself.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def _launcher(pid: int) -> int:
    """Return the nearest ancestor, from `pid` up, that has no rank: a script around each rank is not the launcher."""
    nearest = pid
    for _ in range(_ANCESTORS_MAX):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return nearest
        if not any(variable.startswith(_RANK_VARIABLES) for variable in variables):
            return pid
        parent = _stat(pid)[1:2]
        if not parent or int(parent[0]) < 1:
            return nearest
        pid = int(parent[0])
    return nearest
