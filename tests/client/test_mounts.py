"""Which filesystem is under a path, from mount tables as they are found in the wild and from statfs magic numbers.

With tests/faults/test_network_fs.py, which does it with a real FUSE: row 45 of the fault matrix.
"""

from pathlib import Path

import pytest

from ranklog import mounts, places
from ranklog.config import Settings
from ranklog.errors import UsageError
from ranklog.mounts import filesystem_type, is_network_filesystem, read_mountinfo, require_local, statfs_magic

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


def test_where_neither_table_nor_kernel_has_a_name_the_type_is_unknown_and_counts_as_local(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mounts, "statfs_magic", lambda _: 0)
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
    "kind",
    [
        "ext4", "xfs", "btrfs", "tmpfs", "zfs", "overlay", "f2fs", "fuseblk", "fuse.fuse-overlayfs", "ramfs", "fuse.ext4",
        "virtiofs", "bcachefs",
    ],
)  # fmt: skip
def test_files_of_this_node_do_not(kind: str) -> None:
    assert not is_network_filesystem(kind)


def test_a_network_directory_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - lustre x rw\n")
    monkeypatch.setattr("ranklog.mounts._MOUNTINFO", table)
    with pytest.raises(UsageError) as caught:
        require_local(tmp_path / "spool", allow=False)
    for word in (str(tmp_path / "spool"), "lustre", "RANKLOG_SPOOL_DIR", "RANKLOG_ALLOW_NETWORK_FS=1"):
        assert word in str(caught.value)
    require_local(tmp_path / "spool", allow=True)


def test_a_local_directory_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - xfs x rw\n")
    monkeypatch.setattr("ranklog.mounts._MOUNTINFO", table)
    require_local(tmp_path / "spool", allow=False)


# One line for each network filesystem, as its clients mount it.
REAL_LINES = {
    "nfs": "41 27 0:36 / /n rw,relatime shared:20 - nfs 10.0.0.1:/vol rw,vers=3,rsize=1048576,hard,proto=tcp",
    "nfs4": "41 27 0:36 /a/b /n rw,relatime - nfs4 fs:/home rw,vers=4.2,hard,proto=tcp,timeo=600,sec=sys",
    "lustre": "88 27 0:50 / /n rw,noatime shared:33 - lustre 10.0.0.1@o2ib:10.0.0.2@o2ib:/scratch rw,flock,lazystatfs",
    "gpfs": "90 27 0:51 / /n rw,relatime - gpfs gpfs01 rw",
    "wekafs": "91 27 0:52 / /n rw,relatime - wekafs backend-0/default rw,writecache,inode_bits=auto",
    "ceph": "92 27 0:53 /volumes /n rw,relatime - ceph 10.0.0.1:6789,10.0.0.2:6789:/volumes rw,name=a,secret=<hidden>,acl",
    "beegfs": "93 27 0:54 / /n rw,relatime - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/beegfs-client.conf",
    "cifs": "94 27 0:55 / /n rw,relatime - cifs //server/share rw,vers=3.1.1,username=ada,uid=0,noforceuid",
    "smb3": "94 27 0:55 / /n rw,relatime - smb3 //server/share rw,vers=3.1.1",
    "9p": "95 27 0:56 / /n rw,relatime - 9p host0 rw,trans=virtio,version=9p2000.L",
    "afs": "96 27 0:57 / /n rw,relatime - afs AFS rw",
    "autofs": "97 27 0:58 / /n rw,relatime - autofs /etc/auto.home rw,fd=6,pgrp=900,timeout=300,minproto=5,indirect",
    "fuse.sshfs": "98 27 0:59 / /n rw,nosuid,nodev,relatime - fuse.sshfs ada@host:/data rw,user_id=1000,group_id=1000",
    "fuse.glusterfs": "98 27 0:59 / /n rw,relatime - fuse.glusterfs gl:/v rw,user_id=0,group_id=0,default_permissions",
    "fuse.juicefs": "98 27 0:59 / /n rw,relatime - fuse.juicefs JuiceFS:vol rw,user_id=0,allow_other",
    "fuse.gcsfuse": "98 27 0:59 / /n rw,nosuid,nodev - fuse.gcsfuse bucket rw,user_id=0",
    "fuse": "98 27 0:59 / /n rw,nosuid,nodev,relatime - fuse /dev/fuse rw,user_id=0,group_id=0",
}


@pytest.mark.parametrize(("kind", "line"), REAL_LINES.items(), ids=REAL_LINES)
def test_every_network_filesystem_is_known_from_its_line_and_refused(
    kind: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:1 / / rw - ext4 x rw\n{line}\n".replace(" /n ", f" {tmp_path} "))
    monkeypatch.setattr(mounts, "_MOUNTINFO", table)
    monkeypatch.setattr(mounts, "statfs_magic", lambda _: pytest.fail("the table was enough"))
    with pytest.raises(UsageError, match=rf"network filesystem \({kind}\)"):
        require_local(tmp_path / "x", allow=False)


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (0x0BD00BD0, "lustre"), (0x6969, "nfs"), (0x47504653, "gpfs"), (0x18031977, "wekafs"), (0x00C36400, "ceph"),
        (0x19830326, "beegfs"), (0xFF534D42, "cifs"), (0xFE534D42, "smb3"), (0x517B, "smbfs"), (0x65735546, "fuse"),
        (0x01021997, "9p"), (0x5346414F, "afs"), (0x6B414653, "kafs"), (0x0187, "autofs"), (0x73757245, "coda"),
        (0x01161970, "gfs2"), (0x7461636F, "ocfs2"), (0x20030528, "orangefs"), (0xAAD7AAEA, "panfs"),
        (0x564C, "ncpfs"), (0xBEEFDEAD, "snfs"), (0x013111A8, "ibrix"), (0x7C7C6673, "prl_fs"),
        (0x786F4256, "vboxsf"), (0xBACBACBC, "vmhgfs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["", "1 0 0:1 / / rw - newfs x rw\n"], ids=["no table", "a type nobody knows"])
def test_the_magic_number_decides_where_the_table_does_not(
    magic: int, kind: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "statfs_magic", lambda _: magic)
    assert filesystem_type(tmp_path / "x", table) == kind
    assert is_network_filesystem(kind)


def test_an_unknown_type_with_the_magic_of_a_disk_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for magic in (0xEF53, 0x58465342, 0x9123683E, 0x2FC12FC1, 0x794C7630):
        monkeypatch.setattr(mounts, "statfs_magic", lambda _, magic=magic: magic)
        assert filesystem_type(tmp_path, "1 0 0:1 / / rw - newfs x rw\n") == "newfs"
    assert not is_network_filesystem("newfs")


def test_the_kernel_is_asked_for_real(tmp_path: Path) -> None:
    assert statfs_magic("/proc") == 0x9FA0
    assert statfs_magic(str(tmp_path / "missing")) == 0
    assert statfs_magic(str(tmp_path)) > 0
    assert filesystem_type(Path("/dev/shm"), "") == "tmpfs", "without /proc journals still go to memory"


def test_a_spool_in_var_tmp_is_refused_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diskless node has its whole root on a network."""
    table = tmp_path / "mountinfo"
    table.write_text("1 0 0:1 / / rw - nfs4 server:/root rw\n")
    monkeypatch.setattr(mounts, "_MOUNTINFO", table)
    monkeypatch.setattr(places, "VAR_TMP", tmp_path)
    settings = Settings.from_env({"HOME": str(tmp_path)})
    told: list[str] = []
    assert places.usable_dirs(places.spool_dirs(settings), "spool", settings, told.append) == []
    assert "nfs4" in told[-1]
    assert not (tmp_path / f"ranklog-{settings.uid}").exists()
