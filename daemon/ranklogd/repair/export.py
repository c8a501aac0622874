"""Frames as JSON lines: what is in WAL segments, journals, spools and evidence, one record a line.

Each file is read by itself and says who wrote it; a record that lies in two files is printed twice, with the names of
both. Values follow the typing rule of shards. What cannot be read is told as gap records, as in a shard.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranklog.errors import FormatError
from ranklog.framefile import parse_name
from ranklog.schema import KIND_NAMES
from ranklogd.repair.frames import read_frame_file, sound_frames
from ranklogd.repair.segments import read_segment
from ranklogd.repair.wal import read_bytes
from ranklogd.ship.decode import Record, decode_record
from ranklogd.ship.source import Source, read_source
from ranklogd.ship.walk import Walk
from ranklogd.wal.segment import decode_header

_VALUES_MAX = 16_384


class Unreadable(FormatError):
    """Nothing can be told from this file."""


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of one segment, journal or spool file; raises Unreadable. A file that is gone has none."""
    name = path.name.removesuffix(".requeued")
    parsed = parse_name(name.partition(".original-")[0])
    if parsed is None:
        yield from _segment(path, name.partition(".original-")[0].removesuffix(".excerpt"))
        return
    found = read_frame_file(path, parsed)
    if found is None:
        return
    buffer = read_bytes(path)
    if buffer is None:
        return
    if found.refused and not found.start_frame:
        raise Unreadable(f"{path}: {found.refused}")
    source = read_source(bytes.fromhex(parsed.writer), 0, memoryview(found.start_frame), "")
    for span in sound_frames(buffer, 0):
        try:
            record = decode_record(buffer[span.offset + 8 : span.end])
        except FormatError as exc:
            yield _line(path, source, None, span.first, {"kind": "gap", "reason": str(exc)})
            continue
        yield _line(path, source, None, record.seq, _told(record))


def _segment(path: Path, name: str) -> Iterator[dict[str, Any]]:
    buffer = read_bytes(path)
    if buffer is None:
        return
    try:
        header, offset = decode_header(buffer)
    except FormatError as exc:
        raise Unreadable(f"{path}: {exc}; ranklog fsck check says what a repair can read") from exc
    last = read_segment(name, buffer).last_lsn
    for portion in Walk(buffer, header, last, _VALUES_MAX).portions(offset):
        for record in portion.records:
            lsn = max(record.seq + portion.lsn_offset, portion.lsn_min)
            yield _line(path, portion.source, lsn, record.seq, _told(record))


def _line(path: Path, source: Source, lsn: int | None, seq: int, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": path.name, "project": source.project, "run": source.run, "rank": source.rank, "writer": source.writer,
        "seq": seq, "lsn": lsn, **told,
    }  # fmt: skip


def _told(record: Record) -> dict[str, Any]:
    texts = record.texts or {}
    values: dict[str, Any] = {}
    for place, (key, number) in enumerate(zip(record.keys, record.values, strict=True)):
        if place not in texts:
            values[key] = number
        elif texts[place] is not None:
            values[key] = _parsed(str(texts[place]))
    return {"kind": KIND_NAMES[record.kind], "step": record.step, "ts_us": record.wall_us, "values": values}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
