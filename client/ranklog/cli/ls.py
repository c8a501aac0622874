"""`ranklog ls`: the runs of a store, the latest last. Reads names, footers and start rows; never the metrics."""

import argparse
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ranklog.cli.output import Look, human_size, iso_utc, lay_out, print_json, utc
from ranklog.errors import UsageError
from ranklog.reader import default_url
from ranklog.reader.pending import warn_pending

if TYPE_CHECKING:
    from ranklog.reader.runs import RunSummary

# In order of importance: a narrow terminal shows the first ones.
_HEADER = ("project", "name", "run", "ranks", "records", "last (UTC)", "size", "shards", "rows", "first (UTC)")
_LOOKS = [Look.TEXT] * 4 + [Look.NUMBER, Look.TIME, Look.NUMBER, Look.NUMBER, Look.NUMBER, Look.TIME]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog ls`."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the store; the same as --to")
    add_store_arguments(parser)
    parser.add_argument("--run", help="only this run: its id or display name")


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every reading command takes."""
    parser.add_argument(
        "--to", metavar="URL", help="the store: a directory or URL (default: RANKLOG_TO, else XDG data)"
    )
    parser.add_argument("--project", help="only this project")


def run(args: argparse.Namespace) -> int:
    """Print the runs; an empty store is no error."""
    if args.url and args.to and args.url != args.to:
        raise UsageError(f"two stores given: {args.url!r} and --to {args.to!r}; name one")
    url = args.url or args.to or default_url()
    from ranklog.reader.local import open_source
    from ranklog.reader.runs import summarize_runs

    summaries = summarize_runs(open_source(url), args.project, args.run)
    if args.json:
        print_json([_as_json(summary) for summary in summaries])
    elif summaries:
        # A pipe has no width: whoever reads it wants the whole names.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        table = lay_out(_HEADER, [_as_row(summary) for summary in summaries], _LOOKS, width)
        print("\n".join(table.lines))
        if any(summary.records is None for summary in summaries):
            print("?: not counted, for that takes every shard of a run (ranklog ls --run RUN)")
        if table.hidden:
            print(f"not shown for lack of room: {', '.join(table.hidden)} (use a wider terminal, or --json)")
    else:
        sys.stderr.write(f"No runs in {url}.\n")
    warn_pending()
    return 0


def _as_row(summary: "RunSummary") -> list[str]:
    return [
        summary.project,
        summary.name,
        summary.run,
        rank_ranges(summary.ranks),
        "?" if summary.records is None else f"{summary.records:,}",
        _minute(summary.last_ts_us),
        human_size(summary.size_bytes),
        f"{summary.shards:,}",
        "?" if summary.rows is None else f"{summary.rows:,}",
        _minute(summary.first_ts_us),
    ]


def _as_json(summary: "RunSummary") -> dict[str, object]:
    fields = asdict(summary)
    for name in ("first", "last"):
        time_us = fields.pop(f"{name}_ts_us")
        fields[f"{name}_ts"] = None if time_us is None else iso_utc(utc(time_us))
    return fields


def _minute(time_us: int | None) -> str:
    return "" if time_us is None else f"{utc(time_us):%Y-%m-%d %H:%M}"


def rank_ranges(ranks: list[int]) -> str:
    """Return sorted ranks as ranges: `0-3,8`."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
