"""Who is missing? Compares the calls of `log()` that returned with the rows in the store, read by plain DuckDB.

A trainer that calls nothing but `log()` uses seq 1 for its first record, so call number i is seq i. A seq that lies
in a gap row is lost, but not silently. Doubled means: two rows of one (writer, seq, key) in all shards together.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import duckdb


@dataclass(frozen=True)
class Account:
    """What the store says of one run."""

    records: int
    """Distinct metric records."""
    rows: int
    """Their rows; twelve for each record of the usual load."""
    doubled: int
    """Rows too many."""
    in_gaps: int
    """Seqs that a gap row accounts for."""
    missing: int
    """Calls that returned, and neither a record nor a gap is there."""
    size_bytes: int
    shards: int


def account(store: Path, returned: dict[int, int], run: str = "bench-run") -> Account:
    """Compare the store with `returned`: for each rank the number of calls of `log()` that returned."""
    files = [str(path) for path in store.rglob("*.parquet")]
    sizes = sum(Path(file).stat().st_size for file in files)
    if not files:
        return Account(0, 0, 0, 0, sum(returned.values()), 0, 0)
    con = duckdb.connect()
    con.execute(
        "CREATE VIEW r AS SELECT * FROM read_parquet(?::VARCHAR[], hive_partitioning = false)".replace(
            "?::VARCHAR[]", _list(files)
        )
    )
    metrics = f"FROM r WHERE run = '{run}' AND kind = 'metrics'"
    rows, distinct_rows = con.execute(f"SELECT count(*), count(DISTINCT (writer, seq, key)) {metrics}").fetchone() or (
        0,
        0,
    )
    records = (con.execute(f"SELECT count(DISTINCT (writer, seq)) {metrics}").fetchone() or (0,))[0]
    in_gaps = missing = 0
    gaps: dict[int, set[int]] = {}
    for rank, text in con.execute(f"SELECT rank, text FROM r WHERE run = '{run}' AND kind = 'gap'").fetchall():
        gap = json.loads(text)
        gaps.setdefault(rank, set()).update(range(gap["first"], gap["last"] + 1))
    for rank, count in returned.items():
        there = {seq for (seq,) in con.execute(f"SELECT DISTINCT seq {metrics} AND rank = {rank}").fetchall()}
        absent = set(range(1, count + 1)) - there
        in_gaps += len(absent & gaps.get(rank, set()))
        missing += len(absent - gaps.get(rank, set()))
    con.close()
    return Account(records, rows, rows - distinct_rows, in_gaps, missing, sizes, len(files))


def _list(files: list[str]) -> str:
    return "[" + ", ".join("'" + file.replace("'", "''") + "'" for file in files) + "]"
