"""The command line: a table of commands, each a module of its own that is loaded only when it is called.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit code. Every command has `--json`
(`args.json`), added here. Commands that need the daemon's packages live in `ranklogd.commands` and are named here by
path: the one place where `ranklog` points at `ranklogd`.

Errors that ranklog raises on purpose become one line on stderr and the exit code of their class; anything else is our
mistake and keeps its traceback.
"""

import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ranklog.errors import MissingExtra, NoDaemon, RanklogError, UsageError
from ranklog.version import __version__

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_NO_DAEMON, EXIT_PENDING = range(5)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count.
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE.


class Command(NamedTuple):
    """One command: where it is, what it does, which extra it needs."""

    module: str
    help: str
    extra: str = ""


COMMANDS = {
    "demo": Command("ranklogd.commands.demo", "watch four ranks log, crash and lose nothing; under a minute", "all"),
    "run": Command(
        "ranklogd.commands.run", "run a training command beside a daemon: ranklog run -- torchrun …", "daemon"
    ),
    "status": Command("ranklog.cli.status", "what the daemon on this node holds, and how far it has come"),
    "doctor": Command("ranklogd.commands.doctor", "what is wrong on this node, and the command that mends it"),
    "ping": Command("ranklog.cli.ping", "whether a daemon answers"),
    "flush": Command("ranklog.cli.flush", "wait until what was logged is durable, sealed or uploaded"),
    "ls": Command("ranklog.cli.ls", "runs in a store", "read"),
    "query": Command("ranklog.cli.query", "SQL over the views `records` and `metrics`", "read"),
    "tail": Command("ranklog.cli.tail", "the newest rows, and with --follow those to come", "read"),
    "sync": Command("ranklogd.commands.sync", "bring in what waits on this node, or in a directory", "daemon"),
    "fsck": Command("ranklogd.commands.fsck", "what is in the daemon's state directory, checked and mended", "all"),
    "requeue": Command("ranklogd.commands.requeue", "bring back what was refused or put aside", "all"),
}

_STORES = """\
stores (--to, or RANKLOG_TO):
  /a/directory                             on any filesystem
  hf://buckets/NAMESPACE/BUCKET[/PREFIX]   a Hugging Face Bucket; log in with: hf auth login
  s3://BUCKET[/PREFIX]  gs://…  az://…     object stores; pip install "ranklog[s3]"
"""

EXIT_CODES = """\
exit codes:
  0    done
  1    an error; the reason is on stderr
  2    wrong usage or configuration, or a package is missing (the pip line is on stderr)
  3    no daemon answers
  4    data pending: not everything was brought where it should be in time; nothing is lost
  130  interrupted (Ctrl-C)        141  the reader of our output went away
  `ranklog run` exits with the code of the command it runs
"""

_DAEMON_PACKAGES = ("pyarrow", "msgspec", "numpy", "watchdog", "huggingface_hub", "psutil")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ranklog` with these arguments (default: the process's) and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # Names hold any character; a terminal may not.
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except RanklogError as exc:
        return _fail(exc)
    except OSError as exc:
        return _fail(RanklogError(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)))
    return code


def main_daemon() -> int:
    """Run `ranklogd`, or say with which pip line it is installed; return the exit code."""
    for name in _DAEMON_PACKAGES:
        # Looked for, not loaded: the ingest process must never import pyarrow or huggingface_hub.
        if importlib.util.find_spec(name) is None:
            return _fail(MissingExtra("ranklogd", "daemon", name))
    code: int = importlib.import_module("ranklogd.__main__").main()
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        sys.stderr.write(usage())
        return EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "help":
        name, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if name in ("-h", "--help"):
        print(usage(), end="")
        return EXIT_OK
    if name == "--version":
        print(f"ranklog {__version__}")
        return EXIT_OK
    if name not in COMMANDS:
        raise UsageError(_unknown(name))
    return _run(name, COMMANDS[name], rest)


def _run(name: str, command: Command, arguments: list[str]) -> int:
    import argparse  # A third of the start-up time of `ranklog --help`, which does not need it.

    try:
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=f"ranklog {name}",
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",
            allow_abbrev=False,
        )
        parser.add_argument("--json", action="store_true", help="machine-readable output")
        module.add_arguments(parser)
        try:
            args = parser.parse_args(arguments)
        except SystemExit as exc:
            return exc.code if isinstance(exc.code, int) else EXIT_USAGE
        code: int = module.run(args)
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package in ("", "ranklog", "ranklogd"):
            raise RanklogError(
                f"ranklog {name}: this installation lacks {exc.name}. Run: pip install --force-reinstall ranklog"
            ) from exc
        raise MissingExtra(f"ranklog {name}", command.extra, package) from exc
    return code


def usage() -> str:
    """Return the text of `ranklog --help`."""
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:<{width}}  {command.help}\n" for name, command in COMMANDS.items())
    return (
        "usage: ranklog COMMAND [options]        ranklog COMMAND --help        ranklog --version\n\n"
        "Every rank logs, training never waits, no crash loses a record, and the result is plain parquet.\n\n"
        f"commands, each with --json:\n{commands}\n{_STORES}\n{EXIT_CODES}"
    )


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(COMMANDS)}."
    return f"{name!r} is no command. {hint} Run: ranklog --help"


def _fail(exc: RanklogError) -> int:
    sys.stdout.flush()
    # One line, whatever a library put into its text.
    sys.stderr.write(f"ranklog: {' '.join(str(exc).split())}\n")
    if isinstance(exc, UsageError | MissingExtra):
        return EXIT_USAGE
    return EXIT_NO_DAEMON if isinstance(exc, NoDaemon) else EXIT_ERROR
