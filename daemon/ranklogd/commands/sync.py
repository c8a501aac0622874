"""`ranklog sync`: bring in what waits in this node's journals and spools, offline writers included.

Joins the daemon that answers, or starts one for the moment, and waits until everything is in the store. Exit code 4
if something is left, with the reason.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ranklog.cli import EXIT_OK, EXIT_PENDING
from ranklog.cli.output import print_json
from ranklog.places import adoption_dirs
from ranklog.reader.pending import waiting_writers
from ranklogd.commands.drain import Drained, Progress, drain, snapshot
from ranklogd.commands.launcher import CalledOff, Launcher
from ranklogd.commands.process import Children, Signals
from ranklogd.commands.run import Watch, add_place_arguments, agree, duration, left_behind, place_flags

FILES_SHOWN_MAX = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog sync`."""
    add_place_arguments(parser)
    parser.add_argument(
        "--timeout", default="1h", metavar="TIME", help="give up waiting after so long (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Bring everything in; return 0 or 4. Raises CannotStart, UsageError."""
    timeout_s, lock_wait_s = duration("--timeout", args.timeout), duration("--lock-wait", args.lock_wait)
    with Signals() as signals:
        children = Children()
        watch = Watch(signals, children)
        launcher = Launcher(place_flags(args), children, watch.pause, lock_wait_s=lock_wait_s)
        waiting = len(waiting_writers(adoption_dirs(launcher.settings)))
        try:
            launcher.join()
            to = agree(launcher)
            began_s = time.monotonic()
            progress = Progress(quiet=launcher.settings.quiet or args.json)
            result = drain(
                launcher, timeout_s=timeout_s, pause=watch.pause, progress=progress, since_start=launcher.fresh
            )
            refused = dict(snapshot(launcher.settings).get("adoption_refused", {}))
            launcher.leave(began_s + timeout_s - time.monotonic() if result.done else 0)
        except CalledOff:
            return 128 + watch.ended_by
        finally:
            launcher.leave(0)
    still = len(waiting_writers(adoption_dirs(launcher.settings)))
    code = EXIT_OK if result.done and not still else EXIT_PENDING
    if args.json:
        facts = {"to": to, "writers_before": waiting, "writers_waiting": still, "refused": refused}
        print_json({**asdict(result), **facts})
    else:
        _tell(result, launcher, to, still, refused)
    return code


def _tell(result: Drained, launcher: Launcher, to: str, still: int, refused: dict[str, str]) -> None:
    if result.adopted or result.uploaded:
        writers = f"{_count(result.adopted, 'writer')} brought in, " if result.adopted else ""
        print(f"{writers}{_count(result.uploaded, 'record')} uploaded to {to}")
    elif result.done and not still:
        print(f"Nothing was waiting: everything is in {to}")
    sys.stdout.flush()
    if not result.done:
        sys.stderr.write(f"ranklog: {left_behind(result, launcher, to)}\n")
    if still:
        sys.stderr.write(
            f"ranklog: {_count(still, 'writer')} of this node could not be brought in: still running, or refused. "
            "A running one comes in when it ends: run ranklog sync again then\n"
        )
    for path, reason in list(refused.items())[:FILES_SHOWN_MAX]:
        sys.stderr.write(f"ranklog: left alone: {Path(path)}: {reason}\n")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
