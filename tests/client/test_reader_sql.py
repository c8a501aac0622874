import math
import random
import re

import duckdb
import pytest

from ranklog.errors import FormatError, UsageError
from ranklog.reader.listing import list_shards
from ranklog.reader.sql import METRICS_COLUMNS, connect, quote, split
from ranklog.schema import SCHEMA
from ranklog.stores import open_store
from shards import EPOCH, STORE_A, STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")


def select(root, statement, **which):
    with connect(str(root), **which) as con:
        return con.sql(statement).fetchall()


def test_an_empty_store_gives_empty_views_with_the_right_columns(tmp_path):
    with connect(str(tmp_path / "nothing here")) as con:
        table = con.sql("SELECT * FROM records").to_arrow_table()
        assert table.num_rows == 0
        assert table.cast(SCHEMA).schema == SCHEMA
        assert con.sql("SELECT * FROM metrics").columns == list(METRICS_COLUMNS)


def test_the_columns_are_those_of_the_schema_and_none_of_the_path(tmp_path):
    write_shard(tmp_path, records(A, [{"loss": 1.0}]))
    with connect(str(tmp_path)) as con:
        assert con.sql("SELECT * FROM records").to_arrow_table().cast(SCHEMA).schema == SCHEMA
        assert con.sql("SELECT * FROM metrics").columns == list(METRICS_COLUMNS)


def test_metrics_are_the_rows_of_that_kind_only(tmp_path):
    write_shard(
        tmp_path, start(A) + records(A, [{"loss": 1.0}]) + records(A, [{"cpu": 9.0}], first_seq=2, kind="system")
    )
    assert select(tmp_path, "SELECT key, value FROM metrics") == [("loss", 1.0)]
    assert select(tmp_path, "SELECT count(*) FROM records") == [(3,)]


def test_records_that_two_daemons_stored_appear_once_with_the_lowest_lsn(tmp_path):
    values = [{"loss": float(seq), "acc": seq / 10} for seq in range(1, 21)]
    write_shard(tmp_path, records(A, values[:12], first_lsn=101), store_id=STORE_A)
    write_shard(tmp_path, records(A, values[8:], first_seq=9, first_lsn=1), store_id=STORE_B)

    rows = select(tmp_path, "SELECT seq, key, value, lsn FROM records ORDER BY seq, key")

    assert [(seq, key, value) for seq, key, value, _ in rows] == [
        row for seq in range(1, 21) for row in [(seq, "acc", seq / 10), (seq, "loss", float(seq))]
    ]
    assert {seq: lsn for seq, _, _, lsn in rows} == {seq: seq + 100 if seq < 9 else seq - 8 for seq in range(1, 21)}


def test_two_conversions_of_one_lsn_range_appear_once(tmp_path):
    rows = records(A, [{"loss": float(seq)} for seq in range(10)])
    write_shard(tmp_path, rows)
    write_shard(tmp_path, rows, row_group_rows=3)
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    assert select(tmp_path, "SELECT count(*), count(DISTINCT seq) FROM records") == [(10, 10)]


def test_a_merged_shard_hides_its_parts_even_with_wrong_rows_in_them(tmp_path):
    rows = records(A, [{"loss": 1.0}] * 6)
    write_shard(tmp_path, rows)
    write_shard(tmp_path, [row | {"value": 99.0} for row in rows[:3]])
    assert select(tmp_path, "SELECT DISTINCT value FROM records") == [(1.0,)]


def test_shards_whose_footers_say_nothing_are_deduplicated_too(tmp_path):
    rows = records(A, [{"loss": 1.0}] * 5)
    write_shard(tmp_path, rows, store_id=STORE_A, metadata=False)
    write_shard(tmp_path, rows, store_id=STORE_B, metadata=False)
    assert select(tmp_path, "SELECT count(*) FROM records") == [(5,)]


def test_the_same_seq_of_other_writers_kinds_or_keys_is_another_row(tmp_path):
    rows = records(A, [{"x": 1.0, "y": 1.0}]) + records(A, [{"x": 2.0}], kind="system") + records(B, [{"x": 3.0}])
    write_shard(tmp_path, rows, store_id=STORE_A)
    write_shard(tmp_path, rows, store_id=STORE_B)
    assert select(tmp_path, "SELECT kind, key, value FROM records ORDER BY value, key") == [
        ("metrics", "x", 1.0), ("metrics", "y", 1.0), ("system", "x", 2.0), ("metrics", "x", 3.0),
    ]  # fmt: skip


def test_only_shards_that_may_share_records_pay_for_deduplication(tmp_path):
    first = write_shard(tmp_path, records(A, [{"loss": 1.0}] * 5), store_id=STORE_A)
    ends = write_shard(tmp_path, records(A, [{"loss": 1.0}] * 5, first_seq=6), store_id=STORE_A)
    again = write_shard(tmp_path, records(A, [{"loss": 1.0}] * 5, first_seq=8), store_id=STORE_B)
    other_run = write_shard(tmp_path, records(B, [{"loss": 1.0}] * 5, run="run-2"), store_id=STORE_B)
    store = open_store(str(tmp_path))

    clean, suspect = split(store, list_shards(store))

    assert sorted(clean) == sorted([first, other_run])
    assert sorted(suspect) == sorted([ends, again])
    assert select(tmp_path, "SELECT run, count(*) FROM records GROUP BY 1 ORDER BY 1") == [("run-1", 12), ("run-2", 5)]


@pytest.mark.parametrize("doubled", [False, True])
def test_a_filter_on_key_reaches_the_files(tmp_path, doubled):
    rows = records(A, [{"aa": 1.0, "mm": 2.0, "zz": 3.0}] * 50)
    write_shard(tmp_path, rows, row_group_rows=50)
    if doubled:
        write_shard(tmp_path, rows, row_group_rows=50, store_id=STORE_B)
    with connect(str(tmp_path)) as con:
        plan = con.sql("EXPLAIN SELECT value FROM metrics WHERE key = 'mm'").fetchall()[0][1]
    assert re.search("key ?= ?'mm'", plan.rpartition("READ_PARQUET")[2])
    assert ("WINDOW" in plan.upper()) == doubled


def test_nan_and_infinities_stay_doubles(tmp_path):
    write_shard(tmp_path, records(A, [{"x": math.nan}, {"x": math.inf}, {"x": -math.inf}, {"x": 1e308}]))
    found = [value for (value,) in select(tmp_path, "SELECT value FROM metrics ORDER BY step")]
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf, 1e308]


def test_project_and_run_narrow_the_views(tmp_path):
    for project, run in [("../x", "one"), ("../x", "two"), ("🙂", "one")]:
        write_shard(tmp_path, start(A, project=project, run=run, name=f"name of {run}"))
    everything = "SELECT project, run FROM records ORDER BY ALL"
    assert select(tmp_path, everything, project="../x") == [("../x", "one"), ("../x", "two")]
    assert select(tmp_path, everything, run="one") == [("../x", "one"), ("🙂", "one")]
    assert select(tmp_path, everything, project="🙂", run="name of one") == [("🙂", "one")]
    assert select(tmp_path, everything, project="none") == []


@pytest.mark.parametrize(
    "folder", ["a[1]b", "st*r", "q?", "it's", "{a,b}", "sp ace", "🙂", "back\\slash", "run_id=7", "50%20"]
)
def test_a_store_may_lie_in_a_directory_with_any_name(tmp_path, folder):
    write_shard(tmp_path / folder, records(A, [{"loss": 1.0}]))
    assert select(tmp_path / folder, "SELECT run, value FROM records") == [("run-1", 1.0)]


def test_times_are_in_utc_whatever_the_zone_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    write_shard(tmp_path, records(A, [{"loss": 1.0}], ts=EPOCH))
    assert select(tmp_path, "SELECT ts::VARCHAR FROM records") == [("2026-11-22 12:00:00+00",)]


def test_no_extension_is_ever_fetched(tmp_path):
    with connect(str(tmp_path)) as con:
        settings = con.sql("SELECT value FROM duckdb_settings() WHERE name LIKE 'auto%_known_extensions'").fetchall()
        assert settings == [("false",), ("false",)]


def test_a_damaged_shard_is_named(tmp_path):
    write_shard(tmp_path, records(A, [{"loss": 1.0}]), store_id=STORE_A)
    path = write_shard(tmp_path, records(A, [{"loss": 1.0}]), store_id=STORE_B)
    path.write_bytes(b"PAR1 garbage")
    with pytest.raises(FormatError, match=path.name):
        connect(str(tmp_path))


def test_an_unknown_kind_of_store_is_wrong_usage():
    with pytest.raises(UsageError, match="ftp"):
        connect("ftp://host/x")


def test_quotes_in_names_end_no_literal():
    text = "it's; DROP VIEW records; --"
    assert duckdb.sql(f"SELECT {quote(text)}").fetchall() == [(text,)]


def test_random_overlaps_of_daemons_and_merges_give_each_record_once(tmp_path):
    dice = random.Random(7)
    truth = {}
    for round_number in range(15):
        root = tmp_path / str(round_number)
        truth.clear()
        for letter in "ab":
            for seq in range(1, 30):
                truth[writer(letter), seq] = dice.random()
        for store_id in (STORE_A, STORE_B):
            for letter in "ab":
                seq, lsn = dice.randint(1, 10), dice.randint(1, 50)
                parts = []
                while seq < 30:
                    count = dice.randint(1, 30 - seq)
                    values = [{"x": truth[writer(letter), seq + i]} for i in range(count)]
                    parts.append(records(writer(letter), values, first_seq=seq, first_lsn=lsn, node=f"node-{letter}"))
                    seq, lsn = seq + count, lsn + count
                for rows in parts:
                    write_shard(root, rows, store_id=store_id)
                cut = dice.randint(1, len(parts))
                write_shard(root, [row for rows in parts[:cut] for row in rows], store_id=store_id)
        stored = {(w, seq) for w, seq, _ in select(root, "SELECT writer, seq, value FROM records")}
        rows = select(root, "SELECT writer, seq, value FROM records")
        assert len(rows) == len(stored)
        assert {(w, seq): value for w, seq, value in rows} == {key: truth[key] for key in stored}
        assert {seq for _, seq in stored} >= set(range(10, 30))
