"""`ranklog status`: is the daemon alive, are all ranks talking, is the data safe, is it uploaded. One screen.

`describe` and `describe_absence` are pure: a snapshot in, lines out. Whatever needs a person begins with `!` and says
what to do; while nothing does, no such line is there. The snapshot is that of `ranklogd.report.Status`.
"""

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from ranklog import control, places
from ranklog.autostart import missing_package
from ranklog.cli import EXIT_NO_DAEMON, EXIT_OK
from ranklog.cli.output import Look, human_size, lay_out, print_json, printable
from ranklog.cli.ping import add_socket_argument, settings_of
from ranklog.config import Settings
from ranklog.errors import NoDaemon, RanklogError, UsageError
from ranklog.reader.pending import waiting_writers

Snapshot = Mapping[str, Any]

RUNS_SHOWN = 12
REFUSED_FILES_SHOWN = 3
_HEADER = ("RUN", "RANKS", "RECORDS", "LAST", "STATE", "PROJECT", "ID")
_LOOKS = (Look.TEXT, Look.NUMBER, Look.NUMBER, Look.NUMBER, Look.TEXT, Look.TEXT, Look.TEXT)
_CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"
_WRONG = frozenset({"version", "foreign", "malformed"})
"""Refusals that a person should see to; the others are part of getting in step again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog status`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="only this run: its id or display name")
    parser.add_argument("--watch", action="store_true", help="look again and again, until Ctrl-C")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default: %(default)g)"
    )
    add_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the state of this node's daemon; return 0, or 3 if there is none."""
    if not 0.1 <= args.interval <= 86_400:
        raise UsageError(f"--interval {args.interval:g}: use seconds from 0.1 to 86400")
    settings = settings_of(args)
    never = threading.Event()
    while True:
        code = _look(settings, args, screen=args.watch and sys.stdout.isatty())
        sys.stdout.flush()
        if not args.watch:
            return code
        never.wait(args.interval)


def _look(settings: Settings, args: argparse.Namespace, *, screen: bool) -> int:
    clear = _CLEAR_SCREEN if screen else ""
    try:
        snapshot = control.status(settings)
    except NoDaemon as exc:
        waiting = len(waiting_writers(places.adoption_dirs(settings)))
        if args.json:
            print_json({"error": str(exc), "start": start_command(args.socket), "waiting_writers": waiting})
        else:
            socket = places.find_socket(settings)
            print(
                clear + "\n".join(describe_absence(str(socket), start_command(args.socket), missing_package(), waiting))
            )
        return EXIT_NO_DAEMON
    if args.run is not None:
        snapshot = only_run(snapshot, args.run)
    if args.json:
        print_json(snapshot)
    else:
        width = shutil.get_terminal_size().columns
        print(clear + "\n".join(describe(snapshot, now_s=time.time(), width=width)))
    return EXIT_OK


def only_run(snapshot: Snapshot, wanted: str) -> dict[str, Any]:
    """Return the snapshot with only the runs of this id or display name; raises RanklogError if there is none."""
    runs = [row for row in snapshot["runs"] if wanted in (row["run"], row["name"], f"{row['project']}/{row['run']}")]
    if not runs:
        known = ", ".join(row["name"] or row["run"] for row in snapshot["runs"][:RUNS_SHOWN]) or "none since its start"
        raise RanklogError(
            f"this daemon has seen no run {wanted!r} since its start; the runs are: {known}. For older ones: ranklog ls"
        )
    return {**snapshot, "runs": runs}


def start_command(socket: str | None) -> str:
    """Return the command that starts the daemon which the user looked for."""
    return f"ranklogd --socket {socket}" if socket else "ranklogd"


def describe_absence(socket: str, start: str, missing: str, waiting: int) -> list[str]:
    """Return what to say where no daemon answers; `missing` is a package it would need, `waiting` counts writers."""
    lines = [f"No daemon answers on {socket}.", ""]
    if missing:
        lines.append('install it      pip install "ranklog[daemon]"')
    lines += [f"start one       {start}", "or with a job   ranklog run -- torchrun train.py"]
    if waiting:
        subject = "1 writer on this node holds" if waiting == 1 else f"{waiting} writers on this node hold"
        lines += ["", f"{subject} records that no daemon has taken yet. They are safe.", "bring them in   ranklog sync"]
    return lines


def describe(snapshot: Snapshot, *, now_s: float, width: int) -> list[str]:
    """Return the screen for a snapshot; `now_s` is the time since the epoch."""
    found = problems(snapshot)
    verdict = "OK" if not found else "1 problem" if len(found) == 1 else f"{len(found)} problems"
    head = (
        f"ranklogd {snapshot['version']} · up {age(snapshot['uptime_s'])} · {snapshot['node']} · pid {snapshot['pid']}"
    )
    lines = [
        f"{head}  {verdict:>{max(0, width - len(head) - 2)}}",
        f"ranks     {_ranks(snapshot)}",
        f"safe      {_safe(snapshot)}",
        f"uploaded  {_uploaded(snapshot, now_s)}",
        f"store     {snapshot['to']}",
    ]
    if found:
        lines += ["", *(f"! {text}" for text in found)]
    if snapshot["runs"]:
        rows = [_row(row) for row in snapshot["runs"][:RUNS_SHOWN]]
        table = lay_out(_HEADER, rows, _LOOKS, width)
        lines += ["", *table.lines]
        if len(snapshot["runs"]) > RUNS_SHOWN:
            lines.append(f"and {len(snapshot['runs']) - RUNS_SHOWN} more (ranklog status --json)")
    return [printable(line) for line in lines]


def _ranks(snapshot: Snapshot) -> str:
    running = [row for row in snapshot["runs"] if row["state"] == "running"]
    if not running:
        return "no run is live here"
    last_s = min(row["last_s"] for row in running)
    ranks = _count(sum(row["ranks"] for row in running), "rank")
    when = "just now" if last_s < 2 else f"{age(last_s)} ago"
    return f"{ranks} here in {_count(len(running), 'live run')}, last record {when}"


def _safe(snapshot: Snapshot) -> str:
    marks = snapshot["watermarks"]
    on_the_way = marks["received"] - marks["durable"]
    rest = f", {on_the_way:,} on the way to the disk" if on_the_way else ""
    return f"{_count(marks['durable'], 'record')} durable{rest}"


def _uploaded(snapshot: Snapshot, now_s: float) -> str:
    marks, shipper = snapshot["watermarks"], snapshot["shipper"]
    waiting = marks["received"] - marks["uploaded"]
    last_s = shipper.get("last_upload_s") or 0
    when = f"; last upload {age(max(0.0, now_s - last_s))} ago" if last_s else ""
    if not waiting:
        return f"everything{when}" if marks["received"] else "nothing has arrived yet"
    share = 100 * marks["uploaded"] / marks["received"]
    # Rounded down: 100 % is said only where it is true.
    return f"{int(share * 10) / 10:g} %, {_count(waiting, 'record')} ({human_size(snapshot['used_bytes'])}) to go{when}"


def _row(row: Snapshot) -> list[str]:
    return [
        row["name"] or row["run"],
        f"{row['ranks']}/{row['world_size']}",
        f"{row['records']:,}",
        age(row["last_s"]),
        row["state"],
        row["project"],
        row["run"],
    ]


def problems(snapshot: Snapshot) -> list[str]:
    """Return what a person should see to, most urgent first, each with what ranklog does meanwhile."""
    shipper, state_dir = snapshot["shipper"], snapshot["state_dir"]
    found = []
    if snapshot["full"]:
        found.append(f"no room: {snapshot['full']}. New records stay with their writers and come in once there is room")
    if snapshot["poisoned_segments"]:
        count = _count(snapshot["poisoned_segments"], "WAL segment")
        found.append(
            f"{count} replaced after an fsync error: nothing acknowledged is lost, but check the disk of {state_dir}"
        )
    if upload := why_not_uploaded(snapshot):
        found.append(f"{upload}. Everything waits on this node's disk")
    if dead := shipper.get("dead_letters"):
        shards = _count(dead, "shard")
        found.append(f"{shards} refused by the store for good: kept, with reasons, in {state_dir}/deadletter")
    records, stretches = shipper.get("quarantined_records", 0), shipper.get("damaged_stretches", 0)
    if records or stretches:
        damage = f"{_count(records, 'unreadable record')}, {_count(stretches, 'damaged stretch', 'damaged stretches')}"
        found.append(f"{damage}: gaps in the data; the bytes and reasons are in {state_dir}/quarantine")
    elif files := shipper.get("quarantined_files", 0):
        found.append(f"{_count(files, 'damaged file')} set aside, with reasons, in {state_dir}/quarantine")
    wrong = {code: count for code, count in snapshot["refused"].items() if code in _WRONG}
    if wrong:
        refused = ", ".join(f"{count:,} {code}" for code, count in sorted(wrong.items()))
        found.append(f"refused messages: {refused}. Their writers keep the records")
    files = list(snapshot["adoption_refused"].items())
    found += [f"left alone: {path} ({reason})" for path, reason in files[:REFUSED_FILES_SHOWN]]
    if len(files) > REFUSED_FILES_SHOWN:
        found.append(f"left alone: {len(files) - REFUSED_FILES_SHOWN} more files (ranklog status --json)")
    if snapshot["offline_waiting"]:
        found.append(
            f"{_count(snapshot['offline_waiting'], 'writer')} in offline mode: bring the records in with: ranklog sync"
        )
    return found


def why_not_uploaded(snapshot: Snapshot) -> str:
    """Return why records do not reach the store, with the time of the next try; "" if the daemon knows of nothing."""
    shipper = snapshot["shipper"]
    error = shipper.get("last_error")
    if not error:
        return ""
    next_s = shipper.get("next_try_s") or 0
    return f"upload: {error} ({shipper.get('last_error_class')}{f'; next try in {age(next_s)}' if next_s else ''})"


def age(seconds: float) -> str:
    """Return a duration in its two largest units: `3 h 12 m`, `41 s`; below ten seconds with one decimal."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, factor, smaller, below in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= factor:
            return f"{whole // factor} {unit} {whole % factor // below} {smaller}"
    return f"{whole} s"


def _count(number: int, word: str, plural: str = "") -> str:
    return f"{number:,} {word if number == 1 else plural or word + 's'}"
