"""Carrying out the steps of a repair. The caller holds the daemon's lock.

The evidence comes first: nothing is replaced or removed before its original lies in quarantine/, durably, with its
`.reason`. Every step ends with one rename, and may be done again after a crash anywhere in it.
"""

import errno
import hashlib
import os
from pathlib import Path

from ranklog import fs
from ranklog.errors import RanklogError
from ranklogd.repair.finding import TEMPORARY, Mend, Step
from ranklogd.repair.frames import mended
from ranklogd.repair.header import rebuild
from ranklogd.ship.outbox import set_aside
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import parse_sealed


def carry_out(mend: Mend, state: StateDir, node: str) -> None:
    """Do one step; one that was done before, or whose file is gone, is no error. Raises OSError."""
    if mend.step == Step.EXPLAIN:
        publish(mend.target, f"{mend.reason}\n".encode(), mode=0o600)
    elif not mend.path.exists():
        return
    elif mend.step == Step.RENAME:
        if not mend.target.exists():
            fs.rename(mend.path, mend.target)
            fs.sync_dir(mend.target.parent)
    elif mend.step == Step.SET_ASIDE:
        _move(mend, state)
    elif mend.step == Step.REBUILD:
        keep_original(mend.path, state, mend.reason)
        rebuild_to(mend, node)
        _drop(mend)
    else:
        keep_original(mend.path, state, mend.reason)
        respool(mend.path, mend.target, mend.head)
        _drop(mend)


def rebuild_to(mend: Mend, node: str) -> None:
    """Write the segment with a new header where the step says."""
    sealed = parse_sealed(mend.target.name)
    assert sealed is not None, "a rebuilt segment is a sealed one"
    found = rebuild(memoryview(mend.path.read_bytes()), sealed[0], node)
    if found is None:
        raise RanklogError(f"{mend.path} has changed since the plan was made; run ranklog fsck check again")
    if mend.target != mend.path and mend.target.exists() and mend.target.read_bytes() != found.data:
        raise RanklogError(f"{mend.target} exists already with other bytes; nothing was overwritten")
    publish(mend.target, found.data, mode=0o600)


def respool(source: Path, target: Path, head: bytes, due: int = 1) -> None:
    """Write a spool file of the sound frames in `source`, for the same owner, so that adoption believes it."""
    info = source.stat()
    data = mended(source.read_bytes(), head, due, info.st_mtime_ns)
    publish(target, data, mode=0o640, owner=(info.st_uid, info.st_gid))


def keep_original(path: Path, state: StateDir, reason: str) -> None:
    """Copy a file to quarantine/, under a name with its checksum, so that doing it again finds it there."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()[:8]
    evidence = state.quarantine / f"{path.name}.original-{digest}"
    fs.make_dir(state.quarantine)
    publish(evidence.with_name(f"{evidence.name}.reason"), f"{reason}\n".encode("utf-8", "replace"), mode=0o600)
    if not evidence.exists():
        publish(evidence, data, mode=0o600)


def publish(target: Path, data: bytes, *, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Make a file appear whole, durably, replacing an older one."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        if owner is not None and owner[0] != os.geteuid():
            os.fchown(fd, *owner)
        fs.write_all(fd, data, 0)
    finally:
        os.close(fd)
    try:
        fs.publish(temporary, target)
    except OSError:
        fs.unlink(temporary)
        raise


def _move(mend: Mend, state: StateDir) -> None:
    fs.make_dir(state.quarantine)
    try:
        set_aside(mend.path, mend.target, mend.reason)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        publish(mend.target, mend.path.read_bytes(), mode=0o600)
        fs.unlink(mend.path)
        fs.sync_dir(mend.path.parent)


def _drop(mend: Mend) -> None:
    """Remove the old file, of which there is a copy and a successor."""
    if mend.path != mend.target:
        fs.unlink(mend.path)
        fs.sync_dir(mend.path.parent)
