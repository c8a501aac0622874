"""Segments as the ingest process writes them, made from frames: material for the tests and benches of the shipper."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.frame import encode_frame
from ranklog.layout import Lsn
from ranklog.start import Start, encode_start
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import (
    BATCH,
    WRITER,
    EntryType,
    SegmentHeader,
    WriterMark,
    encode_entry,
    encode_header,
    sealed_name,
)

STORE_ID = "00112233445566aa"
NODE = "node-1"
T0_NS = 1_700_000_000_000_000_000
SALT = 0xA5C3_1E77


def writer_id(number: int) -> str:
    """Return a writer's id: as unlike any other as real ones are, the same for the same number."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def start_of(number: int = 1, **fields: Any) -> Start:
    """Return a writer with plausible fields."""
    plain: dict[str, Any] = {"writer": writer_id(number), "project": "demo", "run": "run-1", "rank": 0, "node": NODE}
    return Start(**{**plain, **fields})


def frame(kind: int, seq: int, payload: Any, *, step: int | None = None, wall_ns: int = T0_NS) -> bytes:
    """Return one frame."""
    return encode_frame(msgpack.packb([int(kind), seq, wall_ns, step, payload]))


class SegmentBuilder:
    """Appends entries as the WAL does, and keeps count of lsns."""

    def __init__(self, first_lsn: int = 1, marks: Sequence[WriterMark] = ()) -> None:
        self.first_lsn = first_lsn
        self.next_lsn = first_lsn
        self.recv_ns = T0_NS + 1_000_000
        self.header = SegmentHeader(NODE, STORE_ID, Lsn(first_lsn), "boot", SALT, tuple(marks))
        self.data = bytearray(encode_header(self.header))

    def _entry(self, kind: EntryType, uid: int, *parts: bytes) -> None:
        self.data += b"".join(encode_entry(SALT, self.next_lsn, self.recv_ns, uid, kind, *parts))

    def writer(self, start: Start, attempt: int = 0, uid: int = 1000) -> None:
        """Append a WRITER entry."""
        self._entry(EntryType.WRITER, uid, WRITER.pack(bytes.fromhex(start.writer), attempt), encode_start(start))

    def batch(self, writer: str, first: int, count: int, frames: bytes, uid: int = 1000) -> int:
        """Append a BATCH entry; return its lsn."""
        lsn = self.next_lsn
        self._entry(EntryType.BATCH, uid, BATCH.pack(bytes.fromhex(writer), first, count), frames)
        self.next_lsn += count
        self.recv_ns += 20_000_000
        return lsn

    @property
    def name(self) -> str:
        """The file name once sealed."""
        return sealed_name(self.first_lsn, self.next_lsn - 1)

    def seal(self, state: StateDir) -> Path:
        """Write the segment into wal/."""
        path = state.wal / self.name
        path.write_bytes(self.data)
        return path


def make_state(root: Path) -> StateDir:
    """Create the rooms of a state directory."""
    state = StateDir(root)
    for room in state.rooms:
        room.mkdir(parents=True)
    return state


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one shard in their stored order; ts columns as ints (µs)."""
    table = pq.ParquetFile(path).read()
    for name in ("ts", "recv_ts"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.int64()))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all shards below `folder`, file after file."""
    return [row for path in sorted(folder.rglob("*.parquet")) for row in read_shard(path)]
