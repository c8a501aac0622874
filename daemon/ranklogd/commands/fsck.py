"""`ranklog fsck`: what is in a daemon's state directory, whether all of it is sound, and how it is mended.

    status    what is there                                          works beside a running daemon
    check     every checksum, lsn and seq; 1 if there is damage      works beside a running daemon
    export    the records in the WAL, journals, spools and evidence, as JSON lines
    repair    the plan; with --apply it is carried out. No daemon may run

Nothing is ever thrown away: what a repair replaces lies in quarantine/ afterwards, with a `.reason` beside it.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranklog.cli import EXIT_ERROR, EXIT_OK
from ranklog.cli.output import Look, human_size, json_value, lay_out, print_json, printable
from ranklog.errors import RanklogError, UsageError
from ranklogd.config import Config, load_config
from ranklogd.statedir import StateDir

if TYPE_CHECKING:
    from ranklogd.repair.finding import Finding

ACTIONS = ("status", "check", "export", "repair")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog fsck`."""
    parser.add_argument("action", nargs="?", default="status", choices=ACTIONS, help="default: %(default)s")
    parser.add_argument("files", nargs="*", metavar="FILE", help="export: only these files (default: all of them)")
    add_place_arguments(parser)
    parser.add_argument("--store", action="store_true", help="check: read every shard of the store, too")
    parser.add_argument("--apply", action="store_true", help="repair: do it; without, the plan is printed")


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a command is told whose state is meant."""
    parser.add_argument("--state-dir", metavar="DIR", help="the daemon's state directory (default: RANKLOG_STATE_DIR)")
    parser.add_argument("--to", metavar="URL", help="the daemon's store (default: RANKLOG_TO)")


def config_of(args: argparse.Namespace) -> Config:
    """Return the daemon's configuration as these arguments, the environment and the config file say it."""
    given = {"state_dir": args.state_dir, "to": args.to}
    return load_config({name: str(value) for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> int:
    """Do what was asked; return 0, or 1 for damage that a check found."""
    from ranklogd.repair.offline import require

    if args.apply and args.action != "repair":
        raise UsageError(f"--apply goes with ranklog fsck repair; {args.action} changes nothing")
    if args.store and args.action != "check":
        raise UsageError("--store goes with ranklog fsck check")
    if args.files and args.action != "export":
        raise UsageError(f"{args.files[0]!r}: files go with ranklog fsck export only")
    config = config_of(args)
    state = StateDir(config.state_dir)
    require(state)
    if args.action == "status":
        return _status(state, config, as_json=args.json)
    if args.action == "check":
        return _check(state, config, store=args.store, as_json=args.json)
    if args.action == "export":
        return _export(state, config, [Path(name) for name in args.files])
    return _repair(state, config, apply=args.apply, as_json=args.json)


def _status(state: StateDir, config: Config, *, as_json: bool) -> int:
    from ranklogd.repair.survey import facts

    found = facts(state, config)
    if as_json:
        print_json(found)
    else:
        print("\n".join(describe(found, shutil.get_terminal_size().columns)))
    return EXIT_OK


def describe(found: dict[str, Any], width: int | None) -> list[str]:
    """Return `fsck status` as lines. Pure."""
    owner = {None: "nobody", 0: "a daemon"}.get(found["owner_pid"], f"a daemon (pid {found['owner_pid']})")
    outbox, shipper = found["outbox"], found["shipper"]
    uploaded = _count(shipper.get("uploaded_shards", 0), "shard")
    lines = [
        f"state     {printable(found['state_dir'])}, owned by {owner}",
        f"store     {printable(found['to'])}, store_id {found['store_id'] or 'not known'}",
        f"outbox    {_count(outbox['shards'], 'shard')} to upload, {human_size(outbox['size_bytes'])}; "
        f"{_count(found['cache']['shards'], 'shard')} in the cache",
        f"shipper   {uploaded} uploaded, everything up to lsn {shipper.get('uploaded_lsn', 0):,}",
    ]
    rows = [
        [row["name"], row["state"], _range(row["first_lsn"], row["last_lsn"]), f"{row['records']:,}",
         f"{row['writers']:,}", human_size(row["size_bytes"]), row["trouble"]]
        for row in found["segments"]
    ]  # fmt: skip
    header = ("SEGMENT", "STATE", "LSNS", "RECORDS", "WRITERS", "SIZE", "TROUBLE")
    number, text = Look.NUMBER, Look.TEXT
    lines += _table("wal", header, rows, (text, text, number, number, number, number, text), width)
    rows = [
        [Path(row["path"]).name, row["state"], row["run"], "" if row["rank"] is None else str(row["rank"]),
         _range(row["first_seq"], row["last_seq"]), human_size(row["size_bytes"]), row["reason"]]
        for row in found["files"]
    ]  # fmt: skip
    header = ("FILE", "STATE", "RUN", "RANK", "SEQS", "SIZE", "REFUSED")
    lines += _table("journal and spool", header, rows, (text, text, text, number, number, number, text), width)
    for room in ("deadletter", "quarantine"):
        rows = [[Path(row["name"]).name, human_size(row["size_bytes"]), row["reason"]] for row in found[room]]
        lines += _table(room, ("FILE", "SIZE", "REASON"), rows, (text, number, text), width)
    return lines


def _range(first: int, last: int) -> str:
    return f"{first:,}..{last:,}" if 0 <= first <= last else ""


def _table(
    title: str, header: tuple[str, ...], rows: list[list[str]], looks: tuple[Look, ...], width: int | None
) -> list[str]:
    if not rows:
        return []
    return ["", title, *lay_out(header, rows, looks, width).lines]


def _check(state: StateDir, config: Config, *, store: bool, as_json: bool) -> int:
    from ranklog.stores import open_store
    from ranklogd.repair.finding import Severity
    from ranklogd.repair.shards import check_store
    from ranklogd.repair.survey import check_all

    found = list(check_all(state, config))
    if store:
        found += check_store(open_store(config.to, replace(config.store_options, create="")))
    counts = Counter(finding.severity for finding in found)
    if as_json:
        print_json({
            "state_dir": str(state.root), "findings": [finding.as_json() for finding in found],
            **{severity.value: counts[severity] for severity in Severity},
        })  # fmt: skip
    else:
        _tell(found, state.root)
        told = ", ".join(f"{counts[severity]} {severity.value}" for severity in reversed(Severity))
        print(f"{state.root}: {told}" if found else f"{state.root}: everything is sound")
        if any(finding.mend for finding in found):
            print(f"The plan of a repair: ranklog fsck repair --state-dir {state.root}")
    return EXIT_ERROR if counts[Severity.DAMAGE] else EXIT_OK


def _tell(found: "Iterable[Finding]", root: Path) -> None:
    for finding in found:
        path = finding.path.relative_to(root) if finding.path.is_relative_to(root) else finding.path
        print(f"{finding.severity.value:<8}  {printable(str(path))}")
        print(f"          {printable(finding.what)}")
        print(f"          the daemon {printable(finding.daemon)}")
        if finding.mend is not None:
            print(f"          a repair would {printable(finding.mend.told())}")


def _export(state: StateDir, config: Config, files: list[Path]) -> int:
    from ranklogd.repair.export import Unreadable, records_of
    from ranklogd.repair.survey import exportable

    code = EXIT_OK
    for path in files or exportable(state, config):
        if files and not path.is_file():
            raise UsageError(f"{path} is no file; ranklog fsck status lists what there is")
        try:
            for record in records_of(path):
                sys.stdout.write(json.dumps(json_value(record), ensure_ascii=False, allow_nan=False) + "\n")
        except Unreadable as exc:
            sys.stderr.write(f"ranklog: left out: {printable(str(exc))}\n")
            code = EXIT_ERROR
    return code


def _repair(state: StateDir, config: Config, *, apply: bool, as_json: bool) -> int:
    from ranklogd.repair.mend import carry_out
    from ranklogd.repair.offline import alone
    from ranklogd.repair.survey import check_all

    done = 0
    with alone(state, "ranklog fsck repair"):
        found = [finding for finding in check_all(state, config) if finding.mend is not None]
        if not as_json:
            _tell(found, state.root)
        if apply:
            for finding in found:
                assert finding.mend is not None, "chosen for it"
                try:
                    carry_out(finding.mend, state, config.node)
                except OSError as exc:
                    left = f"{done} of {len(found)} steps are done; run the same command again"
                    raise RanklogError(f"{finding.path}: {exc.strerror or exc}. {left}") from exc
                done += 1
    if as_json:
        plan = [finding.as_json() for finding in found]
        print_json({"state_dir": str(state.root), "plan": plan, "applied": apply, "done": done})
    elif not found:
        print(f"{state.root}: nothing to repair")
    elif apply:
        print(f"{_count(done, 'step')} done; the originals are in {state.quarantine}")
    else:
        print(f"{_count(len(found), 'step')} planned, nothing was changed. To do it: ranklog fsck repair --apply")
    return EXIT_OK


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
