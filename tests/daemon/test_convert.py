import json
import math
import os
import struct
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranklog.frame import Kind
from ranklog.layout import parse_key, slug
from ranklog.start import Start
from ranklogd.ship.convert import Converted, convert_segment
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import sealed_name
from segments import (
    NODE,
    STORE_ID,
    T0_NS,
    SegmentBuilder,
    frame,
    make_state,
    read_rows,
    read_shard,
    start_of,
    writer_id,
)

A = writer_id(1)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


def metrics(first: int, count: int) -> bytes:
    seqs = range(first, first + count)
    return b"".join(frame(Kind.METRICS, seq, {"x": float(seq), "y": 0.5}, step=seq) for seq in seqs)


def simple_segment(batches: int = 4, first_lsn: int = 1) -> SegmentBuilder:
    segment = SegmentBuilder(first_lsn)
    segment.writer(start_of(1))
    segment.writer(start_of(2, run="run-2", rank=1))
    for number in range(batches):
        segment.batch(writer_id(1 + number % 2), 10 * number, 10, metrics(10 * number, 10))
    return segment


def keys_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_segment_becomes_one_shard_for_each_run_committed_under_its_name(state: StateDir):
    path = simple_segment().seal(state)
    converted = convert_segment(path, state)
    assert not path.exists()
    assert [entry.name for entry in state.outbox.iterdir()] == [path.name]
    keys = {parse_key(key) for key in keys_in(state.outbox / path.name)}
    assert keys == set(converted.shards)
    assert {(key.project_id, key.run_id, key.first_lsn, key.last_lsn) for key in converted.shards} == {
        ("demo", "run-1", 1, 30),
        ("demo", "run-2", 11, 40),
    }
    assert {(key.node, key.store_id) for key in converted.shards} == {(NODE, STORE_ID)}
    assert (converted.rows, converted.records, converted.values) == (80, 40, 80)
    assert (converted.quarantined_records, converted.damaged_stretches) == (0, 0)
    assert converted.size_bytes == sum(file.stat().st_size for file in state.outbox.rglob("*.parquet"))


def test_times_uid_and_lsn_come_from_the_entry(state: StateDir):
    segment = SegmentBuilder(first_lsn=7)
    segment.writer(start_of(1))
    segment.batch(A, 3, 1, frame(Kind.METRICS, 3, {"x": 1.0}, step=4, wall_ns=T0_NS + 1_999), uid=1234)
    convert_segment(segment.seal(state), state)
    (row,) = read_rows(state.outbox)
    assert row == {
        "project": "demo", "run": "run-1", "writer": A, "seq": 3, "lsn": 7, "rank": 0, "role": None, "node": NODE,
        "attempt": 0, "uid": 1234, "step": 4, "ts": T0_NS // 1000 + 1, "recv_ts": T0_NS // 1000 + 1000,
        "kind": "metrics", "key": "x", "value": 1.0, "text": None,
    }  # fmt: skip


def test_cuts_are_contiguous_disjoint_and_no_larger_than_asked_for(state: StateDir):
    path = simple_segment(batches=30).seal(state)
    converted = convert_segment(path, state, values_max=50)
    assert converted.values == 600
    ranges = defaultdict(list)
    for key in converted.shards:
        ranges[key.run_id].append((key.first_lsn, key.last_lsn))
    for found in ranges.values():
        assert len(found) > 5
        assert all(last < first for (_, last), (first, _) in pairwise(found))
    assert max(len(read_shard(file)) for file in state.outbox.rglob("*.parquet")) <= 50
    assert len({(row["writer"], row["seq"], row["key"]) for row in read_rows(state.outbox)}) == 600


def test_long_texts_make_smaller_cuts(state: StateDir):
    segment = SegmentBuilder()
    segment.writer(start_of(1))
    segment.batch(A, 0, 40, b"".join(frame(Kind.TEXT, i, {"t": "x" * 100_000}) for i in range(40)))
    converted = convert_segment(segment.seal(state), state, values_max=50_000)
    assert (converted.rows, len(converted.shards)) == (40, 4)


def test_ever_new_names_make_smaller_cuts(state: StateDir):
    segment = SegmentBuilder()
    segment.writer(start_of(1))
    segment.batch(A, 0, 40_000, b"".join(frame(Kind.METRICS, i, {f"k{i}": 1.0}) for i in range(40_000)))
    converted = convert_segment(segment.seal(state), state, values_max=100_000)
    assert (converted.rows, len(converted.shards)) == (40_000, 3)


def test_a_segment_without_records_is_only_removed(state: StateDir):
    empty = SegmentBuilder(first_lsn=5)
    empty.writer(start_of(1))
    path = state.wal / sealed_name(5, 4)
    path.write_bytes(empty.data)
    assert convert_segment(path, state) == Converted()
    assert not path.exists()
    assert list(state.outbox.iterdir()) == []
    assert list(state.quarantine.iterdir()) == []


def test_where_the_shards_are_committed_the_segment_is_only_removed(state: StateDir):
    path = simple_segment().seal(state)
    committed = state.outbox / path.name
    committed.mkdir()
    assert convert_segment(path, state) == Converted()
    assert not path.exists()
    assert list(committed.iterdir()) == []
    assert convert_segment(path, state) == Converted(), "also when it is gone already"


def test_a_stale_unfinished_conversion_is_removed_first(state: StateDir):
    path = simple_segment().seal(state)
    stale = state.outbox / f"{path.name}.tmp" / "v1" / "half.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"PAR1")
    convert_segment(path, state)
    assert not any("half" in key for key in keys_in(state.outbox))
    assert [entry.name for entry in state.outbox.iterdir()] == [path.name]


def test_hostile_names_stay_within_the_outbox_and_true_in_the_columns(state: StateDir):
    names = ["../../x", "", "🤖 run", "a/b", ".", "CON", "n" * 500, "x\x00y", "-"]
    segment = SegmentBuilder()
    for number, name in enumerate(names, 1):
        segment.writer(start_of(number, project=name, run=name, role=name, node=name))
        segment.batch(writer_id(number), 1, 1, metrics(1, 1))
    path = segment.seal(state)
    converted = convert_segment(path, state)
    assert {(key.project_id, key.run_id) for key in converted.shards} == {(slug(name), slug(name)) for name in names}
    assert keys_in(state.root) == {f"outbox/{path.name}/{key}" for key in keys_in(state.outbox / path.name)}
    rows = read_rows(state.outbox)
    assert {row["run"] for row in rows} == set(names)
    assert {row["role"] for row in rows} == {name or None for name in names}
    assert {row["node"] for row in rows} == {name or NODE for name in names}


@pytest.mark.parametrize("change", ["magic", "checksum", "cut", "empty", "name"])
def test_a_segment_with_an_unreadable_header_goes_to_quarantine_as_it_is(state: StateDir, change):
    segment = simple_segment()
    if change == "magic":
        segment.data[0:9] = bytes(9)
    elif change == "checksum":
        segment.data[30] ^= 1
    elif change == "cut":
        del segment.data[40:]
    elif change == "empty":
        segment.data.clear()
    path = segment.seal(state)
    if change == "name":
        path = path.rename(path.with_name(sealed_name(1, (1 << 64) - 1)))
    converted = convert_segment(path, state)
    assert converted == Converted(damaged_stretches=1)
    assert (state.quarantine / path.name).read_bytes() == segment.data
    assert "header of this segment cannot be read" in (state.quarantine / f"{path.name}.reason").read_text()
    assert not path.exists()
    assert list(state.outbox.iterdir()) == []


def test_a_flipped_byte_anywhere_never_raises_and_every_record_is_a_row_or_in_a_gap(state: StateDir):
    segment = simple_segment()
    path = state.wal / segment.name
    whole = {(writer_id(1 + seq // 10 % 2), seq): seq + 1 for seq in range(40)}
    for offset in range(0, len(segment.data), 41):
        data = bytearray(segment.data)
        data[offset] ^= 0x10
        path.write_bytes(data)
        converted = convert_segment(path, state)
        assert converted.damaged_stretches == (0 if offset < 8 else 1), "a magic that is wrong does no harm"
        assert offset < 8 or (state.quarantine / path.name).read_bytes() == data
        rows = read_rows(state.outbox)
        found = {(row["writer"], row["seq"]) for row in rows if row["kind"] == "metrics"}
        gaps = [(row["writer"], json.loads(row["text"])) for row in rows if row["kind"] == "gap"]
        for (writer, seq), lsn in whole.items():
            assert (
                not converted.shards  # The header itself: the whole segment is in quarantine.
                or (writer, seq) in found
                or any(owner == writer and gap["first"] <= seq <= gap["last"] for owner, gap in gaps)
                or any(owner == "0" * 32 and gap["first"] <= lsn <= gap["last"] for owner, gap in gaps)
                or any(row["project"] == "_lost" and row["lsn"] == lsn for row in rows)
            ), (offset, writer, seq)
        if converted.shards:
            assert len(whole.keys() - found) <= 10
            assert convert_segment(path, state) == Converted()
            (state.outbox / path.name).rename(state.root / f"done-{offset}")


_SCRIPT = """
import sys
from pathlib import Path
from ranklogd.ship.convert import convert_segment
from ranklogd.statedir import StateDir
convert_segment(Path(sys.argv[2]), StateDir(Path(sys.argv[1])), values_max=60)
"""
POINTS = (
    "shard.write.mid", "shard.write.mid:3", "shard.sync.after", "outbox.rename.after", "outbox.dirsync.after",
    "trim.unlink.after",
)  # fmt: skip


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_after_a_crash_at_any_point_another_call_finishes_the_same_work(state: StateDir, tmp_path, point, damaged):
    segment = simple_segment(batches=8)
    if damaged:
        segment.data[-30] ^= 1
    reference = make_state(tmp_path / "reference")
    convert_segment(segment.seal(reference), reference, values_max=60)
    path = segment.seal(state)
    log = tmp_path / "points"
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": paths, "RANKLOG_FAILPOINT": f"{point}=kill", "RANKLOG_FAILPOINT_LOG": str(log)}
    died = subprocess.run([sys.executable, "-c", _SCRIPT, state.root, path], env=env, timeout=60, check=False)
    assert (died.returncode, log.read_text().split()[:2]) == (-9, [point.partition(":")[0], "kill"])
    committed = (state.outbox / path.name).is_dir()
    assert committed or path.exists(), "the records are in the WAL or in the outbox, whatever happened"
    convert_segment(path, state, values_max=60)
    assert keys_in(state.root) == keys_in(reference.root)
    for key in keys_in(state.root):
        assert (state.root / key).read_bytes() == (reference.root / key).read_bytes()


def test_an_io_error_leaves_the_segment_for_a_later_call(state: StateDir):
    path = simple_segment().seal(state)
    state.quarantine.rmdir()
    state.outbox.rmdir()
    state.outbox.write_bytes(b"in the way")
    with pytest.raises(OSError, match="outbox"):
        convert_segment(path, state)
    assert path.exists()
    state.outbox.unlink()
    state.outbox.mkdir()
    assert convert_segment(path, state).records == 40


def told(item: Any) -> tuple[bytes | None, str | None]:
    """The typing rule once more, in other words: (bits of value, text)."""
    if isinstance(item, msgpack.ExtType):
        return None, item.data.decode()
    if isinstance(item, str) or item is None:
        return None, json.dumps(item, ensure_ascii=False)
    if isinstance(item, float) or (int(float(item)) == item and abs(item) <= 2**53):
        return struct.pack("<d", item), None
    return None, str(item)


_doubles = st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack("<d", raw)[0])
_letters = st.characters(exclude_categories=["Cs"])
_values = st.one_of(
    _doubles,
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 2**53, 2**53 + 1, -(2**53) - 1, 2**63, 2**64 - 1]),
    st.integers(-(2**63), 2**64 - 1),
    st.booleans(),
    st.none(),
    st.text(_letters, max_size=8),
    st.sampled_from(["[1, {}]", '"é"', str(2**70)]).map(lambda text: msgpack.ExtType(1, text.encode())),
)
_floats = st.dictionaries(st.sampled_from(["a", "b", "c", ""]), st.floats(), max_size=4)
_payloads = _floats | st.dictionaries(st.text(_letters, max_size=3), _values, max_size=5)
_logged = st.tuples(
    st.integers(0, 3),
    st.sampled_from([Kind.METRICS, Kind.SYSTEM, Kind.CONFIG, Kind.TEXT]),
    st.none() | st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]),
    _payloads,
    st.integers(1, 3),
)
WRITERS: list[Start] = [
    start_of(1, rank=0), start_of(2, rank=1), start_of(3, rank=None, run="run-2"), start_of(4, rank=0, role="eval"),
]  # fmt: skip


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    rank, step = row["rank"], row["step"]
    return row["kind"], row["key"].encode(), (rank is not None, rank), (step is not None, step), row["seq"], row["lsn"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_logged, min_size=1, max_size=30), st.sampled_from([1, 7, 600_000]))
def test_every_writer_seq_and_key_is_there_once_with_its_value_in_sorted_order(tmp_path, logged, values_max):
    state = make_state(tmp_path / os.urandom(8).hex())
    segment = SegmentBuilder()
    for start in WRITERS:
        segment.writer(start)
    seqs, expected = [0, 0, 0, 0], {}
    for number, kind, step, payload, count in logged:
        frames, first, start = [], seqs[number], WRITERS[number]
        for seq in range(first, first + count):
            frames.append(frame(kind, seq, payload, step=step))
            for key, item in payload.items() or [("", ...)]:
                cell = (None, None) if item is ... else told(item)
                expected[start.writer, seq, key] = (start.run, start.rank, step, int(kind), *cell)
        seqs[number] += count
        segment.batch(start.writer, first, count, b"".join(frames))
    converted = convert_segment(segment.seal(state), state, values_max=values_max)
    found = {}
    for file in state.outbox.rglob("*.parquet"):
        order = [_order(row) for row in read_shard(file)]
        assert order == sorted(order)
    rows = read_rows(state.outbox)
    for row in rows:
        key = (row["writer"], row["seq"], row["key"])
        assert key not in found
        kind = ["start", "metrics", "system", "config", "alert", "text"].index(row["kind"])
        bits = None if row["value"] is None else struct.pack("<d", row["value"])
        found[key] = (row["run"], row["rank"], row["step"], kind, bits, row["text"])
    assert found == expected
    assert converted.rows == converted.values == len(expected)
    assert converted.quarantined_records == 0
    assert {row["lsn"] for row in rows} == set(range(1, sum(seqs) + 1))
