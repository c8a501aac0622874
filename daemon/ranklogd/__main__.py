"""`ranklogd`: parse, assemble, serve, drain, exit.

Exit codes: 0 stopped as asked · 1 the WAL or a directory cannot be used (a restart may help) · 2 usage ·
75 another daemon owns the state directory · 78 bad configuration (a restart cannot help).

Signals: SIGTERM, SIGINT drain, a second one exits at once · SIGHUP changes nothing: the configuration is read at start.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ranklog.errors import FormatError, RanklogError, UsageError
from ranklog.version import __version__
from ranklogd.config import Config, load_config, notify_socket
from ranklogd.flags import add_flags, flag_values
from ranklogd.lock import EXIT_BUSY, Busy
from ranklogd.notify import Notifier
from ranklogd.secrecy import forbid_core_file
from ranklogd.server import Server, StopFlag
from ranklogd.setup import LOCK_WAIT_S, assemble, prepare

EXIT_CONFIG = 78
log = logging.getLogger("ranklogd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit code."""
    parser = argparse.ArgumentParser(prog="ranklogd", description="The per-node daemon of ranklog.", epilog=__doc__)
    parser.add_argument("--version", action="version", version=f"ranklogd {__version__}")
    parser.add_argument("--config", type=Path, help="TOML file (default: see the README)")
    parser.add_argument("--check-config", action="store_true", help="check the configuration, print it and exit")
    parser.add_argument(
        "--lock-wait", type=float, default=LOCK_WAIT_S, metavar="S", help="wait this long for another daemon to go"
    )
    parser.add_argument(
        "--bring-in", type=Path, action="append", default=[], metavar="DIR",
        help="adopt what lies here and nowhere else, whoever owns it, under a store id of its own: ranklog sync DIR",
    )  # fmt: skip
    add_flags(parser)
    arguments = parser.parse_args(argv)
    try:
        config = load_config(flag_values(arguments), file=arguments.config)
    except UsageError as exc:
        return _fail(exc, EXIT_CONFIG)
    logging.basicConfig(level=config.log_level.upper(), format="%(name)s %(levelname)s %(message)s", stream=sys.stderr)
    if arguments.check_config:
        sys.stdout.write(config.to_json() + "\n")
        return 0
    return serve(config, arguments.lock_wait, arguments.bring_in)


def serve(config: Config, lock_wait_s: float, bring_in: Sequence[Path] = ()) -> int:
    """Run a daemon with this configuration until it is told to stop; return the exit code."""
    forbid_core_file()
    stop, hurry = StopFlag(), StopFlag()
    asked = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        # The first signal asks for a drain, the second for an exit at once.
        (hurry if stop.is_set() else stop).count += 1
        asked.set()

    def on_hangup(_number: int, _frame: object) -> None:
        # A closed terminal, or a hope for new settings: neither is a reason to die, and to leave a trainer alone.
        log.warning("hangup ignored: the configuration is read at start only, restart ranklogd to change it")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, on_hangup)
    notify = Notifier(notify_socket())
    try:
        state = prepare(config)
        parts = assemble(config, state, notify, lock_wait_s=lock_wait_s, stopped=asked.wait, bring_in=bring_in)
    except UsageError as exc:
        return _fail(exc, EXIT_CONFIG)
    except Busy as exc:
        return _fail(exc, EXIT_BUSY)
    except (OSError, FormatError) as exc:
        return _fail(exc, 1)
    server = Server(parts)
    notify("READY=1")
    log.info("ready pid=%d socket=%s state=%s to=%s", os.getpid(), config.socket, config.state_dir, config.to)
    try:
        server.run(stop)
        remain = server.drain(config.stop_deadline_s, hurry)
    except OSError as exc:
        # No ack was sent for what is not on disk; clients keep it. A restart begins with what is.
        return _fail(exc, 1)
    finally:
        parts.close()
    if remain:
        log.warning(
            "stopped records_not_uploaded=%d; they are safe in %s and go on with the next start",
            remain,
            config.state_dir,
        )
    else:
        log.info("stopped; everything is uploaded")
    return 0


def _fail(exc: Exception, code: int) -> int:
    kind = "" if isinstance(exc, RanklogError | Busy) else f"{type(exc).__name__}: "
    sys.stderr.write(f"ranklogd: {kind}{exc}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
