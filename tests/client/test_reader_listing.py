from ranklog.reader.listing import RunPath, by_run, list_runs, list_shards
from ranklog.stores import open_store
from shards import STORE_A, STORE_B, records, write_shard, writer

A, B = writer("a"), writer("b")


def test_foreign_files_in_the_directory_are_skipped(tmp_path):
    path = write_shard(tmp_path, records(A, [{"loss": 1.0}]))
    folder = path.parent
    (folder / "_run.json").write_text("{}")
    (folder / "notes.parquet").write_bytes(b"not ours")
    (folder / f"copy of {path.name}").write_bytes(path.read_bytes())
    (folder / "media").mkdir()
    (folder / "media" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "v1" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "v2" / folder.relative_to(tmp_path / "v1")).mkdir(parents=True)
    (tmp_path / "v2" / path.relative_to(tmp_path / "v1")).write_bytes(path.read_bytes())

    shards = list_shards(open_store(str(tmp_path)))

    assert [tmp_path / shard.key for shard in shards] == [path]
    assert shards[0].size_bytes == path.stat().st_size


def test_a_directory_that_is_missing_or_empty_has_no_shards(tmp_path):
    assert list_shards(open_store(str(tmp_path))) == []
    assert list_shards(open_store(str(tmp_path / "missing"))) == []
    assert list_runs(open_store(str(tmp_path / "missing"))) == []


def test_a_shard_inside_anothers_lsn_range_is_merged_into_it(tmp_path):
    small = [records(A, [{"loss": float(seq)}], first_seq=seq) for seq in (1, 2, 3)]
    for rows in small:
        write_shard(tmp_path, rows)
    merged = write_shard(tmp_path, [row for rows in small[:2] for row in rows])

    listed = list_shards(open_store(str(tmp_path)))

    assert [shard.name.first_lsn for shard in listed] == [2, 4]
    assert tmp_path / listed[0].key == merged


def test_equal_lsn_ranges_of_other_stores_or_runs_hide_nothing(tmp_path):
    for store_id, run in [(STORE_A, "run-1"), (STORE_B, "run-1"), (STORE_A, "run-2")]:
        write_shard(tmp_path, records(A, [{"loss": 1.0}, {"loss": 2.0}], run=run), store_id=store_id)
        write_shard(tmp_path, records(A, [{"loss": 1.0}], run=run), store_id=store_id)

    assert len(list_shards(open_store(str(tmp_path)))) == 3


def test_true_names_choose_runs_whatever_they_hold(tmp_path):
    names = ["../x", "../../etc", "🙂", "", "a/b", "x" * 500, "run-1", "Run 1", "*", "CON", "a\nb"]
    for project in names:
        write_shard(tmp_path / "store", records(A, [{"loss": 1.0}], project=project, run=project))
    store = open_store(str(tmp_path / "store"))

    assert len(list_runs(store)) == len(names)
    for name in names:
        (shard,) = list_shards(store, project=name)
        assert list_shards(store, run=name) == [shard]
        assert list_shards(store, name, name) == [shard]
        assert list_shards(store, name, "other") == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_shards_are_grouped_by_run_in_order(tmp_path):
    for run in ("run-b", "run-a"):
        write_shard(tmp_path, records(A, [{"loss": 1.0}], run=run))
        write_shard(tmp_path, records(B, [{"loss": 1.0}], run=run, first_seq=5))

    groups = by_run(list_shards(open_store(str(tmp_path))))

    assert list(groups) == [RunPath("proj", "run-a"), RunPath("proj", "run-b")]
    assert [shard.name.first_lsn for shard in groups[RunPath("proj", "run-a")]] == [2, 6]
