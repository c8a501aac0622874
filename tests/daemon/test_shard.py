import hashlib
import json
import math
import struct
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranklog.frame import Kind
from ranklog.layout import format_key, parse_key
from ranklog.schema import SCHEMA
from ranklogd.ship.arrange import Cut, Table
from ranklogd.ship.decode import Record
from ranklogd.ship.shard import ROW_GROUP_ROWS, TS_PLAIN_RECORDS_MAX, encode_shard
from ranklogd.ship.source import Source
from ranklogd.ship.walk import Portion
from segments import NODE, STORE_ID, T0_NS

RANK_0 = Source("aa" * 16, "Project ü", "run-1", 0, None, "node-1", 0)
NO_RANK = Source("bb" * 16, "Project ü", "run-1", None, "node metrics", "node-2", 3)


def table_of(*portions: tuple[Source, int | None, list[Record]]) -> Table:
    cut, lsn = Cut(), 11
    for source, uid, records in portions:
        values = sum(len(record.keys) for record in records)
        cut.add(Portion(source, lsn - records[0].seq, lsn, T0_NS // 1000 + lsn, uid, records, values))
        lsn += len(records)
    (table,) = cut.tables()
    return table


def record(
    seq: int, keys: dict[str, float], texts: dict[int, str | None] | None = None, step: int | None = 1
) -> Record:
    return Record(Kind.METRICS, seq, seq, T0_NS // 1000 + seq, step, tuple(keys), list(keys.values()), texts, 0)


def small_table() -> Table:
    return table_of(
        (RANK_0, 1000, [record(5, {"loss": 0.5, "note": 0.0}, {1: '"é"'}), record(6, {"loss": -0.0}, step=-3)]),
        (NO_RANK, None, [record(0, {"": 0.0}, {0: None}, step=None), record(1, {"big": 0.0}, {0: str(1 << 64)})]),
        (RANK_0, 0xFFFF_FFFE, [record(7, {"loss": math.inf}, step=8)]),
    )


EXPECTED = [
    # writer, seq, lsn, rank, role, node, attempt, uid, step, key, value, text
    ("bb" * 16, 0, 13, None, "node metrics", "node-2", 3, None, None, "", None, None),
    ("bb" * 16, 1, 14, None, "node metrics", "node-2", 3, None, 1, "big", None, str(1 << 64)),
    ("aa" * 16, 6, 12, 0, None, "node-1", 0, 1000, -3, "loss", -0.0, None),
    ("aa" * 16, 5, 11, 0, None, "node-1", 0, 1000, 1, "loss", 0.5, None),
    ("aa" * 16, 7, 15, 0, None, "node-1", 0, -2, 8, "loss", math.inf, None),
    ("aa" * 16, 5, 11, 0, None, "node-1", 0, 1000, 1, "note", None, '"é"'),
]
COLUMNS = ("writer", "seq", "lsn", "rank", "role", "node", "attempt", "uid", "step", "key", "value", "text")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    shard = encode_shard(small_table(), NODE, STORE_ID)
    path = tmp_path / "shard.parquet"
    path.write_bytes(memoryview(shard.data))
    return path


def test_pyarrow_reads_the_schema_and_every_cell(written: Path):
    table = pq.ParquetFile(written).read()
    assert table.schema.remove_metadata() == SCHEMA
    assert [tuple(row[name] for name in COLUMNS) for row in table.to_pylist()] == EXPECTED
    assert math.copysign(1, table["value"][2].as_py()) == -1
    assert set(table["project"].to_pylist()) == {"Project ü"}
    assert table["ts"].cast(pa.int64()).to_pylist()[3] == T0_NS // 1000 + 5
    assert table["recv_ts"].cast(pa.int64()).to_pylist()[3] == T0_NS // 1000 + 11


def test_duckdb_reads_plain_types_and_every_cell(written: Path):
    names = ", ".join(COLUMNS)
    found = duckdb.sql(f"SELECT {names} FROM '{written}'")
    assert found.fetchall() == EXPECTED
    assert {str(kind) for kind in duckdb.sql(f"SELECT project, kind, key, text FROM '{written}'").types} == {"VARCHAR"}
    assert str(duckdb.sql(f"SELECT ts FROM '{written}'").types[0]) == "TIMESTAMP WITH TIME ZONE"


def test_polars_reads_plain_types_and_every_cell(written: Path):
    polars = pytest.importorskip("polars", reason='pip install "ranklog[test-all]"')
    frame = polars.read_parquet(written, hive_partitioning=False)
    assert frame.select(COLUMNS).rows() == EXPECTED
    for name in ("project", "run", "writer", "role", "node", "kind", "key", "text"):
        assert frame.schema[name] == polars.String
    assert frame.schema["ts"] == polars.Datetime("us", "UTC")


def test_the_file_holds_no_arrow_metadata_but_what_a_reader_needs(written: Path):
    metadata = pq.read_metadata(written).metadata
    assert sorted(metadata) == [b"ranklog.format", b"ranklog.segment", b"ranklog.writers"]
    assert metadata[b"ranklog.format"] == b"1"
    assert json.loads(metadata[b"ranklog.segment"]) == [11, 15]
    assert json.loads(metadata[b"ranklog.writers"]) == {"aa" * 16: [5, 7], "bb" * 16: [0, 1]}


def test_the_key_says_run_node_store_lsns_and_bytes():
    shard = encode_shard(small_table(), "Node 1!", STORE_ID)
    assert parse_key(format_key(shard.key)) == shard.key
    assert shard.key.project_id.startswith("project-")
    assert shard.key.node.startswith("node-1-")
    assert (shard.key.run_id, shard.key.store_id) == ("run-1", STORE_ID)
    assert (shard.key.first_lsn, shard.key.last_lsn) == (11, 15)
    assert hashlib.sha256(memoryview(shard.data)).hexdigest().startswith(shard.key.sha256)
    assert shard.rows == 6


def test_the_same_table_gives_the_same_bytes():
    assert encode_shard(small_table(), NODE, STORE_ID).key == encode_shard(small_table(), NODE, STORE_ID).key


@pytest.mark.parametrize("bits", [0x7FF8_0000_0000_0001, 0xFFF8_DEAD_BEEF_0001, 0x7FF0_0000_0000_0001, 1, 1 << 63])
def test_a_double_keeps_its_bits_and_nan_is_not_null(bits):
    (value,) = struct.unpack("<d", struct.pack("<Q", bits))
    data = encode_shard(table_of((RANK_0, 0, [record(1, {"x": value, "t": 0.0}, {1: '"a"'})])), NODE, STORE_ID).data
    column = pq.read_table(pa.BufferReader(data))["value"]
    assert column.null_count == 1
    assert column.combine_chunks().buffers()[1].to_pybytes()[8:16] == struct.pack("<Q", bits)


def test_columns_are_encoded_as_the_module_says_and_carry_statistics_and_page_indexes():
    data = encode_shard(small_table(), NODE, STORE_ID).data
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["value"].encodings
    for name in ("seq", "lsn", "step", "recv_ts", "rank"):
        assert "DELTA_BINARY_PACKED" in columns[name].encodings, name
    for name in ("project", "run", "writer", "node", "kind", "key"):
        assert "RLE_DICTIONARY" in columns[name].encodings, name
    for name, column in columns.items():
        assert column.compression == "ZSTD"
        assert column.has_offset_index, name
        assert column.statistics is not None, name
    assert (columns["key"].statistics.min, columns["key"].statistics.max) == ("", "note")


def test_row_groups_hold_128k_rows_and_only_their_own_names():
    count = ROW_GROUP_ROWS // 2 + 10
    keys = [f"metric-{letter}" * 500 for letter in "abc"]
    table = table_of((RANK_0, 0, [record(seq, dict.fromkeys(keys, 1.0), step=seq) for seq in range(count)]))
    data = encode_shard(table, NODE, STORE_ID).data
    file = pq.ParquetFile(pa.BufferReader(data))
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [ROW_GROUP_ROWS, 3 * count - ROW_GROUP_ROWS]
    assert file.read(["key"])["key"].to_pylist() == [key for key in keys for _ in range(count)]
    assert file.metadata.row_group(1).column(14).statistics.min == keys[1]
    sizes = [file.metadata.row_group(i).column(14).total_uncompressed_size for i in range(2)]
    assert max(sizes) < 2 * 4_000 + 2_000, "two names in each"


@pytest.mark.parametrize(("count", "encoding"), [(100, "PLAIN"), (TS_PLAIN_RECORDS_MAX + 1, "DELTA_BINARY_PACKED")])
def test_timestamps_are_plain_only_where_zstd_reaches_the_last_copy(count, encoding):
    table = table_of((RANK_0, 0, [record(seq, {"x": 1.0}) for seq in range(count)]))
    file = pq.ParquetFile(pa.BufferReader(encode_shard(table, NODE, STORE_ID).data))
    assert encoding in file.metadata.row_group(0).column(11).encodings
