"""`ranklog doctor`: what is wrong on this node, each finding with the command that mends it. Changes nothing.

Works without a daemon, without root and without the packages of the extra `daemon`. Every check runs in a thread of
its own: one that hangs (a network filesystem that is gone) or fails ends none of the others. Exit code 0 if there is
no problem, warnings or not; 1 otherwise.
"""

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from ranklog.cli import EXIT_ERROR, EXIT_OK
from ranklog.cli.output import print_json, printable
from ranklog.cli.ping import add_socket_argument
from ranklog.config import environment
from ranklogd.doctor import contents, daemon, disks
from ranklogd.doctor.finding import Finding, Level, problem
from ranklogd.doctor.site import Site, visit

CHECK_TIMEOUT_S = 10.0
CHECKS: dict[str, Callable[[Site], Iterator[Finding]]] = {
    "socket": daemon.check_socket,
    "versions": daemon.check_versions,
    "limits": daemon.check_limits,
    "clock": daemon.check_clock,
    "state": disks.check_state,
    "room": disks.check_room,
    "journal": disks.check_journal,
    "spool": disks.check_spool,
    "store": contents.check_store,
    "token": contents.check_token,
    "waiting": contents.check_waiting,
    "evidence": contents.check_evidence,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog doctor`."""
    add_socket_argument(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the daemon's TOML file (default: searched)")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 0, or 1 if one of them is a problem."""
    socket = Path(args.socket).absolute() if args.socket else None
    found = examine(visit(environment(), socket, args.config))
    levels = Counter(finding.level for finding in found)
    if args.json:
        counts = {f"{level.value}s": levels[level] for level in (Level.PROBLEM, Level.WARNING, Level.NOTE)}
        print_json({**counts, "findings": [asdict(finding) for finding in found]})
    else:
        print("\n".join(printable(line) for finding in found for line in describe(finding)))
        print(f"\n{verdict(levels)}")
    return EXIT_ERROR if levels[Level.PROBLEM] else EXIT_OK


class _Check(threading.Thread):
    """One check at work. What it raises is our mistake: the traceback goes to stderr, the others go on."""

    def __init__(self, name: str, check: Callable[[Site], Iterator[Finding]], site: Site) -> None:
        super().__init__(name=name, daemon=True)
        self.found: list[Finding] = []
        self.done = False
        self._check = check
        self._site = site

    def run(self) -> None:
        for finding in self._check(self._site):
            self.found.append(finding)
        self.done = True


def examine(site: Site, timeout_s: float = CHECK_TIMEOUT_S) -> list[Finding]:
    """Return every finding, in the order of the checks, after `timeout_s` at the latest."""
    threads = [_Check(name, check, site) for name, check in CHECKS.items()]
    for thread in threads:
        thread.start()
    found = list(site.found)
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
        found += list(thread.found)
        if thread.is_alive():
            text = f"no answer within {timeout_s:g} s: a disk or a network filesystem hangs"
            found.append(problem(thread.name, text, "dmesg | tail; cat /proc/mounts"))
        elif not thread.done:
            text = "this check itself failed, see the traceback above: a mistake of ranklog"
            found.append(problem(thread.name, text, "ranklog --version   # for the report of it"))
    return found


def describe(finding: Finding) -> list[str]:
    """Return the lines of one finding."""
    lines = [f"{finding.level.value:<8} {finding.check:<12} {finding.text}"]
    return [*lines, f"{'':<21} fix: {finding.fix}"] if finding.fix else lines


def verdict(levels: Counter[Level]) -> str:
    """Return the last line."""
    if not levels[Level.PROBLEM]:
        return f"no problem, {_count(levels[Level.WARNING], 'warning')}"
    return f"{_count(levels[Level.PROBLEM], 'problem')}, {_count(levels[Level.WARNING], 'warning')}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
