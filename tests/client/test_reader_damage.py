import hashlib
import io

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranklog.errors import FormatError, RanklogError, StoreError
from ranklog.reader import read
from ranklog.reader.damage import damaged_shards, shard_errors
from ranklog.reader.listing import list_shards
from ranklog.reader.sql import connect_shards
from ranklog.stores import open_store
from shards import STORE_A, STORE_B, records, write_shard, writer

A, B = writer("a"), writer("b")


@pytest.fixture
def store(tmp_path):
    for letter, store_id in (("a", STORE_A), ("b", STORE_B)):
        write_shard(tmp_path, records(writer(letter), [{"x": step / 7} for step in range(1000)]), store_id=store_id)
    return open_store(str(tmp_path))


def test_whole_shards_have_the_bytes_their_names_promise(store):
    assert damaged_shards(store, list_shards(store)) == []


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1])
def test_a_cut_shard_is_found_by_its_name(store, keep):
    shards = list_shards(store)
    path = store.root / shards[1].key
    path.write_bytes(path.read_bytes()[:keep])
    assert damaged_shards(store, shards) == [shards[1]]


def test_a_read_that_stumbles_over_a_changed_byte_names_the_shard(store):
    shards = list_shards(store)
    path = store.root / shards[0].key
    whole = path.read_bytes()
    told = []
    for offset in range(4, len(whole), 97):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x41]) + whole[offset + 1 :])
        try:
            read(store.url)
        except FormatError as exc:
            told.append(str(exc))
    assert len(told) > 10
    assert all(path.name in text for text in told)


def test_what_is_wrong_with_a_statement_is_not_blamed_on_shards(store):
    shards = list_shards(store)
    with connect_shards(store, shards) as con:
        for statement in ("SELECT key::INT FROM records", "SELECT * FROM nothing", "SELECT error('mine')"):
            with pytest.raises(duckdb.Error), shard_errors(store, shards, users_statement=True):
                con.sql(statement).fetchall()


def test_a_whole_file_with_other_columns_is_an_error_of_ours(tmp_path):
    path = write_shard(tmp_path, records(A, [{"x": 1.0}]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    sha = hashlib.sha256(sink.getvalue()).hexdigest()[:12]
    path.rename(path.with_name(path.name.replace(path.name.split(".")[3], sha))).write_bytes(sink.getvalue())
    with pytest.raises(RanklogError, match="cannot read the shards"):
        read(str(tmp_path))


def test_a_shard_that_is_gone_is_worth_another_try(store):
    shards = list_shards(store)
    (store.root / shards[0].key).unlink()
    with pytest.raises(StoreError, match="try again") as caught:
        connect_shards(store, shards)
    assert not caught.value.permanent
