import os

import pytest

from ranklog.errors import StoreError
from ranklog.reader.listing import list_shards
from ranklog.reader.local import local_paths, trim_cache
from ranklog.stores import ObjectInfo, open_store
from shards import records, write_shard, writer


class FarStore:
    """A store whose objects are not local files: it can only list and get, and counts the gets."""

    url = "far://store"

    def __init__(self, root):
        self._near = open_store(str(root))
        self.fetched = []

    def list(self, prefix):
        return self._near.list(prefix)

    def get(self, key, target):
        self.fetched.append(key)
        self._near.get(key, target)

    def put(self, uploads):
        raise AssertionError

    def head(self, key) -> ObjectInfo | None:
        raise AssertionError

    def delete(self, keys):
        raise AssertionError


def shards_of(root, count):
    for seq in range(count):
        write_shard(root, records(writer("a"), [{"loss": float(seq)}], first_seq=seq))


def test_a_directory_is_read_in_place(tmp_path):
    shards_of(tmp_path, 2)
    store = open_store(str(tmp_path))
    shards = list_shards(store)

    assert local_paths(store, shards) == [tmp_path / shard.key for shard in shards]


def test_other_stores_are_fetched_once(tmp_path):
    shards_of(tmp_path / "far", 3)
    store = FarStore(tmp_path / "far")
    shards = list_shards(store)

    for _ in range(2):
        paths = local_paths(store, shards, tmp_path / "cache")
        assert [path.read_bytes() for path in paths] == [(tmp_path / "far" / s.key).read_bytes() for s in shards]
    assert sorted(store.fetched) == sorted(shard.key for shard in shards)


def test_an_object_that_cannot_be_fetched_is_an_error_and_leaves_no_file(tmp_path):
    shards_of(tmp_path / "far", 1)
    store = FarStore(tmp_path / "far")
    shards = list_shards(store)
    (tmp_path / "far" / shards[0].key).unlink()

    with pytest.raises(StoreError):
        local_paths(store, shards, tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.parquet")) == []


def test_the_cache_gives_up_what_was_not_used_for_longest_and_keeps_what_is_needed_now(tmp_path):
    for age, name in enumerate(["new", "middle", "old", "needed"]):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(bytes(100))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))

    trim_cache(tmp_path, keep={tmp_path / "needed.parquet"}, room_bytes=50, size_bytes_max=300)

    assert sorted(path.stem for path in tmp_path.iterdir()) == ["needed", "new"]
