"""A bucket of the loopback Hub with known shards in it, for tests of readers: through the real client, both ways.

with BucketRoom(tmp_path) as room:
    room.add(records(writer("a"), [{"loss": 0.5}]))
    ranklog.read(room.url)
"""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import pytest

from cli import ranklog
from hub.server import Hub
from ranklog.stores import Store, Upload, open_store
from shards import Row, write_shard

BUCKET = "user/logs"
PREFIX = "job"


class BucketRoom:
    """A Hub, this process's settings for it, and a directory store with the same shards to compare with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.near = path / "near"
        self.cache = path / "cache"
        self.url = f"hf://buckets/{BUCKET}/{PREFIX}"
        self.hub = Hub(path / "hub")
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        from huggingface_hub import constants

        self.hub.start()
        self.token = self.hub.token()
        self.env = {
            "HF_ENDPOINT": self.hub.url, "HF_TOKEN": self.token, "HF_HOME": str(self.path / "home"),
            "HF_XET_CACHE": str(self.path / "xet"), "RANKLOG_READ_CACHE_DIR": str(self.cache), "XDG_STATE_HOME": str(self.path / "state"),
            "RANKLOG_JOURNAL_DIR": str(self.path / "journal"), "RANKLOG_SPOOL_DIR": str(self.path / "spool"),
        }  # fmt: skip
        for name, value in self.env.items():
            self._patch.setenv(name, value)
        self._patch.setattr(constants, "ENDPOINT", self.hub.url)
        self.hub.buckets.create(BUCKET, private=True)
        self._writer = open_store(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.stop()
        self._patch.undo()

    @property
    def store(self) -> Store:
        """One more handle on the bucket."""
        return open_store(self.url)

    def add(self, rows: Iterable[Row], **options: Any) -> str:
        """Put one shard into the bucket and return its key."""
        return self.add_all([write_shard(self.near, rows, **options)])[0]

    def add_all(self, paths: Iterable[Path]) -> list[str]:
        """Put files of `near` into the bucket and return their keys."""
        uploads = [Upload(path, str(path.relative_to(self.near))) for path in paths]
        told = self._writer.put(uploads)
        assert set(told.values()) <= {None}, told
        return [upload.key for upload in uploads]

    def remove(self, *keys: str) -> None:
        """Delete shards from the bucket."""
        self._writer.delete(keys)

    def cached(self) -> list[Path]:
        """Every file of the cache, finished or not."""
        return sorted(path for path in self.cache.rglob("*") if path.is_file())

    def cli(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `ranklog` as a process of its own that reads this bucket."""
        return ranklog(*arguments, home=self.path, env=self.env | env)
