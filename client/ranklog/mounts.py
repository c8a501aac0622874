"""Which filesystem a path lies on, and whether that one keeps its promises: a WAL, a journal and a spool need flock
between processes and an fsync that means it, and network filesystems have a long record of neither.

The answer comes from /proc/self/mountinfo, a line for each mount:

    36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/sda1 rw
    octal escapes (\\040 = space) in the mount point; any number of optional fields before the dash

Where that table is missing, does not show the mount (a chroot below one) or names a type that is in no list here,
statfs(2) is asked for the filesystem's magic number. Python has no call for it, and ctypes takes 2 ms to load: hence
not for types that are well known.
"""

import os
import re
import sys
from pathlib import Path

from ranklog.errors import UsageError

_MOUNTINFO = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")

NETWORK = frozenset({
    "9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "cvfs", "daos", "fhgfs", "gfs2", "glusterfs", "gpfs",
    "ibrix", "kafs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3", "smbfs",
    "snfs", "vboxsf", "vmhgfs", "wekafs",
})  # fmt: skip
"""Types whose files live on another machine, or are shared with one."""
_FUSE_LOCAL = frozenset({
    "fuse.ext2", "fuse.ext3", "fuse.ext4", "fuse.fuse-overlayfs", "fuse.fuse2fs", "fuse.squashfuse",
})  # fmt: skip
"""FUSE types known to keep their files on this node. Any other is taken for a network: most are."""
_LOCAL = _FUSE_LOCAL | {
    "aufs", "bcachefs", "btrfs", "devtmpfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "hfsplus", "jfs",
    "nilfs2", "ntfs3", "overlay", "ramfs", "reiserfs", "squashfs", "tmpfs", "ubifs", "vfat", "virtiofs", "xfs", "zfs",
}  # fmt: skip
"""Types that need no second opinion."""
_MAGIC = {
    0x01021997: "9p", 0x5346414F: "afs", 0x0187: "autofs", 0x19830326: "beegfs", 0x00C36400: "ceph",
    0xFF534D42: "cifs", 0x73757245: "coda", 0x65735546: "fuse", 0x01161970: "gfs2", 0x47504653: "gpfs",
    0x013111A8: "ibrix", 0x6B414653: "kafs", 0x0BD00BD0: "lustre", 0x564C: "ncpfs", 0x6969: "nfs",
    0x7461636F: "ocfs2", 0x20030528: "orangefs", 0xAAD7AAEA: "panfs", 0x7C7C6673: "prl_fs", 0xFE534D42: "smb3",
    0x517B: "smbfs", 0xBEEFDEAD: "snfs", 0x01021994: "tmpfs", 0x786F4256: "vboxsf", 0xBACBACBC: "vmhgfs",
    0x18031977: "wekafs",
}  # fmt: skip
"""statfs f_type -> type. Beside the network filesystems, tmpfs: journals belong there."""


def filesystem_type(path: Path, mountinfo: str | None = None) -> str:
    """Return the type (`ext4`, `tmpfs`, `nfs4`, …) of the filesystem that holds `path` or would hold it.

    Where `path` is missing, its nearest existing parent counts, with symbolic links followed. `unknown` where neither
    the mount table nor the kernel gives a name that means something here. `mountinfo` is the table to look into, for
    callers with many questions.
    """
    existing = path.absolute()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    real = os.path.realpath(existing)
    kind = _deepest_mount(read_mountinfo() if mountinfo is None else mountinfo, real)
    return kind if kind in _LOCAL or is_network_filesystem(kind) else _MAGIC.get(statfs_magic(real), kind)


def read_mountinfo() -> str:
    """Return this process's mount table; empty where there is no /proc."""
    try:
        return _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def statfs_magic(path: str) -> int:
    """Return the magic number of the filesystem that holds `path`; 0 where the kernel cannot be asked."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        import ctypes

        statfs = ctypes.CDLL(None).statfs
    except (ImportError, OSError, AttributeError):
        return 0  # A small Python, or no C library to be found.
    answer = ctypes.create_string_buffer(512)  # struct statfs has about 120 bytes, and f_type is its first word.
    if statfs(os.fsencode(path), answer):
        return 0
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


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


def require_local(path: Path, *, allow: bool) -> None:
    """Raise UsageError if `path` is on a network filesystem, unless the user has said that this one is fine."""
    if allow:
        return
    fstype = filesystem_type(path)
    if not is_network_filesystem(fstype):
        return
    raise UsageError(
        f"{path} is on a network filesystem ({fstype}) and is not used: locks and fsync cannot be relied on "
        f"there, so records could be lost or doubled. Name a directory on a disk of this node with "
        f"RANKLOG_STATE_DIR, RANKLOG_JOURNAL_DIR or RANKLOG_SPOOL_DIR, or set RANKLOG_ALLOW_NETWORK_FS=1 if "
        f"{fstype} is local here"
    )
