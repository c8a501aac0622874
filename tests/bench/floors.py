"""The floors: the least that the same job can cost. Each is measured in the run whose figure it stands beside.

    raw_write      msgpack.packb + one write(2) to a file on disk: no daemon, no checksum, nothing survives a torn tail
    packed_pwrite  msgpack.packb + crc32 + one pwrite(2) into reserved pages of a tmpfs file: what a journal must do
    long_parquet   pyarrow writing the rows of a shard, once they are arrays

The first two are for the measured process and import msgpack only when they are made.
"""

import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.load import Record


def raw_write(path: Path) -> Callable[[Record], object]:
    """Return a call that appends a record to `path`, which stays open."""
    from msgpack import packb

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return lambda record: os.write(fd, packb(record))


def packed_pwrite(path: Path, size_bytes: int) -> Callable[[Record], object]:
    """Return a call that writes a checksummed record into `path`, from the front again when it is full."""
    from msgpack import Packer

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.posix_fallocate(fd, 0, size_bytes)
    pack, head, crc32, clock = Packer().pack, struct.Struct("<II").pack, zlib.crc32, time.time_ns
    offset = step = 0

    def call(record: Record) -> None:
        nonlocal offset, step
        body = pack((1, step, clock(), step, record))
        frame = head(crc32(body), len(body)) + body
        if offset + len(frame) > size_bytes:
            offset = 0
        os.pwrite(fd, frame, offset)
        offset += len(frame)
        step += 1

    return call


def long_parquet(path: Path, records: int, metrics: int) -> float:
    """Write as many rows as those records become, with the shard's encodings; return the seconds of pyarrow alone."""
    from bench.bigshard import write_series_shard

    return write_series_shard(path, steps=records, metrics=metrics).write_s


def wide_bytes(path: Path, table: Any) -> int:
    """Return the size of `table` as pyarrow's best wide file: one column for each metric, one row for each record."""
    import pyarrow.parquet as pq

    doubles = [field.name for field in table.schema if str(field.type) == "double"]
    others = [name for name in table.column_names if name not in doubles]
    encodings = {**dict.fromkeys(doubles, "BYTE_STREAM_SPLIT"), **dict.fromkeys(others, "DELTA_BINARY_PACKED")}
    pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding=encodings, store_schema=False)
    return path.stat().st_size
