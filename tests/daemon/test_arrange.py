from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ranklog.frame import Kind
from ranklog.schema import KIND_NAMES
from ranklogd.ship.arrange import Cut, Table
from ranklogd.ship.decode import Record
from ranklogd.ship.source import Source
from ranklogd.ship.walk import Portion


def record(seq: int, values: dict[str, float], *, step: int | None = 0, kind: int = Kind.METRICS) -> Record:
    return Record(kind, seq, seq, 10 * seq, step, tuple(values), list(values.values()), None, 0)


def source(writer: str = "a", run: str = "r", rank: int | None = 0, attempt: int = 0) -> Source:
    return Source(writer, "p", run, rank, None, "n", attempt)


def cut_of(*portions: tuple[Source, list[Record]]) -> Cut:
    cut, lsn = Cut(), 1
    for whose, records in portions:
        values = sum(len(item.keys) for item in records)
        cut.add(Portion(whose, lsn - records[0].seq, lsn, 7, 1000, records, values, values))
        lsn += len(records)
    return cut


def rows(table: Table) -> Iterator[tuple[str, str, int | None, int | None, int, int, float]]:
    """(kind, key, rank, step, seq, lsn, value) in stored order."""
    columns = table.records
    for place, name, value in zip(table.record, table.name, table.value, strict=True):
        kind, key = table.names[name]
        rank = table.sources[table.source_codes[columns.source[place]]].rank
        step = int(columns.step[place]) if columns.stepped[place] else None
        yield KIND_NAMES[kind], key, rank, step, int(columns.seq[place]), int(columns.lsn[place]), float(value)


def order(row: tuple[str, str, int | None, int | None, int, int, float]) -> tuple[object, ...]:
    kind, key, rank, step, seq, lsn, _ = row
    return kind, key.encode(), (rank is not None, rank), (step is not None, step), seq, lsn


def test_rows_are_sorted_by_kind_key_rank_step_and_seq():
    cut = cut_of(
        (source("a", rank=1), [record(5, {"b": 1.0, "a": 2.0}, step=9), record(6, {"a": 3.0}, step=2)]),
        (source("b", rank=0), [record(1, {"c": 4.0, "b": 5.0}, step=9)]),
        (source("c", rank=None), [record(3, {"a": 6.0}, step=None, kind=Kind.CONFIG)]),
        (source("a", rank=1), [record(7, {"a": 7.0}, step=None)]),
    )
    (table,) = cut.tables()
    assert list(rows(table)) == [
        ("config", "a", None, None, 3, 4, 6.0),
        ("metrics", "a", 1, None, 7, 5, 7.0),
        ("metrics", "a", 1, 2, 6, 2, 3.0),
        ("metrics", "a", 1, 9, 5, 1, 2.0),
        ("metrics", "b", 0, 9, 1, 3, 5.0),
        ("metrics", "b", 1, 9, 5, 1, 1.0),
        ("metrics", "c", 0, 9, 1, 3, 4.0),
    ]
    assert table.writers == {"a": (5, 7), "b": (1, 1), "c": (3, 3)}
    assert (table.first_lsn, table.last_lsn) == (1, 5)


def test_each_run_has_its_own_names_writers_and_lsn_range():
    cut = cut_of(
        (source("a", "r1"), [record(1, {"x": 1.0})]),
        (source("b", "r2"), [record(1, {"secret": 2.0}), record(2, {"x": 3.0})]),
        (source("a", "r1"), [record(2, {"x": 4.0})]),
    )
    one, two = cut.tables()
    assert (one.run, [name for _, name in one.names], one.writers, one.first_lsn, one.last_lsn) == (
        "r1", ["x"], {"a": (1, 2)}, 1, 4,
    )  # fmt: skip
    assert (two.run, [name for _, name in two.names], two.writers, two.first_lsn, two.last_lsn) == (
        "r2", ["secret", "x"], {"b": (1, 2)}, 2, 3,
    )  # fmt: skip


def test_two_attempts_of_one_writer_are_one_range_of_seqs():
    cut = cut_of(
        (source("a", attempt=0), [record(1, {"x": 1.0})]),
        (source("a", attempt=1), [record(2, {"x": 1.0})]),
    )
    (table,) = cut.tables()
    assert len(table.sources) == 2
    assert table.writers == {"a": (1, 2)}


def test_an_empty_cut_has_no_tables():
    assert list(Cut().tables()) == []


def test_more_names_than_fit_16_bits_are_sorted_all_the_same():
    cut = cut_of((source(), [record(seq, {f"k{seq:06}": float(seq)}) for seq in range(70_000, 0, -1)]))
    (table,) = cut.tables()
    assert np.array_equal(table.value, np.arange(1.0, 70_001.0))
    assert cut.values == cut.records == cut.names == 70_000


_keys = st.sampled_from(["", "a", "b", "Z", "é", "\U0001f600", "\uffee"])
_records = st.lists(
    st.tuples(
        st.sampled_from(["w1", "w2", "w3"]),
        st.sampled_from([Kind.METRICS, Kind.SYSTEM]),
        st.dictionaries(_keys, st.floats(allow_nan=False), min_size=1),
        st.none() | st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 2),
    ),
    min_size=1,
    max_size=40,
)


@given(_records)
def test_every_value_is_there_once_and_in_order(items):
    owners = {"w1": source("w1", rank=0), "w2": source("w2", rank=None), "w3": source("w3", "other", rank=-1)}
    seqs = dict.fromkeys(owners, 0)
    portions, expected = [], set()
    for lsn, (writer, kind, values, step) in enumerate(items, 1):
        seqs[writer] += 1
        owner, seq = owners[writer], seqs[writer]
        portions.append((owner, [record(seq, values, step=step, kind=kind)]))
        for key, value in values.items():
            expected.add((owner.run, KIND_NAMES[kind], key, owner.rank, step, seq, lsn, value))
    tables = list(cut_of(*portions).tables())
    found = [(table.run, *row) for table in tables for row in rows(table)]
    assert len(found) == len(expected)
    assert set(found) == expected
    for table in tables:
        stored = list(rows(table))
        assert stored == sorted(stored, key=order)
