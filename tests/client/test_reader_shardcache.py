"""The cache of shards, filled from a Hub by the real client."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ranklog
import s3
from bucketroom import BUCKET, PREFIX, BucketRoom
from cli import environment
from node import wait_for
from ranklog.errors import FormatError, StoreError
from ranklog.reader import shardcache as cache_module
from ranklog.reader.listing import list_shards
from ranklog.reader.local import local_paths
from ranklog.reader.shardcache import ShardCache
from ranklog.stores import Upload, open_store
from shards import STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")
MANY = 1000


@pytest.fixture
def room(tmp_path):
    with BucketRoom(tmp_path) as room:
        yield room


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    monkeypatch.setattr(cache_module, "_checked", {})


def add_shards(room, count, **options):
    return [room.add(records(A, [{"loss": float(seq)}], first_seq=seq), **options) for seq in range(1, count + 1)]


def losses(table):
    return sorted(table.column("value").to_pylist())


def test_what_was_fetched_is_what_was_uploaded_and_is_fetched_once(room):
    add_shards(room, 3)
    shards = list_shards(room.store)
    paths = local_paths(room.store, shards)
    assert [path.read_bytes() for path in paths] == [(room.near / shard.key).read_bytes() for shard in shards]
    before = room.hub.requests.copy()
    assert local_paths(room.store, shards) == paths
    assert room.hub.requests == before
    assert len(room.cached()) == 3


def test_a_thousand_shards_cost_a_listing_a_lookup_and_a_token(room):
    room.add_all([write_shard(room.near, records(A, [{"x": 1.0}], first_seq=seq)) for seq in range(1, MANY + 1)])
    before = room.hub.requests.copy()
    calls = room.hub.api_calls
    assert ranklog.read(room.url).num_rows == MANY
    asked = room.hub.requests - before
    assert (asked["tree"], asked["paths"], asked["read_token"]) == (1, 1, 1)
    assert room.hub.api_calls - calls == 3
    assert ranklog.read(room.url).num_rows == MANY
    assert room.hub.api_calls - calls == 4, "a second read costs its listing only"


def test_only_the_run_that_was_asked_for_is_listed_and_fetched(room):
    add_shards(room, 2)
    room.add(records(B, [{"loss": 5.0}], run="run-2"), store_id=STORE_B)
    assert losses(ranklog.read(room.url, project="proj", run="run-2")) == [5.0]
    assert [path.parent.name for path in room.cached()] == ["run_id=run-2"]


def test_pages_of_a_listing_are_followed(room):
    add_shards(room, 7)
    room.hub.max_page = 2
    before = room.hub.requests["tree"]
    from ranklog.stores import hf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "PAGE_SIZE", 2)
        assert len(list_shards(room.store)) == 7
    assert room.hub.requests["tree"] - before == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "zeroed"])
def test_a_damaged_file_is_fetched_again(room, damage):
    add_shards(room, 2)
    shards = list_shards(room.store)
    path = local_paths(room.store, shards)[1]
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-1], "empty": b"", "flipped": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:],
        "zeroed": bytes(len(whole)),
    }  # fmt: skip
    path.write_bytes(broken[damage])
    cache_module._checked.clear()
    assert local_paths(room.store, shards)[1].read_bytes() == whole


def test_damage_behind_the_back_of_a_process_is_mended_by_the_read_that_stumbles_over_it(room):
    add_shards(room, 2)
    assert losses(ranklog.read(room.url)) == [1.0, 2.0]
    path = room.cached()[0]
    path.write_bytes(bytes(path.stat().st_size))
    assert losses(ranklog.read(room.url)) == [1.0, 2.0]


def test_an_object_whose_bytes_are_not_those_its_name_tells_is_named_and_not_kept(room):
    path = write_shard(room.near, records(A, [{"loss": 1.0}]))
    path.write_bytes(path.read_bytes()[::-1])
    (key,) = room.add_all([path])
    with pytest.raises(FormatError, match=key):
        ranklog.read(room.url)
    assert room.cached() == []


def test_a_download_that_is_cut_off_leaves_nothing_half(room, monkeypatch):
    add_shards(room, 2)
    with room.hub.fault("xorb", drop=True), pytest.raises(StoreError) as caught:
        ranklog.read(room.url)
    assert not caught.value.permanent
    assert room.cached() == []
    assert losses(ranklog.read(room.url)) == [1.0, 2.0]


def test_what_came_before_a_failure_is_kept(room, monkeypatch):
    from ranklog.stores import fetch

    monkeypatch.setattr(fetch, "GROUP_FILES_MAX", 1)
    add_shards(room, 3)
    with room.hub.fault("reconstruct", status=403, skip=1), pytest.raises(StoreError):
        local_paths(room.store, list_shards(room.store))
    assert len(room.cached()) == 1


def test_a_shard_that_is_gone_since_the_listing_is_worth_another_try_and_the_others_are_kept(room):
    keys = add_shards(room, 3)
    shards = list_shards(room.store)
    room.remove(keys[1])
    with pytest.raises(StoreError, match="try again") as caught:
        local_paths(room.store, shards)
    assert not caught.value.permanent
    assert len(room.cached()) == 2
    assert losses(ranklog.read(room.url)) == [1.0, 3.0]


def test_two_processes_fill_one_cache_at_once(room):
    add_shards(room, 20)
    script = "import sys, ranklog; print(ranklog.read(sys.argv[1]).num_rows)"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", script, room.url],
            env=environment(room.path) | room.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [reader.communicate(timeout=120) for reader in readers]
    assert [out.strip() for out, _ in told] == ["20", "20"], told
    names = {path.name.split(".")[3]: path for path in room.cached()}
    assert len(names) == len(room.cached()) == 20
    assert all(hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha) for sha, path in names.items())


def test_a_killed_reader_leaves_nothing_that_a_reader_takes_for_a_shard(room):
    add_shards(room, 2)
    script = "import sys, ranklog; ranklog.read(sys.argv[1])"
    with room.hub.fault("xorb", hang=True) as fault:
        reader = subprocess.Popen([sys.executable, "-c", script, room.url], env=environment(room.path) | room.env)
        wait_for(lambda: fault.struck, "the reader fetches")
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    left = list(room.cache.glob(".fetch-*"))
    assert len(left) == 1
    assert list(room.cache.rglob("*.parquet")) == []
    os.utime(left[0], (1_000_000, 1_000_000))
    assert losses(ranklog.read(room.url)) == [1.0, 2.0]
    assert list(room.cache.glob(".fetch-*")) == []


def lie(path, *, bytes_=100, age_s=3600.0):
    path.write_bytes(bytes(bytes_))
    os.utime(path, (time.time() - age_s,) * 2)


def test_the_least_recently_read_files_make_room_and_those_needed_or_in_use_stay(tmp_path):
    for age, name in enumerate(["new", "middle", "old", "needed"]):
        lie(tmp_path / f"{name}.parquet", age_s=3600 + age)
    lie(tmp_path / "in-use.parquet", age_s=0)
    ShardCache(tmp_path, 400).trim(keep={tmp_path / "needed.parquet"}, room_bytes=50)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["in-use", "needed", "new"]


def test_the_bound_holds_over_many_reads(room, monkeypatch):
    add_shards(room, 6)
    monkeypatch.setattr(cache_module, "IN_USE_S", -1.0)
    shards = list_shards(room.store)
    bound = max(shard.size_bytes for shard in shards) * 3
    cache = ShardCache(room.cache, bound)
    for shard in shards:
        cache.paths(room.store, [shard])
        assert sum(path.stat().st_size for path in room.cached()) <= bound
    assert [path.name for path in room.cached()] == [cache.path(shard).name for shard in shards[-3:]]


def test_a_read_that_is_larger_than_the_bound_works_and_the_next_one_brings_the_size_back(room, monkeypatch):
    add_shards(room, 4)
    other = room.add(records(B, [{"loss": 9.0}], run="run-2"), store_id=STORE_B)
    monkeypatch.setenv("RANKLOG_READ_CACHE_SIZE_BYTES", "1")
    monkeypatch.setattr(cache_module, "IN_USE_S", -1.0)
    assert losses(ranklog.read(room.url, "proj", "run-1")) == [1.0, 2.0, 3.0, 4.0]
    ranklog.read(room.url, "proj", "run-2")
    assert [path.name for path in room.cached()] == [other.rpartition("/")[2]]


def test_threads_share_one_cache(room):
    add_shards(room, 10)
    found = []
    threads = [threading.Thread(target=lambda: found.append(losses(ranklog.read(room.url)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [[float(seq) for seq in range(1, 11)]] * 4


def test_without_the_hub_nothing_is_answered_but_the_cache_can_be_read_as_a_directory(room):
    room.add(start(A, name="otter") + records(A, [{"loss": 1.0}]))
    assert losses(ranklog.read(room.url, run="otter")) == [1.0]
    room.hub.stop()
    with pytest.raises(StoreError, match=f"reachable.*--to {room.cache}"):
        ranklog.read(room.url, run="otter")
    assert losses(ranklog.read(str(room.cache), run="otter")) == [1.0]


def test_a_cache_that_cannot_be_written_says_where_it_is(room):
    add_shards(room, 1)
    room.cache.write_bytes(b"a file stands here")
    with pytest.raises(StoreError, match="RANKLOG_READ_CACHE_DIR"):
        ranklog.read(room.url)


def test_other_stores_of_the_cloud_go_through_the_same_cache(tmp_path, monkeypatch):
    bucket = s3.new_bucket()
    for name, value in s3.environment(RANKLOG_READ_CACHE_DIR=str(tmp_path / "cache")).items():
        monkeypatch.setenv(name, value)
    for seq in range(1, 4):
        write_shard(tmp_path / "near", records(A, [{"loss": float(seq)}], first_seq=seq))
    uploads = [
        Upload(path, str(path.relative_to(tmp_path / "near"))) for path in (tmp_path / "near").rglob("*.parquet")
    ]
    store = open_store(f"s3://{bucket}/some/prefix")
    assert set(store.put(uploads).values()) == {None}
    shards = list_shards(store)
    store.delete([shards[0].key])
    with pytest.raises(StoreError, match="try again"):
        local_paths(store, shards)
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 2, "one that is gone does not keep the others away"
    assert losses(ranklog.read(store.url)) == [2.0, 3.0]


def test_the_bucket_and_prefix_are_those_of_the_url(room):
    key = add_shards(room, 1)[0]
    assert list(room.hub.buckets.get(BUCKET).files) == [f"{PREFIX}/{key}"]
