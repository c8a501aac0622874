"""Stores as readers open them, and shards as local files: in place in a directory, else through a cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ranklog.config import Settings
from ranklog.errors import StoreError
from ranklog.reader.listing import Shard
from ranklog.reader.shardcache import ShardCache
from ranklog.stores import Store, open_store
from ranklog.stores.base import StoreOptions


def open_source(url: str) -> Store:
    """Return the store a URL names, with the login that the environment names; raises UsageError, MissingExtra."""
    return open_store(url, StoreOptions(token_file=Settings.from_env().token_file))


def in_place(store: Store) -> Path | None:
    """Return the root of a store whose objects are local files already, or None."""
    root = getattr(store, "root", None)
    return root if isinstance(root, Path) else None


def default_cache() -> ShardCache:
    """Return the cache that the configuration names."""
    settings = Settings.from_env()
    return ShardCache(settings.read_cache_dir, settings.read_cache_size_bytes, quiet=settings.quiet)


@contextmanager
def offline_hint(store: Store) -> Iterator[None]:
    """Where a store cannot be reached, say with the error where its shards of earlier reads are."""
    try:
        yield
    except StoreError as exc:
        root = default_cache().root
        passing = not exc.permanent and not exc.held and exc.retry_after_s is None
        if not passing or in_place(store) or not root.is_dir():
            raise
        text = f"{exc} (What was read before is still on this node, incomplete as it may be: --to {root})"
        raise StoreError(text, permanent=False) from exc


def local_paths(store: Store, shards: Sequence[Shard]) -> list[Path]:
    """Return a good local file for each shard, in order, fetching what is missing; raises StoreError, FormatError."""
    root = in_place(store)
    return [root / shard.key for shard in shards] if root else default_cache().paths(store, shards)


def local_path(store: Store, shard: Shard) -> Path:
    """Return where a shard's local file is, or was; fetches nothing."""
    root = in_place(store)
    return root / shard.key if root else default_cache().path(shard)
