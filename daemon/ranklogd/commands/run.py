"""`ranklog run -- CMD`: a daemon beside the job, and everything brought in before it ends. Works as PID 1.

    join or start a daemon ─▶ job, in its own process group ─▶ signals forwarded, daemon kept alive, orphans reaped
    ─▶ job ends ─▶ its dead ranks adopted, everything uploaded, within --drain ─▶ daemon stopped by its last user

Exit code: the job's; 128 + n if signal n killed it, 127 if it was not found, 126 if it cannot be executed, 125 if no
daemon could be started. A drain that fails changes nothing of that: it prints where the records are. The first signal
during the drain ends it.
"""

import argparse
import json
import secrets
import shlex
import sys
import time
from dataclasses import asdict

from ranklog import places
from ranklog.cli.progress import Progress
from ranklog.config import environment
from ranklog.errors import UsageError
from ranklog.names import new_run_id
from ranklogd.commands.drain import Drained, drain, snapshot
from ranklogd.commands.launcher import TEND_INTERVAL_S, CalledOff, CannotStart, Launcher
from ranklogd.commands.process import (
    ENDING,
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    FORWARDED,
    Child,
    Children,
    Signals,
)
from ranklogd.commands.terminal import Foreground
from ranklogd.units import parse_duration

EXIT_NO_START = 125
LOCK_WAIT_S = 30.0
_PLACES = ("to", "token_file", "create_bucket", "state_dir", "runtime_dir")
STORES = "a directory, hf://buckets/NAMESPACE/BUCKET[/PREFIX], s3:// gs:// az://BUCKET[/PREFIX]"


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which daemon is meant: what `run` and `sync` have in common."""
    parser.add_argument(
        "--to", metavar="URL", help=f"the store of a daemon that is started: {STORES} (default: RANKLOG_TO)"
    )
    parser.add_argument("--token-file", metavar="FILE", help="its token for a Bucket (default: the Hub's own login)")
    parser.add_argument(
        "--create-bucket", choices=("private", "public"), help="let it create a Bucket that was never there"
    )
    parser.add_argument("--state-dir", metavar="DIR", help="its WAL and outbox (default: RANKLOG_STATE_DIR)")
    parser.add_argument("--runtime-dir", metavar="DIR", help="its socket and journals (default: RANKLOG_RUNTIME_DIR)")
    parser.add_argument(
        "--lock-wait", default=f"{LOCK_WAIT_S:g}s", metavar="TIME",
        help="wait so long for another daemon to let go of the state directory (default: %(default)s)",
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog run`."""
    parser.usage = "ranklog run [options] [--] CMD [ARG ...]"
    parser.add_argument(
        "--drain", default="120s", metavar="TIME",
        help="after the job, wait so long for everything to be uploaded (default: %(default)s)",
    )  # fmt: skip
    add_place_arguments(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="the job, such as: torchrun train.py")


def run(args: argparse.Namespace) -> int:
    """Run the job beside a daemon and return its exit code."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("ranklog run: which command? For example: ranklog run -- torchrun --nproc-per-node 4 train.py")
    drain_s = duration("--drain", args.drain)
    lock_wait_s = duration("--lock-wait", args.lock_wait)
    with Signals() as signals:
        children = Children()
        watch = Watch(signals, children)
        launcher = Launcher(place_flags(args), children, watch.pause, lock_wait_s=lock_wait_s)
        try:
            launcher.join()
            to = agree(launcher)
        except CannotStart as exc:
            launcher.leave(0)
            sys.stderr.write(f"ranklog: {' '.join(str(exc).split())}\n")
            return EXIT_NO_START
        except CalledOff:
            return 128 + watch.ended_by
        job = _Job(launcher, children, signals, to)
        code = job.run(command)
        began_s = time.monotonic()
        progress = Progress(quiet=launcher.settings.quiet)
        result = drain(launcher, timeout_s=drain_s, pause=watch.pause, progress=progress)
        _report(result, launcher, to, code if args.json else None)
        launcher.leave(began_s + drain_s - time.monotonic() if result.done else 0)
    return code


def duration(flag: str, text: str) -> float:
    """Return the seconds that a flag says; raises UsageError."""
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise UsageError(f"{flag} {text}: {exc}") from exc


def place_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags of `add_place_arguments` that were given, as fields of the daemon's config."""
    return {name: value for name in _PLACES if (value := getattr(args, name))}


class Watch:
    """A pause that a signal ends, and what kind of signal it was."""

    def __init__(self, signals: Signals, children: Children) -> None:
        self.ended_by = 0
        self._signals = signals
        self._children = children

    def pause(self, seconds: float) -> bool:
        """Wait; True if a signal asks us to end."""
        number = self._signals.wait(seconds)
        self._children.reap()
        if number in ENDING:
            self.ended_by = number
            return True
        return False


def agree(launcher: Launcher) -> str:
    """Return the store of the daemon that was joined; raises CannotStart if it is not what the flags ask for."""
    status = snapshot(launcher.settings)
    wanted = {"to": launcher.config.to, "state_dir": str(launcher.config.state_dir)}
    for name in launcher.flags & wanted.keys():
        if status and status[name] != wanted[name]:
            flag = f"--{name.replace('_', '-')}"
            raise CannotStart(
                f"the daemon on {status['socket']} (pid {status['pid']}) uses {status[name]}, not {wanted[name]}. "
                f"Leave {flag} out to join it, or give --runtime-dir and --state-dir for a daemon of your own"
            )
    return str(status.get("to", launcher.config.to))


class _Job:
    """The command, from its start to its exit code."""

    def __init__(self, launcher: Launcher, children: Children, signals: Signals, to: str) -> None:
        self._launcher = launcher
        self._children = children
        self._signals = signals
        self._to = to
        self._foreground = Foreground()

    def run(self, command: list[str]) -> int:
        """Run it to its end; return the exit code."""
        try:
            child = self._children.spawn(command, self._environment())
        except OSError as exc:
            found = not isinstance(exc, FileNotFoundError)
            sys.stderr.write(f"ranklog: {shlex.quote(command[0])} cannot be run: {exc.strerror}\n")
            return EXIT_NOT_EXECUTABLE if found else EXIT_NOT_FOUND
        self._foreground.lend(child)
        try:
            return self._wait(child)
        finally:
            self._foreground.take_back()

    def _wait(self, child: Child) -> int:
        while True:
            number = self._signals.wait(TEND_INTERVAL_S)
            self._children.reap()
            if child.exit_code is not None:
                return child.exit_code
            if number in FORWARDED:
                child.signal_group(number)
            if child.stopped_by:
                self._foreground.follow_stop(child)
            self._launcher.tend()

    def _environment(self) -> dict[str, str]:
        env = environment()
        settings = self._launcher.settings
        env["RANKLOG_RUN_ID_HINT"] = settings.run_id_hint or new_run_id(time.time_ns(), secrets.token_bytes(10))
        env["RANKLOG_SOCKET"] = str(places.find_socket(settings))
        env["RANKLOG_TO"] = self._to
        env["RANKLOG_AUTOSTART"] = "0"  # This process sees to the daemon.
        if settings.runtime_dir_given or self._launcher.at_home:
            env["RANKLOG_RUNTIME_DIR"] = str(settings.runtime_dir)
            dirs = {"RANKLOG_JOURNAL_DIR": settings.journal_dir, "RANKLOG_SPOOL_DIR": settings.spool_dir}
            env |= {name: str(path) for name, path in dirs.items() if path is not None}
        return env


def _report(result: Drained, launcher: Launcher, to: str, code: int | None) -> None:
    """Say how the drain ended: on a terminal always, elsewhere only if something is left."""
    if code is not None:
        facts = {"exit_code": code, "to": to, "state_dir": str(launcher.config.state_dir), "drain": asdict(result)}
        sys.stderr.write(json.dumps(facts) + "\n")
    elif not result.done:
        sys.stderr.write(f"ranklog: {left_behind(result, launcher, to)}\n")
    elif sys.stderr.isatty() and not launcher.settings.quiet:
        sys.stderr.write(f"ranklog: everything is in {to}\n")


def left_behind(result: Drained, launcher: Launcher, to: str, where: str = "") -> str:
    """Return what is not in the store, why, where it is and how it gets there. `where`: the directory of a `sync`."""
    records = f"{result.pending:,} records are" if result.pending != 1 else "1 record is"
    what = f"{records} not in {to} yet" if result.pending else f"not everything may be in {to} yet"
    if not launcher.started:
        return f"{what} ({result.reason}). Nothing is lost: the daemon goes on by itself. See: ranklog status"
    if where:
        again = shlex.join(["ranklog", "sync", where, "--to", to])
        return f"{what} ({result.reason}). Nothing is lost: they are in {where}. Go on with: {again}"
    command = ["ranklog", "sync", "--to", to, "--state-dir", str(launcher.config.state_dir)]
    return (
        f"{what} ({result.reason}). Nothing is lost: they are on this node, in {launcher.config.state_dir} and the "
        f"spool. Bring them in with: {shlex.join(command)}"
    )
