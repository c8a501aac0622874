"""Shards of stores over the network, kept as local files: <root>/<key>, the layout of a directory store.

    what is kept is never stale    an object is immutable, and its key holds a checksum of its bytes
    what is damaged is not used    size and checksum are compared when a process first uses a file; it is fetched again
    nothing half appears           files are fetched into <root>/.fetch-*, checked there, and renamed into place
    the size is bounded            the least recently read go first, but none that somebody may be reading now

Several processes may share it without a lock: two that fetch the same shard at once put the same bytes there.

While the store cannot be reached, nothing is answered from here by itself, for what is missing would not show. Who
wants what was read before names the root as a directory store: `--to ~/.cache/ranklog/shards`; the error says so.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ranklog import fs
from ranklog.errors import FormatError, StoreError
from ranklog.reader.listing import Shard
from ranklog.reader.progress import Progress
from ranklog.stores import Store
from ranklog.stores.base import Download

IN_USE_S = 60.0
"""A file that was asked for so lately may just be read, by this process or another; it is not removed."""
ABANDONED_S = 86_400.0
"""A fetch that was killed leaves its directory; nobody needs so long for one."""

_checked: dict[Path, tuple[int, int]] = {}
"""Files whose bytes this process has compared with their name -> inode and size."""


class ShardCache:
    """The files of one cache directory. May be shared by threads and processes."""

    def __init__(self, root: Path, size_bytes_max: int, *, quiet: bool = True) -> None:
        self.root = root
        self._size_bytes_max = size_bytes_max
        self._quiet = quiet

    def path(self, shard: Shard) -> Path:
        """Return where the shard's file is, or would be."""
        return self.root / shard.key

    def paths(self, store: Store, shards: Sequence[Shard]) -> list[Path]:
        """Return a good file for each shard, in order, fetching what is missing; raises StoreError, FormatError."""
        paths = [self.path(shard) for shard in shards]
        try:
            missing = [shard for shard, path in zip(shards, paths, strict=True) if not _is_good(shard, path)]
            if missing:
                self.trim(keep=set(paths), room_bytes=sum(shard.size_bytes for shard in missing))
                self._fetch(store, missing)
        except OSError as exc:
            text = f"shards of {store.url} cannot be kept in {self.root} (RANKLOG_READ_CACHE_DIR): {exc}"
            raise StoreError(text, permanent=False, held=True) from exc
        return paths

    def forget(self, shard: Shard) -> None:
        """Remove a file that turned out to be damaged."""
        fs.unlink(self.path(shard))

    def _fetch(self, store: Store, shards: Sequence[Shard]) -> None:
        try:
            fs.make_dir(self.root)
            with self._stage() as stage, Progress(shards, quiet=self._quiet) as progress:
                names = {shard.key: (shard, stage / f"{number}") for number, shard in enumerate(shards)}
                for key in store.fetch([Download(key, path) for key, (_, path) in names.items()]):
                    shard, path = names[key]
                    self._accept(store, shard, path)
                    progress.add(shard)
        except StoreError as exc:
            if not exc.permanent:
                raise
            # Compaction removes merged shards after a while: one may have gone between listing and reading.
            raise StoreError(f"{exc}: it has gone since the listing; try again", permanent=False) from exc

    @contextlib.contextmanager
    def _stage(self) -> Iterator[Path]:
        stage = self.root / f".fetch-{os.getpid()}-{secrets.token_hex(4)}"
        stage.mkdir(mode=0o700)
        try:
            yield stage
        finally:
            fs.remove_tree(stage)

    def _accept(self, store: Store, shard: Shard, fetched: Path) -> None:
        if not _matches(shard, fetched):
            raise FormatError(
                f"{store.url} holds other bytes under {shard.key} than its name says: the object is damaged. "
                "Move it out of the store, and the others can be read"
            )
        target = self.path(shard)
        if not target.parent.is_dir():
            fs.make_dir(target.parent)
        fs.rename(fetched, target)  # Not made durable: after a power cut the checksum tells what arrived.
        _note(target)

    def trim(self, *, keep: set[Path], room_bytes: int) -> None:
        """Remove the least recently read files until `room_bytes` more fit; those in `keep` or in use stay."""
        now_s = time.time()
        files = []
        for path in self.root.rglob("*.parquet"):
            try:
                info = path.stat()
            except FileNotFoundError:
                continue  # Another reader trims the same cache.
            files.append((info.st_mtime, info.st_size, path))
        size_bytes = room_bytes + sum(size for _, size, _ in files)
        for used_s, size, path in sorted(files):
            if size_bytes <= self._size_bytes_max:
                break
            if path not in keep and used_s < now_s - IN_USE_S:
                fs.unlink(path)
                size_bytes -= size
        for stage in self.root.glob(".fetch-*"):
            with contextlib.suppress(OSError):  # Its owner, or another reader, was faster.
                if stage.stat().st_mtime < now_s - ABANDONED_S:
                    fs.remove_tree(stage)


def _is_good(shard: Shard, path: Path) -> bool:
    """Tell whether the file is there and holds what its name says, and note that it is in use."""
    try:
        info = path.stat()
        if _checked.get(path) != (info.st_ino, shard.size_bytes) or info.st_size != shard.size_bytes:
            if not _matches(shard, path):
                fs.unlink(path)
                return False
            _note(path)
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _matches(shard: Shard, path: Path) -> bool:
    if path.stat().st_size != shard.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(shard.name.sha256)


def _note(path: Path) -> None:
    info = path.stat()
    _checked[path] = (info.st_ino, info.st_size)
