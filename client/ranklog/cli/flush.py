"""`ranklog flush`: wait until all that the daemon has received has come so far. Exit code 4 if it has not in time.

    durable     on this node's disk; a power cut cannot take it back
    sealed      in a segment that is ready to be converted
    uploaded    in the store (the default)

On a terminal a bar shows how far the upload is, elsewhere one line a minute. Records of dead and of offline
writers that no daemon has taken are `ranklog sync`'s business.
"""

import argparse
import sys
from functools import partial

from ranklog import control
from ranklog.cli import EXIT_OK, EXIT_PENDING
from ranklog.cli.output import print_json
from ranklog.cli.ping import add_socket_argument, add_timeout_argument, settings_of, timeout_of
from ranklog.cli.progress import Asking, Progress
from ranklog.cli.status import why_not_uploaded
from ranklog.config import Settings
from ranklog.control import Flushed
from ranklog.errors import NoDaemon
from ranklog.wire import Wait

LOOK_INTERVAL_S = 0.05
_STAGES = {wait.name.lower(): wait for wait in Wait}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog flush`."""
    parser.add_argument(
        "--wait", choices=list(_STAGES), default="uploaded", help="until when to wait (default: %(default)s)"
    )
    add_timeout_argument(parser, 60)
    add_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Wait; return 0 or 4. Raises NoDaemon."""
    settings, timeout_s = settings_of(args), timeout_of(args)
    progress = Progress(quiet=args.json or settings.quiet)
    flushed = _flush(settings, _STAGES[args.wait], timeout_s, progress)
    reason = "" if flushed.done else why_not_uploaded(control.status(settings))
    if args.json:
        print_json({"done": flushed.done, "wait": args.wait, "pending": flushed.pending, "reason": reason})
    elif flushed.done:
        print(f"Everything that the daemon has received is {args.wait}.")
    else:
        records = f"{flushed.pending:,} record{'s are' if flushed.pending != 1 else ' is'}"
        why = f" ({reason})" if reason else ""
        sys.stderr.write(
            f"ranklog: {records} not {args.wait} after {timeout_s:g} s{why}. Nothing is lost, and the daemon goes on; "
            f"watch it with: ranklog status --watch\n"
        )
    return EXIT_OK if flushed.done else EXIT_PENDING


def _flush(settings: Settings, wait: Wait, timeout_s: float, progress: Progress) -> Flushed:
    """Ask, and show how far it is as long as there is no answer; raises NoDaemon."""
    asking = Asking(partial(control.flush, settings, wait, timeout_s))
    asking.start()
    try:
        while asking.is_alive():
            asking.join(LOOK_INTERVAL_S)
            if asking.is_alive() and progress.due():
                progress.show(_snapshot(settings))
    finally:
        progress.clear()
    if asking.answer is None:
        raise asking.error or NoDaemon("the daemon's answer got lost; ask again")
    return asking.answer


def _snapshot(settings: Settings) -> dict[str, object]:
    try:
        return control.status(settings)
    except NoDaemon:
        return {}
