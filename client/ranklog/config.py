"""What the environment says, read once and frozen. The only module of the client, beside `identity` and `failpoint`,
that looks at environment variables; everything else takes a `Settings`.

An empty variable counts as unset. A value that cannot be understood is a UsageError that names variable, value and
what would be right: guessing would send records to a place nobody looks at. Which of the directories named here are
used, and in what order, is decided in `places`.

`runtime_dir` and `state_dir` hold the defaults of the daemon too: both sides must come to the same place without
talking to each other.
"""

import math
import os
import pwd
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from ranklog.errors import UsageError

Mode = Literal["online", "offline", "disabled"]

SOCKET_PATH_SIZE_MAX = 107
"""Bytes of a unix socket's path; the kernel has no room for more."""
SOCKET_NAME = "ranklog.sock"

_MODES = ("online", "offline", "disabled")
_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})
_SIZE = re.compile(r"(\d{1,15}) ?([kmg]?)(i?b)?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for, with every default filled in."""

    to: str
    """URL of the store that a daemon started from here writes to, and that readers read; a path is a directory."""
    mode: Mode = "online"
    """`offline`: journal and spool only, until `ranklog sync`. `disabled`: `log()` does nothing at all."""
    project: str | None = None
    """For an `init()` that names no project."""
    name: str | None = None
    """For an `init()` that names no display name."""
    run_id: str | None = None
    """The run's id for every rank, whatever launcher started it."""
    run_id_hint: str | None = None
    """What `ranklog run` offers; used only where nothing else connects the ranks of a job."""
    socket: Path | None = None
    """The daemon's socket; no other is tried then."""
    runtime_dir: Path
    """The daemon's socket and, if it is a tmpfs, the journals."""
    runtime_dir_given: bool = False
    """The user named it, so no other daemon is meant."""
    state_dir: Path
    """The daemon's WAL and outbox, for a daemon started from here."""
    journal_dir: Path | None = None
    """Where journals go; no other directory is tried then."""
    spool_dir: Path | None = None
    """Where spools go; no other directory is tried then."""
    autostart: bool = False
    """The first `init()` on a node starts a daemon if none answers."""
    quiet: bool = False
    """No output but warnings."""
    allow_network_fs: bool = False
    """Accept journal, spool and state on a network filesystem, where locks and fsync may not hold what they promise."""
    journal_size_bytes: int = 32 << 20
    """Unacknowledged records of one writer in tmpfs, which is memory of the node; more go to the spool."""
    journal_file_size_bytes: int = 512 << 10
    """One journal file. Smaller: less memory held by an idle writer; larger: fewer files under load."""
    spool_size_bytes: int = 1 << 30
    """One writer's records on disk while no daemon takes them. Past it the newest are refused, and a gap says so."""
    token_file: Path | None = None
    """Where readers find the Hub's token; None: the Hub's own login."""
    read_cache_dir: Path
    """Where readers keep shards that they fetched from a bucket. They are files like those of a directory store."""
    read_cache_size_bytes: int = 4 << 30
    """Of these, what is kept for later; the least recently read go first. A run of 50 M values is about 0.3 GB."""
    flush_interval_s: float = 0.1
    """How often the sender looks for new records. Longer: fewer wake-ups beside the training, later durability."""
    uid: int
    xdg_runtime: Path | None = None
    """None where the session has none, as in most batch jobs."""
    xdg_state: Path
    xdg_data: Path

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Return what `env` (default: this process's environment) says; raises UsageError naming a bad variable."""
        env = os.environ if env is None else env
        uid = os.geteuid()  # Files are created, and their owners judged, by this one.
        data = xdg_home(env, "XDG_DATA_HOME", ".local/share", uid)
        settings = cls(
            to=_text(env, "RANKLOG_TO") or str(data / "ranklog"),
            mode=_mode(env),
            project=_text(env, "RANKLOG_PROJECT"),
            name=_text(env, "RANKLOG_NAME"),
            run_id=_text(env, "RANKLOG_RUN_ID"),
            run_id_hint=_text(env, "RANKLOG_RUN_ID_HINT"),
            socket=_path(env, "RANKLOG_SOCKET"),
            runtime_dir=runtime_dir(env, uid),
            runtime_dir_given=_text(env, "RANKLOG_RUNTIME_DIR") is not None,
            state_dir=state_dir(env, uid),
            journal_dir=_path(env, "RANKLOG_JOURNAL_DIR"),
            spool_dir=_path(env, "RANKLOG_SPOOL_DIR"),
            autostart=_flag(env, "RANKLOG_AUTOSTART"),
            quiet=_flag(env, "RANKLOG_QUIET"),
            allow_network_fs=_flag(env, "RANKLOG_ALLOW_NETWORK_FS"),
            journal_size_bytes=_size(env, "RANKLOG_JOURNAL_SIZE_BYTES", cls.journal_size_bytes),
            journal_file_size_bytes=_size(env, "RANKLOG_JOURNAL_FILE_SIZE_BYTES", cls.journal_file_size_bytes),
            spool_size_bytes=_size(env, "RANKLOG_SPOOL_SIZE_BYTES", cls.spool_size_bytes),
            token_file=_path(env, "RANKLOG_TOKEN_FILE"),
            read_cache_dir=_path(env, "RANKLOG_READ_CACHE_DIR")
            or xdg_home(env, "XDG_CACHE_HOME", ".cache", uid) / "ranklog" / "shards",
            read_cache_size_bytes=_size(env, "RANKLOG_READ_CACHE_SIZE_BYTES", cls.read_cache_size_bytes),
            flush_interval_s=_seconds(env, "RANKLOG_FLUSH_INTERVAL_S", cls.flush_interval_s),
            uid=uid,
            xdg_runtime=xdg_runtime(env, uid),
            xdg_state=xdg_home(env, "XDG_STATE_HOME", ".local/state", uid),
            xdg_data=data,
        )
        _check_socket("RANKLOG_SOCKET", settings.socket)
        if settings.runtime_dir_given and settings.socket is None:
            _check_socket("RANKLOG_RUNTIME_DIR", settings.runtime_dir / SOCKET_NAME)
        return settings


def runtime_dir(env: Mapping[str, str], uid: int) -> Path:
    """Return where a daemon of this user has its socket, for both sides of it."""
    session = xdg_runtime(env, uid)
    default = session / "ranklog" if session else Path("/run/ranklog" if uid == 0 else f"/tmp/ranklog-{uid}")  # noqa: S108
    return _path(env, "RANKLOG_RUNTIME_DIR") or default


def state_dir(env: Mapping[str, str], uid: int) -> Path:
    """Return where a daemon of this user keeps its WAL and outbox."""
    return _path(env, "RANKLOG_STATE_DIR") or xdg_home(env, "XDG_STATE_HOME", ".local/state", uid) / "ranklog"


def xdg_runtime(env: Mapping[str, str], uid: int) -> Path | None:
    """Return the session's runtime directory, or None.

    Batch systems and sudo hand the variable on to places where the directory is missing or somebody else's.
    """
    text = _text(env, "XDG_RUNTIME_DIR")
    if text is None or not text.startswith("/"):
        return None
    try:
        info = os.stat(text)
    except OSError:
        return None
    return Path(text) if stat.S_ISDIR(info.st_mode) and info.st_uid == uid else None


def xdg_home(env: Mapping[str, str], variable: str, default: str, uid: int) -> Path:
    """Return an XDG base directory; relative values are ignored, as its specification says."""
    text = _text(env, variable)
    return Path(text) if text is not None and text.startswith("/") else _home(env, uid) / default


def _home(env: Mapping[str, str], uid: int) -> Path:
    text = _text(env, "HOME")
    if text is not None and text.startswith("/"):
        return Path(text)
    try:
        return Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        return Path(f"/var/tmp/ranklog-{uid}")  # noqa: S108  A container with a made-up uid; `places` checks the owner.


def _text(env: Mapping[str, str], name: str) -> str | None:
    return env.get(name) or None


def _path(env: Mapping[str, str], name: str) -> Path | None:
    text = _text(env, name)
    if text is None:
        return None
    if "\0" in text:
        raise UsageError(f"{name}={text!r} is not a path")
    return Path(text).absolute()


def _mode(env: Mapping[str, str]) -> Mode:
    text = _text(env, "RANKLOG_MODE") or "online"
    if text.lower() not in _MODES:
        raise UsageError(f"RANKLOG_MODE={text!r} is not a mode; use one of {', '.join(_MODES)}")
    return cast("Mode", text.lower())


def _flag(env: Mapping[str, str], name: str) -> bool:
    text = (_text(env, name) or "0").lower()
    if text not in _YES | _NO:
        raise UsageError(f"{name}={text!r} is neither yes nor no; use 1 or 0")
    return text in _YES


def _size(env: Mapping[str, str], name: str, default: int) -> int:
    text = _text(env, name)
    if text is None:
        return default
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) * _FACTORS[match[2].lower()] if match else 0
    if not 0 < size < 1 << 62:
        raise UsageError(f"{name}={text!r} is not a size; use bytes (33554432) or a binary unit (512K, 32M, 1G)")
    return size


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = _text(env, name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 60:
        raise UsageError(f"{name}={text!r} is not a time; use seconds above 0 and up to 60, such as 0.1")
    return seconds


def _check_socket(name: str, path: Path | None) -> None:
    if path is not None and len(os.fsencode(path)) > SOCKET_PATH_SIZE_MAX:
        raise UsageError(
            f"{name}: the socket {str(path)!r} has a path of {len(os.fsencode(path))} bytes, and the kernel takes "
            f"{SOCKET_PATH_SIZE_MAX}; choose a shorter directory, such as one below /tmp"
        )


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, to build a child's from."""
    return dict(os.environ)
