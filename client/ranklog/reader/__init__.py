"""The reading side: listing -> shards -> DuckDB -> Arrow. Needs the extra `read`; importing this package does not.

    listing      which shards exist and are visible (names only)
    local        stores as readers open them, shards as local files
    shardcache   shards of stores over the network, kept on this node
    progress     how far a larger download is
    footer       what a shard says of itself
    overlap      which shards may repeat a record
    runs         runs by display name, and their summaries
    sql          DuckDB views over shards
    fetch        DuckDB's results as Arrow, in such a way that Ctrl-C ends them
    damage       which shard a failed read is due to
    table        `read`: an Arrow table, thinned on request
    follow       rows of shards as they arrive
    live         when to look for them: the store's feed of changes, or again and again
    pending      writers of this node whose records no daemon has taken

Nothing here writes to a store.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from ranklog.config import Settings
from ranklog.errors import MissingExtra
from ranklog.reader.pending import warn_pending

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_EXTRA = ("pyarrow", "duckdb")


def default_url() -> str:
    """Return the store URL of the configuration: RANKLOG_TO, else the file, else a directory under XDG data."""
    return Settings.from_env().to


def read(
    url: str | None = None,
    project: str | None = None,
    run: str | None = None,
    keys: str | Iterable[str] | None = None,
    ranks: int | Iterable[int] | None = None,
    max_points: int | None = None,
    *,
    kinds: str | Iterable[str] = ("metrics",),
) -> "pa.Table":
    """Return logged rows as an Arrow table with the columns of `ranklog.schema`, each record once.

    `url` names the store (default: the configured one), `project` and `run` the true names; `run` may be a run's id or
    its display name. `keys` are exact names or globs (`train/*`), `ranks` global ranks, `kinds` words of the column
    `kind`. Sorted by (key, rank, step, seq).

    `max_points` thins each series of one key and rank to at most that many rows (4 or more): its first and last, and
    the lowest and highest of equal stretches between them. See `ranklog.reader.table`.

    Raises MissingExtra without pyarrow or duckdb, UsageError, StoreError, and FormatError for a damaged shard.
    """
    with _extra("ranklog.read()"):
        from ranklog.reader.table import read_table
    _warn_once()
    return read_table(url or default_url(), project, run, keys, ranks, max_points, kinds=kinds)


def connect(url: str | None = None, project: str | None = None, run: str | None = None) -> "duckdb.DuckDBPyConnection":
    """Return a DuckDB connection with the views `records` and `metrics`; see `ranklog.reader.sql`."""
    with _extra("ranklog.reader.connect()"):
        from ranklog.reader import sql
    return sql.connect(url or default_url(), project, run)


@contextmanager
def _extra(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name not in _EXTRA:
            raise
        raise MissingExtra(what, "read", exc.name) from exc


@cache
def _warn_once() -> None:
    # A notebook reads again and again; the note is news only once.
    warn_pending()
