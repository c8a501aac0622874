"""`init()` and the module-level functions: the one run that this process is in.

`init()` does no network I/O and never waits for the daemon: it decides who this process is, creates a journal file and
starts the sender thread. Calling it again finishes the run before; a notebook re-runs its first cell all day.
"""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranklog import places, wire
from ranklog.config import Settings
from ranklog.errors import RanklogError, UsageError
from ranklog.identity import Identity, identify, pid_namespace, process_start, this_machine
from ranklog.lifecycle import lifecycle
from ranklog.run import FLUSH_TIMEOUT_S, Run
from ranklog.shield import say, shielded, warn
from ranklog.start import NAME_SIZE_MAX, Start
from ranklog.version import __version__
from ranklog.writer import Places, Writer

MODES = ("online", "offline", "disabled")
RESUME = ("allow", "must", "never", "auto", None, True, False)
NOTES_SIZE_MAX = 16 << 10
TAGS_MAX = 64


class _Current:
    """Holds the current run, if any."""

    run: Run | None = None


_current = _Current()


_NO_RUN = Run(Start(writer="0" * 32, project="", run=""), lambda _: None, lambda *_: None)
"""What `init()` returns if it failed: it drops its records."""


@shielded(_NO_RUN, usage_errors=True)
def init(
    project: str | None = None,
    name: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | tuple[str, ...] | None = None,
    notes: str | None = None,
    id: str | None = None,  # noqa: A002 - the name users know
    resume: str | bool | None = "allow",
    mode: str | None = None,
    dir: str | Path | None = None,  # noqa: A002 - the name users know
    rank: int | None = None,
    role: str | None = None,
    **unknown: Any,
) -> Run:
    """Start a run in this process, on every rank, and return it; the run before, if any, is finished.

    All ranks of a job get the same run, see `ranklog.identity`; `id` or RANKLOG_RUN_ID says so outright, and `rank`
    and `role` override what the launcher says. `mode` is "online", "offline" (records stay on this node until
    `ranklog sync`) or "disabled". `dir` is where this run's spool goes. `resume` is taken for wandb's sake: here the
    same id is always the same run. Keywords that only other trackers know cost one warning.

    Raises UsageError for a mode or resume word it does not know. Anything else that goes wrong costs one warning and
    gives a run that drops its records.
    """
    settings = Settings.from_env()
    mode = mode or settings.mode
    if mode not in MODES:
        raise UsageError(f"init(mode={mode!r}): use one of {', '.join(MODES)}")
    if resume not in RESUME:
        raise UsageError(f"init(resume={resume!r}): use 'allow', 'must' or 'never'")
    if unknown:
        warn(f"init() does not know {', '.join(sorted(unknown))}; ignored")
    if _current.run is not None:
        _current.run.finish(wait=None)
    project, name = project or settings.project, name or settings.name
    identity = identify(None, project=project, name=name, id=id, rank=rank, role=role, machine=this_machine())
    if identity.warning and identity.is_local_rank0:
        warn(identity.warning)
    start = _start(identity, mode, group=group, job_type=job_type, tags=tags, notes=notes)
    run = _current.run = _open_run(start, identity, settings, mode, dir)
    if config:
        run.config.update(config)
    if settings.autostart and mode == "online":
        # In a thread of its own: init() waits for no process to start.
        threading.Thread(target=_autostart, args=(settings,), daemon=True).start()
    return run


def _open_run(start: Start, identity: Identity, settings: Settings, mode: str, directory: str | Path | None) -> Run:
    loud = identity.is_local_rank0 and not settings.quiet and mode != "disabled"

    def open_writer(start: Start) -> Writer | None:
        return None if mode == "disabled" else _open_writer(start, settings, mode, directory)

    def on_finish(run: Run, complete: bool | None) -> None:  # noqa: FBT001
        lifecycle.remove(run)
        if _current.run is run:
            _current.run = None
        if loud and complete is not None:
            say(_finished_line(run, complete, mode))

    run = Run(start, open_writer, on_finish)
    lifecycle.add(run)
    if loud:
        say(_started_line(run, identity, settings, mode))
    return run


def _start(
    identity: Identity, mode: str, *, group: str | None, job_type: str | None, tags: Any, notes: str | None
) -> Start:
    pid = os.getpid()
    machine = this_machine()
    return Start(
        writer=os.urandom(16).hex(),
        protocol=wire.VERSION_MIN,
        project=identity.project,
        run=identity.run,
        name=identity.name,
        group=_fit("group", group),
        job_type=_fit("job_type", job_type),
        tags=[_fit("tag", str(tag)) for tag in list(tags or [])[:TAGS_MAX]],
        notes=_fit("notes", notes, NOTES_SIZE_MAX),
        rank=identity.rank,
        local_rank=identity.local_rank,
        world_size=identity.world_size,
        local_world_size=identity.local_world_size,
        node_rank=identity.node_rank,
        role=identity.role,
        node=identity.node,
        attempt=identity.attempt,
        pid=pid,
        pid_start=process_start(pid) or 0,
        pid_ns=pid_namespace() or 0,
        boot=machine.boot_id,
        mode=mode,
        client=__version__,
        wall_ns=time.time_ns(),
    )


def _fit(what: str, text: str | None, size_max: int = NAME_SIZE_MAX) -> str:
    """Return `text` cut to `size_max` UTF-8 bytes, with one warning if it had to be."""
    raw = str(text or "").encode("utf-8", "replace")
    if len(raw) > size_max:
        warn(f"init({what}=…): {len(raw)} bytes; the limit is {size_max}: cut")
    return raw[:size_max].decode("utf-8", "ignore")


def _open_writer(start: Start, settings: Settings, mode: str, directory: str | Path | None) -> Writer | None:
    own = [Path(directory).absolute()] if directory else []
    journal_dirs = places.usable_dirs(places.journal_dirs(settings), "journal", settings, warn)
    spool_dirs = places.usable_dirs([*own, *places.spool_dirs(settings)], "spool", settings, warn)
    found = None if mode == "offline" else lambda: places.find_socket(settings)
    try:
        return Writer(start, settings, Places(journal_dirs, spool_dirs, found), warn)
    except (OSError, RanklogError) as exc:
        warn(f"no journal could be made: {exc}. Training goes on; nothing is logged")
        return None


def _autostart(settings: Settings) -> None:
    with lifecycle.importing:
        from ranklog import autostart  # Brings in subprocess: a third of what `import ranklog` costs without it.

    autostart.start_if_absent(settings)


def _started_line(run: Run, identity: Identity, settings: Settings, mode: str) -> str:
    socket = places.find_socket(settings)
    if mode == "offline":
        where = "offline: records stay on this node until `ranklog sync`"
    elif socket.exists():
        where = f"daemon at {socket}"
    else:
        where = "no daemon yet: records are kept on this node"
    ranks = f"{identity.world_size} rank{'s' * (identity.world_size != 1)}"
    return f"run {run.name} ({run.id}) · project {run.project} · {ranks} · {where}"


def _finished_line(run: Run, complete: bool, mode: str) -> str:  # noqa: FBT001
    if complete:
        return f"run {run.name} finished · durable on this node · ranklog status"
    reason = "offline mode" if mode == "offline" else "no daemon took the last records"
    return f"run {run.name} finished · {reason}; they are safe in this node's spool. Bring them in: ranklog sync"


def log(metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Log one record of metrics to the current run; see `Run.log`."""
    run = _current.run
    if run is None:
        warn("log() before init(): the record is dropped. Call ranklog.init(project=…) first")
        return
    run.log(metrics, step)


def log_system(metrics: Mapping[str, Any]) -> None:
    """Log system metrics to the current run; see `Run.log_system`."""
    run = _run("log_system")
    if run is not None:
        run.log_system(metrics)


def alert(title: str, text: str = "", level: str = "INFO") -> None:
    """Record an alert in the current run; see `Run.alert`."""
    run = _run("alert")
    if run is not None:
        run.alert(title, text, level)


def define_metric(name: str, step_metric: str | None = None, summary: str | None = None) -> None:
    """Declare a metric of the current run; see `Run.define_metric`."""
    run = _run("define_metric")
    if run is not None:
        run.define_metric(name, step_metric, summary)


def flush(timeout: float = FLUSH_TIMEOUT_S) -> bool:
    """Wait until the current run's records survive a power cut; see `Run.flush`."""
    run = _run("flush")
    return run is None or run.flush(timeout)


def finish(exit_code: int | None = None, *, wait: str | None = "durable", timeout: float = FLUSH_TIMEOUT_S) -> None:
    """End the current run, if there is one; see `Run.finish`."""
    if _current.run is not None:
        _current.run.finish(exit_code, wait=wait, timeout=timeout)


class CurrentConfig:
    """`ranklog.config`: the current run's settings. Before `init()`, changes cost one warning and are dropped."""

    def update(self, settings: Mapping[str, Any] | None = None, *, allow_val_change: bool = True, **more: Any) -> None:
        """Set several at once; see `Config.update`."""
        run = _run("config.update")
        if run is not None:
            run.config.update(settings, allow_val_change=allow_val_change, **more)

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __getitem__(self, key: str) -> Any:
        if _current.run is None:
            raise KeyError(key)
        return _current.run.config[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or `default`."""
        return default if _current.run is None else _current.run.config.get(key, default)

    def keys(self) -> list[str]:
        """Return the names, so that `dict(ranklog.config)` works."""
        return [] if _current.run is None else _current.run.config.keys()


config = CurrentConfig()


def current_run() -> Run | None:
    """Return the current run, or None outside one."""
    return _current.run


def _run(what: str) -> Run | None:
    if _current.run is None:
        warn(f"{what}() before init(): ignored. Call ranklog.init(project=…) first")
    return _current.run
