"""Every option of the daemon, with unit, default and reason; read once, frozen, checked (`ranklogd.limits`).

    flags  >  RANKLOG_<FIELD>  >  TOML file  >  default
    systemd's STATE_DIRECTORY and RUNTIME_DIRECTORY win over all of them: only there may a hardened unit write

The file is RANKLOG_CONFIG, else $XDG_CONFIG_HOME/ranklog/ranklogd.toml, else /etc/ranklog/ranklogd.toml; without one
the daemon starts all the same. It is one flat table; an unknown key is an error, for a typo must not become a default.
Sizes and times may be text with a unit (`ranklogd.units`). An empty text means the default, as an empty variable does.

`to_json` and `from_json` hand the config to the shipper, which looks at neither file nor environment. The command
line's face of these fields is in `ranklogd.flags`; where a user's directories are is decided in `ranklog.config`, so
that client and daemon meet.
"""

import difflib
import json
import os
import platform
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ranklog.config import SOCKET_NAME, Settings, runtime_dir, state_dir, xdg_home
from ranklog.errors import UsageError
from ranklog.stores.base import StoreOptions, url_scheme
from ranklogd.limits import check_value
from ranklogd.units import parse_duration, parse_mode, parse_size

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_SYSTEMD = {"state_dir": "STATE_DIRECTORY", "runtime_dir": "RUNTIME_DIRECTORY"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The daemon's options. Paths are absolute and all defaults filled in, once `load_config` made it."""

    to: str = ""
    """Where shards go: a directory, hf://buckets/USER/NAME, s3://, gs:// or az://. Default: $XDG_DATA_HOME/ranklog."""
    state_dir: Path = Path()
    """WAL, outbox, quarantine: what outlives a crash, on a disk of this node. Default: $XDG_STATE_HOME/ranklog."""
    runtime_dir: Path = Path()
    """Socket and journals, best on a tmpfs. Default: $XDG_RUNTIME_DIR/ranklog, /run/ranklog for root, else in /tmp."""
    socket: Path = Path()
    """The unix socket; the kernel takes a path of 107 bytes. Default: <runtime_dir>/ranklog.sock."""
    socket_mode: int = 0o600
    """Permissions of the socket, octal. Who may connect may log: 0660 with a socket_group lets others in."""
    socket_group: str = ""
    """Group of the socket, by name or number. Empty: the daemon's own group."""
    journal_dir: Path | None = None
    """Where to look for journals, and nowhere else. Empty: the places where clients put them by default."""
    spool_dir: Path | None = None
    """Where to look for spools, and nowhere else. Empty: the places where clients put them by default."""
    commit_interval_s: float = 0.020
    """At most one fdatasync in so many seconds, for all that arrived. Longer: fewer syncs, later acknowledgements."""
    seal_size_bytes: int = 64 << 20
    """Seal the open segment at this size. Larger: fewer and larger shards, more memory while one is converted."""
    seal_age_s: float = 10.0
    """Seal the open segment this many seconds after its first record. Shorter: fresher shards, and more of them."""
    disk_quota_bytes: int = 20 << 30
    """What the state directory may hold while the store is away; then clients keep new records in their spools."""
    disk_free_min_bytes: int = 256 << 20
    """Take no records while the disk has less than this free: the node needs some for itself. 0: no such limit."""
    quota_per_uid_bytes: int = 0
    """What one user may have in the state directory, so that none can fill it for the others. 0: no such limit."""
    reserve_size_bytes: int = 4 << 20
    """Room kept back in a file and given up on a full disk, so that deletes and renames still work. 0: none."""
    cache_age_s: float = 3600.0
    """Keep uploaded shards so long for readers on this node."""
    cache_size_bytes: int = 256 << 20
    """Keep at most so much of them, oldest out first. 0: none. A directory store never does: its own are at hand."""
    rescan_interval_s: float = 5.0
    """Look for files so often even if no event was reported: events can be lost, a listing cannot."""
    idle_exit_s: float = 0.0
    """Exit after so long without a writer or anything left to upload; for daemons started by a client. 0: stay."""
    stop_deadline_s: float = 60.0
    """On SIGTERM, go on uploading for at most so long. What remains is uploaded after the next start."""
    upload_batch_max: int = 0
    """Shards in one call to the store. More: fewer calls; fewer: less again after a failure. 0: as the store likes."""
    upload_deadline_s: float = 120.0
    """A call to the store that takes longer is given up where the store allows it, and reported in any case."""
    upload_interval_min_s: float = 10.0
    """The least time between two uploads, where the store counts requests (a Bucket). Shorter: earlier data."""
    upload_interval_max_s: float = 1800.0
    """The longest time between two uploads that sharing one rate limit with many nodes may lead to."""
    token_file: Path | None = None
    """A file with the Bucket's token, read for each request, so it may be replaced. Default: the Hub's own login."""
    create_bucket: str = ""
    """private or public: create the Bucket if it was never there. Empty: never; a missing one is reported."""
    retry_base_s: float = 1.0
    """The longest wait after a first failed upload. It doubles with each further one; a random part of it is taken."""
    retry_max_s: float = 300.0
    """The longest wait between two tries. There is no last try: nothing is dropped because a server said no."""
    writers_max: int = 65536
    """Writers known at one time, those counted whose end is not long ago; more are refused. Bounds memory."""
    writer_keep_s: float = 48 * 3600.0
    """Remember an ended writer so long, so that nothing of it that turns up late is taken twice."""
    node: str = ""
    """This node's name in the data and in the names of its shards. Default: the host name."""
    node_metrics_interval_s: float = 15.0
    """Record CPU, memory, disk and network of the node so often, for every run that is live here. 0: never."""
    allow_network_fs: bool = False
    """Accept state, journals and spools on a network filesystem, where locks and fsync may not keep their promises."""
    log_level: str = "info"
    """debug, info, warning or error; lines go to standard error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_value(field.name, field.type, getattr(self, field.name))
        if self.retry_base_s > self.retry_max_s:
            raise UsageError(f"retry_base_s={self.retry_base_s:g} is longer than retry_max_s={self.retry_max_s:g}")
        if self.upload_interval_min_s > self.upload_interval_max_s:
            limits = f"{self.upload_interval_min_s:g} is longer than {self.upload_interval_max_s:g}"
            raise UsageError(f"upload_interval_min_s={limits}, which is upload_interval_max_s")

    @property
    def is_paced(self) -> bool:
        """Whether uploads keep a pace: where the store counts requests, and all nodes of a user share the count."""
        return url_scheme(self.to or "/") == "hf"

    @property
    def keeps_cache(self) -> bool:
        """Whether uploaded shards are kept: not where the store is a directory, which readers here can use as well."""
        return self.cache_size_bytes > 0 and self.is_remote

    @property
    def is_remote(self) -> bool:
        """Whether the store is reached over the network, and so promises that each call has an end."""
        return url_scheme(self.to or "/") not in ("", "file")

    @property
    def batch_max(self) -> int:
        """Shards in one call: where calls are counted, a backlog must make them larger, never more of them."""
        return self.upload_batch_max or (1000 if self.is_paced else 64)

    @property
    def store_options(self) -> StoreOptions:
        """What a store needs to know beyond its URL."""
        return StoreOptions(
            deadline_s=self.upload_deadline_s,
            token_file=self.token_file,
            create=self.create_bucket,
            seen_marker=self.state_dir / "bucket-seen",
        )

    def settings(self, env: Mapping[str, str] | None = None) -> Settings:
        """Return the client's settings with this config's places: `ranklog.places` then finds what clients left."""
        return replace(
            Settings.from_env(env),
            to=self.to,
            state_dir=self.state_dir,
            runtime_dir=self.runtime_dir,
            socket=self.socket,
            journal_dir=self.journal_dir,
            spool_dir=self.spool_dir,
            allow_network_fs=self.allow_network_fs,
        )

    def to_json(self) -> str:
        """Return one line that `from_json` reads back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in values.items()})

    @staticmethod
    def from_json(text: str) -> "Config":
        """Return the config that `to_json` wrote; raises UsageError.

        A field that is not known is passed over: after a downgrade in place, an older shipper serves a later daemon.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return Config(**{name: _from_json(name, value) for name, value in values.items() if name in _FIELDS})
        except (ValueError, TypeError, AttributeError) as exc:
            raise UsageError(f"this is not the JSON of a daemon's config: {exc}") from exc


_FIELDS = {field.name: field for field in fields(Config)}
_PATHS = frozenset(name for name, field in _FIELDS.items() if field.type in (Path, Path | None))


def load_config(
    argv_overrides: Mapping[str, str], env: Mapping[str, str] | None = None, file: Path | None = None
) -> Config:
    """Return the config of these flags (field name -> text), this environment and the file they lead to.

    `file` is one the user named, which must exist. Raises UsageError that names source, field, value and limit.
    """
    env = os.environ if env is None else env
    given = {name: (f"{path}: {name}", value) for path, name, value in _read_file(env, file)}
    for name in _FIELDS:
        variable = f"RANKLOG_{name.upper()}"
        if env.get(variable):
            given[name] = (variable, env[variable])
    for name, text in argv_overrides.items():
        _known(name, "the command line")
        given[name] = (f"--{name.replace('_', '-')}", text)
    for name, variable in _SYSTEMD.items():
        if env.get(variable, "").startswith("/"):
            given[name] = (variable, env[variable].split(":")[0])
    values = {name: _parse(name, value, source) for name, (source, value) in given.items() if value != ""}
    return _with_places(Config(**values), env)


def _known(name: str, where: object) -> None:
    if name not in _FIELDS:
        near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(_FIELDS)}"
        raise UsageError(f"{where}: unknown option {name!r}; {hint}")


def _read_file(env: Mapping[str, str], file: Path | None) -> list[tuple[Path, str, Any]]:
    named = file or (Path(env["RANKLOG_CONFIG"]) if env.get("RANKLOG_CONFIG") else None)
    home = xdg_home(env, "XDG_CONFIG_HOME", ".config", os.geteuid())
    for path in [named] if named else [home / "ranklog/ranklogd.toml", Path("/etc/ranklog/ranklogd.toml")]:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as exc:
            if named:
                raise UsageError(f"config file {path} does not exist; name another with RANKLOG_CONFIG") from exc
        except (OSError, ValueError) as exc:
            raise UsageError(f"config file {path} cannot be read: {exc}") from exc
        else:
            for name in table:
                _known(name, path)
            return [(path, name, value) for name, value in table.items()]
    return []


def _parse(name: str, value: object, source: str) -> Any:
    """Return a field's value from text or from what TOML made of it; raises UsageError naming the source."""
    try:
        parsed = _parse_text(name, value) if isinstance(value, str) else value
        if isinstance(parsed, int) and not isinstance(parsed, bool) and _FIELDS[name].type is float:
            parsed = float(parsed)
        if name == "socket_mode" and not isinstance(value, str):
            raise ValueError('write it as text with octal digits, such as "0660"')  # 660 and 0o660 look alike to TOML.
        check_value(name, _FIELDS[name].type, parsed)
    except (ValueError, UsageError) as exc:
        raise UsageError(f"{source}={value!r}: {exc}") from exc
    return parsed


def _from_json(name: str, value: Any) -> Any:
    return Path(value) if name in _PATHS and value is not None else value


def _parse_text(name: str, text: str) -> object:
    kind = _FIELDS[name].type
    if name in _PATHS:
        if "\0" in text:
            raise ValueError("not a path")
        return Path(os.path.expanduser(text)).absolute()
    if kind is bool:
        if text.lower() not in _WORDS:
            raise ValueError("neither yes nor no; write true or false")
        return _WORDS[text.lower()]
    if name == "socket_mode":
        return parse_mode(text)
    if kind is float:
        return parse_duration(text)
    if kind is int:
        if not name.endswith("_bytes") and not text.strip().isdecimal():
            raise ValueError("not a whole number")
        return parse_size(text)
    return text


def _with_places(config: Config, env: Mapping[str, str]) -> Config:
    """Fill in the defaults that depend on user and machine, by the same rules as the client."""
    uid = os.geteuid()
    runtime = config.runtime_dir if config.runtime_dir != Path() else runtime_dir(env, uid)
    data = xdg_home(env, "XDG_DATA_HOME", ".local/share", uid) / "ranklog"
    to = config.to or str(data)
    return replace(
        config,
        to=to if url_scheme(to) else str(Path(os.path.expanduser(to)).absolute()),
        state_dir=config.state_dir if config.state_dir != Path() else state_dir(env, uid),
        runtime_dir=runtime,
        socket=config.socket if config.socket != Path() else runtime / SOCKET_NAME,
        node=config.node or platform.node() or "unnamed",
        token_file=config.token_file or _credential(env),
    )


def _credential(env: Mapping[str, str]) -> Path | None:
    """Return the token that systemd hands over (LoadCredential=hf_token), if it does."""
    path = Path(env.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / "hf_token"
    return path if path.is_file() else None


def environment() -> MutableMapping[str, str]:
    """Return this process's environment, to be handed on (`ranklogd.secrecy`)."""
    return os.environ


def notify_socket() -> str:
    """Return where systemd wants to hear of readiness; empty outside it."""
    return os.environ.get("NOTIFY_SOCKET", "")
