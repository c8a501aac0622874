"""Which shards a reader must read. Listing by prefix is the only index: no manifest, no cache that could be stale.

A path that the grammar of `ranklog.layout` does not own is somebody else's file and is skipped. A shard whose lsn
range lies properly inside another's of the same run, node and store_id was merged into that one and is skipped too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ranklog.layout import ROOT, ShardKey, format_key, parse_key, project_prefix, run_prefix, slug, visible
from ranklog.stores import ObjectInfo, Store

Lister = Callable[[str], Iterable[ObjectInfo]]
"""What answers a listing by prefix in the place of the store: one who was told of every change since the last."""


class RunPath(NamedTuple):
    """A run as paths spell it; the true names are columns of its shards."""

    project_id: str
    run_id: str


class Shard(NamedTuple):
    """One visible shard of a store."""

    name: ShardKey
    size_bytes: int

    @property
    def key(self) -> str:
        """The object's key in the store."""
        return format_key(self.name)

    @property
    def run(self) -> RunPath:
        """The run it belongs to, as the path spells it."""
        return RunPath(self.name.project_id, self.name.run_id)


def list_shards(
    store: Store, project: str | None = None, run: str | None = None, *, lister: Lister | None = None
) -> list[Shard]:
    """Return the visible shards, sorted by run, node, store_id and lsn; `project` and `run` are true names (ids).

    Empty where nothing matches. Raises StoreError.
    """
    run_id = None if run is None else slug(run)
    sizes: dict[ShardKey, int] = {}
    for found in (lister or store.list)(prefix_of(project, run)):
        name = parse_key(found.key)
        if name is not None and run_id in (None, name.run_id):
            sizes[name] = found.size_bytes
    return [Shard(name, sizes[name]) for name in visible(sizes)]


def prefix_of(project: str | None, run: str | None = None) -> str:
    """Return the prefix below which all shards asked for lie; where only the project is unknown, that of everything."""
    if project is None:
        return f"{ROOT}/"
    return project_prefix(project) if run is None else run_prefix(project, run)


def by_run(shards: Iterable[Shard]) -> dict[RunPath, list[Shard]]:
    """Return the shards grouped by run, in their order."""
    groups: dict[RunPath, list[Shard]] = defaultdict(list)
    for shard in shards:
        groups[shard.run].append(shard)
    return dict(groups)


def list_runs(store: Store) -> list[RunPath]:
    """Return every run of the store that has a shard, sorted; raises StoreError."""
    return list(by_run(list_shards(store)))
