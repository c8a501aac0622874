"""Where files and sockets go, on filesystems laid out for the test, and what stands in the way there."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ranklog import places
from ranklog.config import Settings
from ranklog.errors import UsageError

UID = os.geteuid()
needs_root = pytest.mark.skipif(UID != 0, reason="needs files of other users: run the tests as root")
MOUNTS = """1 0 0:1 / / rw - ext4 x rw
2 1 0:2 / {root}/shm rw - tmpfs x rw
3 1 0:3 / {root}/run rw - tmpfs x rw
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's directories below `tmp_path`, those that are open to everybody with the sticky bit."""
    for name in ("shm", "tmp", "var_tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o1777)
    (tmp_path / "run").mkdir()
    for constant in ("SHM", "TMP", "VAR_TMP", "RUN"):
        monkeypatch.setattr(places, constant, tmp_path / constant.lower())
    monkeypatch.setattr(places, "SYSTEM_SPOOL", tmp_path / "spool")
    mount(tmp_path, monkeypatch, MOUNTS)
    return tmp_path


def mount(root: Path, monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    (root / "mountinfo").write_text(table.format(root=root))
    monkeypatch.setattr("ranklog.mounts._MOUNTINFO", root / "mountinfo")


def settings_for(root: Path) -> Settings:
    return Settings(
        to="/data", runtime_dir=root / "run" / "ranklog", state_dir=root / "home" / "state" / "ranklog", uid=UID,
        xdg_state=root / "home" / "state", xdg_data=root / "home" / "data", read_cache_dir=root / "home" / "cache",
    )  # fmt: skip


def test_journals_prefer_memory_and_spools_disk(root: Path) -> None:
    found = settings_for(root)
    state, last = root / "home" / "state" / "ranklog" / "spool", root / "var_tmp" / f"ranklog-{UID}" / "spool"
    assert places.spool_dirs(found) == [state, last]
    hot = [root / "run" / "ranklog" / "journal", root / "shm" / f"ranklog-{UID}"]
    assert places.journal_dirs(found) == [*hot, state, last]


def test_a_runtime_directory_on_disk_takes_no_journals(root: Path) -> None:
    found = replace(settings_for(root), runtime_dir=root / "tmp" / "ranklog")
    assert places.journal_dirs(found)[0] == root / "shm" / f"ranklog-{UID}"


def test_without_any_tmpfs_journals_go_where_spools_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(root, monkeypatch, "1 0 0:1 / / rw - overlay x rw\n")
    assert places.journal_dirs(settings_for(root)) == places.spool_dirs(settings_for(root))


def test_a_spool_that_an_administrator_made_comes_first(root: Path) -> None:
    (root / "spool").mkdir()
    assert places.spool_dirs(settings_for(root))[0] == root / "spool"


def test_a_home_on_a_network_takes_no_spool_unless_told_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "home").mkdir()
    mount(root, monkeypatch, MOUNTS + "4 1 0:4 / {root}/home rw - nfs4 x rw\n")
    found = settings_for(root)
    assert places.spool_dirs(found) == [root / "var_tmp" / f"ranklog-{UID}" / "spool"]
    assert len(places.spool_dirs(replace(found, allow_network_fs=True))) == 2


def test_a_directory_that_the_user_names_is_the_only_one(root: Path) -> None:
    (root / "spool").mkdir()
    found = replace(settings_for(root), journal_dir=root / "j", spool_dir=root / "s")
    assert places.journal_dirs(found) == [root / "j"]
    assert places.spool_dirs(found) == [root / "s"]
    assert places.adoption_dirs(found) == [root / "j", root / "s"]
    assert places.journal_dirs(replace(found, journal_dir=None))[-1] == root / "s"


def test_a_daemon_scans_whatever_a_client_may_have_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "spool").mkdir()
    found = settings_for(root)
    used = {*places.journal_dirs(found), *places.spool_dirs(found)}
    mount(root, monkeypatch, "1 0 0:1 / / rw - overlay x rw\n")  # Another container may see another filesystem.
    scanned = places.adoption_dirs(found)
    assert used <= set(scanned)
    assert len(scanned) == len(set(scanned))


@needs_root
def test_a_daemon_of_root_scans_the_directories_of_all_users_and_nobody_elses(root: Path) -> None:
    own = set(places.adoption_dirs(settings_for(root)))
    user = [
        root / "shm" / "ranklog-1234", root / "var_tmp" / "ranklog-1234" / "spool",
        root / "tmp" / "ranklog-1234" / "journal", root / "run" / "user" / "1234" / "ranklog" / "journal",
    ]  # fmt: skip
    planted = [root / "shm" / "ranklog-77", root / "shm" / "ranklog-x", root / "var_tmp" / "ranklog-88" / "spool"]
    for path in [*user, *planted]:
        path.mkdir(parents=True)
    for path in [*user, *planted, root / "var_tmp" / "ranklog-1234", root / "tmp" / "ranklog-1234"]:
        os.chown(path, 1234, 1234)
    for path in (root / "run" / "user" / "1234", root / "run" / "user" / "1234" / "ranklog"):
        os.chown(path, 1234, 1234)
    (root / "shm" / "ranklog-1235").symlink_to(root / "home")
    os.chown(root / "shm" / "ranklog-1235", 1235, 1235, follow_symlinks=False)
    assert set(places.adoption_dirs(settings_for(root))) - own == set(user)
    assert set(places.adoption_dirs(replace(settings_for(root), uid=1))) & set(user) == set()


def test_sockets_are_looked_for_in_order_and_once(root: Path) -> None:
    found = settings_for(root)
    run, tmp = root / "run" / "ranklog" / "ranklog.sock", root / "tmp" / f"ranklog-{UID}" / "ranklog.sock"
    session = root / "run" / "user"
    assert places.socket_candidates(found) == [run, tmp]
    assert places.socket_candidates(replace(found, xdg_runtime=session, runtime_dir=session / "ranklog")) == [
        session / "ranklog" / "ranklog.sock", run, tmp,
    ]  # fmt: skip


def test_a_socket_or_runtime_directory_that_the_user_names_is_the_only_one(root: Path) -> None:
    found = settings_for(root)
    assert places.socket_candidates(replace(found, socket=root / "x.sock")) == [root / "x.sock"]
    named = replace(found, runtime_dir=root / "r", runtime_dir_given=True, xdg_runtime=root)
    assert places.socket_candidates(named) == [root / "r" / "ranklog.sock"]


@pytest.fixture
def listen() -> Iterator[object]:
    sockets = []

    def listen(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        sockets.append(socket.socket(socket.AF_UNIX))
        # By a short name, for the kernel takes 107 bytes and a test's directory may have more.
        fd = os.open(path.parent, os.O_RDONLY)
        sockets[-1].bind(f"/proc/self/fd/{fd}/{path.name}")
        os.close(fd)
        return path

    yield listen
    for opened in sockets:
        opened.close()


def test_the_first_socket_that_exists_is_found(root: Path, listen) -> None:  # type: ignore[no-untyped-def]
    found = settings_for(root)
    assert places.find_socket(found) == root / "run" / "ranklog" / "ranklog.sock"
    last = listen(root / "tmp" / f"ranklog-{UID}" / "ranklog.sock")
    assert places.find_socket(found) == last
    (root / "run" / "ranklog").mkdir()
    (root / "run" / "ranklog" / "ranklog.sock").touch()
    assert places.find_socket(found) == last
    (root / "run" / "ranklog" / "ranklog.sock").unlink()
    assert places.find_socket(found) == last
    first = listen(root / "run" / "ranklog" / "ranklog.sock")
    assert places.find_socket(found) == first


@needs_root
def test_a_socket_planted_by_somebody_else_is_passed_over(root: Path, listen) -> None:  # type: ignore[no-untyped-def]
    found = settings_for(root)
    planted = listen(root / "tmp" / f"ranklog-{UID}" / "ranklog.sock")
    os.chown(planted.parent, 1234, 1234)
    assert places.find_socket(found) == root / "run" / "ranklog" / "ranklog.sock"
    os.chown(planted.parent, UID, UID)
    assert places.find_socket(found) == planted


def test_a_private_directory_is_made_with_its_parents(root: Path) -> None:
    path = root / "var_tmp" / "ranklog-x" / "spool"
    places.ensure_private_dir(path)
    places.ensure_private_dir(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_ours_that_others_may_write_to_is_closed_to_them(root: Path) -> None:
    path = root / "shm" / "ranklog-x"
    path.mkdir()
    path.chmod(0o777)
    places.ensure_private_dir(path)
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_link_or_a_file_in_its_place_is_refused(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "shm" / "link").symlink_to(root / "elsewhere")
    with pytest.raises(UsageError, match=r"link is a symbolic link.*Nothing was written.*RANKLOG_JOURNAL_DIR"):
        places.ensure_private_dir(root / "shm" / "link")
    (root / "shm" / "file").touch()
    with pytest.raises(UsageError, match="is not a directory"):
        places.ensure_private_dir(root / "shm" / "file")
    assert list((root / "elsewhere").iterdir()) == []


@needs_root
def test_somebody_elses_directory_is_refused(root: Path) -> None:
    path = root / "shm" / "ranklog-0"
    path.mkdir()
    os.chown(path, 1234, 1234)
    with pytest.raises(UsageError, match=r"ranklog-0 .*belongs to user 1234"):
        places.ensure_private_dir(path)
    private = root / "home" / "spool"
    private.mkdir(parents=True)
    os.chown(private, 1234, 1234)
    with pytest.raises(UsageError, match="belongs to user 1234, not to 0"):
        places.ensure_private_dir(private)


@needs_root
@pytest.mark.parametrize("trap", ["directory", "link"])
def test_nothing_is_made_below_a_trap_in_an_open_directory(root: Path, trap: str) -> None:
    target = root / "target"
    target.mkdir()
    planted = root / "var_tmp" / "ranklog-0"
    if trap == "link":
        planted.symlink_to(target)
    else:
        planted.mkdir()
    os.chown(planted, 1234, 1234, follow_symlinks=False)
    with pytest.raises(UsageError, match="in a directory open to everybody and belongs to user 1234"):
        places.ensure_private_dir(planted / "spool")
    assert list(target.iterdir()) == []
    assert not (planted / "spool").exists()


def test_usable_directories_keep_their_order_and_say_why_others_are_not(root: Path) -> None:
    (root / "shm" / f"ranklog-{UID}").symlink_to(root / "home")
    found, warnings = settings_for(root), list[str]()
    dirs = places.journal_dirs(found)
    assert places.usable_dirs(dirs, "journal", found, warnings.append) == [dirs[0], *dirs[2:]]
    assert len(warnings) == 1
    assert "is a symbolic link" in warnings[0]


@needs_root
def test_a_shared_volume_that_the_user_names_may_belong_to_somebody_else(root: Path) -> None:
    volume = root / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    os.chown(volume, 1234, 1234)
    places.prepare_dir(volume, "spool", replace(settings_for(root), spool_dir=volume))
    with pytest.raises(UsageError):
        places.prepare_dir(volume, "spool", settings_for(root))


@needs_root
def test_the_administrators_spool_may_belong_to_the_daemon(root: Path) -> None:
    (root / "spool").mkdir()
    (root / "spool").chmod(0o3733)
    os.chown(root / "spool", 1234, 1234)
    places.prepare_dir(root / "spool", "spool", settings_for(root))
    assert (root / "spool").stat().st_mode & 0o7777 == 0o3733


def test_a_named_directory_on_a_network_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(root, monkeypatch, "1 0 0:1 / / rw - lustre x rw\n")
    found = replace(settings_for(root), spool_dir=root / "s")
    with pytest.raises(UsageError, match="lustre"):
        places.prepare_dir(root / "s", "spool", found)
    assert not (root / "s").exists()
    places.prepare_dir(root / "s", "spool", replace(found, allow_network_fs=True))
    assert (root / "s").is_dir()
