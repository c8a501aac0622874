import pytest

from ranklog.errors import FormatError
from ranklog.reader.footer import Footer, count_records, parse_writers, read_footer
from shards import EPOCH, records, start, write_shard, writer

A, B = writer("a"), writer("b")


def test_a_footer_tells_names_times_and_rows_without_reading_any(tmp_path):
    rows = start(A, project="../x", run="Run 🙂") + records(A, [{"a": 1.0, "b": 2.0}] * 3, project="../x", run="Run 🙂")

    footer = read_footer(write_shard(tmp_path, rows, row_group_rows=2))

    assert (footer.project, footer.run, footer.rows) == ("../x", "Run 🙂", 7)
    assert footer.first_ts_us == int(EPOCH.timestamp()) * 1_000_000
    assert footer.last_ts_us == (int(EPOCH.timestamp()) + 3) * 1_000_000
    assert footer.writers == {A: (0, 3)}


def test_start_rows_are_looked_for_only_where_they_can_be(tmp_path):
    begun = read_footer(write_shard(tmp_path, start(A) + records(A, [{"a": 1.0}] * 4), row_group_rows=2))
    later = read_footer(write_shard(tmp_path, records(A, [{"a": 1.0}], first_seq=9)))

    assert begun.start_groups == (2,)
    assert later.start_groups == ()


def test_other_bytes_under_a_shards_name_are_named_with_the_remedy(tmp_path):
    path = write_shard(tmp_path, records(A, [{"a": 1.0}]))
    path.write_bytes(b"garbage")

    with pytest.raises(FormatError, match=r"no parquet file.*Move it out"):
        read_footer(path)


def test_a_file_that_is_gone_is_not_taken_for_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_footer(tmp_path / "gone.parquet")


@pytest.mark.parametrize(
    "text", [None, b"", b"{", b"[]", b"null", b'{"w": 1}', b'{"w": ["x", 1]}', b'{"w": [1]}', b"\xff"]
)
def test_a_writers_entry_that_makes_no_sense_tells_nothing(text):
    assert parse_writers(text) is None


def footer_of(writers) -> Footer:
    return Footer(0, None, None, None, None, writers, ())


def test_records_in_two_shards_are_counted_once():
    assert count_records([footer_of({A: (0, 9)}), footer_of({A: (5, 14), B: (0, 0)}), footer_of({A: (20, 20)})]) == 17
    assert count_records([footer_of({A: (0, 9)}), footer_of({A: (3, 4)}), footer_of({A: (8, 10)})]) == 11
    assert count_records([]) == 0


def test_records_are_not_guessed_where_a_footer_is_silent():
    assert count_records([footer_of({A: (0, 9)}), footer_of(None)]) is None
