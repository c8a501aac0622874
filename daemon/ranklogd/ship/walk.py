"""A segment's bytes to portions of records, whatever is wrong with them. Pure, and bounded in memory.

Two promises hold for any bytes behind a readable header. Every seq of a batch that can be told has a record or lies
within a gap record. Every lsn that damaged bytes held, up to the one in the segment's name, has a record, lies within
a gap record of its writer, or, where not even the writer can be told, within a gap record of project `_lost`.

Records of a writer without a WRITER entry are kept under `_lost`. What damage took from a writer also shows where
its next batch begins behind the expected seq, or, where none follows, by the seq with which the next segment's header
goes on; this is looked at only after damage, for a healthy daemon records its own gaps, and a store that is new to a
writer must not claim a loss.

Portions come in lsn order and hold contiguous lsns; a cut may therefore end between any two of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ranklog.errors import FormatError
from ranklogd.ship.batch import Batch, batch_of, read_batch
from ranklogd.ship.decode import INT64_MAX, Record, gap_record
from ranklogd.ship.source import Source, damage_source, lost_source, read_source
from ranklogd.wal.salvage import RebuiltWriter, salvage
from ranklogd.wal.segment import WRITER, Damage, Entry, EntryType, SegmentHeader, scan

PORTION_VALUES_MAX = 16_384
"""Decoded records are Python objects, some hundred bytes a value: few may exist at a time."""
PORTION_SIZE_MAX = 1 << 20
REASONS_MAX = 1_000
"""Lines of evidence kept for one segment; a hostile writer can make each of its frames one."""


_DAMAGED = "damaged WAL segment"


@dataclass(slots=True)
class Portion:
    """Consecutive records of one writer. A record's lsn is max(seq + lsn_offset, lsn_min)."""

    source: Source
    lsn_offset: int
    lsn_min: int
    """A gap record for seqs that damage took before a batch gets the lsn of that batch."""
    recv_us: int
    uid: int | None
    records: list[Record] = field(default_factory=list)
    values: int = 0
    size_bytes: int = 0


@dataclass
class Evidence:
    """What was wrong with one segment, for the quarantine."""

    spans: dict[int, int] = field(default_factory=dict)
    """Offset -> end of the entries that hold a bad frame, and of the WRITER entries that explain them."""
    reasons: list[str] = field(default_factory=list)
    reasons_count: int = 0
    records: int = 0
    """Records that could not be read, or whose writer is not known."""
    damaged_stretches: int = 0

    def note(self, *, writer: str, seq: int, lsn: int, count: int, reason: str) -> None:
        """Add one line; the first REASONS_MAX are kept, all are counted."""
        self.reasons_count += 1
        if self.reasons_count <= REASONS_MAX:
            self.reasons.append(f"writer={writer} seq={seq} lsn={lsn} records={count} reason={reason[:300]!r}")


class Walk:
    """One pass over a segment; `portions` yields its records, `evidence` says afterwards what was wrong."""

    def __init__(
        self,
        buffer: memoryview,
        header: SegmentHeader,
        last_lsn: int,
        values_max: int,
        following: Mapping[bytes, int] | None = None,
        *,
        has_marks: bool = True,
    ) -> None:
        """`following` is the seq with which each writer goes on behind this segment, as far as that is known.

        Without `has_marks` the header was damaged: with which seq its writers begin is then not known, either.
        """
        self._has_marks = has_marks
        self.evidence = Evidence()
        self._following = following or {}
        self._buffer = buffer
        self._header = header
        self._last = last_lsn
        self._values_max = min(values_max, PORTION_VALUES_MAX)
        self._sources: dict[bytes, Source] = {}
        self._source_spans: dict[bytes, tuple[int, int]] = {}
        self._expected = {mark.writer: mark.last_seq + 1 for mark in header.writers}
        self._next_lsn: int = header.first_lsn
        self._recv_us = 0

    def portions(self, offset: int) -> Iterator[Portion]:
        """Yield the records of the entries from `offset` on, up to the last lsn; never raises because of content."""
        damage: Damage | None = None
        end = len(self._buffer)
        for item in scan(self._buffer, self._header.salt, offset, self._header.first_lsn):
            if self._next_lsn > self._last:
                return
            if isinstance(item, Damage):
                damage = item
                continue
            if item.lsn > self._last:
                end = item.offset if damage is None else damage.end
                break
            if damage is not None:
                yield from self._salvage(damage.offset, damage.end, item.lsn - 1)
                damage = None
            offset = item.end
            yield from self._entry(item)
        if self._next_lsn <= self._last:
            # The segment was sealed with these records in it: this is no torn tail, they were acknowledged.
            yield from self._salvage(damage.offset if damage else offset, end, self._last)
        for source, first, last in self._untold():
            # Its lsns were told to be lost already, so this row shares the segment's last one.
            gap = gap_record(first, last, _DAMAGED, self._recv_us)
            yield Portion(source, -INT64_MAX, self._last, self._recv_us, None, [gap], 1)

    def _entry(self, entry: Entry) -> Iterator[Portion]:
        self._recv_us = entry.recv_ns // 1000
        if entry.type == EntryType.BATCH:
            yield from self._batch(batch_of(entry))
            return
        writer, attempt = WRITER.unpack_from(entry.payload)
        if self._has_marks:
            self._expected.setdefault(writer, 0)
        try:
            self._sources[writer] = read_source(writer, attempt, entry.payload[WRITER.size :], self._header.node)
            self._source_spans[writer] = (entry.offset, entry.end)
        except FormatError as exc:
            self.evidence.spans[entry.offset] = entry.end
            self.evidence.note(writer=writer.hex(), seq=0, lsn=entry.lsn, count=0, reason=str(exc))

    def _batch(self, batch: Batch) -> Iterator[Portion]:
        self._next_lsn = max(self._next_lsn, batch.lsn + batch.total)
        source = self._sources.get(batch.writer) or self._find_source(batch)
        portion = self._portion(source, batch)
        expected = self._expected.get(batch.writer, 0 if self._has_marks else batch.first)
        self._expected[batch.writer] = batch.first + batch.total
        if self.evidence.damaged_stretches and batch.first > expected:
            portion.records.append(gap_record(expected, batch.first - 1, _DAMAGED, batch.recv_us))
            portion.values += 1
        reason = self._impossible(batch)
        if reason:
            self._bad(batch, batch.first, batch.total, reason)
            portion.lsn_offset = -INT64_MAX
            portion.records.append(gap_record(batch.first, batch.first + batch.total - 1, reason, batch.recv_us))
            portion.values += 1
            yield portion
            return
        for record in read_batch(batch, lambda seq, count, why: self._bad(batch, seq, count, why)):
            portion.records.append(record)
            portion.values += len(record.keys)
            portion.size_bytes += record.size_bytes
            if portion.values >= self._values_max or portion.size_bytes >= PORTION_SIZE_MAX:
                yield portion
                portion = self._portion(source, batch)
        if portion.records:
            yield portion

    def _find_source(self, batch: Batch) -> Source:
        """Return the writer of a batch that no WRITER entry explains: told by its own start frame, or lost."""
        try:
            source = read_source(batch.writer, 0, batch.frames, self._header.node)
        except FormatError:
            source = lost_source(batch.writer, self._header.node)
            self._bad(batch, batch.first, batch.total, "no WRITER entry before this batch in the segment")
        else:
            self._sources[batch.writer] = source
        return source

    def _portion(self, source: Source, batch: Batch) -> Portion:
        return Portion(source, batch.lsn - batch.first, batch.lsn, batch.recv_us, batch.uid)

    def _impossible(self, batch: Batch) -> str:
        """Return why a batch's own numbers cannot be, if so: its rows must not reach beyond the segment's lsns."""
        last_seq, last_lsn = batch.first + batch.total - 1, batch.lsn + batch.total - 1
        if last_lsn > self._last:
            return f"batch of lsns {batch.lsn}..{last_lsn} in a segment that ends with {self._last}"
        return f"batch ends with seq {last_seq}, beyond 2^63" if last_seq > INT64_MAX else ""

    def _bad(self, batch: Batch, seq: int, count: int, reason: str) -> None:
        evidence = self.evidence
        evidence.records += count
        evidence.spans[batch.offset] = batch.end
        if batch.writer in self._source_spans:
            offset, end = self._source_spans[batch.writer]
            evidence.spans[offset] = end
        lsn = batch.lsn + seq - batch.first
        evidence.note(writer=batch.writer.hex(), seq=seq, lsn=lsn, count=count, reason=reason)

    def _salvage(self, offset: int, end: int, last_lsn: int) -> Iterator[Portion]:
        """Yield what can still be read between `offset` and `end`, and a gap for the other lsns up to `last_lsn`."""
        self.evidence.damaged_stretches += 1
        missing = max(last_lsn - self._next_lsn + 1, 0)
        reason = f"damaged bytes {offset}..{end}"
        self.evidence.note(writer="?", seq=0, lsn=self._next_lsn, count=missing, reason=reason)
        room = last_lsn - self._next_lsn + 1
        for item in salvage(self._buffer, offset, end, room=room, expected=self._expected):
            if isinstance(item, RebuiltWriter):
                self._rebuilt(item)
                continue
            where = (item.offset, item.end, self._next_lsn, self._recv_us)
            yield from self._batch(Batch(*where, None, item.writer, item.first, item.total, item.frames))
        first_lsn = self._next_lsn
        if first_lsn > last_lsn:
            return
        self._next_lsn = last_lsn + 1
        self.evidence.records += last_lsn - first_lsn + 1
        losses = self._untold() if last_lsn == self._last else []
        if sum(last - first + 1 for _, first, last in losses) != last_lsn - first_lsn + 1:
            losses = [(damage_source(self._header.store_id, self._header.node), first_lsn, last_lsn)]
        for source, first, last in losses:
            self._expected[bytes.fromhex(source.writer)] = last + 1
            gap = gap_record(first, last, _DAMAGED, self._recv_us)
            yield Portion(source, first_lsn - first, first_lsn, self._recv_us, None, [gap], 1)
            first_lsn += last - first + 1

    def _rebuilt(self, item: RebuiltWriter) -> None:
        if self._has_marks:
            self._expected.setdefault(item.writer, 0)
        try:
            self._sources[item.writer] = read_source(item.writer, item.attempt, item.frames, self._header.node)
        except FormatError as exc:
            self.evidence.note(writer=item.writer.hex(), seq=0, lsn=self._next_lsn, count=0, reason=str(exc))

    def _untold(self) -> list[tuple[Source, int, int]]:
        """Return (writer, first seq, last seq) of what damage took from writers that did not go on in this segment."""
        if not self.evidence.damaged_stretches:
            return []
        return [
            (self._sources.get(writer) or lost_source(writer, self._header.node), self._expected[writer], due - 1)
            for writer, due in self._following.items()
            if due > self._expected.get(writer, due)
        ]
