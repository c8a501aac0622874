"""Shards where they wait and where they went: outbox, dead letters, cache, store; and the quarantine's own order."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ranklog.errors import FormatError
from ranklog.layout import ShardKey, parse_key
from ranklog.reader.footer import read_footer
from ranklog.reader.listing import list_shards
from ranklog.reader.local import local_paths
from ranklog.stores import Store
from ranklogd.repair.finding import TEMPORARY, Finding, Mend, Severity, Step
from ranklogd.repair.wal import aside, names_in
from ranklogd.ship.footers import lsn_range
from ranklogd.statedir import StateDir

REASON = ".reason"


def files_in(directory: Path) -> list[Path]:
    """Return every file below a directory, sorted; none if it is not there."""
    return sorted(Path(room) / name for room, _, names in os.walk(directory) for name in names)


def trouble_of(path: Path, key: ShardKey) -> str:
    """Return what is wrong with a shard that should be `key`; "" if nothing is. Raises FileNotFoundError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(key.sha256):
        return f"its bytes (sha256 {digest[:12]}) are not those that were named ({key.sha256})"
    try:
        read_footer(path)
        told = lsn_range(path)
    except FormatError as exc:
        return str(exc)
    if told != (key.first_lsn, key.last_lsn):
        return f"its name says lsns {key.first_lsn:,}..{key.last_lsn:,}, its footer {told}"
    return ""


def check_outbox(state: StateDir, *, running: bool) -> Iterator[Finding]:
    """Yield what is wrong in outbox/."""
    for name in names_in(state.outbox):
        room = state.outbox / name
        if not room.is_dir():
            if room.exists():
                mend = aside(state, room, f"{room}: no shard; the daemon never looked at it.")
                yield Finding(Severity.WARNING, room, "a file where directories of shards are", "never looks", mend)
        elif name.endswith(".tmp"):
            if not running:
                what = "shards of a conversion that did not end; the segment is still in wal/"
                yield Finding(Severity.NOTE, room, what, "removes them at its next start, and converts again")
        else:
            for path in files_in(room):
                daemon = "puts it aside before it is uploaded: its rows reach no reader"
                yield from _check_shard(path, str(path.relative_to(room)), daemon, None)


def check_cache(state: StateDir) -> Iterator[Finding]:
    """Yield what is wrong in cache/: copies of uploaded shards, so nothing is lost by it."""
    for path in files_in(state.cache):
        mend = aside(state, path, f"{path}: damaged; the store has the verified shard.")
        yield from _check_shard(path, str(path.relative_to(state.cache)), "lets it go after a while", mend)


def check_deadletter(state: StateDir) -> Iterator[Finding]:
    """Yield what is wrong in deadletter/, and that something waits there."""
    for path in files_in(state.deadletter):
        name = path.name
        if name.startswith("."):
            yield from _unfinished(state, path)
            continue
        if name.endswith(REASON):
            if not path.with_name(name.removesuffix(REASON)).exists():
                yield _lone_reason(path)
            continue
        key = str(path.relative_to(state.deadletter))
        found = list(_check_shard(path, key, "never uploads it", None))
        yield from found
        if not found:
            what = "refused by the store for good; ranklog requeue --deadletter brings it back"
            yield Finding(Severity.WARNING, path, what, "keeps it")
        yield from _unexplained(path, "the store's reason was lost.")


def check_quarantine(state: StateDir) -> Iterator[Finding]:
    """Yield what is out of order among the evidence. That there is some is a note: its `.reason` says what was lost."""
    for name in names_in(state.quarantine):
        path = state.quarantine / name
        if name.startswith("."):
            yield from _unfinished(state, path)
        elif name.endswith(REASON):
            if not path.with_name(name.removesuffix(REASON)).exists():
                yield _lone_reason(path)
        else:
            yield Finding(Severity.NOTE, path, f"evidence: {reason_of(path) or 'no reason given'}", "keeps it")
            yield from _unexplained(path, "nobody wrote down why it is here.")


def check_store(store: Store) -> Iterator[Finding]:
    """Yield the shards of a directory store whose bytes are not those their names promise; raises StoreError."""
    shards = list_shards(store)
    for shard, path in zip(shards, local_paths(store, shards), strict=True):
        yield from _check_shard(
            path, shard.key, "never reads it again; readers stop at it until it is moved away", None
        )


def reason_of(path: Path) -> str:
    """Return the first line of the `.reason` beside a file; "" without one."""
    try:
        text = path.with_name(path.name + REASON).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.partition("\n")[0]


def hidden_by(store: Store, key: ShardKey) -> ShardKey | None:
    """Return the shard of the store that makes readers ignore `key`, if there is one; raises StoreError."""
    prefix = f"v1/project_id={key.project_id}/run_id={key.run_id}/"
    for info in store.list(prefix):
        other = parse_key(info.key)
        if other is None or other[:4] != key[:4] or other[4:6] == key[4:6]:
            continue
        if other.first_lsn <= key.first_lsn and key.last_lsn <= other.last_lsn:
            return other
    return None


def _check_shard(path: Path, key: str, daemon: str, mend: Mend | None) -> Iterator[Finding]:
    name = parse_key(key)
    if name is None:
        yield Finding(Severity.WARNING, path, "no name of a shard", daemon, mend)
        return
    try:
        trouble = trouble_of(path, name)
    except FileNotFoundError:
        return
    except OSError as exc:
        trouble = f"it cannot be read: {exc.strerror or exc}"
    if trouble:
        yield Finding(Severity.DAMAGE, path, trouble, daemon, mend)


def _unfinished(state: StateDir, path: Path) -> Iterator[Finding]:
    if not path.name.startswith(TEMPORARY):
        mend = aside(state, path, f"{path}: was being written when its process died.")
        yield Finding(Severity.NOTE, path, "was being written when its process died", "leaves it", mend)


def _lone_reason(path: Path) -> Finding:
    return Finding(Severity.NOTE, path, "the reason for a file that is not here any more", "leaves it")


def _unexplained(path: Path, text: str) -> Iterator[Finding]:
    told = path.with_name(path.name + REASON)
    if not told.exists() and path.exists():
        mend = Mend(Step.EXPLAIN, path, told, f"{path.name}: {text}")
        yield Finding(Severity.NOTE, path, "it has no .reason", "leaves it", mend)
