"""One suite for every store: what `ranklog.stores.base.Store` promises. A new store joins by a line in STORES."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import s3
from hub.server import Hub
from ranklog.errors import StoreError, UsageError
from ranklog.stores import ObjectInfo, Store, Upload, open_store
from ranklog.stores.base import Download

OpenStore = Callable[[], Store]
"""Makes one more handle on the same place."""


@contextmanager
def directory_store(room: Path) -> Iterator[OpenStore]:
    yield lambda: open_store(str(room / "store"))


@contextmanager
def bucket_store(room: Path) -> Iterator[OpenStore]:
    """A real bucket's client against the Hub on loopback."""
    from huggingface_hub import constants

    with Hub(room / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setenv("HF_XET_CACHE", str(room / "xet"))
        patch.setenv("HF_TOKEN", hub.token())
        hub.buckets.create("user/b", private=True)
        yield lambda: open_store("hf://buckets/user/b/some/prefix")


@contextmanager
def s3_store(room: Path) -> Iterator[OpenStore]:
    """A server that speaks S3, in this process; a bucket of its own for each test."""
    url = f"s3://{s3.new_bucket()}/some/prefix"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield lambda: open_store(url)


STORES: list[Callable[[Path], AbstractContextManager[OpenStore]]] = [directory_store, bucket_store, s3_store]
CREATE_IF_ABSENT = [directory_store, s3_store]
"""Those that can tell two apart who put other bytes under one key at one moment. A bucket cannot, and need not: a
daemon's names hold its own random id."""

KEY = "v1/project_id=p/run_id=r/n.0123456789abcdef.0000000000000001-0000000000000009.aaaaaaaaaaaa.parquet"
HOSTILE = [
    "", "/", "/etc/passwd", "a/", "a//b", "..", "../a", "a/../b", "a/..", ".", "./a", "a/./b", ".hidden",
    "a/.put-1.tmp", "a\\b", "a\0b", "a\nb", "a\x7fb", "\udc80", "x" * 256, "/".join(["x" * 200] * 6),
]  # fmt: skip


@pytest.fixture(params=STORES, ids=lambda make: make.__name__.removesuffix("_store"))
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    with request.param(tmp_path) as make:
        yield make


@pytest.fixture(params=CREATE_IF_ABSENT, ids=lambda make: make.__name__.removesuffix("_store"))
def reopen_atomic(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    with request.param(tmp_path) as make:
        yield make


@pytest.fixture
def store(reopen: OpenStore) -> Store:
    return reopen()


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    made: list[Path] = []

    def make(data: bytes) -> Path:
        made.append(tmp_path / f"source-{len(made)}")
        made[-1].write_bytes(data)
        return made[-1]

    return make


def fetch(store: Store, key: str, tmp_path: Path) -> bytes:
    target = tmp_path / "fetched"
    store.get(key, target)
    return target.read_bytes()


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "one byte", "3 MiB"])
def test_what_was_put_is_listed_sized_and_read_back_byte_for_byte(store, source, tmp_path, data):
    assert store.put([Upload(source(data), KEY)]) == {KEY: None}
    assert store.heads([KEY]) == {KEY: ObjectInfo(KEY, len(data))}
    assert list(store.list("")) == [ObjectInfo(KEY, len(data))]
    assert fetch(store, KEY, tmp_path) == data


def test_the_source_stays_as_it_was(store, source):
    path = source(b"bytes")
    store.put([Upload(path, KEY)])
    store.delete([KEY])
    assert path.read_bytes() == b"bytes"


def test_changing_the_source_afterwards_does_not_change_the_object(store, source, tmp_path):
    path = source(b"bytes")
    store.put([Upload(path, KEY)])
    with path.open("r+b") as file:
        file.write(b"other")
    assert fetch(store, KEY, tmp_path) == b"bytes"


def test_an_empty_store_lists_nothing_and_has_nothing(store):
    assert list(store.list("")) == []
    assert list(store.list("v1/project_id=p/")) == []
    assert store.heads([KEY]) == {}
    store.delete([KEY])


def test_an_empty_put_does_nothing(store):
    assert store.put([]) == {}


def test_the_same_bytes_at_the_same_key_succeed_again(store, source):
    path = source(b"bytes")
    for _ in range(3):
        assert store.put([Upload(path, KEY)]) == {KEY: None}
    assert store.put([Upload(source(b"bytes"), KEY)]) == {KEY: None}
    assert [info.key for info in store.list("")] == [KEY]


@pytest.mark.parametrize("other", [b"bytez", b"byte", b"bytes and more", b""])
def test_other_bytes_at_an_existing_key_are_a_permanent_error_and_overwrite_nothing(store, source, tmp_path, other):
    store.put([Upload(source(b"bytes"), KEY)])
    error = store.put([Upload(source(other), KEY)])[KEY]
    assert isinstance(error, StoreError)
    assert error.permanent
    assert fetch(store, KEY, tmp_path) == b"bytes"


def test_one_bad_file_of_a_batch_leaves_the_others_alone(store, source, tmp_path):
    store.put([Upload(source(b"taken"), "a/taken")])
    results = store.put([
        Upload(source(b"1"), "a/first"), Upload(source(b"other"), "a/taken"), Upload(source(b"x"), "../a"),
        Upload(tmp_path / "no such file", "a/missing"), Upload(source(b"2"), "a/last"),
    ])  # fmt: skip
    assert {key for key, error in results.items() if error is None} == {"a/first", "a/last"}
    assert {info.key for info in store.list("")} == {"a/first", "a/last", "a/taken"}
    assert set(results) == {"a/first", "a/taken", "../a", "a/missing", "a/last"}


def test_another_handle_on_the_same_place_sees_the_object(store, reopen, source, tmp_path):
    store.put([Upload(source(b"bytes"), KEY)])
    assert fetch(reopen(), KEY, tmp_path) == b"bytes"
    assert [info.key for info in open_store(store.url).list("")] == [KEY]


def test_a_listing_is_sorted_by_key_and_takes_its_prefix_as_a_plain_string(store, source):
    keys = ["a/b/c", "a-b", "a.b", "a/b-c", "a/b/c-d/e", "a/b.c", "ab", "a/ba/c", "b"]
    results = store.put([Upload(source(key.encode()), key) for key in keys])
    assert set(results.values()) == {None}
    for prefix in ["", "a", "a/", "a/b", "a/b/", "a/b/c", "a/b/c-d/e", "a/b/c-d/e/", "c", "/"]:
        assert [i.key for i in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix)), prefix


@pytest.mark.parametrize("key", HOSTILE)
def test_a_key_that_leaves_the_store_or_that_some_store_cannot_hold_is_refused_for_good(store, source, tmp_path, key):
    error = store.put([Upload(source(b"x"), key)])[key]
    assert error is not None
    assert error.permanent
    for refuse in (lambda: store.heads([key]), lambda: store.get(key, tmp_path / "t"), lambda: store.delete([key])):
        with pytest.raises(StoreError) as refused:
            refuse()
        assert refused.value.permanent
    assert list(store.list("")) == []


def test_a_prefix_cannot_climb_out_of_the_store(store, tmp_path):
    (tmp_path / "outside").write_bytes(b"secret")
    for prefix in ("../", "a/../../", "/etc/", "a//"):
        with pytest.raises(StoreError, match="refused"):
            list(store.list(prefix))


def test_getting_what_is_not_there_is_a_permanent_error_and_leaves_the_target_as_it_was(store, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"before")
    with pytest.raises(StoreError, match="no object") as refused:
        store.get(KEY, target)
    assert refused.value.permanent
    assert target.read_bytes() == b"before"


def test_getting_replaces_the_target_and_leaves_nothing_beside_it(store, source, tmp_path):
    store.put([Upload(source(b"new"), KEY)])
    room = tmp_path / "room"
    room.mkdir()
    (room / "target").write_bytes(b"something longer")
    store.get(KEY, room / "target")
    assert [(p.name, p.read_bytes()) for p in room.iterdir()] == [("target", b"new")]


def test_many_objects_are_fetched_each_told_once_its_file_is_whole(store, source, tmp_path):
    contents = {f"v1/{number}": os.urandom(number * 1000) for number in range(12)}
    store.put([Upload(source(data), key) for key, data in contents.items()])
    downloads = [Download(key, tmp_path / f"fetched-{number}") for number, key in enumerate(contents)]
    targets = dict(downloads)
    told = []
    for key in store.fetch(downloads):
        assert targets[key].read_bytes() == contents[key]
        told.append(key)
    assert sorted(told) == sorted(contents)
    assert list(store.fetch([])) == []


def test_of_many_objects_those_that_are_missing_are_a_permanent_error_after_all_others(store, source, tmp_path):
    store.put([Upload(source(b"a"), "v1/a"), Upload(source(b"c"), "v1/c")])
    downloads = [Download(f"v1/{name}", tmp_path / f"fetched-{name}") for name in "abcd"]
    told = []
    with pytest.raises(StoreError) as refused:
        told += store.fetch(downloads[:1])
        for key in store.fetch(downloads[1:]):
            told.append(key)
    assert refused.value.permanent
    assert sorted(told) == ["v1/a", "v1/c"]
    assert [name for name in "abcd" if (tmp_path / f"fetched-{name}").exists()] == ["a", "c"]


def test_deleting_removes_the_named_objects_only_and_may_be_repeated(store, source):
    store.put([Upload(source(key.encode()), key) for key in ("a/1", "a/2", "a/3")])
    for _ in range(2):
        store.delete(["a/1", "a/3", "a/9", "b/1/2", "a/2/below-an-object"])
        assert [info.key for info in store.list("")] == ["a/2"]
    assert store.put([Upload(source(b"again"), "a/1")]) == {"a/1": None}


def test_a_directory_of_keys_is_no_object(store, source, tmp_path):
    store.put([Upload(source(b"x"), "a/b/c")])
    assert store.heads(["a/b"]) == {}
    with pytest.raises(StoreError):
        store.get("a/b", tmp_path / "t")
    store.put([Upload(source(b"xy"), "a/b/c/below-an-object")])  # Flat keys allow it, a directory does not.
    assert store.heads(["a/b/c"]) == {"a/b/c": ObjectInfo("a/b/c", 1)}


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_of_many_that_put_other_bytes_at_one_key_exactly_one_wins(reopen_atomic, source, tmp_path):
    data = [bytes([i]) * 5000 for i in range(8)]
    paths = [source(item) for item in data]
    barrier, results = threading.Barrier(8), {}

    def work(i: int) -> None:
        store = reopen_atomic()
        barrier.wait()
        results[i] = store.put([Upload(paths[i], KEY)])[KEY]

    in_threads(8, work)
    winners = [i for i, error in results.items() if error is None]
    assert len(winners) == 1
    assert fetch(reopen_atomic(), KEY, tmp_path) == data[winners[0]]
    assert all(error is None or error.permanent for error in results.values())


def test_a_listing_beside_running_puts_never_shows_a_half_written_object(reopen, source):
    size = 2 << 20
    paths = [source(os.urandom(size)) for _ in range(3)]
    done = threading.Event()
    seen: list[ObjectInfo] = []

    def watch() -> None:
        store = reopen()
        while not done.is_set():
            seen.extend(store.list("a/"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        store = reopen()
        for round_ in range(5):
            keys = [f"a/{round_}-{i}" for i in range(3)]
            assert set(store.put(list(map(Upload, paths, keys))).values()) == {None}
    finally:
        done.set()
        watcher.join(60)
    assert {info.size_bytes for info in seen} <= {size}
    assert len(list(reopen().list("a/"))) == 15


# No key is also a folder of another: a store of flat keys takes that, a directory cannot.
FOLDERS = st.lists(st.sampled_from(["a", "b", "a-b", "run_id=x", "é"]), max_size=2)
KEYS = st.builds(lambda folders, leaf: "/".join([*folders, leaf]), FOLDERS, st.sampled_from(["x.parquet", "a.b", "y"]))
ACTIONS = st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), KEYS, st.binary(max_size=1)), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_any_row_of_puts_and_deletes_leaves_what_a_dict_would_hold(store, source, tmp_path, actions):
    model: dict[str, bytes] = {}
    for action, key, data in actions:
        if action == "put":
            error = store.put([Upload(source(data), key)])[key]
            assert (error is None) == (model.setdefault(key, data) == data)
        else:
            store.delete([key])
            model.pop(key, None)
    assert list(store.list("")) == [ObjectInfo(key, len(model[key])) for key in sorted(model)]
    assert {key: fetch(store, key, tmp_path) for key in model} == model
    store.delete(list(model))


@pytest.mark.parametrize("url", ["", "ftp://x/y", "hf:", "file://host/x", "file:x", "file:///a?b", "a\0b"])
def test_a_url_that_names_no_store_is_a_usage_error(url):
    with pytest.raises(UsageError):
        open_store(url)
