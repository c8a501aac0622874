"""Which filesystem is under a path, from mount tables as they are found in the wild."""

from pathlib import Path

import pytest

from ranklog.errors import UsageError
from ranklog.mounts import filesystem_type, is_network_filesystem, read_mountinfo, require_local

# A host booted through an initramfs: its first mounts stand before the root they were moved into.
TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw,relatime shared:2 - devtmpfs devtmpfs rw
25 24 0:23 / /dev/shm rw,relatime shared:3 master:1 - tmpfs tmpfs rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:40 / /home rw,relatime - autofs systemd-1 rw
31 30 0:41 / /home rw,relatime - nfs4 server:/home rw
32 31 0:42 / /home/ada/scratch rw - fuse.sshfs host: rw
33 27 0:43 / /mnt/with\040space\134and\011tab rw - lustre 10.0.0.1@tcp:/fs rw
34 27 0:44 / /data rw - ext4 /dev/vdb rw
35 34 0:45 / /data rw - wekafs weka rw
this line is not one of the table
36 27 0:46 / /database rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"), ("/proc", "proc"), ("/dev", "devtmpfs"), ("/dev/shm", "tmpfs"), ("/dev/shm/ranklog-0", "tmpfs"),
        ("/home", "nfs4"), ("/home/ada", "nfs4"), ("/home/ada/scratch/x", "fuse.sshfs"), ("/home/adam", "nfs4"),
        ("/mnt/with space\\and\ttab/x", "lustre"), ("/data", "wekafs"), ("/data/x", "wekafs"), ("/database", "ext4"),
        ("/homeless", "ext4"), ("/tmp/../dev/shm", "tmpfs"),
    ],
)  # fmt: skip
def test_the_longest_and_latest_mount_decides(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda _: True)  # The table is of another machine.
    assert filesystem_type(Path(path), TABLE) == kind


def test_a_path_that_does_not_exist_yet_is_judged_by_its_nearest_parent(tmp_path: Path) -> None:
    table = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path} rw - nfs x rw\n3 2 0:3 / {tmp_path}/a/b rw - tmpfs x rw"
    assert filesystem_type(tmp_path / "a" / "b" / "c", table) == "nfs"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert filesystem_type(tmp_path / "a" / "b" / "c", table) == "tmpfs"


def test_a_symbolic_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    table = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path}/real rw - lustre x rw\n"
    assert filesystem_type(tmp_path / "link" / "new", table) == "lustre"


def test_without_a_table_the_type_is_unknown_and_counts_as_local() -> None:
    assert filesystem_type(Path("/x"), "") == "unknown"
    assert not is_network_filesystem("unknown")


def test_this_machine_is_understood() -> None:
    assert " - " in read_mountinfo()
    assert filesystem_type(Path("/proc/self")) == "proc"
    assert filesystem_type(Path("/dev/shm/no/such/file")) in ("tmpfs", "devtmpfs", "overlay", "ext4")


@pytest.mark.parametrize(
    "kind",
    [
        "nfs", "nfs4", "NFS4", "lustre", "gpfs", "wekafs", "ceph", "beegfs", "cifs", "smb3", "smbfs", "9p", "afs",
        "glusterfs", "orangefs", "pvfs2", "panfs", "autofs", "fuse", "fuse.sshfs", "fuse.juicefs", "fuse.ceph-fuse",
        "fuse.glusterfs", "fuse.s3fs", "fuse.something-new", "ocfs2", "gfs2",
    ],
)  # fmt: skip
def test_files_that_live_elsewhere_count_as_network(kind: str) -> None:
    assert is_network_filesystem(kind)


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "tmpfs", "zfs", "overlay", "f2fs", "fuseblk", "fuse.fuse-overlayfs", "ramfs"]
)
def test_files_of_this_node_do_not(kind: str) -> None:
    assert not is_network_filesystem(kind)


def test_a_network_directory_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - lustre x rw\n")
    monkeypatch.setattr("ranklog.mounts._MOUNTINFO", table)
    with pytest.raises(UsageError) as caught:
        require_local(tmp_path / "spool", "spool", allow=False)
    for word in (str(tmp_path / "spool"), "lustre", "spool", "RANKLOG_SPOOL_DIR", "RANKLOG_ALLOW_NETWORK_FS=1"):
        assert word in str(caught.value)
    require_local(tmp_path / "spool", "spool", allow=True)


def test_a_local_directory_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - xfs x rw\n")
    monkeypatch.setattr("ranklog.mounts._MOUNTINFO", table)
    require_local(tmp_path / "spool", "spool", allow=False)
