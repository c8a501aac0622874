"""The hands: what is on disk after each step, and what is refused."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ranklog import fs


def test_write_all_writes_behind_the_end_and_in_the_middle(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    fs.write_all(fd, b"abcdef", 2)
    fs.write_all(fd, memoryview(b"XY"), 3)
    fs.write_all(fd, b"", 99)
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"\0\0aXYdef"


def test_write_all_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:3], offset))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    fs.write_all(fd, b"0123456789", 0)
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_publish_gives_a_finished_file_its_name_and_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "name").write_bytes(b"old")
    fs.publish(tmp_path / "new", tmp_path / "name")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"name": b"new"}


def test_publish_syncs_bytes_then_renames_then_syncs_the_directory(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    script = (
        "import os, pathlib, sys\n"
        "from ranklog import fs\n"
        "done = []\n"
        "def note(word, real):\n"
        "    def call(*args):\n"
        "        kind = os.readlink(f'/proc/self/fd/{args[0]}').rsplit('/', 1)[1] if word == 'fsync' else ''\n"
        "        done.append((word, kind)); return real(*args)\n"
        "    return call\n"
        "os.fsync, os.rename = note('fsync', os.fsync), note('rename', os.rename)\n"
        "fs.publish(pathlib.Path('new'), pathlib.Path('name'))\n"
        "print(done)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(fs.__file__).parent.parent)}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"[('fsync', 'new'), ('rename', ''), ('fsync', '{tmp_path.name}')]"


def test_publish_new_leaves_a_taken_name_alone(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    fs.publish_new(tmp_path / "new", tmp_path / "free")
    assert (tmp_path / "free").read_bytes() == b"new"
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        fs.publish_new(tmp_path / "other", tmp_path / "free")
    assert (tmp_path / "free").read_bytes() == b"new"


def test_publish_new_works_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "new").write_bytes(b"new")
    fs.publish_new(tmp_path / "new", tmp_path / "free")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        fs.publish_new(tmp_path / "other", tmp_path / "free")
    assert (tmp_path / "free").read_bytes() == b"new"


def test_unlinking_what_is_gone_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    fs.unlink(tmp_path / "f")
    fs.unlink(tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_remove_tree_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "link").symlink_to(outside)
    (tree / "dangling").symlink_to(tmp_path / "nowhere")
    fs.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "keep").exists()
    fs.remove_tree(tree)


def test_remove_tree_does_not_follow_a_link_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "keep").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fs.remove_tree(tmp_path / "link")
    assert (tmp_path / "real" / "keep").exists()


def test_remove_empty_dirs_keeps_what_holds_a_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "full").mkdir()
    (tmp_path / "a" / "full" / "file").touch()
    assert fs.remove_empty_dirs(tmp_path / "a") is False
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["full"]
    fs.unlink(tmp_path / "a" / "full" / "file")
    assert fs.remove_empty_dirs(tmp_path / "a") is True
    assert fs.remove_empty_dirs(tmp_path / "a") is True


def test_make_dir_makes_parents_private_and_leaves_what_is_there(tmp_path: Path) -> None:
    fs.make_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "a").chmod(0o755)
    fs.make_dir(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755


def test_preallocate_reserves_room_and_keeps_what_is_there(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"abc")
    fs.preallocate(fd, 100_000)
    info = os.fstat(fd)
    os.close(fd)
    assert info.st_size == 100_000
    assert info.st_blocks * 512 >= 100_000
    assert (tmp_path / "f").read_bytes() == b"abc" + bytes(100_000 - 3)


@pytest.mark.parametrize("size", [1, 3, 5000])
def test_preallocate_works_where_there_is_no_fallocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"abc")
    fs.preallocate(fd, size)
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"abc" + bytes(max(0, size - 3))


def test_a_full_disk_is_told_and_not_papered_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full") as caught:
        fs.preallocate(-1, 10)
    assert caught.value.errno in fs.NO_SPACE


def test_a_lock_is_taken_once_and_free_after_its_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert fs.try_lock(first)
    assert not fs.try_lock(second)
    os.close(first)
    assert fs.try_lock(second)
    os.close(second)


def test_an_honest_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    fd = fs.open_untrusted(tmp_path / "f")
    assert os.read(fd, 10) == b"abc"
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize("trap", ["symlink", "fifo", "directory", "hard link", "socket", "missing"])
def test_a_planted_file_is_refused_without_waiting(tmp_path: Path, trap: str) -> None:
    target, path = tmp_path / "secret", tmp_path / "f"
    target.write_bytes(b"secret")
    if trap == "symlink":
        path.symlink_to(target)
    elif trap == "fifo":
        os.mkfifo(path)
    elif trap == "directory":
        path.mkdir()
    elif trap == "hard link":
        path.hardlink_to(target)
    elif trap == "socket":
        os.mknod(path, 0o140600)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=re.escape(str(path))):
        fs.open_untrusted(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rename_takes_away_what_a_power_cut_left_under_the_old_name_but_never_the_only_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"x")
    os.link(old, new)
    fs.rename(old, new)
    assert not old.exists()
    with pytest.raises(AssertionError):
        fs.rename(new, new)
    assert new.read_bytes() == b"x"
