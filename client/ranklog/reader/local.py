"""Shards as local files. A directory store is read in place; from others, objects are fetched into a cache.

A key ends in the object's checksum, so a cached file is never stale and may be shared by every store that has it. The
cache is bounded: files not used for longest go first, but never one that the present read needs.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranklog import fs
from ranklog.reader.listing import Shard
from ranklog.stores import Store

CACHE_SIZE_MAX = 10 << 30
"""Bytes the cache may keep from earlier reads. A run of 50 M values is about 0.3 GB."""
FETCH_THREADS = 8  # Small objects wait for round trips, not for bandwidth.


def default_cache_dir() -> Path:
    """Return where fetched shards are kept unless the caller says otherwise."""
    return Path("~/.cache/ranklog/shards").expanduser()


def local_paths(store: Store, shards: Sequence[Shard], cache_dir: Path | None = None) -> list[Path]:
    """Return a readable local file for each shard, in order; raises StoreError or OSError.

    A store with a path as `root` is a directory: its files are used where they lie.
    """
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        return [root / shard.key for shard in shards]
    cache = cache_dir or default_cache_dir()
    paths = [cache / shard.key for shard in shards]
    missing = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    trim_cache(cache, keep=set(paths), room_bytes=sum(shard.size_bytes for shard, _ in missing))
    for folder in sorted({path.parent for path in paths}):
        fs.make_dir(folder)
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        list(pool.map(lambda pair: store.get(pair[0].key, pair[1]), missing))
    for path in paths:
        os.utime(path)
    return paths


def trim_cache(cache: Path, *, keep: set[Path], room_bytes: int, size_bytes_max: int = CACHE_SIZE_MAX) -> None:
    """Remove the files that were not used for longest until `room_bytes` more fit; those in `keep` stay."""
    files = []
    for path in cache.rglob("*.parquet"):
        try:
            info = path.stat()
        except FileNotFoundError:
            continue  # Another reader trims the same cache.
        files.append((info.st_mtime_ns, info.st_size, path))
    size_bytes = room_bytes + sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if size_bytes <= size_bytes_max:
            return
        if path not in keep:
            fs.unlink(path)
            size_bytes -= size
