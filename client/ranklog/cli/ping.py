"""`ranklog ping`: exit code 0 if a daemon answers, 3 if none does. For probes and scripts."""

import argparse
from dataclasses import replace
from pathlib import Path

from ranklog import control
from ranklog.cli.output import print_json
from ranklog.config import Settings
from ranklog.errors import UsageError

TIMEOUT_S_MAX = 7 * 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog ping`."""
    add_socket_argument(parser)
    add_timeout_argument(parser, control.CONNECT_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Ask who is there; raises NoDaemon."""
    pong = control.ping(settings_of(args), timeout_of(args))
    if args.json:
        print_json({
            "version": pong.version, "pid": pong.pid, "socket": str(pong.socket),
            "took_ms": round(pong.took_s * 1000, 2),
        })  # fmt: skip
    else:
        print(f"ranklogd {pong.version} (pid {pong.pid}) answers on {pong.socket} after {pong.took_s * 1000:.1f} ms")
    return 0


def add_socket_argument(parser: argparse.ArgumentParser) -> None:
    """Declare how a command is told which daemon is meant."""
    parser.add_argument("--socket", metavar="PATH", help="the daemon's socket (default: RANKLOG_SOCKET, else searched)")


def add_timeout_argument(parser: argparse.ArgumentParser, default_s: float) -> None:
    """Declare for how long a command waits."""
    parser.add_argument(
        "--timeout", type=float, default=default_s, metavar="S", help="wait so many seconds (default: %(default)g)"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the environment's settings, with the socket that was named; raises UsageError."""
    settings = Settings.from_env()
    return replace(settings, socket=Path(args.socket).absolute()) if args.socket else settings


def timeout_of(args: argparse.Namespace) -> float:
    """Return the seconds of `--timeout`; raises UsageError."""
    seconds: float = args.timeout
    if not 0 < seconds <= TIMEOUT_S_MAX:
        raise UsageError(f"--timeout {seconds:g}: use seconds above 0 and up to {TIMEOUT_S_MAX:.0f}")
    return seconds
