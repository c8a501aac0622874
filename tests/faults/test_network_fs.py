"""A network filesystem under state, journal and spool, for real: row 45 of the fault matrix.

FUSE stands for all of them here: a directory of this disk, mounted once more through `bindfs`. NFS and the others need
modules that a kernel for tests rarely has, so a person on a cluster names a directory for the same tests:

    RANKLOG_TEST_NETWORK_DIR=/lustre/scratch/$USER pytest tests/faults/test_network_fs.py

The tables of types and magic numbers are tested in tests/client/test_mounts.py.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from node import Node, wait_for
from ranklog.mounts import filesystem_type, statfs_magic

NAMED = os.environ.get("RANKLOG_TEST_NETWORK_DIR", "")
NEEDS = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount: run the tests with sudo"),
    pytest.mark.skipif(shutil.which("bindfs") is None, reason="needs bindfs: apt-get install bindfs"),
]


@pytest.fixture(params=[pytest.param("fuse", marks=NEEDS), *(["named"] if NAMED else [])])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a network filesystem."""
    if request.param == "named":
        with tempfile.TemporaryDirectory(dir=NAMED) as path:
            yield Path(path)
        return
    for name in ("behind", "mounted"):
        (tmp_path / name).mkdir()
    with mounted(tmp_path / "behind", tmp_path / "mounted") as path:
        yield path


class mounted:
    """`source` once more through FUSE, at `target`."""

    def __init__(self, source: Path, target: Path) -> None:
        self._target = target
        subprocess.run(["bindfs", source, target], check=True, capture_output=True)

    def __enter__(self) -> Path:
        return self._target

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self._target], check=True)


@pytest.fixture
def node(tmp_path: Path, elsewhere: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        yield node


def everything_in(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


def log_some(node: Node, name: str, *, killed: bool = False) -> "subprocess.CompletedProcess[str]":
    flags = ["--no-finish"] if killed else []
    done = node.run(oracle.witness(name, node, "--count", "200", "--run", name, *flags))
    assert done.returncode == 0, done.stderr
    return done


def test_a_state_directory_there_is_refused_in_words_before_anything_is_written(node: Node, elsewhere: Path) -> None:
    done = node.run([sys.executable, "-m", "ranklogd"], RANKLOG_STATE_DIR=str(elsewhere / "state"))
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in (str(elsewhere / "state"), "network filesystem", "RANKLOG_STATE_DIR", "RANKLOG_ALLOW_NETWORK_FS=1"):
        assert word in done.stderr
    assert everything_in(elsewhere) == []
    node.start_daemon()
    log_some(node, "after")
    oracle.check(node)


def test_with_the_override_all_three_work_there(node: Node, elsewhere: Path) -> None:
    node.state, node.spool, node.journal = (elsewhere / name for name in ("state", "spool", "journal"))
    node.env |= {
        "RANKLOG_STATE_DIR": str(node.state), "RANKLOG_SPOOL_DIR": str(node.spool), "RANKLOG_ALLOW_NETWORK_FS": "1",
        "RANKLOG_JOURNAL_DIR": str(node.journal),
    }  # fmt: skip
    assert "network filesystem" not in log_some(node, "early", killed=True).stderr
    assert node.leftovers()
    daemon = node.start_daemon(RANKLOG_SEAL_AGE_S="1")
    log_some(node, "one")
    daemon.kill()
    daemon.wait()
    node.start_daemon()
    assert oracle.check(node).writers == 2
    assert everything_in(node.state / "wal")


@pytest.mark.parametrize("variable", ["RANKLOG_SPOOL_DIR", "RANKLOG_JOURNAL_DIR"])
def test_a_client_warns_once_about_a_spool_or_journal_there_and_goes_on(
    node: Node, elsewhere: Path, variable: str
) -> None:
    node.start_daemon()
    node.env[variable] = str(elsewhere / "rooms")
    told = log_some(node, "one").stderr
    assert told.count("network filesystem") == 1, told
    assert str(elsewhere / "rooms") in told
    assert everything_in(elsewhere) == []
    oracle.check(node)


def test_a_journal_on_this_node_survives_a_kill_though_the_spool_was_refused(node: Node, elsewhere: Path) -> None:
    node.env["RANKLOG_SPOOL_DIR"] = str(elsewhere / "spool")
    assert "network filesystem" in log_some(node, "one", killed=True).stderr
    node.start_daemon()
    oracle.check(node)


def test_a_daemon_offers_no_spool_there_and_serves_all_the_same(node: Node, elsewhere: Path) -> None:
    node.start_daemon(RANKLOG_SPOOL_DIR=str(elsewhere / "spool"))
    told = (node.path / "daemon.log").read_text()
    assert told.count("network filesystem") == 1, told
    log_some(node, "one")
    assert everything_in(elsewhere) == []
    oracle.check(node)


IN_A_NAMESPACE = """
import os, sys, subprocess
home, var_tmp = sys.argv[1:]
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
if var_tmp == "local":
    subprocess.run(["mount", "-t", "tmpfs", "none", "/var/tmp"], check=True)
else:
    subprocess.run(["mount", "--bind", home, "/var/tmp"], check=True)
import ranklog
run = ranklog.init("p", id="r")
for i in range(50):
    run.log({"i": float(i)})
run.finish(timeout=0)
found = [os.path.join(room, name) for room, _, names in os.walk("/var/tmp") for name in names]
print(*found, sep="\\n")
"""


@pytest.mark.parametrize("var_tmp", ["local", "network"])
def test_with_the_home_there_the_spool_goes_to_the_next_place_and_to_none_if_that_is_there_too(
    node: Node, elsewhere: Path, var_tmp: str
) -> None:
    elsewhere.chmod(0o1777)
    for variable in ("RANKLOG_SPOOL_DIR", "RANKLOG_STATE_DIR"):
        del node.env[variable]
    command = ["unshare", "--mount", sys.executable, "-c", IN_A_NAMESPACE, str(elsewhere), var_tmp]
    done = node.run(command, HOME=str(elsewhere))
    assert done.returncode == 0, done.stderr
    spooled = done.stdout.split()
    assert everything_in(elsewhere) == []
    if var_tmp == "local":
        assert [path for path in spooled if path.endswith(".spool")], "in /var/tmp, which is this node's"
        assert "network filesystem" not in done.stderr
    else:
        assert spooled == []
        assert done.stderr.count("network filesystem") == 1, done.stderr
        assert list(node.journal.glob("*.journal")), "the records are in memory"


HIDDEN = """
import ctypes, os, sys
from pathlib import Path
from ranklog.errors import UsageError
from ranklog.mounts import filesystem_type, read_mountinfo, require_local
os.chroot(sys.argv[1])
os.chdir("/")
print(repr(filesystem_type(Path("/state"), "")), filesystem_type(Path("/state")), filesystem_type(Path("/shm/x")))
try:
    require_local(Path("/state"), allow=False)
except UsageError as exc:
    print(exc)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a chroot: run the tests with sudo")
def test_a_chroot_that_hides_the_mount_does_not_hide_the_filesystem(node: Node, elsewhere: Path) -> None:
    """Below a mount point the table has no line for the root, and without /proc it has none at all."""
    (elsewhere / "root" / "state").mkdir(parents=True)
    done = node.python(HIDDEN, str(elsewhere / "root"))
    assert done.returncode == 0, done.stderr
    kind = filesystem_type(elsewhere).partition(".")[0]
    assert done.stdout.startswith(f"{kind!r} {kind} {kind}\n"), done.stdout
    assert "/state is on a network filesystem" in done.stdout


def test_the_magic_number_of_a_real_one_agrees_with_the_table(elsewhere: Path) -> None:
    kind = filesystem_type(elsewhere)
    assert filesystem_type(elsewhere, "").partition(".")[0] == kind.partition(".")[0]
    assert statfs_magic(str(elsewhere)) != statfs_magic("/proc")


def test_a_mount_that_went_dead_is_an_error_in_words_and_no_hang(node: Node, elsewhere: Path) -> None:
    """The FUSE server dies: every call on the mount fails from then on."""
    if NAMED:
        return  # Nobody kills a cluster's file server for a test.
    (server,) = subprocess.run(
        ["pgrep", "-f", f"^bindfs .*{elsewhere}$"], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(server), 9)
    wait_for(lambda: not os.path.exists(elsewhere / "x") and not os.path.isdir(elsewhere), "it is dead")
    done = node.run([sys.executable, "-m", "ranklogd"], RANKLOG_STATE_DIR=str(elsewhere / "state"))
    assert done.returncode in (1, 78)
    assert "Traceback" not in done.stderr
    assert str(elsewhere) in done.stderr
    node.start_daemon()
    node.env["RANKLOG_SPOOL_DIR"] = str(elsewhere / "spool")
    assert "Traceback" not in log_some(node, "one").stderr
    node.env["RANKLOG_SPOOL_DIR"] = str(node.spool)
    oracle.check(node)
