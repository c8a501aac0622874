"""Which filesystem a path lies on, and whether that one keeps its promises: a WAL, a journal and a spool need flock
between processes and an fsync that means it, and network filesystems have a long record of neither.

The answer comes from /proc/self/mountinfo, a line for each mount:

    36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/sda1 rw
    octal escapes (\\040 = space) in the mount point; any number of optional fields before the dash
"""

import os
import re
from pathlib import Path

from ranklog.errors import UsageError

_MOUNTINFO = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")

NETWORK = frozenset({
    "9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "daos", "fhgfs", "gfs2", "glusterfs", "gpfs", "kafs",
    "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "vboxsf", "vmhgfs",
    "wekafs",
})  # fmt: skip
"""Types whose files live on another machine, or are shared with one."""
_FUSE_LOCAL = frozenset({"fuse.fuse-overlayfs", "fuse.fuse2fs", "fuse.squashfuse"})
"""FUSE types known to keep their files on this node. Any other is taken for a network: most are."""


def filesystem_type(path: Path, mountinfo: str | None = None) -> str:
    """Return the type (`ext4`, `tmpfs`, `nfs4`, …) of the filesystem that holds `path` or would hold it.

    Where `path` is missing, its nearest existing parent counts, with symbolic links followed. `unknown` without
    /proc. `mountinfo` is the table to look into, for callers with many questions.
    """
    existing = path.absolute()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    return _deepest_mount(read_mountinfo() if mountinfo is None else mountinfo, os.path.realpath(existing))


def read_mountinfo() -> str:
    """Return this process's mount table; empty where there is no /proc."""
    try:
        return _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _deepest_mount(mountinfo: str, path: str) -> str:
    best, best_type = -1, "unknown"
    for line in mountinfo.split("\n"):
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ", 1)[0]
        if not dash or len(fields) < 5 or not kind:
            continue
        point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4]).rstrip("/")
        # Of two mounts on one point the later one hides the earlier: hence not only longer, but also as long.
        if (path == point or path.startswith(point + "/")) and len(point) >= best:
            best, best_type = len(point), kind
    return best_type


def is_network_filesystem(fstype: str) -> bool:
    """Return True for a type whose files live on another machine; a FUSE type that is not known counts as one."""
    kind = fstype.lower()
    return kind in NETWORK or kind == "fuse" or (kind.startswith("fuse.") and kind not in _FUSE_LOCAL)


def require_local(path: Path, what: str, *, allow: bool) -> None:
    """Raise UsageError if `path` is on a network filesystem, unless the user has said that this one is fine.

    `what` names in the text what the directory is for: journal, spool, state.
    """
    fstype = filesystem_type(path)
    if allow or not is_network_filesystem(fstype):
        return
    raise UsageError(
        f"{path} is on a network filesystem ({fstype}) and is not used for the {what}: locks and fsync cannot be "
        f"relied on there, so records could be lost or doubled. Name a directory on a disk of this node with "
        f"RANKLOG_STATE_DIR, RANKLOG_JOURNAL_DIR or RANKLOG_SPOOL_DIR, or set RANKLOG_ALLOW_NETWORK_FS=1 if "
        f"{fstype} is local here"
    )
