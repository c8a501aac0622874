"""One run's sorted table to the bytes and the key of one parquet object. Pure.

What a reader meets: the schema of `ranklog.schema`, plain strings, no Arrow metadata. How it is stored:

    string columns                      dictionary; built from codes, so no string is hashed or copied once a row
    value                               BYTE_STREAM_SPLIT: mantissa bytes do not compress, but exponents do
    seq, lsn, rank, step, recv_ts, …    DELTA_BINARY_PACKED: almost free where they count or repeat
    ts                                  DELTA_BINARY_PACKED, but plain in a small shard: there zstd finds each key's
                                        copy of the same timestamps again, which a delta's bit packing hides
    row groups of 128k rows, zstd, statistics, page index: one series is read without its neighbours

Arrow arrays are made from numpy's buffers throughout: `pa.array` copies, and imports pandas where it is installed.

The same table gives the same bytes, so a conversion that is done again gives the same key.
"""

import hashlib
import json
from collections.abc import Sequence
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
    ts_plain = table.record_count <= TS_PLAIN_RECORDS_MAX
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
        writer.add_key_value_metadata(
            {
                "ranklog.format": FORMAT,
                "ranklog.segment": json.dumps([table.first_lsn, table.last_lsn]),
                "ranklog.writers": json.dumps(table.writers),
            }
        )
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()[:12]
    key = ShardKey(slug(table.project), slug(table.run), slug(node), store_id, table.first_lsn, table.last_lsn, digest)
    return Shard(key, data, rows)


def _row_group(table: Table, rows: slice) -> pa.Table:
    record, name = table.record[rows], table.name[rows]
    columns, sources = table.records, table.sources
    source = table.source_codes[columns.source[record]]
    # Names are sorted, so those of one row group are a range of all names: no group carries another's dictionary.
    base, names = int(name[0]), table.names[int(name[0]) : int(name[-1]) + 1]
    kinds = np.array([kind for kind, _ in names], np.int32)[name - base]
    uid = columns.uid[record]
    value, text = _typed(table, rows)
    arrays = {
        "project": _constant(table.project, len(record)),
        "run": _constant(table.run, len(record)),
        "writer": _told([item.writer for item in sources], source),
        "seq": _numbers("seq", columns.seq[record]),
        "lsn": _numbers("lsn", columns.lsn[record]),
        "rank": _counted("rank", [item.rank for item in sources], source),
        "role": _told([item.role for item in sources], source),
        "node": _told([item.node for item in sources], source),
        "attempt": _counted("attempt", [item.attempt for item in sources], source),
        "uid": _numbers("uid", uid, there=uid != -1),
        "step": _numbers("step", columns.step[record], there=columns.stepped[record] != 0),
        "ts": _numbers("ts", columns.wall_us[record]),
        "recv_ts": _numbers("recv_ts", columns.recv_us[record]),
        "kind": _codes(kinds, KIND_NAMES),
        "key": _codes((name - base).astype(np.int32), [key for _, key in names]),
        "value": value,
        "text": text,
    }
    return pa.Table.from_arrays(list(arrays.values()), schema=_FILE_SCHEMA)


def _typed(table: Table, rows: slice) -> tuple[Any, Any]:
    """Return the value and the text column of a range of rows; exactly one of them is there, or neither."""
    value, slots = table.value[rows], table.text[rows]
    told = slots >= 0
    if not told.any():
        return _numbers("value", value), pa.nulls(len(value), pa.string())
    texts = [table.texts[slot] for slot in slots[told].tolist()]
    there = told.copy()
    there[told] = [text is not None for text in texts]
    return _numbers("value", value, ~told), _strings([text for text in texts if text is not None], there)


def _numbers(name: str, values: npt.NDArray[Any], there: npt.NDArray[np.bool_] | None = None) -> Any:
    """Return a column of numbers, null where they are not `there`; NaN is a value like any other."""
    return _array(SCHEMA.field(name).type, values, there)


def _strings(texts: Sequence[str], there: npt.NDArray[np.bool_] | None = None) -> Any:
    """Return a string column of `texts`, at the rows that are `there` if these are given, null elsewhere."""
    parts = [text.encode() for text in texts]
    there = np.ones(len(parts), np.bool_) if there is None else there
    offsets = np.zeros(len(there) + 1, np.int32)
    offsets[1:][there] = [len(part) for part in parts]
    np.cumsum(offsets, out=offsets)
    buffers = [None if there.all() else _bits(there), pa.py_buffer(offsets), pa.py_buffer(b"".join(parts))]
    return pa.Array.from_buffers(pa.string(), len(there), buffers)


def _bits(there: npt.NDArray[np.bool_]) -> Any:
    return pa.py_buffer(np.packbits(there, bitorder="little"))


def _array(kind: Any, values: npt.NDArray[Any], there: npt.NDArray[np.bool_] | None) -> Any:
    assert values.itemsize * 8 == kind.bit_width, (kind, values.dtype)
    validity = None if there is None or there.all() else _bits(there)
    return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(np.ascontiguousarray(values))])


def _constant(text: str, rows: int) -> Any:
    return _codes(np.zeros(rows, np.int32), [text])


def _told(texts: Sequence[str | None], source: npt.NDArray[Any]) -> Any:
    """Return the column of a text of writers; equal texts share a code, and None is null."""
    known: dict[str, int] = {}
    codes = np.array([-1 if text is None else known.setdefault(text, len(known)) for text in texts], np.int32)[source]
    return _codes(codes, list(known))


def _counted(name: str, counts: Sequence[int | None], source: npt.NDArray[Any]) -> Any:
    """Return the column of a count of writers; None is null."""
    there = np.array([count is not None for count in counts])[source]
    return _numbers(name, np.array([count or 0 for count in counts], np.int32)[source], there)


def _codes(codes: npt.NDArray[Any], texts: Sequence[str]) -> Any:
    """Return a column of texts by their codes; -1 is null."""
    return pa.DictionaryArray.from_arrays(_array(pa.int32(), codes, codes >= 0), _strings(texts))
