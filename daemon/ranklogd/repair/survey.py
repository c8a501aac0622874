"""What is there: the facts behind `ranklog fsck status`, and all checks in one row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranklog.frame import HEADER, body_at
from ranklog.places import adoption_dirs
from ranklog.start import decode_start
from ranklogd.config import Config
from ranklogd.repair import frames, shards
from ranklogd.repair.finding import Finding
from ranklogd.repair.frames import Frames
from ranklogd.repair.offline import owner_pid
from ranklogd.repair.segments import read_segment
from ranklogd.repair.wal import check_wal, names_in, read_bytes, segment_names
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import BATCH, WRITER, Entry, EntryType, batch_count, decode_header, parse_open, scan


def check_all(state: StateDir, config: Config) -> Iterator[Finding]:
    """Yield every finding, room by room."""
    running = owner_pid(state) is not None
    yield from check_wal(state, config.node, running=running)
    yield from shards.check_outbox(state, running=running)
    yield from shards.check_deadletter(state)
    yield from shards.check_cache(state)
    yield from shards.check_quarantine(state)
    directories = adoption_dirs(config.settings())
    yield from frames.check_frames(
        state, directories, lambda writer: start_frame_in_wal(state, writer), running=running
    )


def facts(state: StateDir, config: Config) -> dict[str, Any]:
    """Return what the state directory and the writers' directories hold."""
    segments = []
    store_id = ""
    for name in segment_names(state):
        buffer = read_bytes(state.wal / name)
        if buffer is None:
            continue
        found = read_segment(name, buffer)
        is_open = parse_open(name) is not None
        store_id = found.header.store_id if found.header and (is_open or not store_id) else store_id
        segments.append({
            "name": name, "state": "open" if is_open else "sealed", "first_lsn": found.first_lsn,
            "last_lsn": found.last_lsn, "records": found.records, "writers": len(found.writers),
            "size_bytes": found.size_bytes, "trouble": found.error or next(iter(found.troubles), ""),
        })  # fmt: skip
    waiting = [path for name in names_in(state.outbox) if not name.endswith(".tmp")
               for path in shards.files_in(state.outbox / name)]  # fmt: skip
    return {
        "state_dir": str(state.root),
        "owner_pid": owner_pid(state),
        "store_id": store_id,
        "to": config.to,
        "segments": segments,
        "outbox": {"shards": len(waiting), "size_bytes": sum(map(_size, waiting))},
        "cache": {"shards": len(shards.files_in(state.cache))},
        "deadletter": _with_reasons(state.deadletter),
        "quarantine": _with_reasons(state.quarantine),
        "files": [_file(found) for found in frames.frame_files(adoption_dirs(config.settings()))],
        "shipper": _report(state),
    }


def _with_reasons(room: Path) -> list[dict[str, Any]]:
    return [
        {"name": str(path.relative_to(room)), "size_bytes": _size(path), "reason": shards.reason_of(path)}
        for path in shards.files_in(room)
        if not path.name.endswith(".reason") and not path.name.startswith(".")
    ]


def _file(found: Frames) -> dict[str, Any]:
    start = found.start
    state = "refused" if found.refused else "in use" if found.alive else "left behind"
    return {
        "path": str(found.path), "kind": found.name.kind, "writer": found.name.writer, "state": state,
        "project": start.project if start else "", "run": start.run if start else "",
        "rank": start.rank if start else None, "mode": start.mode if start else "",
        "first_seq": found.first_seq, "last_seq": found.last_seq, "size_bytes": found.size_bytes,
        "reason": found.refused,
    }  # fmt: skip


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _report(state: StateDir) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(state.shipper_report.read_bytes())
    except (OSError, ValueError):
        return {}
    return report


def last_seqs(state: StateDir) -> dict[str, int]:
    """Return the last seq of each writer that the newest open segment knows: what lies below is in the line."""
    for name in reversed(segment_names(state)):
        buffer = read_bytes(state.wal / name) if parse_open(name) is not None else None
        found = None if buffer is None else read_segment(name, buffer)
        if buffer is None or found is None or found.header is None:
            continue
        last = {mark.writer.hex(): mark.last_seq for mark in found.header.writers}
        for item in scan(buffer, found.header.salt, decode_header(buffer)[1], found.header.first_lsn):
            if isinstance(item, Entry) and item.type == EntryType.BATCH:
                writer, first, _ = BATCH.unpack_from(item.payload)
                last[writer.hex()] = first + batch_count(item) - 1
        return last
    return {}


def start_frame_in_wal(state: StateDir, writer: str) -> bytes:
    """Return the start frame that a segment holds for a writer; empty if none does."""
    wanted = bytes.fromhex(writer)
    for name in segment_names(state):
        buffer = read_bytes(state.wal / name)
        found = None if buffer is None else read_segment(name, buffer)
        if buffer is None or found is None or found.header is None:
            continue
        for item in scan(buffer, found.header.salt, decode_header(buffer)[1], found.header.first_lsn):
            if isinstance(item, Entry) and item.type == EntryType.WRITER and item.payload[:16] == wanted:
                body = body_at(item.payload, WRITER.size)
                if body is not None and decode_start(body).writer == writer:
                    return bytes(item.payload[WRITER.size : WRITER.size + HEADER.size + len(body)])
    return b""


def exportable(state: StateDir, config: Config) -> list[Path]:
    """Return the files that hold frames: segments, what dead writers left, and evidence."""
    evidence = [
        state.quarantine / name
        for name in names_in(state.quarantine)
        if not name.startswith(".") and not name.endswith(".reason") and ".parquet" not in name
    ]
    left = [found.path for found in frames.frame_files(adoption_dirs(config.settings())) if not found.alive]
    return [*(state.wal / name for name in segment_names(state)), *left, *evidence]
