"""The node as `ranklog doctor` finds it: settings, the daemon's config as it would be now, and the daemon's answer.

A variable or a file that cannot be understood is reported and left out, so that everything else can be looked at.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ranklog import control
from ranklog.config import Settings, xdg_home
from ranklog.control import Pong
from ranklog.errors import RanklogError, UsageError
from ranklogd.config import Config, load_config
from ranklogd.doctor.finding import Finding, ok, problem, warning
from ranklogd.statedir import StateDir

ANSWER_TIMEOUT_S = 3.0
_OTHERS = frozenset({"RANKLOG_CONFIG", "RANKLOG_FAILPOINT", "RANKLOG_FAILPOINT_LOG", "RANKLOG_REQUIRE_ALL"})
_VARIABLE = re.compile(r"[A-Z_]+(?==|:)")
_NO_FILE = Path("/dev/null")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What every check may look at."""

    env: Mapping[str, str]
    settings: Settings
    config: Config
    to: str
    """The store URL: the daemon's, else what the environment says."""
    pong: Pong | None
    """None: nobody answered."""
    snapshot: Mapping[str, Any]
    """The daemon's status; empty where it gave none. A daemon of another version may lack any field."""
    found: tuple[Finding, ...]
    """What was found on the way."""

    @property
    def state(self) -> StateDir:
        """The state directory of the daemon that answers, else of one that would be started here."""
        return StateDir(Path(self.snapshot.get("state_dir") or self.config.state_dir))


class _Asked(dict[str, str]):
    """An environment that remembers which variables were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return default


def known_variables() -> set[str]:
    """Return every RANKLOG_ variable that means something: those the client asks for, and the daemon's options."""
    asked = _Asked()
    Settings.from_env(asked)
    options = {f"RANKLOG_{field.name.upper()}" for field in fields(Config)}
    return {name for name in asked.names if name.startswith("RANKLOG_")} | options | _OTHERS


def visit(env: Mapping[str, str], socket: Path | None, file: Path | None) -> Site:
    """Look at environment, config file and daemon; never raises for what they hold."""
    found = list(_unknown(env))
    env = {name: value for name, value in env.items() if value}
    wanted_to = env.get("RANKLOG_TO", "")
    settings = _settings(env, found)
    config = _config(env, file, settings, found)
    # A store that cannot be is told by the check of the store.
    found = [finding for finding in found if not finding.text.startswith("RANKLOG_TO=")]
    if not found:
        found.append(ok("config", f"{_file(env, file, settings.uid)}; {len(_given(env))} variables of ranklog are set"))
    settings = replace(settings, socket=socket or settings.socket)
    pong, snapshot = _ask(settings)
    to = str(snapshot.get("to") or wanted_to or config.to)
    return Site(env=env, settings=settings, config=config, to=to, pong=pong, snapshot=snapshot, found=tuple(found))


def _settings(env: dict[str, str], found: list[Finding]) -> Settings:
    while True:
        try:
            return Settings.from_env(env)
        except UsageError as exc:
            found.append(_bad(env, str(exc)))


def _config(env: dict[str, str], file: Path | None, settings: Settings, found: list[Finding]) -> Config:
    """Return what a daemon started here would go by, without what is wrong in it."""
    for source in (file, _NO_FILE):
        while True:
            try:
                return load_config({}, env, source)
            except UsageError as exc:
                if _VARIABLE.match(str(exc)) is None:
                    found.append(problem("config", str(exc), "ranklogd --check-config   # after mending it"))
                    break
                found.append(_bad(env, str(exc)))
    return Config(to=settings.to, state_dir=settings.state_dir, runtime_dir=settings.runtime_dir)


def _ask(settings: Settings) -> tuple[Pong | None, dict[str, Any]]:
    try:
        pong = control.ping(settings, ANSWER_TIMEOUT_S)
    except (RanklogError, OSError):
        return None, {}
    try:
        snapshot = control.status(settings, ANSWER_TIMEOUT_S)
    except (RanklogError, OSError):
        return pong, {}
    return pong, snapshot


def _given(env: Mapping[str, str]) -> list[str]:
    return sorted(name for name in env if name.startswith("RANKLOG"))


def _unknown(env: Mapping[str, str]) -> list[Finding]:
    known = known_variables()
    found = []
    for name in _given(env):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            text = f"{name} means nothing to ranklog" + (f"; did you mean {near[0]}?" if near else "")
            fix = f'export {near[0]}="${name}"; unset {name}' if near else f"unset {name}"
            found.append(warning("environment", text, fix))
    return found


def _bad(env: dict[str, str], text: str) -> Finding:
    """Take the variable out of `env` that this error begins with, so that the next look gets further.

    Where it names none, all of them go.
    """
    match = _VARIABLE.match(text)
    name = match[0] if match and match[0] in env else ""
    if not name:  # An option that two variables make impossible together, for one.
        for given in _given(env):
            del env[given]
        return problem("environment", text, "env | grep RANKLOG_")
    del env[name]
    return problem("environment", text, f"unset {name}")


def _file(env: Mapping[str, str], file: Path | None, uid: int) -> str:
    home = xdg_home(env, "XDG_CONFIG_HOME", ".config", uid) / "ranklog/ranklogd.toml"
    named = [Path(text) for text in (file, env.get("RANKLOG_CONFIG")) if text]
    for path in named or [home, Path("/etc/ranklog/ranklogd.toml")]:
        if path.is_file():
            return f"{path} is sound"
    return "no config file, which is fine"
