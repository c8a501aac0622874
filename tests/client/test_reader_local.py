from pathlib import Path

import pytest

from ranklog.errors import StoreError, UsageError
from ranklog.reader.listing import list_shards
from ranklog.reader.local import default_cache, in_place, local_path, local_paths, open_source
from ranklog.stores import open_store
from shards import records, write_shard, writer


def test_a_directory_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKLOG_READ_CACHE_DIR", str(tmp_path / "cache"))
    for seq in range(2):
        write_shard(tmp_path / "store", records(writer("a"), [{"loss": float(seq)}], first_seq=seq))
    store = open_source(str(tmp_path / "store"))
    shards = list_shards(store)

    assert in_place(store) == tmp_path / "store"
    assert local_paths(store, shards) == [tmp_path / "store" / shard.key for shard in shards]
    assert [local_path(store, shard) for shard in shards] == local_paths(store, shards)
    assert not (tmp_path / "cache").exists()


def test_a_bucket_is_not_in_place_and_its_shards_have_their_place_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKLOG_READ_CACHE_DIR", str(tmp_path))
    path = write_shard(tmp_path / "near", records(writer("a"), [{"loss": 1.0}]))
    (shard,) = list_shards(open_store(str(tmp_path / "near")))
    store = open_source("hf://buckets/user/b")
    assert in_place(store) is None
    assert local_path(store, shard) == tmp_path / path.relative_to(tmp_path / "near")


def test_the_cache_is_where_the_configuration_says(monkeypatch, tmp_path):
    monkeypatch.delenv("RANKLOG_READ_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().root == tmp_path / "ranklog" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_cache().root == Path("/home/ada/.cache/ranklog/shards")


def test_the_token_file_of_the_configuration_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKLOG_TOKEN_FILE", str(tmp_path / "missing"))
    with pytest.raises(StoreError, match="token file") as caught:
        list_shards(open_source("hf://buckets/user/b"))
    assert caught.value.held


def test_a_url_that_names_no_store_is_wrong_usage():
    with pytest.raises(UsageError):
        open_source("hf://user/b")
