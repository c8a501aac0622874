"""Where this node's journals, spools and sockets are: one set of rules for client, daemon and tools.

    journal   RANKLOG_JOURNAL_DIR, alone
              <runtime dir>/journal if that is a tmpfs, /dev/shm/ranklog-$UID, the spool's directories
    spool     RANKLOG_SPOOL_DIR, alone
              /var/spool/ranklog if an administrator made it, $XDG_STATE_HOME/ranklog/spool if this node's own disk,
              /var/tmp/ranklog-$UID/spool
    socket    RANKLOG_SOCKET, alone; <RANKLOG_RUNTIME_DIR>/ranklog.sock, alone
              then in the session's runtime directory, /run/ranklog and /tmp/ranklog-$UID

A directory the user names is the only one: records must not turn up elsewhere, nor in another daemon. /dev/shm, /tmp
and /var/tmp are open to everybody, so what stands there under our name may be somebody's trap: `ensure_private_dir`
and `find_socket` refuse it.
"""

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from ranklog import fs
from ranklog.config import SOCKET_NAME, Settings
from ranklog.errors import UsageError
from ranklog.mounts import filesystem_type, is_network_filesystem, read_mountinfo, require_local

__all__ = [
    "adoption_dirs", "ensure_private_dir", "filesystem_type", "find_socket", "is_network_filesystem", "journal_dirs",
    "prepare_dir", "require_local", "socket_candidates", "spool_dirs", "usable_dirs", "why_unusable",
]  # fmt: skip

SHM = Path("/dev/shm")  # noqa: S108  Checked for owners, see above.
VAR_TMP = Path("/var/tmp")  # noqa: S108
TMP = Path("/tmp")  # noqa: S108
RUN = Path("/run")
SYSTEM_SPOOL = Path("/var/spool/ranklog")

_USERS_MAX = 1000  # For a daemon of root: anybody can make directories in /dev/shm.


def journal_dirs(settings: Settings) -> list[Path]:
    """Return the directories for journal files, best first. None of them needs to exist: see `usable_dirs`."""
    if settings.journal_dir is not None:
        return [settings.journal_dir]
    mounts = read_mountinfo()
    hot = [settings.runtime_dir / "journal", SHM / f"ranklog-{settings.uid}"]
    return [path for path in hot if filesystem_type(path, mounts) == "tmpfs"] + spool_dirs(settings)


def spool_dirs(settings: Settings) -> list[Path]:
    """Return the directories for spool files, best first. None of them needs to exist: see `usable_dirs`."""
    if settings.spool_dir is not None:
        return [settings.spool_dir]
    dirs = [SYSTEM_SPOOL] if os.path.isdir(SYSTEM_SPOOL) else []
    state = settings.xdg_state / "ranklog" / "spool"
    if settings.allow_network_fs or not is_network_filesystem(filesystem_type(state)):
        dirs.append(state)
    return [*dirs, VAR_TMP / f"ranklog-{settings.uid}" / "spool"]


def adoption_dirs(settings: Settings) -> list[Path]:
    """Return every directory in which a client may have left records for a daemon with these settings.

    One's own may still be missing (a client makes them); those of other users, for root, exist now.
    """
    dirs: list[Path] = []
    if settings.journal_dir is not None:
        dirs.append(settings.journal_dir)
    else:
        dirs += [settings.runtime_dir / "journal", SHM / f"ranklog-{settings.uid}"]
    dirs += spool_dirs(settings)
    if settings.uid == 0 and settings.journal_dir is None:
        dirs += _of_users(SHM.glob("ranklog-*"))
        dirs += _of_users(TMP.glob("ranklog-*"), "journal")
        dirs += _of_users((RUN / "user").glob("[0-9]*"), "ranklog", "journal")
    if settings.uid == 0 and settings.spool_dir is None:
        dirs += _of_users(VAR_TMP.glob("ranklog-*"), "spool")
    return list(dict.fromkeys(dirs))


def _of_users(homes: Iterable[Path], *rooms: str) -> list[Path]:
    """Return those rooms of `[ranklog-]<uid>` directories that belong to that very user, and are no links elsewhere."""
    found = []
    for home in homes:
        steps = [home]
        for room in rooms:
            steps.append(steps[-1] / room)
        try:
            kinds = [step.lstat() for step in steps]
        except OSError:
            continue
        uid = home.name.removeprefix("ranklog-")
        if all(stat.S_ISDIR(kind.st_mode) and str(kind.st_uid) == uid for kind in kinds):
            found.append(steps[-1])
    return sorted(found)[:_USERS_MAX]


def socket_candidates(settings: Settings) -> list[Path]:
    """Return the sockets at which a daemon for these settings may listen, best first."""
    if settings.socket is not None:
        return [settings.socket]
    paths = [settings.runtime_dir / SOCKET_NAME]
    if not settings.runtime_dir_given:
        if settings.xdg_runtime is not None:
            paths.append(settings.xdg_runtime / "ranklog" / SOCKET_NAME)
        paths += [RUN / "ranklog" / SOCKET_NAME, TMP / f"ranklog-{settings.uid}" / SOCKET_NAME]
    return list(dict.fromkeys(paths))


def find_socket(settings: Settings) -> Path:
    """Return the first candidate at which there is a socket that this user may use, else the first candidate.

    A socket that somebody else planted in a directory open to everybody is passed over: the records would be theirs.
    """
    candidates = socket_candidates(settings)
    for path in candidates:
        try:
            usable = stat.S_ISSOCK(path.stat().st_mode) and os.access(path, os.R_OK | os.W_OK)
            if usable and _planted(path, settings.uid) is None:
                return path
        except OSError:
            continue
    return candidates[0]


def _planted(path: Path, uid: int) -> Path | None:
    """Return the first part of `path` that stands in a directory open to everybody and is neither ours nor root's."""
    for part in [*reversed(path.parents), path][1:]:
        try:
            owner, open_to_all = part.lstat().st_uid, part.parent.stat().st_mode & stat.S_IWOTH
        except FileNotFoundError:
            return None
        if open_to_all and owner not in (0, uid):
            return part
    return None


def ensure_private_dir(path: Path) -> None:
    """Make sure that `path` is a directory of ours that nobody else can write to, creating it with mode 0700.

    Raises UsageError where it is a symbolic link, no directory, or somebody else's; OSError where it cannot be made.
    """
    uid = os.geteuid()
    _refuse_trap(path, uid)  # Before, so that nothing is created inside a trap …
    fs.make_dir(path)
    _refuse_trap(path, uid)  # … and after, for one that was set up meanwhile.
    info = path.lstat()
    if info.st_uid != uid:
        raise UsageError(_trap(path, f"belongs to user {info.st_uid}, not to {uid}"))
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(stat.S_IMODE(info.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def _refuse_trap(path: Path, uid: int) -> None:
    part = _planted(path, uid)
    if path.is_symlink():
        raise UsageError(_trap(path, "is a symbolic link"))
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(_trap(path, "is not a directory"))
    if part is not None:
        raise UsageError(_trap(part, f"is in a directory open to everybody and belongs to user {part.lstat().st_uid}"))


def _trap(path: Path, why: str) -> str:
    return (
        f"{path} {why}: whoever put it there could read, change or remove records. Nothing was written to it. "
        f"Remove it, or name another place with RANKLOG_JOURNAL_DIR, RANKLOG_SPOOL_DIR or RANKLOG_RUNTIME_DIR"
    )


def prepare_dir(path: Path, what: str, settings: Settings) -> None:
    """Make one of the directories above ready for files of ours; raises UsageError or OSError.

    `what` (`journal`, `spool`) is for the text. A directory that the user or an administrator made may belong to
    somebody else, such as a volume that two containers share; all others must be private.
    """
    require_local(path, allow=settings.allow_network_fs)
    if path in (settings.journal_dir, settings.spool_dir):
        fs.make_dir(path)
    elif path != SYSTEM_SPOOL:
        ensure_private_dir(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"the {what} directory {path} is not writable for user {settings.uid}")


def why_unusable(path: Path, settings: Settings) -> str:
    """Return why `prepare_dir` would refuse this directory, "" if it would not. Creates and changes nothing."""
    try:
        require_local(path, allow=settings.allow_network_fs)
        if path not in (settings.journal_dir, settings.spool_dir, SYSTEM_SPOOL):
            _refuse_trap(path, settings.uid)
            if path.exists() and path.lstat().st_uid != settings.uid:
                return f"{path} belongs to user {path.lstat().st_uid}, not to {settings.uid}"
        there = next(part for part in (path, *path.parents) if part.exists())
    except (UsageError, OSError) as exc:
        return str(exc)
    if not there.is_dir():
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable for user {settings.uid}"


def usable_dirs(dirs: Iterable[Path], what: str, settings: Settings, warn: Callable[[str], None]) -> list[Path]:
    """Return those of `dirs` that are ready for files of ours, in the same order; says why the others are not."""
    ready = []
    for path in dirs:
        try:
            prepare_dir(path, what, settings)
        except (UsageError, OSError) as exc:
            warn(str(exc))
        else:
            ready.append(path)
    return ready
