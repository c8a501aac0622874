"""What a failed read of shards means. Imports duckdb.

DuckDB seldom says which file it stumbled over. A shard's name holds the checksum of its bytes, so after an error that
looks like damage the shards are read once more, as bytes, to name those that changed. Where none did, the statement
was at fault. What is damaged in the cache only is removed there, and the next read fetches it again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from ranklog.errors import FormatError, RanklogError, StoreError
from ranklog.reader.footer import read_footer
from ranklog.reader.listing import Shard
from ranklog.reader.local import default_cache, in_place, local_path
from ranklog.stores import Store

NAMED_MAX = 3
"""Damaged shards that a message names; one is the usual case."""


@contextmanager
def shard_errors(store: Store, shards: Sequence[Shard], *, users_statement: bool = False) -> Iterator[None]:
    """Raise FormatError naming damaged shards, a passing StoreError if one is gone, else RanklogError for DuckDB's.

    With `users_statement`, errors that are the statement's own pass through as they are.
    """
    try:
        yield
    except (FileNotFoundError, duckdb.Error) as exc:
        missing = [path for shard in shards if not (path := local_path(store, shard)).exists()]
        if missing:
            # Compaction removes merged shards after a while: one may have gone between listing and reading.
            raise StoreError(f"{missing[0]} has gone from the store; try again", permanent=False) from exc
        # Most complaints of the parquet reader have no class of their own; the user's mistakes do.
        if users_statement and type(exc) not in (duckdb.Error, duckdb.InvalidInputException):
            raise
        damaged = damaged_shards(store, shards)
        if damaged and in_place(store) is None:
            for shard in damaged:
                default_cache().forget(shard)
            text = f"{len(damaged)} shards were damaged in the cache on this node, and are removed there; try again"
            raise StoreError(text, permanent=False) from exc
        if damaged:
            raise FormatError(_describe([local_path(store, shard) for shard in damaged], len(shards))) from exc
        for shard in shards:
            read_footer(local_path(store, shard))  # Raises where a later ranklog wrote the shard, and says so.
        if users_statement:
            raise
        raise RanklogError(f"cannot read the shards of {store.url}: {first_line(exc)}") from exc


def _describe(damaged: Sequence[Path], count: int) -> str:
    more = " and others" if len(damaged) > NAMED_MAX else ""
    return (
        f"{len(damaged)} of {count} shards damaged: their bytes do not match the checksum in their name. Move them out "
        f"of the store, and the others can be read: {', '.join(map(str, damaged[:NAMED_MAX]))}{more}"
    )


def damaged_shards(store: Store, shards: Sequence[Shard]) -> list[Shard]:
    """Return the shards whose local bytes are not those their names promise; reads all of them."""
    damaged = []
    for shard in shards:
        with local_path(store, shard).open("rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(shard.name.sha256):
                damaged.append(shard)
    return damaged


def first_line(exc: Exception) -> str:
    """Return what an error of DuckDB says, without the statement it quotes: ours names every shard."""
    return str(exc).partition("\n\nLINE ")[0]
