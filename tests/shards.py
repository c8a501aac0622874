"""Shards of known records for reader tests: the schema, order, encodings and names of the real ones, written here
from nothing but `ranklog.schema` and `ranklog.layout`, so that a mistake of the converter cannot hide one of a reader.

    rows = records(writer("a"), first_seq=1, values=[{"loss": 0.5}, {"loss": 0.4}])
    write_shard(tmp_path, rows, store_id=STORE_A)
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.layout import Lsn, ShardKey, format_key, slug
from ranklog.schema import FORMAT, SCHEMA

STORE_A, STORE_B = "a" * 16, "b" * 16
EPOCH = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)

_STRINGS = [field.name for field in SCHEMA if field.type == pa.string()]
_DELTA = dict.fromkeys(("step", "seq", "lsn", "ts", "recv_ts"), "DELTA_BINARY_PACKED")

Row = dict[str, Any]


def writer(letter: str) -> str:
    """A writer id of 32 equal hex digits."""
    return letter * 32


def records(
    writer_id: str,
    values: Sequence[dict[str, float | bool | str | None]],
    *,
    first_seq: int = 1,
    first_lsn: int | None = None,
    first_step: int | None = 0,
    kind: str = "metrics",
    **columns: Any,
) -> list[Row]:
    """Rows of consecutive records: one dict of values each. Texts go to `text` as JSON, numbers to `value`.

    lsn is seq + 1 unless `first_lsn` is given; ts is EPOCH plus seq seconds. `columns` replace the defaults below.
    """
    rows = []
    for index, record in enumerate(values):
        seq = first_seq + index
        for key, value in record.items() or [("", None)]:
            number = isinstance(value, bool | int | float)
            rows.append({
                "project": "proj", "run": "run-1", "writer": writer_id, "seq": seq,
                "lsn": (seq + 1 if first_lsn is None else first_lsn + index),
                "rank": 0, "role": "", "node": "node-1", "attempt": 0, "uid": 1000,
                "step": None if first_step is None else first_step + index,
                "ts": EPOCH + timedelta(seconds=seq), "recv_ts": EPOCH + timedelta(seconds=seq, milliseconds=20),
                "kind": kind, "key": key,
                "value": float(value) if number else None,
                "text": None if number or value is None else json.dumps(value),
            } | columns)  # fmt: skip
    return rows


def start(writer_id: str, *, lsn: int = 1, name: str = "", **columns: Any) -> list[Row]:
    """The start row of a writer: seq 0, its text the start payload as JSON."""
    rows = records(writer_id, [{}], first_seq=0, first_lsn=lsn, first_step=None, kind="start", **columns)
    rows[0]["text"] = json.dumps({"writer": writer_id, "name": name})
    return rows


def write_shard(
    root: Path,
    rows: Iterable[Row],
    *,
    store_id: str = STORE_A,
    lsns: tuple[int, int] | None = None,
    row_group_rows: int = 128 * 1024,
    metadata: bool = True,
) -> Path:
    """Write one shard of one run into a directory store and return its path; `lsns` widens the range in its name."""

    def place(row: Row) -> tuple[Any, ...]:
        none_last = [(row[column] is None, row[column] or 0) for column in ("rank", "step")]
        return (row["kind"], row["key"], *none_last, row["seq"])

    ordered = sorted(rows, key=place)
    table = pa.Table.from_pylist(ordered, SCHEMA)
    first, last = lsns or (min(row["lsn"] for row in ordered), max(row["lsn"] for row in ordered))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, SCHEMA, compression="zstd", use_dictionary=_STRINGS, store_schema=False, write_page_index=True,
        column_encoding=_DELTA | {"value": "BYTE_STREAM_SPLIT"},
    ) as file:  # fmt: skip
        file.write_table(table, row_group_size=row_group_rows)
        if metadata:
            # Not as metadata of the Arrow schema: that is dropped along with it.
            file.add_key_value_metadata(_metadata(ordered, first, last))
    contents = sink.getvalue().to_pybytes()
    row = ordered[0]
    name = ShardKey(
        slug(row["project"]), slug(row["run"]), slug(row["node"]), store_id, Lsn(first), Lsn(last),
        hashlib.sha256(contents).hexdigest()[:12],
    )  # fmt: skip
    path = root / format_key(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


def _metadata(rows: Sequence[Row], first_lsn: int, last_lsn: int) -> dict[str, str]:
    seqs: dict[str, list[int]] = {}
    for row in rows:
        seqs.setdefault(row["writer"], []).append(row["seq"])
    return {
        "ranklog.format": FORMAT,
        "ranklog.segment": json.dumps([first_lsn, last_lsn]),
        "ranklog.writers": json.dumps({writer_id: [min(found), max(found)] for writer_id, found in seqs.items()}),
    }
