"""The places where records lie before they are in the store: whose, on what, and how much room is left.

Nothing is created and nothing written: modes, owners and free space are read, and the state lock is tried for a moment.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ranklog import fs
from ranklog.cli.output import human_size
from ranklog.errors import FormatError
from ranklog.mounts import filesystem_type, is_network_filesystem
from ranklog.places import SHM, journal_dirs, spool_dirs, why_unusable
from ranklogd.disk import file_sizes
from ranklogd.doctor.daemon import listening
from ranklogd.doctor.finding import Finding, note, ok, problem, warning
from ranklogd.doctor.site import Site
from ranklogd.wal import segment

INODES_MIN = 10_000
QUOTA_NEAR = 0.8
_HEAD_SIZE = 1 << 20
_MEMORY = ("tmpfs", "ramfs")


def check_state(site: Site) -> Iterator[Finding]:
    """The daemon's state directory: owner, mode, lock, filesystem, format of its segments."""
    root = site.state.root
    try:
        info = root.stat()
    except FileNotFoundError:
        yield from _place("state", root, site)
        return
    except OSError as exc:
        yield _closed(root, exc, site)
        return
    if not stat.S_ISDIR(info.st_mode):
        yield problem("state", f"{root} is no directory", f"rm {root}   # or choose another: --state-dir")
        return
    if info.st_uid != site.settings.uid and not site.pong:
        text = f"{root} belongs to user {info.st_uid}: a daemon of user {site.settings.uid} refuses it"
        yield problem("state", text, f"sudo chown -R {site.settings.uid} {root}   # or choose another: --state-dir")
    if info.st_mode & 0o022:
        yield warning(
            "state", f"{root} can be written to by others (mode {info.st_mode & 0o777:04o})", f"chmod 0700 {root}"
        )
    yield from _lock(site)
    yield from _later_segments(site)
    yield from _place("state", root, site)


def _closed(path: Path, exc: OSError, site: Site) -> Finding:
    text = f"{path} cannot be looked into by user {site.settings.uid}: {exc.strerror}"
    return note("state", text, "sudo ranklog doctor   # or as the daemon's user")


def _lock(site: Site) -> Iterator[Finding]:
    """Tell of a daemon that owns the directory and is not the one that answers."""
    try:
        fd = os.open(site.state.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError as exc:
        yield _closed(site.state.lock, exc, site)
        return
    try:
        free, owner = fs.try_lock(fd), os.pread(fd, 256, 0)
    finally:
        os.close(fd)
    if free or site.pong is not None:
        return
    try:
        pid = int(json.loads(owner)["pid"])
    except (ValueError, KeyError, TypeError):
        pid = -1
    if pid in listening(site):
        return  # Told by the check of the socket.
    text = f"a daemon (pid {pid}) owns {site.state.root} and listens on none of the sockets looked at"
    yield problem("state", text, "ranklog doctor --socket PATH   # its own: see its --socket or --runtime-dir")


def _later_segments(site: Site) -> Iterator[Finding]:
    if site.pong is not None:
        return  # A daemon runs on them: it can read them, or is of an older version and says so with its uploads.
    try:
        names = sorted(os.listdir(site.state.wal))
    except FileNotFoundError:
        return
    except OSError as exc:
        yield _closed(site.state.wal, exc, site)
        return
    for name in names:
        if segment.parse_open(name) is None and segment.parse_sealed(name) is None:
            continue
        try:
            with (site.state.wal / name).open("rb") as file:
                segment.decode_header(memoryview(file.read(_HEAD_SIZE)))
        except segment.LaterFormat as exc:
            text = f"a later ranklog wrote {site.state.wal / name}: {exc}"
            yield problem("state", text, "pip install --upgrade ranklog")
            return
        except (OSError, FormatError):
            continue  # Being sealed at this moment, or damaged: `ranklog fsck` looks at that.


def check_room(site: Site) -> Iterator[Finding]:
    """Free space, inodes and quota of the state directory, and its reserve."""
    root, config = site.state.root, site.config
    for finding in (_space(root, config.disk_free_min_bytes), _inodes(root)):
        if finding is not None:
            yield finding
    try:
        used = int(site.snapshot["used_bytes"])
    except (KeyError, TypeError, ValueError):
        used = sum(file_sizes(site.state.wal, site.state.outbox))
    quota = config.disk_quota_bytes
    if used >= QUOTA_NEAR * quota:
        text = f"{human_size(used)} wait for their upload; the quota is {human_size(quota)} (disk_quota_bytes)"
        tell = problem if used >= quota else warning
        yield tell("room", text, "ranklog status   # says why they are not uploaded")
    if site.snapshot.get("full"):
        yield problem("room", f"the daemon takes no records: {site.snapshot['full']}", f"df -h {root}")
    if site.pong and config.reserve_size_bytes and _is_missing(site.state.reserve):
        text = "the reserve was given up: the disk was full, and is taken back once there is room for it"
        yield warning("room", text, f"df -h {root}")


def _is_missing(path: Path) -> bool:
    return os.access(path.parent, os.X_OK) and not path.exists()


def _space(path: Path, least: int) -> Finding | None:
    room = os.statvfs(_existing(path))
    free = room.f_bavail * room.f_frsize
    if free < least:
        text = (
            f"{human_size(free)} free for {path}; below {human_size(least)} no records are taken (disk_free_min_bytes)"
        )
        return problem("room", text, f"du -xh --max-depth=2 {_existing(path)} | sort -h | tail   # see what to remove")
    if free < 4 * least:
        text = (
            f"{human_size(free)} free for {path}; below {human_size(least)} no records are taken (disk_free_min_bytes)"
        )
        return warning("room", text, f"df -h {_existing(path)}")
    return ok("room", f"{human_size(free)} free for {path}")


def _inodes(path: Path) -> Finding | None:
    room = os.statvfs(_existing(path))
    if not room.f_files or room.f_favail >= INODES_MIN:
        return None  # Some filesystems have no limit, and say 0.
    tell = problem if room.f_favail < INODES_MIN // 100 else warning
    return tell("room", f"{room.f_favail} inodes are left for {path}", f"df -i {_existing(path)}")


def check_journal(site: Site) -> Iterator[Finding]:
    """Where `log()` writes: the first directory that can be used, and whether it is memory."""
    dirs = journal_dirs(site.settings)
    ready = [path for path in dirs if not why_unusable(path, site.settings)]
    yield from _unusable("journal", dirs, site)
    if not ready:
        text = "no directory for journals: they are kept in memory, and a kill loses what was not acknowledged"
        yield problem("journal", text, f"export RANKLOG_JOURNAL_DIR=/dev/shm/ranklog-{site.settings.uid}")
        return
    kind = filesystem_type(ready[0])
    if kind not in _MEMORY:
        text = f"{ready[0]} is on {kind}, not on a tmpfs: log() waits whenever that disk does, as beside a checkpoint"
        yield warning("journal", text, f"export RANKLOG_JOURNAL_DIR=/dev/shm/ranklog-{site.settings.uid}")
    else:
        yield ok("journal", f"{ready[0]} ({kind})")
    room = os.statvfs(_existing(ready[0]))
    free, each = room.f_bavail * room.f_frsize, site.settings.journal_size_bytes
    if kind in _MEMORY and free < each:
        text = f"{human_size(free)} free there; one writer takes up to {human_size(each)} while no daemon answers"
        where = _existing(ready[0])
        fix = "docker run --shm-size=1g …" if SHM in (where, *where.parents) else f"df -h {where}"
        yield warning("journal", text, fix)


def check_spool(site: Site) -> Iterator[Finding]:
    """Where records wait while no daemon takes them."""
    dirs = spool_dirs(site.settings)
    ready = [path for path in dirs if not why_unusable(path, site.settings)]
    yield from _unusable("spool", dirs, site)
    if not ready:
        text = "no directory for spools: without a daemon, records past the journal are refused and counted"
        yield problem("spool", text, f"export RANKLOG_SPOOL_DIR=/var/tmp/ranklog-{site.settings.uid}/spool")
        return
    kind, path = filesystem_type(ready[0]), ready[0]
    room = os.statvfs(_existing(path))
    free = room.f_bavail * room.f_frsize
    if kind in _MEMORY:
        text = f"{path} is on {kind}: what waits there is gone after a reboot"
        yield warning("spool", text, f"export RANKLOG_SPOOL_DIR=/var/tmp/ranklog-{site.settings.uid}/spool")
    elif is_network_filesystem(kind):
        yield warning("spool", f"{path} is on a network filesystem ({kind}), which RANKLOG_ALLOW_NETWORK_FS accepts")
    else:
        yield ok("spool", f"{path} ({kind}), {human_size(free)} free")
    if free < site.settings.spool_size_bytes:
        most = human_size(site.settings.spool_size_bytes)
        text = f"{human_size(free)} free for {path}; one writer may spool {most} (RANKLOG_SPOOL_SIZE_BYTES)"
        yield warning("spool", text, f"df -h {_existing(path)}")


def _unusable(what: str, dirs: list[Path], site: Site) -> Iterator[Finding]:
    for path in dirs:
        why = why_unusable(path, site.settings)
        if why:
            yield warning(what, f"not used: {why}", f"ls -ld {path}")


def _place(what: str, path: Path, site: Site) -> Iterator[Finding]:
    """Tell what the directory lies on, or would lie on."""
    kind = filesystem_type(path)
    state = "" if path.exists() else "; it is made by the first daemon"
    if is_network_filesystem(kind) and not site.config.allow_network_fs:
        text = f"{path} is on a network filesystem ({kind}), where locks and fsync may fail: a daemon refuses it"
        yield problem(what, text, "export RANKLOG_STATE_DIR=/var/tmp/ranklog-state   # any disk of this node")
    elif kind in _MEMORY:
        text = f"{path} is on {kind}: what is acknowledged there is gone after a reboot"
        yield warning(what, text, "export RANKLOG_STATE_DIR=/var/tmp/ranklog-state   # any disk of this node")
    elif not os.access(_existing(path), os.W_OK | os.X_OK) and not site.pong:
        text = f"{path} cannot be written to by user {site.settings.uid}"
        yield problem(what, text, "export RANKLOG_STATE_DIR=/var/tmp/ranklog-state   # any disk of this node")
    else:
        yield ok(what, f"{path} ({kind}){state}")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest of its parents that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
