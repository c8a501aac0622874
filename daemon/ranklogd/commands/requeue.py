"""`ranklog requeue`: bring dead letters and quarantined records back into the line. Prints the plan unless `--apply`.

What may come back, and why no reader sees a record twice, is decided in `ranklogd.repair.requeue`. No daemon may run
meanwhile; the next one uploads what came back.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ranklog.cli import EXIT_ERROR, EXIT_OK
from ranklog.cli.output import print_json, printable
from ranklog.errors import RanklogError, UsageError
from ranklogd.commands.fsck import add_place_arguments, config_of
from ranklogd.statedir import StateDir

if TYPE_CHECKING:
    from ranklogd.repair.requeue import Item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog requeue`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, by file name or the end of their path")
    parser.add_argument("--all", action="store_true", help="everything that can come back")
    parser.add_argument("--deadletter", action="store_true", help="only shards that the store refused")
    parser.add_argument("--quarantine", action="store_true", help="only what could not be read")
    parser.add_argument("--apply", action="store_true", help="do it; without, the plan is printed")
    add_place_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan or carry it out; return 0, or 1 if something that was named must stay."""
    from ranklog.places import spool_dirs, usable_dirs
    from ranklog.stores import open_store
    from ranklogd.repair.offline import alone
    from ranklogd.repair.requeue import Way, bring_back, items

    rooms = [room for room in ("deadletter", "quarantine") if getattr(args, room)] or ["deadletter", "quarantine"]
    if args.apply and not (args.names or args.all or args.deadletter or args.quarantine):
        raise UsageError("--apply needs to know what: name files, or use --deadletter, --quarantine or --all")
    if args.names and args.all:
        raise UsageError("name files or use --all, not both")
    config = config_of(args)
    state = StateDir(config.state_dir)
    store = open_store(config.to, replace(config.store_options, create=""))  # It only looks.
    done: list[Item] = []
    with alone(state, "ranklog requeue"):
        found = [item for item in items(state, store, config.node) if item.room in rooms]
        if args.names:
            found = _named(found, args.names)
        if args.apply:
            warnings: list[str] = []
            settings = config.settings()
            spools = usable_dirs(spool_dirs(settings)[:1], "spool", settings, warnings.append)
            for item in found:
                if item.way is Way.NONE:
                    continue
                try:
                    bring_back(item, state, next(iter(spools), None), config.node)
                except OSError as exc:
                    left = f"{len(done)} came back before; run the same command again"
                    raise RanklogError(f"{item.path}: {exc.strerror or exc}. {left}") from exc
                done.append(item)
    stays = [item for item in found if item.way is Way.NONE]
    if args.json:
        print_json({
            "state_dir": str(state.root), "items": [item.as_json() for item in found], "applied": args.apply,
            "done": len(done),
        })  # fmt: skip
    else:
        _tell(found, done, state, apply=args.apply)
    return EXIT_ERROR if args.names and stays else EXIT_OK


def _named(found: "Sequence[Item]", names: Sequence[str]) -> "list[Item]":
    chosen: list[Item] = []
    for name in names:
        matching = [item for item in found if item.name == name or item.name.endswith(f"/{name}")]
        if not matching:
            raise UsageError(f"{name!r} does not stand aside; ranklog requeue lists what does")
        chosen += matching
    return chosen


def _tell(found: "Sequence[Item]", done: "Sequence[Item]", state: StateDir, *, apply: bool) -> None:
    if not found:
        print(f"{state.root}: nothing stands aside")
        return
    for item in found:
        print(printable(f"{item.room}/{item.name}"))
        print(f"          why it is there: {printable(item.reason) or 'nobody wrote it down'}")
        print(f"          stays: {printable(item.why_not)}" if item.why_not else f"          goes {item.way.value}")
    able = sum(not item.why_not for item in found)
    if apply:
        print(f"{len(done)} brought back; the next daemon uploads them: ranklog sync")
    elif able:
        print(f"{able} of {len(found)} can come back, nothing was changed. To do it: ranklog requeue --all --apply")
    else:
        print("None of it can come back")
