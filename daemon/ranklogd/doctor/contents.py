"""The store, and what lies on this node and waits: for a daemon, for a person, for `ranklog sync`."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ranklog import fs
from ranklog.cli.output import human_size
from ranklog.cli.status import why_not_uploaded
from ranklog.errors import MissingExtra, RanklogError, StoreError
from ranklog.framefile import parse_name
from ranklog.places import adoption_dirs
from ranklog.reader.pending import waiting_writers
from ranklog.stores import Store, open_store
from ranklog.stores.base import StoreOptions
from ranklogd.doctor.finding import Finding, note, ok, problem, warning
from ranklogd.doctor.site import Site

SHOWN_MAX = 3
STORE_FREE_MIN = 1 << 30
COUNTED_MAX = 10_000
PROBE_S = 5.0
_SYNC = "ranklog sync"
_NOBODYS_KEY = "ranklog-doctor"


def check_store(site: Site) -> Iterator[Finding]:
    """Whether shards can go where they should."""
    try:
        store = open_store(site.to, StoreOptions(deadline_s=PROBE_S, token_file=site.config.token_file))
    except MissingExtra as exc:
        yield problem("store", str(exc), str(exc).rpartition("Run: ")[2])
        return
    except RanklogError as exc:
        yield problem("store", str(exc), "export RANKLOG_TO=/path/of/a/directory")
        return
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        yield from _directory(root, site)
    elif not _is_bucket(site.to) or _token_path(site).exists() or site.env.get("HF_TOKEN"):
        yield _probe(store, site)
    if why := why_not_uploaded({"shipper": site.snapshot.get("shipper") or {}}):
        yield problem("store", f"{why}. Everything waits on this node's disk", "ranklog status")


def _directory(root: Path, site: Site) -> Iterator[Finding]:
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield problem("store", f"{place} is no directory, and {root} should be one", f"ls -ld {place}")
        return
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{root} cannot be written to by user {site.settings.uid}"
        if site.pong is None:
            yield problem("store", text, f"mkdir -p {root}; chmod u+rwx {root}   # as its owner")
        else:
            yield note("store", f"{text}; what counts is the daemon's user")
        return
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    if free < STORE_FREE_MIN:
        yield warning("store", f"{human_size(free)} free for {root}", f"df -h {place}")
    else:
        yield ok("store", f"{root}, {human_size(free)} free" + ("" if root == place else "; it is made when needed"))


def _is_bucket(url: str) -> bool:
    return url.lower().startswith("hf:")


def _probe(store: Store, site: Site) -> Finding:
    """Ask the store for something that is not there: one request, which changes nothing."""
    try:
        if _is_bucket(site.to):
            store.heads([_NOBODYS_KEY])
        else:
            next(iter(store.list(f"{_NOBODYS_KEY}/")), None)  # Only a listing tells a missing bucket from an object.
    except StoreError as exc:
        if not exc.held:
            return warning("store", f"{exc}. Records wait on this node until it answers", "ranklog doctor   # again")
        if "no such bucket" in str(exc) and site.config.create_bucket:
            return note("store", f"{site.to} is not there yet; the daemon makes it with the first upload")
        return problem("store", str(exc), _held_fix(site.to, str(exc)))
    return ok("store", f"{site.to} answers, and this user may look into it")


def _held_fix(url: str, text: str) -> str:
    """Return the command that mends what a store holds us up for."""
    if not _is_bucket(url):
        return "env | grep -E 'AWS_|GOOGLE_|AZURE_'   # as the daemon's user"
    if "no such bucket" in text:
        return f"hf buckets create {'/'.join(url.split('/')[3:5])} --private   # or ranklogd --create-bucket private"
    return "hf auth login"


def _token_path(site: Site) -> Path:
    home = Path(site.env.get("HF_HOME") or f"{site.env.get('HOME', '/')}/.cache/huggingface")
    return site.config.token_file or Path(site.env.get("HF_TOKEN_PATH") or home / "token")


def check_token(site: Site) -> Iterator[Finding]:
    """Whether there is a token, if the store wants one. It is not read here, and never shown."""
    if not _is_bucket(site.to):
        return
    path, named = _token_path(site), site.config.token_file is not None
    if named and not path.is_file():
        yield problem("token", f"token_file {path} is not there", f"install -m 0600 /dev/stdin {path}   # and paste it")
        return
    if named and not os.access(path, os.R_OK):
        yield problem(
            "token", f"{path} cannot be read by user {site.settings.uid}", f"chown {site.settings.uid} {path}"
        )
        return
    if site.env.get("HF_TOKEN") and not named:
        text = "HF_TOKEN is set: it works, and whoever may read this process's environment has it. A file is better"
        yield note("token", text, "hf auth login; unset HF_TOKEN")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        if not site.env.get("HF_TOKEN"):
            yield problem("token", f"no token: neither HF_TOKEN nor {path}", "hf auth login")
        return
    if mode & 0o077:
        yield problem("token", f"{path} can be read by others (mode {mode:04o})", f"chmod 0600 {path}")
    else:
        yield ok("token", f"{path} is there, and only its owner may read it")


def check_waiting(site: Site) -> Iterator[Finding]:
    """Journals and spools of writers that are gone, and files that will not be taken over."""
    dirs = adoption_dirs(site.settings)
    waiting = len(waiting_writers(dirs))
    offline = site.snapshot.get("offline_waiting") or 0
    stuck = site.snapshot.get("adoption_stuck") or 0
    if offline:
        yield note("waiting", f"{_count(offline, 'writer')} in offline mode on this node", _SYNC)
    if stuck:
        text = f"files of {_count(stuck, 'dead writer')} wait for room"
        yield warning("waiting", text, "ranklog status")
    if waiting and site.pong is None:
        yield warning(
            "waiting", f"{_count(waiting, 'writer')} left records here that no daemon has taken; they are safe", _SYNC
        )
    elif not waiting:
        yield ok("waiting", "no journal or spool waits for a daemon")
    elif waiting > offline + stuck:
        yield note("waiting", f"{_count(waiting - offline - stuck, 'writer')} being brought in by the daemon", _SYNC)
    told = site.snapshot.get("adoption_refused") or {}
    refused = dict(told) if isinstance(told, dict) and site.pong else dict(_planted(dirs))
    for path, why in list(refused.items())[:SHOWN_MAX]:
        fix = "pip install --upgrade ranklog" if "upgrade ranklog" in why else f"ls -l {path}"
        yield warning("waiting", f"left alone: {path} ({why})", fix)
    if len(refused) > SHOWN_MAX:
        yield warning("waiting", f"left alone: {len(refused) - SHOWN_MAX} more files", "ranklog status --json")


def _planted(dirs: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) of files that are named like a writer's and that no daemon would open."""
    for directory in dirs:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names[:COUNTED_MAX]:
            if parse_name(name) is None:
                continue
            try:
                os.close(fs.open_untrusted(directory / name))
            except FileNotFoundError:
                continue
            except OSError as exc:
                yield str(directory / name), exc.strerror or str(exc)


def check_evidence(site: Site) -> Iterator[Finding]:
    """What was set aside for a person: damaged bytes, and shards that the store refused for good."""
    for room, what, fix in (
        (site.state.quarantine, "bytes that could not be read, kept with the reasons", "ranklog fsck status"),
        (
            site.state.deadletter,
            "refused by the store for good, kept with the reasons",
            "ranklog requeue",
        ),
    ):
        try:
            count, capped = _files(room)
        except FileNotFoundError:
            continue
        except OSError as exc:
            yield note("evidence", f"{room} cannot be looked into: {exc.strerror}", "sudo ranklog doctor")
            continue
        if count:
            more = " or more" if capped else ""
            yield warning("evidence", f"{_count(count, 'file')}{more} in {room}: {what}", fix)
        else:
            yield ok("evidence", f"{room} is empty")


def _files(room: Path) -> tuple[int, bool]:
    """Return how many files lie below `room`, reasons not counted, and whether that was too many to go on."""
    os.listdir(room)  # `walk` says nothing of a directory that it may not read.
    count = 0
    for _, _, names in os.walk(room):
        count += sum(not name.endswith(".reason") and not name.startswith(".") for name in names)
        if count >= COUNTED_MAX:
            return count, True
    return count, False


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
