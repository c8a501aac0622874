"""`ranklog tail`: the newest rows of a run, and with --follow the rows of each shard as it arrives.

Rows arrive by shards, so --follow is as late as the daemon's seal age (10 s) plus the upload.
How new shards are found is the business of `ranklog.reader.live`.
"""

import argparse
import json
import sys
from typing import Any

from ranklog.cli.ls import add_store_arguments
from ranklog.cli.output import arrow_rows, cell, json_value, number, printable
from ranklog.errors import UsageError
from ranklog.reader import default_url
from ranklog.reader.pending import warn_pending

SHOWN_KINDS = ("metrics", "system", "alert", "text", "gap")
"""What a person watches; start, config and end rows are for queries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog tail`."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or display name (default: all runs of the store)")
    add_store_arguments(parser)
    parser.add_argument(
        "-k", "--key", action="append", metavar="KEY", help="only this key, or glob such as 'train/*'; repeatable"
    )
    parser.add_argument(
        "-n", "--rows", type=int, default=20, metavar="N", help="rows to begin with (default: %(default)s)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print further rows as they arrive, until Ctrl-C")
    parser.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="S",
        help="seconds between two looks, where the store does not tell by itself (default: %(default)s; more over a "
        "network while nothing comes)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the newest rows; with --follow, go on until interrupted."""
    if args.rows < 0 or not 0.05 <= args.interval <= 86_400:
        raise UsageError(f"-n is {args.rows} and --interval {args.interval:g}; they must be ≥ 0 and 0.05..86400")
    from ranklog.reader.follow import Follower
    from ranklog.reader.live import follow
    from ranklog.reader.local import open_source
    from ranklog.reader.sql import among, key_condition, quote

    condition = among("kind", [quote(kind) for kind in SHOWN_KINDS])
    if args.key:
        condition += f" AND {key_condition(args.key)}"
    url = args.to or default_url()
    store = open_source(url)
    follower = Follower(store, args.project, args.run, condition)
    show = _show_json if args.json else _show
    rows = follower.newest(args.rows)
    show(rows, with_run=args.run is None)
    if rows.num_rows == 0 and args.rows and not args.json:
        sys.stderr.write(f"No rows yet in {url}.\n")
    sys.stdout.flush()
    warn_pending()
    if args.follow:
        for fresh in follow(store, follower, args.interval):
            show(fresh, with_run=args.run is None)
            sys.stdout.flush()
    return 0


def _show(table: Any, *, with_run: bool) -> None:
    names = table.schema.names
    for values in arrow_rows(table):
        row = dict(zip(names, values, strict=True))
        where = "node" if row["rank"] is None else f"rank {row['rank']}"
        step = "" if row["step"] is None else f"step {row['step']}"
        shown = number(row["value"]) if row["value"] is not None else row["text"] or ""
        mark = "" if row["kind"] == "metrics" else f"[{row['kind']}] "
        name = f"{row['project']}/{row['run']}  " if with_run else ""
        print(printable(f"{cell(row['ts'])}  {name}{where:<7}  {step:<10}  {mark}{row['key']} = {shown}"))


def _show_json(table: Any, *, with_run: bool) -> None:
    del with_run  # Always there: programs need no short lines.
    for values in arrow_rows(table):
        record = dict(zip(table.schema.names, map(json_value, values), strict=True))
        print(json.dumps(record, ensure_ascii=False, allow_nan=False))
