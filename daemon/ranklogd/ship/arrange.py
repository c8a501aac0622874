"""A cut's records to one sorted long table for each run, as numpy arrays. Pure.

Order of rows: (kind, key, rank, step, seq); a missing rank or step comes first, equals stay in lsn order. No string is
sorted but the distinct (kind, key) names themselves:

    1. a record with its tuple of keys is a row of codes, one for each name; equal tuples share it (a "layout")
    2. records, not values, are put into (run, rank, step, seq) order, by passes of a stable sort that are skipped
       where the order holds already
    3. the values of the records in that order, sorted stably by the rank of their name's code, are in final order;
       names are few, so their codes fit 16 bits and the sort is a radix sort

A row then knows its record by index, and each record-level column is one gather away.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ranklog.layout import Lsn
from ranklog.schema import KIND_NAMES
from ranklogd.ship.decode import Record
from ranklogd.ship.source import Source
from ranklogd.ship.walk import PORTION_VALUES_MAX, Portion

Ints: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Floats: TypeAlias = npt.NDArray[np.float64]

_NO_RANK = -2  # Ranks start at -1.
_NO_UID = -1  # UID_UNKNOWN; larger uids than 2^31 wrap, as they do elsewhere (-2 is nobody).


class Columns(NamedTuple):
    """Record-level columns, in lsn order."""

    seq: Ints
    last: Ints
    lsn: Ints
    step: Ints
    stepped: Ints
    """0 where the record has no step."""
    wall_us: Ints
    recv_us: Ints
    uid: Ints
    source: Ints
    layout: Ints


@dataclass(frozen=True)
class Table:
    """All rows of one run in one cut, in final order. The arrays with one item a row run in parallel."""

    project: str
    run: str
    sources: tuple[Source, ...]
    """This run's writers."""
    source_codes: Ints
    """From `records.source` to `sources`."""
    names: tuple[tuple[int, str], ...]
    """(kind, key), sorted, each of them used; what `name` counts in."""
    records: Columns
    """Of the whole cut, shared by its tables; what `record` counts in."""
    record_count: int
    """How many of them are this run's."""
    texts: Sequence[str | None]
    """What `text` counts in."""
    record: Ints
    name: Ints
    """Ascending."""
    value: Floats
    text: Ints
    """-1 where there is a value."""
    first_lsn: Lsn
    last_lsn: Lsn
    writers: dict[str, tuple[int, int]]
    """Writer -> the first and last seq its rows stand for."""


class Cut:
    """The records of one contiguous range of lsns. Add portions in lsn order, then take the tables."""

    def __init__(self) -> None:
        self.values = 0
        """Rows it will have."""
        self.records = 0
        self.size_bytes = 0
        """Bytes of the frames' bodies."""
        self._names: dict[tuple[int, str], int] = {}
        self._layouts: dict[tuple[int, tuple[str, ...]], int] = {}
        self._layout_names: list[list[int]] = []
        self._sources: dict[Source, int] = {}
        self._texts: list[str | None] = []
        self._text_rows: list[int] = []
        self._waiting: list[Portion] = []
        self._waiting_values = 0
        self._columns: list[Columns] = []
        self._values: list[Floats] = []

    @property
    def names(self) -> int:
        """How many distinct (kind, key) were met so far, but for the portions that wait."""
        return len(self._names)

    def add(self, portion: Portion) -> None:
        """Take a portion's records."""
        self._waiting.append(portion)
        self._waiting_values += portion.values
        self.values += portion.values
        self.size_bytes += portion.size_bytes
        self.records += len(portion.records)
        # Python objects become arrays as soon as there are enough of them to pay for the calls.
        if self._waiting_values >= PORTION_VALUES_MAX:
            self._pack()

    def tables(self) -> Iterator[Table]:
        """Yield one table for each (project, run), in order of first appearance."""
        self._pack()
        if not self._columns:
            return
        columns = Columns(*map(np.concatenate, zip(*self._columns, strict=True)))
        values = np.concatenate(self._values)
        self._columns.clear()
        self._values.clear()
        text = np.full(len(values), -1, np.int32)
        text[_ints(self._text_rows)] = np.arange(len(self._texts), dtype=np.int32)
        layouts = self._sorted_layouts()
        lengths = layouts.lengths[columns.layout]
        first_row = np.cumsum(lengths) - lengths
        sources = tuple(self._sources)
        runs: dict[tuple[str, str], int] = {}
        run_of_source = [runs.setdefault((source.project, source.run), len(runs)) for source in sources]
        run_of = _ints(run_of_source, np.int32)[columns.source]
        order = _record_order(columns, sources, run_of)
        bounds = np.searchsorted(run_of[order], np.arange(len(runs) + 1))
        material = _Material(sources, columns, first_row, values, text, self._texts, layouts)
        for (project, run), number in runs.items():
            yield _table(project, run, order[bounds[number] : bounds[number + 1]], material)

    def _pack(self) -> None:
        """Turn the waiting records into arrays."""
        if not self._waiting:
            return
        portions, self._waiting, self._waiting_values = self._waiting, [], 0
        records = list(chain.from_iterable(portion.records for portion in portions))
        counts = [len(portion.records) for portion in portions]
        count = len(records)

        def spread(per_portion: list[int]) -> Ints:
            return np.repeat(_ints(per_portion), counts)

        seq = np.fromiter((record.seq for record in records), np.int64, count)
        layouts = [self._layout(record) for record in records]
        self._columns.append(
            Columns(
                seq=seq,
                last=np.fromiter((record.last for record in records), np.int64, count),
                lsn=np.maximum(seq + spread([p.lsn_offset for p in portions]), spread([p.lsn_min for p in portions])),
                step=np.fromiter((record.step or 0 for record in records), np.int64, count),
                stepped=np.fromiter((record.step is not None for record in records), np.int8, count),
                wall_us=np.fromiter((record.wall_us for record in records), np.int64, count),
                recv_us=spread([portion.recv_us for portion in portions]),
                uid=spread([_NO_UID if portion.uid is None else portion.uid for portion in portions]).astype(np.int32),
                source=spread([self._source(portion.source) for portion in portions]).astype(np.int32),
                layout=_ints(layouts, np.int32),
            )
        )
        base = sum(map(len, self._values))
        self._values.append(np.fromiter(chain.from_iterable(record.values for record in records), np.float64))
        for record in records:
            if record.texts is not None:
                self._text_rows.extend(base + position for position in record.texts)
                self._texts.extend(record.texts.values())
            base += len(record.keys)

    def _source(self, source: Source) -> int:
        return self._sources.setdefault(source, len(self._sources))

    def _layout(self, record: Record) -> int:
        layout = self._layouts.setdefault((record.kind, record.keys), len(self._layouts))
        if layout == len(self._layout_names):
            names = self._names
            self._layout_names.append([names.setdefault((record.kind, key), len(names)) for key in record.keys])
        return layout

    def _sorted_layouts(self) -> "_Layouts":
        found = list(self._names)
        # Code points order strings as their UTF-8 bytes do, which is the order parquet's statistics use.
        order = sorted(range(len(found)), key=lambda code: (KIND_NAMES[found[code][0]], found[code][1]))
        rank = np.empty(len(found), np.uint16 if len(found) <= 1 << 16 else np.uint32)
        rank[order] = np.arange(len(found), dtype=rank.dtype)
        lengths = _ints([len(names) for names in self._layout_names])
        codes = rank[np.fromiter(chain.from_iterable(self._layout_names), np.int64)]
        return _Layouts([found[code] for code in order], codes, np.cumsum(lengths) - lengths, lengths)


class _Layouts(NamedTuple):
    """The distinct names, sorted, and all layouts as codes into them: each layout's start in `codes` and length."""

    names: list[tuple[int, str]]
    codes: npt.NDArray[Any]
    starts: Ints
    lengths: Ints


class _Material(NamedTuple):
    """All of a cut, from which each run's table is taken."""

    sources: tuple[Source, ...]
    columns: Columns
    first_row: Ints
    """Each record's first item in `values` and `text`."""
    values: Floats
    text: Ints
    texts: Sequence[str | None]
    layouts: _Layouts


def _ints(items: list[int], dtype: type[np.signedinteger[Any]] = np.int64) -> Ints:
    return np.fromiter(items, dtype, len(items))


def _table(project: str, run: str, mine: Ints, cut: _Material) -> Table:
    """Return the table of one run, whose records `mine` are in order already."""
    columns, layouts = cut.columns, cut.layouts
    layout = columns.layout[mine]
    lengths = layouts.lengths[layout]
    place, row = _expand(cut.first_row[mine], lengths)
    code = layouts.codes[_expand(layouts.starts[layout], lengths)[1]]
    final = np.argsort(code, kind="stable")
    row, code = row[final], code[final]
    # Only what this run uses: its file must not carry another run's names or writers in a dictionary.
    fresh = np.concatenate(([True], code[1:] != code[:-1]))
    used = np.flatnonzero(np.bincount(columns.source[mine]))
    source_codes = np.zeros(len(cut.sources), np.int32)
    source_codes[used] = np.arange(len(used))
    sources = tuple(cut.sources[number] for number in used.tolist())
    lsn = columns.lsn[mine]
    return Table(
        project=project,
        run=run,
        sources=sources,
        source_codes=source_codes,
        names=tuple(layouts.names[number] for number in code[fresh].tolist()),
        records=columns,
        record_count=len(mine),
        texts=cut.texts,
        record=mine[place[final]],
        name=np.cumsum(fresh, dtype=np.int32) - 1,
        value=cut.values[row],
        text=cut.text[row],
        first_lsn=Lsn(int(lsn.min())),
        last_lsn=Lsn(int(lsn.max())),
        writers=_seq_ranges(columns.seq[mine], columns.last[mine], source_codes[columns.source[mine]], sources),
    )


def _record_order(columns: Columns, sources: tuple[Source, ...], run_of: Ints) -> Ints:
    """Return the records' indexes in (run, rank, step, seq) order, equals in lsn order."""
    ranks = _ints([_NO_RANK if source.rank is None else source.rank for source in sources], np.int32)
    order: Ints = np.arange(len(columns.seq), dtype=np.int32)
    for key in (columns.seq, columns.step, columns.stepped, ranks[columns.source], run_of):
        items = key[order]
        if not np.all(items[:-1] <= items[1:]):
            order = order[np.argsort(items, kind="stable")]
    return order


def _expand(starts: Ints, lengths: Ints) -> tuple[Ints, npt.NDArray[np.intp]]:
    """Return, for ranges of `lengths` items from `starts` on, the range and the item of each of their items."""
    ends = np.cumsum(lengths)
    items = np.arange(ends[-1], dtype=np.intp) + np.repeat(starts - (ends - lengths), lengths)
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), items


def _seq_ranges(seq: Ints, last: Ints, source: Ints, sources: tuple[Source, ...]) -> dict[str, tuple[int, int]]:
    """Return each writer's first and last seq; a writer with two attempts has two sources."""
    lowest, highest = np.full(len(sources), np.iinfo(np.int64).max), np.full(len(sources), -1)
    np.minimum.at(lowest, source, seq)
    np.maximum.at(highest, source, last)
    writers: dict[str, tuple[int, int]] = {}
    for writer, low, high in zip((item.writer for item in sources), lowest.tolist(), highest.tolist(), strict=True):
        known = writers.get(writer, (low, high))
        writers[writer] = (min(known[0], low), max(known[1], high))
    return writers
