"""The daemon and the process around it: can it be reached, does it fit, has it descriptors, does the clock stand still.

The clock is compared with things the kernel counts on its own: the daemon wrote its cookie when it started, and the
kernel knows for how long it has been running, whatever the clock was set to meanwhile.
"""

import errno
import grp
import os
import pwd
import resource
import socket as sockets
import stat
import struct
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ranklog import wire
from ranklog.autostart import missing_package
from ranklog.identity import process_start
from ranklog.places import socket_candidates
from ranklog.version import __version__
from ranklogd.doctor.finding import Finding, note, ok, problem, warning
from ranklogd.doctor.site import Site

FILES_MIN = 4096
"""Each connection takes a descriptor; libzmq aborts the daemon where there is none."""
CLOCK_SLACK_S = 120.0
_FIRST_CREDIBLE_S = 1_577_836_800  # 2020-01-01: no clock that was set shows an earlier time.


def check_socket(site: Site) -> Iterator[Finding]:
    """Whether a daemon can be reached, and if not, at which of the places it fails."""
    if site.pong is not None:
        pong = site.pong
        text = f"ranklogd {pong.version} (pid {pong.pid}) answers on {pong.socket} after {pong.took_s * 1000:.1f} ms"
        yield ok("socket", text)
        if not site.snapshot:
            yield warning("socket", "it gave no status that can be read", f"kill {pong.pid}; ranklogd")
        return
    candidates = socket_candidates(site.settings)
    trouble = [finding for path in candidates for finding in _look_at(path, site.settings.uid)]
    yield from trouble
    if not trouble and site.settings.mode == "offline":
        yield note("socket", "RANKLOG_MODE=offline: nothing is sent to a daemon", "ranklog sync")
    elif not trouble:
        where = ", ".join(map(str, candidates))
        text = f"no daemon: there is no socket at {where}. Records wait in this node's spool"
        yield warning("socket", text, "ranklogd   # or: ranklog run -- COMMAND")


def _look_at(path: Path, uid: int) -> Iterator[Finding]:
    """Yield what is wrong with a socket at which nobody answered; nothing where there is none."""
    try:
        info = path.stat()
    except PermissionError:
        yield warning("socket", f"{path.parent} may not be looked into by user {_user(uid)}", f"ls -ld {path.parent}")
        return
    except OSError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        yield problem("socket", f"{path} is in the way of the socket and is none", f"rm {path}")
        return
    code, pid = _connect(path)
    if code == errno.ECONNREFUSED:
        yield warning("socket", f"{path} is left from a daemon that is gone; the next one takes its place", "ranklogd")
    elif code in (errno.EACCES, errno.EPERM):
        mode, group = stat.S_IMODE(info.st_mode), _group(info.st_gid)
        text = f"user {_user(uid)} may not connect to {path} (mode {mode:04o}, {_user(info.st_uid)}:{group})"
        joins = mode & 0o060 == 0o060
        fix = f"sudo usermod -aG {group} {_user(uid)}   # and log in again"
        yield problem(
            "socket", text, fix if joins else "ranklogd --socket-mode 0660 --socket-group GROUP   # as its owner"
        )
    elif code == 0:
        stopped = bool(pid) and _state_of(pid) in ("T", "t")
        how = "is stopped (SIGSTOP)" if stopped else "hangs, is busy, or is no ranklogd"
        text = f"process {pid} listens on {path} and does not answer: it {how}. Records wait in this node's spool"
        yield problem("socket", text, f"kill -CONT {pid}" if stopped else f"kill {pid}; ranklogd")


def listening(site: Site) -> set[int]:
    """Return the processes that listen on one of the sockets, whether they answer or not."""
    return {_connect(path)[1] for path in socket_candidates(site.settings)}


def _connect(path: Path) -> tuple[int, int]:
    """Return (errno, listening pid) of a connection that is closed at once; pid 0 where that is not known."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003
        code = probe.connect_ex(os.fsencode(path))
        if code == errno.EAGAIN:
            return 0, 0  # Its queue is full.
        if code:
            return code, 0
        peer = probe.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12)
        return 0, int(struct.unpack("iII", peer)[0])


def _state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def check_versions(site: Site) -> Iterator[Finding]:
    """Whether client and daemon understand each other, and what this installation can do."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("pyzmq", "msgpack"))
    yield ok("versions", f"ranklog {__version__}, {packages}, protocol {wire.VERSION_MIN}..{wire.VERSION}")
    if site.pong is not None and site.pong.version != __version__:
        yield _skew(site, site.pong.version)
    refused = (site.snapshot.get("refused") or {}).get("version")
    if refused:
        text = f"the daemon refused {refused} greetings of clients whose protocol it does not speak; they spool"
        yield warning("versions", text, "pip install --upgrade ranklog   # where the older of the two is")
    absent = missing_package()
    if absent:
        text = f"this installation cannot run a daemon: {absent} is missing"
        tell = note if site.pong else warning
        yield tell("versions", text, 'pip install "ranklog[daemon]"')
    lacking = [name for name in ("pyarrow", "duckdb") if find_spec(name) is None]
    if lacking:
        text = f"this installation cannot read shards (ls, query, tail): {' and '.join(lacking)} missing"
        yield note("versions", text, 'pip install "ranklog[read]"')


def _skew(site: Site, theirs: str) -> Finding:
    spoken = site.snapshot.get("protocol")
    fix = "pip install --upgrade ranklog   # where the older of the two is; then restart the daemon"
    text = f"the daemon is version {theirs}, this client {__version__}"
    if not isinstance(spoken, list) or len(spoken) != 2:
        return warning("versions", f"{text}; which protocols it speaks it does not say", fix)
    low, high = spoken
    if low > wire.VERSION or high < wire.VERSION_MIN:
        ours = f"{wire.VERSION_MIN}..{wire.VERSION}"
        text = f"{text}: it speaks protocol {low}..{high}, this client {ours}. Records are spooled only"
        return problem("versions", text, fix)
    return note("versions", f"{text}; both speak protocol {min(high, wire.VERSION)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown)"


def check_limits(site: Site) -> Iterator[Finding]:
    """Whether the daemon, or one started from here, may open as many files as it has clients."""
    most, whose, fix = resource.getrlimit(resource.RLIMIT_NOFILE)[1], "a daemon started from here", "ulimit -Hn 65536"
    if site.pong is not None:
        try:
            lines = Path(f"/proc/{site.pong.pid}/limits").read_text().splitlines()
            text = next(line for line in lines if line.startswith("Max open files")).split()[3]
        except (OSError, StopIteration, IndexError):
            yield note("limits", f"the limits of process {site.pong.pid} cannot be read by this user")
            return
        most = int(text) if text.isdecimal() else -1
        whose, fix = "the daemon", "LimitNOFILE=65536 in its systemd unit, or: ulimit -n 65536; ranklogd"
    if 0 <= most < FILES_MIN:
        text = f"{whose} may open {most} files, and needs one for each client: libzmq aborts it when there is none left"
        yield warning("limits", text, fix)
    else:
        yield ok("limits", f"{whose} may open {most if most >= 0 else 'any number of'} files")


def check_clock(site: Site) -> Iterator[Finding]:
    """Whether the clock can be right, and whether it was moved since the daemon started."""
    now_s = time.time()
    if now_s < _FIRST_CREDIBLE_S:
        text = f"the clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(now_s))}: it was never set"
        yield warning("clock", text, "timedatectl set-ntp true")
        return
    moved_s = _moved_s(site, now_s)
    ahead = _ahead_s(site, now_s)
    if abs(moved_s) > CLOCK_SLACK_S:
        text = (
            f"the clock was moved by {moved_s:+,.0f} s since the daemon started: the column ts shows it, order does not"
        )
        yield warning("clock", text, "timedatectl status")
    elif ahead > CLOCK_SLACK_S:
        text = f"files of ranklog on this node are {ahead:,.0f} s younger than the clock: it was set back"
        yield warning("clock", text, "timedatectl status")
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC, steady", time.gmtime(now_s)))


def _moved_s(site: Site, now_s: float) -> float:
    """Return by how much the clock runs ahead of what the daemon saw at its start; 0 where that cannot be told."""
    began_ticks = process_start(site.pong.pid) if site.pong else None
    if site.pong is None or began_ticks is None:
        return 0.0
    try:
        written_s = Path(f"{site.pong.socket}.cookie").stat().st_mtime
    except OSError:
        return 0.0
    began_s = now_s - time.clock_gettime(time.CLOCK_BOOTTIME) + began_ticks / os.sysconf("SC_CLK_TCK")
    return began_s - written_s


def _ahead_s(site: Site, now_s: float) -> float:
    newest = 0.0
    for path in (site.state.wal, site.state.outbox, site.state.lock):
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:
            continue
    return newest - now_s
