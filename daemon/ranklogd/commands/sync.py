"""`ranklog sync [DIR]`: bring in what waits in this node's journals and spools, offline writers included, or in DIR.

Joins the daemon that answers, or starts one for the moment, and waits until everything is in the store. Exit code 4
if something is left, with the reason.

DIR is a state, journal or spool directory without a daemon, or one that holds such, also copied from another machine
(`abandoned`). A daemon of its own works on it in place, which knows nothing of this node's other records.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ranklog.autostart import is_listening
from ranklog.cli import EXIT_OK, EXIT_PENDING
from ranklog.cli.output import print_json
from ranklog.cli.progress import Progress
from ranklog.config import SOCKET_NAME
from ranklog.errors import UsageError
from ranklog.places import adoption_dirs
from ranklog.reader.pending import waiting_writers
from ranklogd.commands.abandoned import Abandoned, look_into, require_free, uploaded_lsn
from ranklogd.commands.drain import Drained, drain, snapshot
from ranklogd.commands.launcher import CalledOff, Launcher
from ranklogd.commands.process import Children, Signals
from ranklogd.commands.run import Watch, add_place_arguments, agree, duration, left_behind, place_flags
from ranklogd.config import load_config
from ranklogd.statedir import StateDir

FILES_SHOWN_MAX = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog sync`."""
    parser.add_argument(
        "dir", nargs="?", type=Path, metavar="DIR",
        help="a state, journal or spool directory that no daemon uses, or one that holds them; also a copy",
    )  # fmt: skip
    add_place_arguments(parser)
    parser.add_argument(
        "--timeout", default="1h", metavar="TIME", help="give up waiting after so long (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Bring everything in; return 0 or 4. Raises CannotStart, UsageError."""
    timeout_s, lock_wait_s = duration("--timeout", args.timeout), duration("--lock-wait", args.lock_wait)
    flags, found = place_flags(args), None
    if args.dir is not None:
        if args.state_dir:
            raise UsageError("ranklog sync DIR works in DIR itself: leave --state-dir out")
        found = look_into(args.dir.resolve())
        flags = _flags_for(found, flags)
    with Signals() as signals:
        children = Children()
        watch = Watch(signals, children)
        bring_in = () if found is None else (found.root, *found.journals)
        launcher = Launcher(flags, children, watch.pause, lock_wait_s=lock_wait_s, bring_in=bring_in)
        if found is not None and launcher.config.state_dir != found.state.root:
            raise UsageError("STATE_DIRECTORY or RUNTIME_DIRECTORY of systemd is set, and wins: unset it to sync DIR")
        if found is not None and not is_listening(launcher.config.socket):
            require_free(found)
        journals = adoption_dirs(launcher.settings) if found is None else list(found.journals)
        waiting = len(waiting_writers(journals))
        begin = uploaded_lsn(StateDir(launcher.config.state_dir))
        try:
            launcher.join()
            to = agree(launcher)
            began_s = time.monotonic()
            progress = Progress(quiet=launcher.settings.quiet or args.json)
            since_lsn = begin if launcher.fresh else None
            result = drain(launcher, timeout_s=timeout_s, pause=watch.pause, progress=progress, since_lsn=since_lsn)
            refused = dict(snapshot(launcher.settings).get("adoption_refused", {}))
            launcher.leave(began_s + timeout_s - time.monotonic() if result.done else 0)
        except CalledOff:
            return 128 + watch.ended_by
        finally:
            launcher.leave(0)
    still = len(waiting_writers(journals))
    dead = sum(1 for _ in found.state.deadletter.rglob("*.parquet")) if found is not None else 0
    code = EXIT_OK if result.done and not still and not dead else EXIT_PENDING
    if args.json:
        facts = {"to": to, "writers_before": waiting, "writers_waiting": still, "refused": refused}
        print_json({**asdict(result), **facts})
    else:
        _tell(result, launcher, to, still, refused, found)
        if found is not None and dead:
            place = found.state.deadletter
            sys.stderr.write(f"ranklog: the store refused {_count(dead, 'shard')} for good: kept in {place}\n")
    return code


def _flags_for(found: Abandoned, flags: dict[str, str]) -> dict[str, str]:
    """Return the flags of a daemon that has the directory, and nothing else of this node."""
    digest = hashlib.sha256(str(found.root).encode("utf-8", "surrogateescape")).hexdigest()
    runtime = load_config(flags).runtime_dir / f"sync-{digest[:8]}"
    return flags | {
        "state_dir": str(found.state.root),
        "runtime_dir": str(runtime),
        "socket": str(runtime / SOCKET_NAME),
        "journal_dir": str(runtime / "journal"),
        "spool_dir": str(runtime / "spool"),
        "node_metrics_interval_s": "0",
        # A copy often lies on one, and nobody else writes to it: at worst, what is done is done once more.
        "allow_network_fs": "true",
    }


def _tell(
    result: Drained, launcher: Launcher, to: str, still: int, refused: dict[str, str], found: Abandoned | None
) -> None:
    if result.adopted or result.uploaded:
        writers = f"{_count(result.adopted, 'writer')} brought in, " if result.adopted else ""
        print(f"{writers}{_count(result.uploaded, 'record')} uploaded to {to}")
    elif result.done and not still:
        print(f"Nothing was waiting: everything is in {to}")
    sys.stdout.flush()
    if not result.done:
        text = left_behind(result, launcher, to, "" if found is None else str(found.root))
        sys.stderr.write(f"ranklog: {text}\n")
    if still:
        place = "this node" if found is None else str(found.root)
        sys.stderr.write(
            f"ranklog: {_count(still, 'writer')} of {place} could not be brought in: still running, or refused. "
            "A running one comes in when it ends: run ranklog sync again then\n"
        )
    for path, reason in list(refused.items())[:FILES_SHOWN_MAX]:
        sys.stderr.write(f"ranklog: left alone: {Path(path)}: {reason}\n")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
