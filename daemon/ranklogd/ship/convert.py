"""A sealed segment to its shards, committed in the outbox. A crash anywhere means: call it again.

    1. outbox/<segment>/ exists     the shards are committed: go to 6
    2. remove outbox/<segment>.tmp/, read the segment
    3. write and fsync each cut's shards in outbox/<segment>.tmp/<key>, and the directories
    4. publish what goes to quarantine
    5. rename to outbox/<segment>/, fsync outbox          committed
    6. take the segment out of wal/, fsync wal

Nothing in a segment's bytes makes this raise: what cannot be read becomes gap rows and goes to quarantine. An OSError
(disk full, I/O error) does go to the caller; the segment is then untouched and is tried again later.

A segment is cut into contiguous ranges of lsns before anything is sorted. That bounds memory, and it keeps the lsn
ranges of one run's shards disjoint, which the containment rule of `ranklog.layout` needs.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from ranklog import fs
from ranklog.errors import FormatError
from ranklog.failpoint import failpoint
from ranklog.layout import ShardKey, format_key
from ranklogd.ship.arrange import Cut
from ranklogd.ship.decode import INT64_MAX
from ranklogd.ship.quarantine import discard_segment, keep_evidence, quarantine_segment
from ranklogd.ship.shard import Shard, encode_shard
from ranklogd.ship.walk import Walk
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import SegmentHeader, decode_header, parse_sealed
