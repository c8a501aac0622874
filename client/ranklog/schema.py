"""The one schema of every shard, for ever: long, one row for each (record, key). Imports pyarrow.

`value` holds floats, bools and ints up to 2^53; everything else is in `text` as JSON, exact. NaN and infinities are
doubles. Every record has at least one row (key '' when it has no keys). Plain strings, no nested types, no Arrow
metadata in the file: this is what every parquet reader agrees on. Columns may be appended; a format whose rows mean
something else lies under another root than `v1/`, so that old readers never meet it. File metadata, under `ranklog.`:

    ranklog.format    "1"
    ranklog.segment   JSON [first_lsn, last_lsn] of the rows
    ranklog.writers   JSON {writer: [first_seq, last_seq]}
"""

import pyarrow as pa

FORMAT = "1"

SCHEMA = pa.schema([
    pa.field("project", pa.string(), nullable=False),
    pa.field("run", pa.string(), nullable=False),
    pa.field("writer", pa.string(), nullable=False),
    pa.field("seq", pa.int64(), nullable=False),
    pa.field("lsn", pa.int64(), nullable=False),
    pa.field("rank", pa.int32()),
    pa.field("role", pa.string()),
    pa.field("node", pa.string(), nullable=False),
    pa.field("attempt", pa.int32(), nullable=False),
    pa.field("uid", pa.int32()),
    pa.field("step", pa.int64()),
    pa.field("ts", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("recv_ts", pa.timestamp("us", tz="UTC"), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("value", pa.float64()),
    pa.field("text", pa.string()),
])  # fmt: skip

KIND_NAMES = ("start", "metrics", "system", "config", "alert", "text", "media", "gap", "end")
"""The `kind` column's words, indexed by `ranklog.frame.Kind`."""
