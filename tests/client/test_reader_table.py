import math
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ranklog
from ranklog.errors import FormatError, UsageError
from ranklog.reader import read
from ranklog.schema import SCHEMA
from shards import EPOCH, STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")


def column(table, name):
    return table.column(name).to_pylist()


def test_the_table_has_exactly_the_schema_even_when_empty(tmp_path):
    assert read(str(tmp_path)).schema == SCHEMA
    write_shard(tmp_path, records(A, [{"loss": 1.0, "note": "hi"}, {}]))
    assert read(str(tmp_path)).schema == SCHEMA
    assert read(str(tmp_path), max_points=4).schema == SCHEMA


def test_ranklog_read_is_the_same_function(tmp_path):
    write_shard(tmp_path, records(A, [{"loss": 1.0}]))
    assert column(ranklog.read(str(tmp_path)), "value") == [1.0]


def test_rows_are_sorted_by_key_rank_step_and_seq(tmp_path):
    for rank, letter in ((1, "b"), (0, "a"), (None, "c")):
        values = [{"b": 1.0, "a": 2.0}] * 3
        write_shard(tmp_path, records(writer(letter), values, rank=rank), store_id=letter * 16)
    write_shard(tmp_path, records(A, [{"a": 2.0}], first_seq=9, first_step=1), store_id="a" * 16)

    table = read(str(tmp_path))

    rows = list(
        zip(column(table, "key"), column(table, "rank"), column(table, "step"), column(table, "seq"), strict=True)
    )
    assert rows[:4] == [("a", 0, 0, 1), ("a", 0, 1, 2), ("a", 0, 1, 9), ("a", 0, 2, 3)]
    assert rows == sorted(rows, key=lambda row: (row[0], row[1] is None, row[1] or 0, *row[2:]))


def test_values_come_back_as_logged(tmp_path):
    logged = [{"x": math.inf}, {"x": -math.inf}, {"x": "text \u0000 🙂"}, {"x": 0.1}, {"x": True}, {"x": math.nan}]
    write_shard(tmp_path, records(A, logged))
    table = read(str(tmp_path))
    values = column(table, "value")
    assert values[:5] == [math.inf, -math.inf, None, 0.1, 1.0]
    assert math.isnan(values[5])
    assert column(table, "text")[2] == '"text \\u0000 \\ud83d\\ude42"'
    assert column(table, "ts")[0] == EPOCH + timedelta(seconds=1)


def test_duplicates_of_two_daemons_are_read_once(tmp_path):
    rows = records(A, [{"loss": float(seq)} for seq in range(10)])
    write_shard(tmp_path, rows)
    write_shard(tmp_path, rows[5:], store_id=STORE_B)
    assert column(read(str(tmp_path)), "value") == [float(seq) for seq in range(10)]


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ("loss", ["loss"]),
        (["loss", "acc"], ["acc", "loss"]),
        ("train/*", ["train/a", "train/b/c"]),
        ("train/?", ["train/a"]),
        ("layer[0]", ["layer[0]"]),
        ("*", ["acc", "it's", "layer[0]", "loss", "train/a", "train/b/c"]),
        ("it's", ["it's"]),
        ("LOSS", []),
        ([], []),
    ],
)
def test_keys_are_exact_names_or_globs(tmp_path, keys, found):
    names = ["loss", "acc", "train/a", "train/b/c", "layer[0]", "it's"]
    write_shard(tmp_path, records(A, [dict.fromkeys(names, 1.0)]))
    assert column(read(str(tmp_path), keys=keys), "key") == found


def test_ranks_and_kinds_choose_rows(tmp_path):
    for rank, letter in enumerate("abc"):
        rows = start(writer(letter), rank=rank) + records(writer(letter), [{"x": 1.0}], rank=rank)
        write_shard(tmp_path, rows, store_id=letter * 16)
    assert column(read(str(tmp_path), ranks=1), "rank") == [1]
    assert column(read(str(tmp_path), ranks=0), "rank") == [0]
    assert column(read(str(tmp_path), ranks=(0, 2)), "rank") == [0, 2]
    assert column(read(str(tmp_path), ranks=[]), "rank") == []
    assert column(read(str(tmp_path), kinds="start"), "kind") == ["start"] * 3
    assert read(str(tmp_path), kinds=("start", "metrics")).num_rows == 6


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(UsageError, match=r"'metric' does not exist.*metrics"):
        read(str(tmp_path), kinds="metric")


def test_a_run_may_be_named_by_its_display_name(tmp_path):
    write_shard(tmp_path, start(A, name="brave otter") + records(A, [{"x": 1.0}]))
    write_shard(tmp_path, records(B, [{"x": 2.0}], run="run-2"))
    assert column(read(str(tmp_path), "proj", "brave otter"), "value") == [1.0]


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path):
    path = write_shard(tmp_path, records(A, [{"x": 1.0}]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=path.name):
        read(str(tmp_path))


def test_fewer_than_four_points_are_refused(tmp_path):
    with pytest.raises(UsageError, match="4 or more"):
        read(str(tmp_path), max_points=3)


def test_a_series_that_is_short_enough_is_not_thinned(tmp_path):
    both = records(A, [{"x": 1.0}] * 5) + records(B, [{"x": 1.0}] * 5, first_lsn=20)
    long = records(writer("c"), [{"x": 1.0}] * 50, first_lsn=100, rank=1)
    write_shard(tmp_path, both + long)
    table = read(str(tmp_path), max_points=10)
    assert column(table, "rank").count(0) == 10
    assert column(table, "rank").count(1) <= 10


def test_thinning_keeps_the_ends_and_a_spike_of_one_step(tmp_path):
    values = [{"x": math.sin(step / 50)} for step in range(1000)]
    values[777], values[333], values[500] = {"x": 50.0}, {"x": -50.0}, {"x": math.nan}
    write_shard(tmp_path, records(A, values))

    table = read(str(tmp_path), max_points=40)

    steps, thinned = column(table, "step"), column(table, "value")
    assert 20 <= table.num_rows <= 40
    assert (steps[0], steps[-1]) == (0, 999)
    assert 50.0 in thinned
    assert -50.0 in thinned
    assert max(after - before for before, after in pairwise(steps)) <= 200


def test_rows_without_a_step_are_thinned_over_time(tmp_path):
    write_shard(
        tmp_path, records(A, [{"x": float(i % 7)} for i in range(200)], first_step=None, kind="system", rank=None)
    )
    table = read(str(tmp_path), max_points=20, kinds="system")
    times = column(table, "ts")
    assert 10 <= table.num_rows <= 20
    assert (min(times), max(times)) == (EPOCH + timedelta(seconds=1), EPOCH + timedelta(seconds=200))


def test_worlds_of_one_run_and_nodes_are_series_of_their_own(tmp_path):
    rows = []
    for number, (letter, columns) in enumerate(
        {
            "a": {"role": ""},
            "b": {"role": "rollout"},
            "c": {"rank": None, "node": "n1"},
            "d": {"rank": None, "node": "n2"},
        }.items()
    ):
        rows.append(
            records(writer(letter), [{"x": float(i)} for i in range(30)], first_lsn=1 + 100 * number, **columns)
        )
    for number, part in enumerate(rows):
        write_shard(tmp_path, part, store_id=f"{number:016x}")
    table = read(str(tmp_path), max_points=8)
    for letter in "abcd":
        kept = [v for v, w in zip(column(table, "value"), column(table, "writer"), strict=True) if w == writer(letter)]
        assert {0.0, 29.0} <= set(kept)
        assert len(kept) <= 8


values = st.one_of(st.none(), st.floats(allow_nan=True), st.sampled_from([0.0, 1.0, -1.0]))
steps = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 30))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(points=st.lists(st.tuples(steps, values), min_size=1, max_size=60), max_points=st.integers(4, 24))
def test_thinning_keeps_first_last_lowest_and_highest_of_any_series(tmp_path_factory, points, max_points):
    root = tmp_path_factory.mktemp("store")
    rows = []
    for seq, (step, value) in enumerate(points, 1):
        rows += records(A, [{"x": value}], first_seq=seq, step=step)
    write_shard(root, rows)

    table = read(str(root), max_points=max_points)

    kept = column(table, "seq")
    assert len(kept) == len(set(kept)) <= max(max_points, 4)
    if len(points) <= max_points:
        assert sorted(kept) == list(range(1, len(points) + 1))
    stepped = all(step is not None for step, _ in points)
    place = [(step if stepped else seq, seq) for seq, (step, _) in enumerate(points, 1)]
    assert {min(place)[1], max(place)[1]} <= set(kept)
    real = [value for _, value in points if value is not None and not math.isnan(value)]
    if real:
        shown = [value for value in column(table, "value") if value is not None and not math.isnan(value)]
        assert (min(shown), max(shown)) == (min(real), max(real))
