"""One run's sorted table to the bytes and the key of one parquet object. Pure.

What a reader meets: the schema of `ranklog.schema`, plain strings, no Arrow metadata. How it is stored:

    string columns                      dictionary; built from codes, so no string is hashed or copied once a row
    value                               BYTE_STREAM_SPLIT: mantissa bytes do not compress, but exponents do
    seq, lsn, rank, step, recv_ts, …    DELTA_BINARY_PACKED: almost free where they count or repeat
    ts                                  DELTA_BINARY_PACKED, but plain in a small shard: there zstd finds each key's
                                        copy of the same timestamps again, which a delta's bit packing hides
    row groups of 128k rows, zstd, statistics, page index: one series is read without its neighbours

The same table gives the same bytes, so a conversion that is done again gives the same key.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from ranklog.layout import ShardKey, slug
from ranklog.schema import FORMAT, KIND_NAMES, SCHEMA
from ranklogd.ship.arrange import Table

ROW_GROUP_ROWS = 128 << 10
ZSTD_LEVEL = 1
"""Level 3 saves 0.3 % of a shard of random mantissas, which is noise."""
TS_PLAIN_RECORDS_MAX = 8_192
"""Up to here a copy of a shard's timestamps lies within zstd's reach; then plain is 4 % of the file smaller."""

_STRINGS = [field.name for field in SCHEMA if pa.types.is_string(field.type)]
_DELTA = ["seq", "lsn", "rank", "attempt", "uid", "step", "recv_ts"]
_CODES = pa.dictionary(pa.int32(), pa.string())
_TS = SCHEMA.field("ts").type
_FILE_SCHEMA = pa.schema(
    field.with_type(_CODES) if field.name in _STRINGS and field.name != "text" else field for field in SCHEMA
)


class Shard(NamedTuple):
    """One object, not on disk yet."""

    key: ShardKey
    data: Any
    """A buffer."""
    rows: int


def encode_shard(table: Table, node: str, store_id: str) -> Shard:
    """Return the table as parquet, under the name its bytes and lsns give it in the store of daemon `store_id`."""
    sink = pa.BufferOutputStream()
    rows = len(table.record)
    ts_plain = len(np.unique(table.record[: ROW_GROUP_ROWS])) <= TS_PLAIN_RECORDS_MAX
    writer = pq.ParquetWriter(
        sink,
        _FILE_SCHEMA,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=_STRINGS,
        column_encoding={
            "value": "BYTE_STREAM_SPLIT",
            **dict.fromkeys(_DELTA if ts_plain else [*_DELTA, "ts"], "DELTA_BINARY_PACKED"),
        },
        write_page_index=True,
        store_schema=False,
    )
    with writer:
        for start in range(0, rows, ROW_GROUP_ROWS):
            writer.write_table(_row_group(table, slice(start, start + ROW_GROUP_ROWS)))
        writer.add_key_value_metadata({
            "ranklog.format": FORMAT,
            "ranklog.segment": json.dumps([table.first_lsn, table.last_lsn]),
            "ranklog.writers": json.dumps(table.writers),
        })
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()[:12]
    key = ShardKey(
        slug(table.project), slug(table.run), slug(node), store_id, table.first_lsn, table.last_lsn, digest
    )
    return Shard(key, data, rows)


def _row_group(table: Table, rows: slice) -> pa.Table:
    record, name = table.record[rows], table.name[rows]
    columns, sources = table.records, table.sources
    source = columns.source[record]
    # Names are sorted, so those of one row group are a range of all names: no group carries another's dictionary.
    base, names = int(name[0]), table.names[int(name[0]) : int(name[-1]) + 1]
    kinds = np.array([kind for kind, _ in names], np.int32)[name - base]
    value, text = _typed(table, rows)
    arrays = {
        "project": _constant(table.project, len(record)),
        "run": _constant(table.run, len(record)),
        "writer": _of_source([item.writer for item in sources], source),
        "seq": pa.array(columns.seq[record]),
        "lsn": pa.array(columns.lsn[record]),
        "rank": pa.array([item.rank for item in sources], pa.int32()).take(pa.array(source)),
        "role": _of_source([item.role for item in sources], source),
        "node": _of_source([item.node for item in sources], source),
        "attempt": pa.array([item.attempt for item in sources], pa.int32()).take(pa.array(source)),
        "uid": pa.array(columns.uid[record], mask=columns.uid[record] == -1),
        "step": pa.array(columns.step[record], mask=columns.stepless[record]),
        "ts": pa.array(columns.wall_us[record]).view(_TS),
        "recv_ts": pa.array(columns.recv_us[record]).view(_TS),
        "kind": _codes(kinds, list(KIND_NAMES)),
        "key": _codes((name - base).astype(np.int32), [key for _, key in names]),
        "value": value,
        "text": text,
    }
    return pa.table(arrays, schema=_FILE_SCHEMA)


def _typed(table: Table, rows: slice) -> tuple[Any, Any]:
    """Return the value and the text column of a range of rows; exactly one of them is there, or neither."""
    value, slots = table.value[rows], table.text[rows]
    told = slots >= 0
    if not told.any():
        return pa.array(value), pa.nulls(len(value), pa.string())
    used = slots[told]
    texts = pa.array([table.texts[slot] for slot in used.tolist()], pa.string())
    slots = np.zeros(len(value), np.int64)
    slots[told] = np.arange(len(used))
    return pa.array(value, mask=told), texts.take(pa.array(slots, mask=~told))


def _constant(text: str, rows: int) -> Any:
    return _codes(np.zeros(rows, np.int32), [text])


def _of_source(texts: list[str | None], source: npt.NDArray[Any]) -> Any:
    """Return the column of a property of writers; equal texts share a code, and None is null."""
    known = list(dict.fromkeys(text for text in texts if text is not None))
    code = np.array([-1 if text is None else known.index(text) for text in texts], np.int32)[source]
    return _codes(code, known) if code.min() >= 0 else _codes(code, known, mask=code < 0)


def _codes(codes: npt.NDArray[np.int32], texts: list[str], mask: npt.NDArray[np.bool_] | None = None) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=mask), pa.array(texts, pa.string()))
