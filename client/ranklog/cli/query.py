"""`ranklog query`: SQL over the views `records` and `metrics`, in DuckDB's dialect. CSV and JSON are streamed."""

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from ranklog.cli.ls import add_store_arguments
from ranklog.cli.output import Look, arrow_rows, cell, csv_column, json_value, lay_out
from ranklog.errors import RanklogError, UsageError
from ranklog.reader import default_url
from ranklog.reader.pending import warn_pending

ROWS_SHOWN = 40
"""Rows of a table unless --rows says otherwise: about a screenful. CSV and JSON print all."""

_BATCH_ROWS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog query`."""
    parser.add_argument("sql", metavar="SQL", help="a statement over `records` or `metrics`; - reads it from stdin")
    add_store_arguments(parser)
    parser.add_argument("--run", help="only this run, by id or display name: faster than a condition in the SQL")
    parser.add_argument("--format", choices=("table", "csv", "json"), help="default: table; --json is --format json")
    parser.add_argument(
        "--rows", type=int, default=ROWS_SHOWN, metavar="N", help="rows of a table (default: %(default)s, 0: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the statement and print its result; a statement that DuckDB does not understand is wrong usage."""
    import duckdb

    from ranklog.reader.damage import first_line, shard_errors
    from ranklog.reader.fetch import fetch_batches
    from ranklog.reader.local import open_source
    from ranklog.reader.runs import find_shards
    from ranklog.reader.sql import connect_shards

    statement = sys.stdin.read() if args.sql == "-" else args.sql
    style = "json" if args.json else args.format or "table"
    store = open_source(args.to or default_url())
    shards = find_shards(store, args.project, args.run)
    try:
        with connect_shards(store, shards) as con, shard_errors(store, shards, users_statement=True):
            batches = fetch_batches(con, statement, _BATCH_ROWS)
            schema = next(batches, None)
            if schema is not None:
                _PRINTERS[style](schema, batches, args.rows)
    except (duckdb.ParserException, duckdb.CatalogException, duckdb.BinderException) as exc:
        raise UsageError(f"query: {first_line(exc)}") from exc
    except (duckdb.Error, ValueError) as exc:
        raise RanklogError(f"query: {first_line(exc)}") from exc
    warn_pending()
    return 0


def _unique(names: list[str]) -> list[str]:
    """Return the names with `#2`, `#3` … behind repeated ones, for JSON objects cannot hold two."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def _print_table(schema: Any, batches: Iterator[Any], rows_max: int) -> None:
    shown: list[list[str]] = []
    total = 0
    for batch in batches:
        room = batch.num_rows if rows_max == 0 else max(0, rows_max - len(shown))
        shown += [[cell(value) for value in row] for row in arrow_rows(batch.slice(0, room))]
        total += batch.num_rows
    table = lay_out(schema.names, shown, [_look(field.type) for field in schema], shutil.get_terminal_size().columns)
    print("\n".join(table.lines))
    notes = [f"{total:,} row{'s' * (total != 1)}"]
    if total > len(shown):
        notes.append(f"the first {len(shown):,} shown (all: --rows 0, or --format csv)")
    if table.hidden:
        notes.append(f"no room for {', '.join(table.hidden)} (wider terminal, --format csv, or fewer columns)")
    print(f"({'; '.join(notes)})")


def _look(kind: Any) -> Look:
    import pyarrow as pa

    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Look.NUMBER
    return Look.TIME if pa.types.is_timestamp(kind) else Look.TEXT


def _print_csv(schema: Any, batches: Iterator[Any], _rows_max: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(schema.names)
    for batch in batches:
        writer.writerows(zip(*map(csv_column, batch.columns), strict=True))


def _print_json(schema: Any, batches: Iterator[Any], _rows_max: int) -> None:
    names = _unique(schema.names)
    separator = "["
    for batch in batches:
        for row in arrow_rows(batch):
            record = dict(zip(names, map(json_value, row), strict=True))
            sys.stdout.write(f"{separator}{json.dumps(record, ensure_ascii=False, allow_nan=False)}")
            separator = ",\n "
    sys.stdout.write("[]\n" if separator == "[" else "]\n")


_PRINTERS = {"table": _print_table, "csv": _print_csv, "json": _print_json}
