"""What a shard's parquet footer says of its lsns: for the tools that compare it with the name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ranklog.errors import FormatError


def lsn_range(path: Path) -> tuple[int, int] | None:
    """Return (first, last) lsn of the metadata entry `ranklog.segment`, None without one; raises FormatError."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        told = json.loads(metadata.get(b"ranklog.segment", b"null"))
        return None if told is None else (int(told[0]), int(told[1]))
    except (pa.ArrowInvalid, ValueError, TypeError, LookupError) as exc:
        raise FormatError(f"the parquet footer cannot be read: {exc}") from exc
