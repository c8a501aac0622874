"""Rows in the order in which they arrive: the newest ones now, then those of each new shard. Imports duckdb, pyarrow.

A daemon uploads oldest first, so for each (run, node, store_id) one number is enough to know what was shown: the
highest lsn. A merged shard brings no higher one and is passed over. Only a record that two daemons stored is shown
twice; a reader of the whole store shows it once.

Which shards there are the follower finds by listing, or, between `listen` and `deafen`, from the changes it is told.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from ranklog.errors import StoreError
from ranklog.layout import ShardKey
from ranklog.reader.damage import shard_errors
from ranklog.reader.fetch import fetch_table
from ranklog.reader.listing import RunPath, Shard, prefix_of
from ranklog.reader.local import in_place, local_paths
from ranklog.reader.runs import find_shards
from ranklog.reader.sql import connect_shards
from ranklog.stores import ObjectInfo, Store
from ranklog.stores.base import Changes

COLUMNS = ("project", "run", "rank", "node", "attempt", "step", "ts", "kind", "key", "value", "text", "seq", "writer")

_SELECT = "SELECT {columns} FROM records WHERE {where}"
_ORDER = "ts, project, run, rank, seq, key"


class _Source(NamedTuple):
    """One daemon's shards of one run."""

    run: RunPath
    node: str
    store_id: str

    @classmethod
    def of(cls, name: ShardKey) -> "_Source":
        return cls(RunPath(name.project_id, name.run_id), name.node, name.store_id)


class Follower:
    """Follows one run, or all. Not safe for use by two threads."""

    def __init__(self, store: Store, project: str | None, run: str | None, condition: str) -> None:
        self._store = store
        self._project = project
        self._run = run
        self._condition = condition
        """SQL over the columns: which rows to show."""
        self._shown: dict[_Source, int] = {}
        self._told: dict[str, int] | None = None
        """Key -> size of what there is, kept up to date by what we are told; None: list."""
        self.objects = 0
        """How many the last listing held: what one costs."""
        self.trouble: StoreError | None = None
        """Why some shards that `fresh` found were not read; they are tried again in its next call."""

    def listen(self) -> None:
        """List once; from then on `apply` tells what there is. Raises StoreError."""
        self._told = {info.key: info.size_bytes for info in self._ask(prefix_of(self._project))}

    def apply(self, changes: Changes) -> None:
        """Take in what changed since `listen`."""
        assert self._told is not None
        for change in changes:
            if change.gone:
                self._told.pop(change.key, None)
            else:
                self._told[change.key] = change.size_bytes

    def deafen(self) -> None:
        """Nobody tells any more: list again."""
        self._told = None

    def newest(self, count: int) -> pa.Table:
        """Return the `count` newest rows by the clients' clocks, oldest first; `fresh` goes on behind them.

        Over a network they are looked for in the shards that arrived last, and not further back than needed.
        """
        shards = self._list()
        self._mark(shards)
        if in_place(self._store):
            return self._newest(shards, count)
        depth = 1
        while True:
            last = _last(shards, depth)
            found = self._newest(last, count)
            if found.num_rows >= count or len(last) == len(shards):
                return found
            depth *= 4

    def _newest(self, shards: list[Shard], count: int) -> pa.Table:
        with connect_shards(self._store, shards) as con, shard_errors(self._store, shards):
            rows = f"{self._select(self._condition)} ORDER BY ts DESC LIMIT {count}"
            return fetch_table(con, f"FROM ({rows}) ORDER BY {_ORDER}")

    def fresh(self) -> pa.Table | None:
        """Return the rows that arrived since the last call, oldest first; None if no shard did."""
        groups: dict[_Source, list[Shard]] = {}
        for shard in self._list():
            source = _Source.of(shard.name)
            if shard.name.last_lsn > self._shown.get(source, -1):
                groups.setdefault(source, []).append(shard)
        self.trouble = None
        tables = []
        if len(groups) > 1:
            self._prefetch(groups)
        for source, shards in groups.items():
            where = f"({self._condition}) AND lsn > {self._shown.get(source, -1)}"
            try:
                with connect_shards(self._store, shards) as con, shard_errors(self._store, shards):
                    tables.append(fetch_table(con, self._select(where)))
            except StoreError as exc:
                if exc.permanent:
                    raise
                self.trouble = exc  # Perhaps merged into another shard since; the next call finds that one.
                continue
            self._mark(shards)
        if not tables:
            return None
        return pa.concat_tables(tables).sort_by([(column, "ascending") for column in _ORDER.split(", ")])

    def _prefetch(self, groups: dict[_Source, list[Shard]]) -> None:
        """Fetch everything in one go; what that does not bring is each daemon's own trouble."""
        try:
            local_paths(self._store, [shard for shards in groups.values() for shard in shards])
        except StoreError as exc:
            self.trouble = exc

    def _select(self, where: str) -> str:
        return _SELECT.format(columns=", ".join(COLUMNS), where=where)

    def _list(self) -> list[Shard]:
        return find_shards(self._store, self._project, self._run, lister=self._ask)

    def _ask(self, prefix: str) -> Iterable[ObjectInfo]:
        if self._told is not None:
            return [ObjectInfo(key, size) for key, size in sorted(self._told.items()) if key.startswith(prefix)]
        found = list(self._store.list(prefix))
        self.objects = len(found)
        return found

    def _mark(self, shards: list[Shard]) -> None:
        for shard in shards:
            source = _Source.of(shard.name)
            self._shown[source] = max(self._shown.get(source, -1), shard.name.last_lsn)


def _last(shards: list[Shard], depth: int) -> list[Shard]:
    """Return the `depth` last shards of each daemon of each run, in their order."""
    groups: dict[_Source, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(_Source.of(shard.name), []).append(shard)
    return [shard for group in groups.values() for shard in group[-depth:]]
