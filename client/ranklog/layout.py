"""Object keys: where a shard lies in the store and what its name says. Pure.

    v1/project_id=<slug>/run_id=<slug>/<node>.<store_id>.<first_lsn>-<last_lsn>.<sha256[:12]>.parquet

Slugs match `[a-z][a-z0-9-]*`, so no reader takes one for a number and no store stumbles over one; the true names are
columns of the file, and the path's column names differ from the file's, which several readers require. A name that
matches is its own slug; any other gets a hash at its end, and so does one that only looks as if it had got a hash,
so that nobody can name a project into another's directory. `lsn`s are 16 hex digits, so names sort by age. A daemon
(store_id) owns its names: nobody else can choose the same one.

Containment rule: a reader ignores a shard whose lsn range lies properly inside another's of the same run, node and
store_id. That makes a merged shard replace its parts at the moment it appears, without a manifest.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, NewType

Lsn = NewType("Lsn", int)
"""A daemon's WAL position: counts records, from 1; never reused within one store_id."""

ROOT = "v1"
_SLUG_SIZE_MAX = 64
_SLUG = re.compile(r"[a-z][a-z0-9-]{0,63}")
_HASHED = re.compile(r".*-[0-9a-f]{10}")
_KEY = re.compile(
    r"v1/project_id=(?P<project>[a-z][a-z0-9-]*)/run_id=(?P<run>[a-z][a-z0-9-]*)/"
    r"(?P<node>[a-z][a-z0-9-]*)\.(?P<store>[0-9a-f]{16})\.(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16})\."
    r"(?P<sha>[0-9a-f]{12})\.parquet"
)


class ShardKey(NamedTuple):
    """What one shard's name says: whose rows it holds, and which of the daemon's lsns they came from."""

    project_id: str
    run_id: str
    node: str
    store_id: str
    first_lsn: Lsn
    last_lsn: Lsn
    sha256: str
    """First 12 hex digits of the file's SHA-256: other bytes get another name."""


def slug(name: str) -> str:
    """Return a path-safe stand-in for `name`: itself if it is one already, else readable text plus a hash.

    Takes true names only: the slug of a slug is another one.
    """
    if _SLUG.fullmatch(name) and not _HASHED.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()[:256]).strip("-")
    if not text or not text[0].isalpha():
        text = f"x-{text}".rstrip("-")
    return f"{text[: _SLUG_SIZE_MAX - 11].rstrip('-')}-{digest}"


def run_prefix(project: str, run: str) -> str:
    """Return the prefix under which every shard of that run lies; takes true names, ends with a slash."""
    return f"{ROOT}/project_id={slug(project)}/run_id={slug(run)}/"


def project_prefix(project: str) -> str:
    """Return the prefix of every run of that project; takes the true name, ends with a slash."""
    return f"{ROOT}/project_id={slug(project)}/"


def format_key(key: ShardKey) -> str:
    """Return the object key; the inverse of `parse_key`."""
    return (
        f"{ROOT}/project_id={key.project_id}/run_id={key.run_id}/"
        f"{key.node}.{key.store_id}.{key.first_lsn:016x}-{key.last_lsn:016x}.{key.sha256}.parquet"
    )


def parse_key(path: str) -> ShardKey | None:
    """Return what the name says, or None for a path this grammar does not own; listings skip those."""
    match = _KEY.fullmatch(path)
    if match is None:
        return None
    first, last = int(match["first"], 16), int(match["last"], 16)
    if first > last:
        return None
    return ShardKey(match["project"], match["run"], match["node"], match["store"], Lsn(first), Lsn(last), match["sha"])


def visible(keys: Iterable[ShardKey]) -> list[ShardKey]:
    """Return the keys a reader must read, by the containment rule, sorted by run, node, store and lsn."""
    groups: dict[tuple[str, str, str, str], list[ShardKey]] = defaultdict(list)
    for key in keys:
        groups[key[:4]].append(key)
    chosen: list[ShardKey] = []
    for _, group in sorted(groups.items()):
        # Widest first among equal starts: whatever begins later and ends no later is then contained.
        reach: ShardKey | None = None
        for key in sorted(group, key=lambda k: (k.first_lsn, -k.last_lsn, k.sha256)):
            if reach is not None and key.last_lsn <= reach.last_lsn and key[4:6] != reach[4:6]:
                continue
            chosen.append(key)
            if reach is None or key.last_lsn > reach.last_lsn:
                reach = key
    return chosen
