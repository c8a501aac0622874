"""How a daemon is put together: in which order, and what stops it."""

import os
import resource
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ingesting import Inside, frames
from ranklog.errors import FormatError, UsageError
from ranklogd.config import Config
from ranklogd.lock import Busy
from ranklogd.notify import Notifier
from ranklogd.setup import OPEN_FILES_MAX, assemble, prepare
from ranklogd.statedir import StateDir
from ranklogd.wal import segment
from segments import SegmentBuilder, start_of

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests with sudo")
Make = Callable[..., Config]
Start = Callable[..., Inside]


def start(config: Config, wait_s: float = 0) -> object:
    return assemble(config, prepare(config), Notifier(""), lock_wait_s=wait_s, stopped=lambda _: False)


def test_the_directories_are_made_and_are_ones_own(make_config: Make) -> None:
    config = make_config()
    state = prepare(config)
    for room in (state.root, *state.rooms, config.runtime_dir):
        assert stat.S_IMODE(room.stat().st_mode) & 0o022 == 0
        assert room.stat().st_uid == os.geteuid()


def test_a_network_filesystem_is_refused_for_the_state(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranklog.mounts.read_mountinfo", lambda: "1 0 0:1 / / rw - nfs4 server:/ rw\n")
    with pytest.raises(UsageError, match="network filesystem"):
        prepare(make_config())
    prepare(make_config(allow_network_fs=True))


def test_the_limit_of_open_files_is_raised_as_far_as_allowed(make_config: Make) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        prepare(make_config())
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(OPEN_FILES_MAX, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_second_daemon_on_the_same_state_touches_nothing(inside: Start, make_config: Make, tmp_path: Path) -> None:
    first = inside()
    names = sorted(path.name for path in first.parts.state.wal.iterdir())
    other = make_config(runtime_dir=tmp_path / "elsewhere")
    with pytest.raises(Busy, match=f"owns {first.config.state_dir}.*--state-dir"):
        start(other)
    assert sorted(path.name for path in first.parts.state.wal.iterdir()) == names
    assert not other.socket.exists()


def test_a_second_daemon_with_a_state_of_its_own_cannot_take_the_socket(
    inside: Start, make_config: Make, tmp_path: Path
) -> None:
    """libzmq would let it, and the clients of the first would talk to nobody."""
    first = inside()
    inode = first.config.socket.stat().st_ino
    with pytest.raises(Busy, match=f"owns {first.config.socket}.*--runtime-dir"):
        start(make_config(state_dir=tmp_path / "other"))
    assert first.config.socket.stat().st_ino == inode


def test_what_an_earlier_daemon_left_open_is_sealed_and_its_writers_are_known(inside: Start, make_config: Make) -> None:
    state = prepare(make_config())
    one = start_of(1)
    builder = SegmentBuilder()
    builder.writer(one, uid=os.geteuid())
    builder.batch(one.writer, 1, 4, frames(1, 4), uid=os.geteuid())
    (state.wal / segment.open_name(1)).write_bytes(builder.data + b"torn")
    daemon = inside()
    assert sorted(path.name for path in state.wal.iterdir()) == [
        "0000000000000001-0000000000000004.wal", "0000000000000005.open",
    ]  # fmt: skip
    assert daemon.parts.ingest.writers.get(bytes.fromhex(one.writer)).durable == 4
    assert daemon.parts.store_id == builder.header.store_id


def test_a_segment_of_a_later_version_stops_the_start_in_words(make_config: Make) -> None:
    config = make_config()
    state = prepare(config)
    data = bytes(SegmentBuilder().data)
    (state.wal / segment.open_name(1)).write_bytes(data[:7] + b"9" + bytes(8) + data[16:])
    with pytest.raises(FormatError, match="upgrade ranklog"):
        start(config)
    assert not config.socket.exists()


def test_clients_are_offered_places_that_exist_and_a_cookie(inside: Start) -> None:
    daemon = inside()
    offer = daemon.parts.ingest._offer
    assert offer.spool_dir == str(daemon.config.spool_dir)
    assert offer.journal_dir == str(daemon.config.journal_dir)
    assert Path(offer.spool_dir).is_dir()
    cookie = Path(offer.cookie)
    assert len(cookie.read_bytes()) == 32
    daemon.parts.close()
    assert not cookie.exists()
    assert not daemon.config.socket.exists()
    daemon.parts.close = lambda: None  # type: ignore[method-assign]  # It is taken apart already.


@NEEDS_ROOT
def test_a_spool_directory_that_others_share_keeps_its_owner_and_mode(inside: Start, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, 4242, 4242)
    shared.chmod(0o1777)
    daemon = inside(spool_dir=shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    assert daemon.parts.ingest._offer.spool_dir == str(shared)


def test_a_spool_directory_that_cannot_be_made_is_no_reason_not_to_start(inside: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    daemon = inside(spool_dir=tmp_path / "file" / "spool")
    assert daemon.parts.ingest._offer.spool_dir == ""


def test_a_group_that_nobody_knows_is_the_users_mistake(make_config: Make) -> None:
    with pytest.raises(UsageError, match="no-such-group"):
        start(make_config(socket_group="no-such-group"))


def test_a_group_is_taken_by_name_or_number(inside: Start) -> None:
    daemon = inside(socket_group=str(os.getegid()), socket_mode="0660")
    info = daemon.config.socket.stat()
    assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (os.getegid(), 0o660)


@NEEDS_ROOT
def test_a_disk_full_of_our_own_records_does_not_keep_the_daemon_from_starting(
    make_config: Make, tmp_path: Path
) -> None:
    """Nothing would ever be uploaded otherwise: the reserve is there for this."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], check=True)
    try:
        config = make_config(state_dir=disk / "state", reserve_size_bytes=128 << 10)
        parts = start(config)
        parts.disk.look()
        state = StateDir(config.state_dir)
        assert state.reserve.exists()
        parts.close()
        with pytest.raises(OSError, match="No space"), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        parts = start(config)
        parts.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
