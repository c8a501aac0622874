import json

from ranklog.reader.runs import find_shards, summarize_runs
from ranklog.stores import open_store
from shards import EPOCH, STORE_B, records, start, write_shard, writer

A, B, C = writer("a"), writer("b"), writer("c")


def begin(root, writer_id, run, name, **columns):
    rows = start(writer_id, run=run, name=name, **columns) + records(writer_id, [{"loss": 1.0}], run=run, **columns)
    return write_shard(root, rows, store_id=writer_id[:16])


def runs_of(root, *, project=None, run=None):
    return sorted({shard.name.run_id for shard in find_shards(open_store(str(root)), project, run)})


def test_a_run_is_found_by_id_or_by_display_name(tmp_path):
    begin(tmp_path, A, "id-1", "brave-otter")
    begin(tmp_path, B, "id-2", "Calm Heron 🪶")

    assert runs_of(tmp_path, run="id-1") == ["id-1"]
    assert runs_of(tmp_path, run="brave-otter") == ["id-1"]
    assert runs_of(tmp_path, project="proj", run="Calm Heron 🪶") == ["id-2"]
    assert runs_of(tmp_path, project="other", run="brave-otter") == []
    assert runs_of(tmp_path, run="brave") == []


def test_a_display_name_brings_all_shards_of_every_run_that_has_it(tmp_path):
    begin(tmp_path, A, "id-1", "baseline")
    write_shard(tmp_path, records(A, [{"loss": 1.0}], first_seq=50, run="id-1"), store_id=A[:16])
    begin(tmp_path, B, "id-2", "baseline")

    assert len(find_shards(open_store(str(tmp_path)), run="baseline")) == 3


def test_an_id_wins_over_a_display_name(tmp_path):
    begin(tmp_path, A, "same", "other")
    begin(tmp_path, B, "id-2", "same")

    assert runs_of(tmp_path, run="same") == ["same"]


def test_start_rows_that_are_no_json_have_no_name(tmp_path):
    for letter, text in zip("abcd", [None, "{", "[1]", json.dumps({"name": 7})], strict=True):
        rows = start(writer(letter), run=f"run-{letter}")
        rows[0]["text"] = text
        write_shard(tmp_path, rows)

    assert [summary.name for summary in summarize_runs(open_store(str(tmp_path)))] == [""] * 4


def test_a_summary_counts_records_and_names_ranks(tmp_path):
    begin(tmp_path, A, "id-1", "otter", rank=0)
    begin(tmp_path, B, "id-1", "otter", rank=3, project="proj")
    begin(tmp_path, C, "id-1", "", rank=None)
    write_shard(tmp_path, records(A, [{"a": 1.0, "b": 2.0}], run="id-1", first_seq=2), store_id=A[:16])

    (summary,) = summarize_runs(open_store(str(tmp_path)), "proj")

    assert (summary.project, summary.run, summary.name, summary.ranks) == ("proj", "id-1", "otter", [0, 3])
    assert (summary.writers, summary.records, summary.rows, summary.shards) == (3, 7, 8, 4)
    epoch_us = int(EPOCH.timestamp()) * 1_000_000
    assert (summary.first_ts_us, summary.last_ts_us) == (epoch_us, epoch_us + 2_000_000)
    assert summary.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))


def test_a_record_that_two_daemons_stored_is_counted_once(tmp_path):
    rows = start(A) + records(A, [{"loss": 1.0}] * 4)
    write_shard(tmp_path, rows)
    write_shard(tmp_path, rows[2:], store_id=STORE_B)

    (summary,) = summarize_runs(open_store(str(tmp_path)))

    assert (summary.records, summary.rows) == (5, 8)


def test_the_latest_run_comes_last(tmp_path):
    write_shard(tmp_path, records(A, [{"loss": 1.0}], first_seq=100, run="a-late"))
    write_shard(tmp_path, records(B, [{"loss": 1.0}], first_seq=1, run="b-early"))

    assert [summary.run for summary in summarize_runs(open_store(str(tmp_path)))] == ["b-early", "a-late"]
