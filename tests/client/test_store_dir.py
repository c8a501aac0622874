"""What only the directory store promises: modes, durability order, leftovers, and what a sick filesystem answers."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ranklog import fs
from ranklog.errors import StoreError
from ranklog.stores import Upload, open_store
from ranklog.stores.dir import STALE_AFTER_S, DirStore

KEY = "v1/project_id=p/run_id=r/shard.parquet"
DATA = os.urandom(100_000)
CHAIN = ["sync run_id=r/", "sync project_id=p/", "sync v1/", "sync store/"]

PUT = """
import sys
from pathlib import Path
from ranklog.stores import Upload, open_store
result = open_store(sys.argv[1]).put([Upload(Path(sys.argv[2]), sys.argv[3])])[sys.argv[3]]
print(result)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> DirStore:
    return DirStore(root)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def put_in_a_process(root: Path, source: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PUT, str(root), str(source), KEY]
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_object_is_a_plain_file_at_root_slash_key(store, root, source):
    assert store.put([Upload(source, KEY)]) == {KEY: None}
    assert (root / KEY).read_bytes() == DATA
    assert files(root) == [KEY]
    assert (root / KEY).stat().st_nlink == 1


@pytest.mark.parametrize("url", ["{}", "file://{}", "file://localhost{}", "FILE://{}"])
def test_a_path_and_a_file_url_name_the_same_directory(url, tmp_path):
    assert open_store(url.format(tmp_path)).url == str(tmp_path)
    assert open_store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"


def test_a_relative_path_and_a_tilde_are_made_absolute_when_the_store_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert open_store("here").url == str(tmp_path / "here")
    assert open_store("~/data").url == "/somewhere/data"


def test_opening_a_store_touches_nothing(store, root):
    list(store.list(""))
    assert not root.exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read_the_store(store, root, source, umask):
    source.chmod(0o600)
    before = os.umask(umask)
    try:
        store.put([Upload(source, KEY)])
    finally:
        os.umask(before)
    assert (root / KEY).stat().st_mode & 0o777 == 0o666 & ~umask
    assert {path.stat().st_mode & 0o777 for path in [root, *root.rglob("*")] if path.is_dir()} == {0o777 & ~umask}


def test_a_killed_put_leaves_no_object_and_the_next_one_succeeds(root, source, store):
    killed = put_in_a_process(root, source, RANKLOG_FAILPOINT="store.put.mid=kill")
    assert killed.returncode == -signal.SIGKILL
    assert store.heads([KEY]) == {}
    assert list(store.list("")) == []
    assert len(files(root)) == 1, "the leftover is there, so the listing really hid something"
    assert put_in_a_process(root, source).stdout == "None\n"
    assert (root / KEY).read_bytes() == DATA


def test_an_error_half_way_leaves_nothing_behind_and_may_be_tried_again(root, source):
    failed = put_in_a_process(root, source, RANKLOG_FAILPOINT="store.put.mid=err")
    assert "cannot store" in failed.stdout
    assert files(root) == []


def test_a_leftover_is_removed_by_a_later_put_once_it_is_an_hour_old_and_never_before(store, root, source):
    room = (root / KEY).parent
    room.mkdir(parents=True)
    for name, age_s in ((".put-old.tmp", STALE_AFTER_S + 60), (".put-live.tmp", STALE_AFTER_S - 60), (".other", 10**6)):
        (room / name).write_bytes(b"part")
        os.utime(room / name, times=(0, (room / name).stat().st_mtime - age_s))
    store.put([Upload(source, KEY)])
    assert sorted(path.name for path in room.iterdir()) == [".other", ".put-live.tmp", "shard.parquet"]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What put does to names and bytes, in order; every call still happens."""
    done: list[str] = []

    def spy(name: str, say: object) -> None:
        real = getattr(fs, name)
        monkeypatch.setattr(fs, name, lambda *args: (done.append(say(*args)), real(*args))[1])

    spy("sync_data", lambda fd: f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).suffix}")
    spy("publish_new", lambda _, target: f"name {target.name}")
    spy("sync_dir", lambda path: f"sync {path.name}/")
    return done


def test_bytes_are_durable_before_the_name_and_every_directory_above_before_success(store, source, journal, root):
    root.mkdir()
    store.put([Upload(source, KEY)])
    assert journal == [f"sync {root.parent.name}/", "sync .tmp", "name shard.parquet", *CHAIN], "the root's name first"


def test_a_put_that_finds_its_object_there_still_makes_the_names_durable(store, source, journal):
    """A killed put may have given the name without having synced the directory."""
    store.put([Upload(source, KEY)])
    journal.clear()
    assert DirStore(store.root).put([Upload(source, KEY)]) == {KEY: None}
    assert journal == [f"sync {store.root.parent.name}/", *CHAIN]


def test_many_objects_of_one_run_share_the_directory_syncs(store, source, journal, root):
    root.mkdir()
    store.put([Upload(source, f"v1/a/{i}") for i in range(10)])
    assert [step for step in journal if step.endswith("/")][1:] == ["sync a/", "sync v1/", "sync store/"]


def test_a_directory_that_cannot_be_synced_fails_the_objects_in_it(store, source, monkeypatch):
    def broken(path: Path) -> None:
        if path.name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(fs, "sync_dir", broken)
    results = store.put([Upload(source, "a/bad/1"), Upload(source, "a/good/1")])
    assert results["a/good/1"] is None
    assert results["a/bad/1"] is not None
    assert not results["a/bad/1"].permanent


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_that_knows_no_sync_of_directories_is_good_enough(store, root, source, monkeypatch, code):
    root.mkdir()

    def unknown(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(fs, "sync_dir", unknown)
    assert store.put([Upload(source, KEY)]) == {KEY: None}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_without_hard_links_holds_the_same_promises(store, source, tmp_path, monkeypatch, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    assert store.put([Upload(source, KEY)]) == {KEY: None}
    assert store.put([Upload(source, KEY)]) == {KEY: None}
    error = store.put([Upload(other, KEY)])[KEY]
    assert error is not None
    assert error.permanent
    assert files(store.root) == [KEY]
    with pytest.raises(FileExistsError):
        fs.publish_new(other, store.root / KEY)
    assert (store.root / KEY).read_bytes() == DATA


def test_a_full_disk_is_transient_names_the_path_and_says_what_to_do(store, root, source):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # Python ignores SIGXFSZ: the write fails instead.
    try:
        error = store.put([Upload(source, KEY)])[KEY]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error is not None
    assert not error.permanent
    assert str(root) in str(error)
    assert "free space" in str(error)
    assert files(root) == []
    assert store.put([Upload(source, KEY)]) == {KEY: None}


def test_a_file_where_a_directory_must_be_is_transient_for_a_person_can_move_it(store, root, source):
    (root / "v1").mkdir(parents=True)
    (root / "v1/project_id=p").write_bytes(b"in the way")
    error = store.put([Upload(source, KEY)])[KEY]
    assert error is not None
    assert not error.permanent
    assert store.heads([KEY]) == {}
    (root / "v1/project_id=p").unlink()
    assert store.put([Upload(source, KEY)]) == {KEY: None}


def test_a_root_that_is_no_directory_fails_the_call_as_a_whole_and_may_be_tried_again(store, root, source):
    root.write_bytes(b"in the way")
    with pytest.raises(StoreError, match="cannot create the store") as refused:
        store.put([Upload(source, KEY)])
    assert not refused.value.permanent
    root.unlink()
    assert store.put([Upload(source, KEY)]) == {KEY: None}


def test_something_else_than_a_file_at_the_key_is_permanent_and_never_listed(store, root, source, tmp_path):
    room = (root / KEY).parent
    room.mkdir(parents=True)
    (root / KEY).symlink_to(source)
    os.mkfifo(room / "pipe")
    for key in (KEY, f"{Path(KEY).parent}/pipe"):
        error = store.put([Upload(source, key)])[key]
        assert error is not None
        assert error.permanent
        assert store.heads([key]) == {}
        with pytest.raises(StoreError):
            store.get(key, tmp_path / "t")
    assert list(store.list("")) == []


def test_a_linked_directory_neither_loops_nor_widens_a_listing(store, root, source, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"x")
    store.put([Upload(source, "a/b")])
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "out").symlink_to(tmp_path / "outside")
    assert [info.key for info in store.list("")] == ["a/b"]


def test_a_directory_that_cannot_be_read_is_an_error_and_not_an_empty_listing(root, source):
    """As root every directory can be read, so this one is made unreadable by its kind of path: a loop of links."""
    root.parent.mkdir(exist_ok=True)
    root.symlink_to(root)
    store = DirStore(root)
    with pytest.raises(StoreError):
        list(store.list(""))
    with pytest.raises(StoreError):
        store.heads([KEY])
    with pytest.raises(StoreError):
        store.put([Upload(source, KEY)])
