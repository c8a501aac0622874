"""Rows in the order in which they arrive: the newest ones now, then those of each new shard. Imports duckdb, pyarrow.

A daemon uploads oldest first, so for each (run, node, store_id) one number is enough to know what was shown: the
highest lsn. A merged shard brings no higher one and is passed over. Only a record that two daemons stored is shown
twice; a reader of the whole store shows it once.
"""

from typing import NamedTuple

import pyarrow as pa

from ranklog.errors import StoreError
from ranklog.layout import ShardKey
from ranklog.reader.damage import shard_errors
from ranklog.reader.fetch import fetch_table
from ranklog.reader.listing import RunPath, Shard
from ranklog.reader.runs import find_shards
from ranklog.reader.sql import connect_shards
from ranklog.stores import Store

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

    def newest(self, count: int) -> pa.Table:
        """Return the `count` newest rows by the clients' clocks, oldest first; `fresh` goes on behind them."""
        shards = self._list()
        self._mark(shards)
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
        tables = []
        for source, shards in groups.items():
            where = f"({self._condition}) AND lsn > {self._shown.get(source, -1)}"
            try:
                with connect_shards(self._store, shards) as con, shard_errors(self._store, shards):
                    tables.append(fetch_table(con, self._select(where)))
            except StoreError as exc:
                if exc.permanent:
                    raise
                continue  # Merged into another shard since the listing; the next call finds that one.
            self._mark(shards)
        if not tables:
            return None
        return pa.concat_tables(tables).sort_by([(column, "ascending") for column in _ORDER.split(", ")])

    def _select(self, where: str) -> str:
        return _SELECT.format(columns=", ".join(COLUMNS), where=where)

    def _list(self) -> list[Shard]:
        return find_shards(self._store, self._project, self._run)

    def _mark(self, shards: list[Shard]) -> None:
        for shard in shards:
            source = _Source.of(shard.name)
            self._shown[source] = max(self._shown.get(source, -1), shard.name.last_lsn)
