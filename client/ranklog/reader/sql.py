"""DuckDB over the shards: the views `records` and `metrics`. Imports duckdb.

    records   every column of the schema, one row for each (writer, seq, kind, key): the one with the lowest lsn
    metrics   the rows of kind `metrics`, without the columns that only matter to the daemon

Deduplication is free where it can be: shards that provably share no record (`ranklog.reader.overlap`) are scanned as
they are, so a filter on `key` skips row groups by their statistics. Only the others pass through a window; a filter on
a column of its partition still reaches the files.

Nothing is downloaded: the parquet reader is part of DuckDB, and loading further extensions is switched off.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb

from ranklog.reader.damage import shard_errors
from ranklog.reader.footer import read_footer
from ranklog.reader.listing import Shard, by_run
from ranklog.reader.local import local_paths, open_source
from ranklog.reader.overlap import may_repeat, settled_by_names
from ranklog.reader.runs import find_shards
from ranklog.schema import SCHEMA
from ranklog.stores import Store

METRICS_COLUMNS = ("run", "rank", "step", "key", "value", "text", "ts", "project", "node", "attempt", "seq", "writer")
"""What people look for first stands first: a narrow terminal has no room for the rest."""

_TYPES = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "int32": "INTEGER",
    "double": "DOUBLE",
    "timestamp[us, tz=UTC]": "TIMESTAMPTZ",
}
_IDENTITY = "project, run, writer, seq, kind, key"
_METRICS = "CREATE VIEW metrics AS SELECT {columns} FROM records WHERE kind = 'metrics'"
_SCAN = "SELECT {columns} FROM read_parquet([{files}], hive_partitioning = false)"
_FIRST_COPY = f"QUALIFY row_number() OVER (PARTITION BY {_IDENTITY} ORDER BY lsn, recv_ts, node) = 1"


def connect(url: str, project: str | None = None, run: str | None = None) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB connection with the views over the store's shards of now; later ones need a new one.

    `run` is an id or a display name. An empty store gives empty views. Raises UsageError, StoreError, FormatError.
    """
    store = open_source(url)
    return connect_shards(store, find_shards(store, project, run))


def connect_shards(store: Store, shards: Sequence[Shard]) -> duckdb.DuckDBPyConnection:
    """Return a connection with the views over the given visible shards; raises StoreError, FormatError."""
    con = duckdb.connect(
        ":memory:", config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    )
    # Shards never change behind their names, so their footers may be kept: a third of a warm query's time.
    con.execute("SET TimeZone = 'UTC'; SET parquet_metadata_cache = true")
    with shard_errors(store, shards):
        clean, suspect = split(store, shards)
        con.execute(f"CREATE VIEW records AS {_records(clean, suspect)}")
        con.execute(_METRICS.format(columns=", ".join(METRICS_COLUMNS)))
    return con


def split(store: Store, shards: Sequence[Shard]) -> tuple[list[Path], list[Path]]:
    """Return the files that share no record with any other, and those that may."""
    clean: list[Path] = []
    suspect: list[Path] = []
    local_paths(store, shards)  # All in one go.
    for group in by_run(shards).values():
        paths = local_paths(store, group)
        names = [shard.name for shard in group]
        if settled_by_names(names):
            clean += paths
            continue
        repeated = may_repeat(names, [read_footer(path).writers for path in paths])
        clean += [path for index, path in enumerate(paths) if index not in repeated]
        suspect += [path for index, path in enumerate(paths) if index in repeated]
    return clean, suspect


def quote(text: str) -> str:
    """Return `text` as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, literals: Sequence[str]) -> str:
    """Return SQL that is true where the column is one of these literals; no literals, no rows."""
    return f"{column} IN ({', '.join(literals)})" if literals else "false"


def key_condition(patterns: Sequence[str]) -> str:
    """Return SQL that is true for keys equal to a pattern or matching it as a glob (`*`, `?`, `[…]`)."""
    # Only equality is compared with the row groups' statistics, so a plain key does not go through GLOB.
    parts = [among("key", [quote(pattern) for pattern in patterns])]
    parts += [f"key GLOB {quote(pattern)}" for pattern in patterns if set(pattern) & set("*?[")]
    return f"({' OR '.join(parts)})"


def _records(clean: Sequence[Path], suspect: Sequence[Path]) -> str:
    columns = ", ".join(SCHEMA.names)
    parts = []
    if clean:
        parts.append(_SCAN.format(columns=columns, files=_file_list(clean)))
    if suspect:
        parts.append(f"{_SCAN.format(columns=columns, files=_file_list(suspect))} {_FIRST_COPY}")
    if not parts:
        nothing = ", ".join(f"NULL::{_TYPES[str(field.type)]} AS {field.name}" for field in SCHEMA)
        parts.append(f"SELECT {nothing} WHERE false")
    return " UNION ALL ".join(f"({part})" for part in parts)


def _file_list(paths: Iterable[Path]) -> str:
    # DuckDB takes a path for a pattern; a bracket makes each special character stand for itself.
    return ", ".join(quote("".join(f"[{c}]" if c in "*?[" else c for c in str(path))) for path in paths)
