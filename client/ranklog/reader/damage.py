"""What a failed read of shards means. Imports duckdb.

DuckDB seldom says which file it stumbled over. A shard's name holds the checksum of its bytes, so after an error that
looks like damage the shards are read once more, as bytes, to name those that changed. Where none did, the statement
was at fault.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from ranklog.errors import FormatError, StoreError
from ranklog.reader.listing import Shard
from ranklog.reader.local import local_paths
from ranklog.stores import Store

NAMED_MAX = 3
"""Damaged shards that a message names; one is the usual case."""


@contextmanager
def shard_errors(store: Store, shards: Sequence[Shard]) -> Iterator[None]:
    """Raise FormatError naming the damaged shards, or a passing StoreError if one is gone; pass other errors on."""
    try:
        yield
    except (FileNotFoundError, duckdb.IOException) as exc:
        # Compaction removes merged shards after a while: one may have gone between listing and reading.
        raise StoreError(
            f"a shard of {store.url} cannot be read; try again: {first_line(exc)}", permanent=False
        ) from exc
    except duckdb.Error as exc:
        # The parquet reader's own complaints have no class of their own but these two.
        if type(exc) not in (duckdb.Error, duckdb.InvalidInputException):
            raise
        damaged = damaged_shards(store, shards)
        if not damaged:
            raise
        names = ", ".join(map(str, damaged[:NAMED_MAX])) + (" and others" if len(damaged) > NAMED_MAX else "")
        raise FormatError(
            f"{len(damaged)} of {len(shards)} shards damaged: the bytes do not match the checksum in the name. "
            f"Move out of the store, and the others can be read: {names}"
        ) from exc


def damaged_shards(store: Store, shards: Sequence[Shard]) -> list[Path]:
    """Return the local files whose bytes are not those their names promise; reads all of them."""
    damaged = []
    for shard, path in zip(shards, local_paths(store, shards), strict=True):
        with path.open("rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(shard.name.sha256):
                damaged.append(path)
    return damaged


def first_line(exc: Exception) -> str:
    """Return what an error of DuckDB says, without the statement it quotes: ours names every shard."""
    return str(exc).partition("\n\nLINE ")[0]
