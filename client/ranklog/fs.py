"""Every fsync, rename and unlink of the project: durability order in one place.

A file is published as bytes, fsync, rename, fsync of the directory: a rename may reach the disk before the bytes it
names, and the name itself lives in the directory. An fsync that failed is never tried again on the same file: the
kernel forgets the error together with the dirty pages, so a second call would lie (errors here propagate).
"""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that mean "full": worth trying another directory, or again later."""


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; raises OSError, after which any part may be there."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def sync_data(fd: int) -> None:
    """Make a file's bytes and size durable. On OSError the file is poisoned: never sync it again."""
    os.fdatasync(fd)


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc  # Of a descriptor, the kernel names no file.
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Rename within one filesystem; not durable before the caller syncs the directory."""
    assert source != target, "the one name would be taken for a leftover of the other"
    os.rename(source, target)
    # A power cut between two directories may leave one file under both names, and then rename(2) does nothing.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(source), os.lstat(target)):
            os.unlink(source)


def publish(temporary: Path, target: Path) -> None:
    """Make a finished file appear under its name, durably: fsync, rename, fsync of the directory."""
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, target)
    sync_dir(target.parent)


def unlink(path: Path) -> None:
    """Remove a file; one that is gone already is no error. Not durable before the directory is synced."""
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with everything in it, without following links; a missing one is no error."""
    if not path.is_dir() or path.is_symlink():
        return
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            remove_tree(child)
        else:
            child.unlink(missing_ok=True)
    path.rmdir()


def make_dir(path: Path, mode: int = 0o700) -> None:
    """Create a directory and its parents, durably; one that is there keeps its mode."""
    if path.is_dir():
        return
    missing = [path]
    while not missing[-1].parent.is_dir():
        missing.append(missing[-1].parent)
    for part in reversed(missing):
        part.mkdir(mode=mode, exist_ok=True)
        sync_dir(part.parent)


def preallocate(fd: int, size_bytes: int) -> None:
    """Reserve room, so that a later write into it cannot fail with ENOSPC; raises OSError where there is none."""
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # A filesystem without fallocate: zeros written now, behind what is there, reserve the same room.
        size = os.fstat(fd).st_size
        write_all(fd, bytes(max(0, size_bytes - size)), size)


def try_lock(fd: int) -> bool:
    """Take the exclusive flock without waiting; False if somebody else holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_untrusted(path: Path) -> int:
    """Open for reading a file that another user may have planted; raises OSError with the reason.

    Refused: symbolic links, anything but a regular file (a FIFO would block or be read as records), and files with a
    second name (a hard link to somebody else's file).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        os.close(fd)
        kind = "not a regular file" if not stat.S_ISREG(info.st_mode) else f"it has {info.st_nlink} names (hard link)"
        raise OSError(errno.EPERM, f"refused: {kind}", str(path))
    return fd


_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


def publish_new(temporary: Path, target: Path) -> None:
    """Give a finished, synced file its name unless that is taken (FileExistsError); not durable before a sync_dir.

    `temporary` may remain as a second name of the file: the caller unlinks it.
    """
    try:
        os.link(temporary, target)  # The one call that creates a name only if it is free, on every filesystem.
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        # A filesystem without hard links: here two who put other bytes under one name at one moment could collide.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from exc
        os.rename(temporary, target)


def remove_empty_dirs(path: Path) -> bool:
    """Remove a directory and those below it unless a file lies in them; return whether `path` is gone now."""
    try:
        with os.scandir(path) as entries:
            children = [(Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries]
    except FileNotFoundError:
        return True
    left = [child for child, is_dir in children if not (is_dir and remove_empty_dirs(child))]
    if not left:
        path.rmdir()
    return not left
