"""Every format as literal bytes, in files that are never edited: what one version wrote, each later one must read.

A new version of a format is a new file. `golden/SHA256` holds the digest of each file, so an edit fails here. Where the
bytes follow from the input alone, today's encoder must write exactly these; a shard's bytes change with the version of
pyarrow, so there only its content is compared.

    frames_v1.bin         all frame kinds          written: all but the start frame, which gains fields
    journal_v1.journal    a recycled journal file  written: as the frames
    spool_v1.spool        a spool file             written: as the frames
    wire_v1.txt           messages, one a line     written: all
    segment_v1.wal        a WAL segment            written: its entries, see tests/daemon/test_segment.py
    tries_v1.tries        what befell a segment    read
    shard_v1.parquet      a shard                  read: the project's readers, and pyarrow alone
    names_v1.txt          names of files, keys and slugs, one a line       written: all
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import pyarrow.parquet as pq
import pytest

from cli import ranklog
from ranklog import framefile, wire
from ranklog.frame import Kind, encode_frame, encode_gap, spans
from ranklog.framefile import FileName
from ranklog.layout import Lsn, ShardKey, format_key, parse_key, project_prefix, run_prefix, slug
from ranklog.reader.footer import read_footer
from ranklog.start import Start, decode_start, encode_start
from ranklog.wire import Code, Type, Wait
from ranklogd.orphan import open_orphan, pieces
from ranklogd.ship.convert import convert_segment
from ranklogd.ship.tries import Record, judge
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import open_name, parse_open, parse_sealed, sealed_name
from segments import STORE_ID, SegmentBuilder, frame, make_state, start_of

GOLDEN = Path(__file__).parent / "golden"
WRITER = "00112233445566778899aabbccddeeff"
WALL_NS = 1_700_000_000_000_000_000
START = Start(
    writer=WRITER, project="llama 3", run="r01", name="brave-river-1", tags=["a", "ß"], rank=3, world_size=8, node="node-7",
    boot="054b0bd2-49ab-466e-b956-eee60c04d751", client="0.1", wall_ns=WALL_NS,
)  # fmt: skip


def metrics(seq: int) -> bytes:
    return encode_frame(msgpack.packb([Kind.METRICS, seq, WALL_NS + seq, seq, {"loss": 1 / seq, "n": seq, "note": "é"}]))


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_no_golden_file_was_edited_and_none_is_without_a_digest():
    lines = (GOLDEN / "SHA256").read_text().splitlines()
    expected = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GOLDEN.iterdir() if path.name != "SHA256"}
    assert found == expected, "a golden file is never edited: a new version of a format is a new file"


def start_end(data: bytes) -> int:
    return next(spans(memoryview(data))).end


def test_a_journal_file_is_a_start_frame_frames_and_stale_bytes():
    data = golden("journal_v1.journal")
    head = start_end(data)
    stale = metrics(3)
    # Recycled: frames 9 and 10 over older ones of the same size, then zeros up to the preallocated size.
    assert data[head:] == metrics(9) + metrics(10) + stale + bytes(4096 - head - 3 * len(stale))
    assert [(span.kind, span.first) for span in spans(memoryview(data))] == [(Kind.START, 0), (Kind.METRICS, 9), (Kind.METRICS, 10)]
    assert decode_start(memoryview(data)[8:head]) == START


def test_a_spool_file_is_a_start_frame_and_frames_to_its_end():
    data = golden("spool_v1.spool")
    head = start_end(data)
    end = encode_frame(msgpack.packb([Kind.END, 14, WALL_NS, None, {"exit_code": 0, "last": 14}]))
    assert data[head:] == metrics(11) + encode_gap(12, 13, "full", WALL_NS) + end
    assert decode_start(memoryview(data)[8:head]) == START


@pytest.mark.parametrize(("name", "first", "last", "ended"), [("journal_v1.journal", 9, 10, False), ("spool_v1.spool", 11, 14, True)])
def test_what_an_old_client_left_behind_is_read_by_todays_adopter(tmp_path: Path, name: str, first: int, last: int, ended: bool):
    path = tmp_path / framefile.format_name(FileName(WRITER, 0, name.rpartition(".")[2]))
    shutil.copy(GOLDEN / name, path)
    orphan = open_orphan(path, WRITER)
    assert orphan is not None
    assert (orphan.start, orphan.first_seq, orphan.alive) == (START, first, False)
    found = [piece for piece in pieces(orphan, 0) if piece.frames]
    assert (found[0].first_seq, found[-1].next_seq, found[-1].ended) == (first, last + 1, ended)


ID = bytes.fromhex(WRITER)
MESSAGES: list[tuple[Type, tuple[Any, ...]]] = [
    (Type.HELLO, (1, 1, ID, 0)),
    (Type.HELLO, (1, 2, ID, 1 << 40)),
    (Type.BATCH, (ID, 1, 64, 0xDEADBEEF, False)),
    (Type.BATCH, (ID, 1 << 33, 1, 0, True)),
    (Type.PING, (1,)),
    (Type.STATUS, (1,)),
    (Type.FLUSH, (1, int(Wait.DURABLE), 2.5)),
    (Type.FLUSH, (1, int(Wait.UPLOADED), 60.0)),
    (Type.SYNC, (1,)),
    (Type.WELCOME, (1, ID, 7, "/var/spool/ranklog", "/run/ranklog/journal", "/run/ranklog/ranklog.sock.cookie", 2)),
    (Type.ACK, (ID, -1, 2)),
    (Type.ACK, (ID, 1 << 40, 2)),
    (Type.REFUSE, (ID, int(Code.FULL), "the disk is full: é", True, -1)),
    (Type.REFUSE, (bytes(16), int(Code.MALFORMED), "", False, -1)),
    (Type.REFUSE, (ID, int(Code.SEQUENCE), "out of order", True, 42)),
    (Type.PONG, (1, "0.1.0", 4711)),
    (Type.REPORT, (1,)),
    (Type.FLUSHED, (1, False, 12)),
]


def wire_lines() -> list[str]:
    return [f"{kind.name} {wire.encode(kind, *fields).hex()}" for kind, fields in MESSAGES]


def test_every_message_has_these_bytes_and_is_read():
    lines = golden("wire_v1.txt").decode().splitlines()
    assert lines == wire_lines()
    assert {line.split()[0] for line in lines} == {kind.name for kind in Type}, "a new type is a line in a new file"
    for line, (kind, fields) in zip(lines, MESSAGES, strict=True):
        assert wire.decode(bytes.fromhex(line.split()[1])) == (kind, list(fields))


def test_the_numbers_of_kinds_types_and_codes_mean_what_they_meant():
    assert [(kind.name, kind.value) for kind in Kind] == [
        ("START", 0), ("METRICS", 1), ("SYSTEM", 2), ("CONFIG", 3), ("ALERT", 4), ("TEXT", 5), ("MEDIA", 6), ("GAP", 7), ("END", 8),
    ]  # fmt: skip
    assert {code.name: code.value for code in Code} == {
        "UNKNOWN_WRITER": 1, "SEQUENCE": 2, "DAMAGED": 3, "VERSION": 4, "FULL": 5, "FOREIGN": 6, "MALFORMED": 7, "STOPPING": 8,
    }  # fmt: skip
    assert {wait.name: wait.value for wait in Wait} == {"DURABLE": 0, "SEALED": 1, "UPLOADED": 2}


def test_an_old_tries_file_is_judged_as_it_was():
    assert judge(golden("tries_v1.tries").decode(), oom_kills=20) == Record(strikes=3, unexplained=1, last="Fatal Python error: Segmentation fault")


KEY = ShardKey("llama-3-0f4b3df0a5", "run-1", "node-7", "0123456789abcdef", Lsn(1), Lsn(0xFFFF), "0123456789ab")
STATE = StateDir(Path("STATE"))
SLUGS = ["demo", "run-1", "Größe", "llama 3", "7b", "", "a" * 100, "x-0123456789", "../etc", "日本"]
NAMES: dict[str, Callable[[], str]] = {
    "journal": lambda: framefile.format_name(FileName(WRITER, 0, "journal")),
    "spool": lambda: framefile.format_name(FileName(WRITER, 0xABC, "spool")),
    "open segment": lambda: open_name(0x101),
    "sealed segment": lambda: sealed_name(1, 0x100),
    "shard": lambda: format_key(KEY),
    "run": lambda: run_prefix("llama 3", "r01"),
    "project": lambda: project_prefix("demo"),
    "state rooms": lambda: " ".join(str(room) for room in STATE.rooms),
    "state files": lambda: " ".join(map(str, (STATE.lock, STATE.reserve, STATE.shipper_report))),
    **{f"slug {json.dumps(name)}": lambda name=name: slug(name) for name in SLUGS},
}


def names_lines() -> list[str]:
    return [f"{what}: {make()}" for what, make in NAMES.items()]


def test_every_name_is_spelt_as_it_was_and_is_understood():
    lines = golden("names_v1.txt").decode().splitlines()
    assert lines == names_lines()
    named = dict(line.split(": ", 1) for line in lines)
    assert framefile.parse_name(named["journal"]) == FileName(WRITER, 0, "journal")
    assert framefile.parse_name(named["spool"]) == FileName(WRITER, 0xABC, "spool")
    assert parse_open(named["open segment"]) == 0x101
    assert parse_sealed(named["sealed segment"]) == (1, 0x100)
    assert parse_key(named["shard"]) == KEY


RANK = start_of(1, project="llama 3", run="r01", name="brave-river-1", rank=3, role="rollout", attempt=2, wall_ns=WALL_NS)
FRAMES = [
    frame(Kind.METRICS, 1, {"loss": 0.5, "note": "é\n", "n": 3}, step=0),
    frame(Kind.METRICS, 2, {"loss": float("inf"), "ok": True, "none": None, "huge": 1 << 60}, step=1),
    frame(Kind.METRICS, 3, {}, step=2),
    encode_gap(4, 6, "full", WALL_NS),
    frame(Kind.ALERT, 7, {"title": "t", "text": "x", "level": "WARN"}),
    frame(Kind.CONFIG, 8, {"layers": msgpack.ExtType(1, b"[1,2]")}),
    frame(Kind.END, 9, {"exit_code": 0, "last": 9}),
]
CELLS = [
    (1, "metrics", "loss", 0.5, None), (1, "metrics", "n", 3.0, None), (1, "metrics", "note", None, '"é\\n"'),
    (2, "metrics", "huge", None, "1152921504606846976"), (2, "metrics", "loss", float("inf"), None),
    (2, "metrics", "none", None, "null"), (2, "metrics", "ok", 1.0, None), (3, "metrics", "", None, None),
    (4, "gap", "", None, '{"first": 4, "last": 6, "reason": "full"}'),
    (7, "alert", "t", None, '{"text": "x", "level": "WARN"}'), (8, "config", "layers", None, "[1,2]"),
    (9, "end", "", None, '{"exit_code": 0, "last": 9}'),
]  # fmt: skip


def sealed_in(root: Path) -> tuple[Path, StateDir]:
    """Return a sealed segment with these records."""
    state = make_state(root)
    builder = SegmentBuilder()
    builder.writer(RANK, attempt=1)
    builder.batch(RANK.writer, 0, 10, encode_start(RANK) + b"".join(FRAMES))
    return builder.seal(state), state


def check_rows(rows: list[dict[str, Any]]) -> None:
    start, *others = sorted(rows, key=lambda row: (row["seq"], row["key"]))
    assert [(row["seq"], row["kind"], row["key"], row["value"], row["text"]) for row in others] == CELLS
    told = json.loads(start["text"])
    assert {name: told[name] for name in ("project", "run", "name", "rank")} == {"project": "llama 3", "run": "r01", "name": "brave-river-1", "rank": 3}
    for row in rows:
        same = {name: row[name] for name in ("project", "run", "writer", "rank", "role", "node", "attempt", "uid")}
        assert same == {
            "project": "llama 3", "run": "r01", "writer": RANK.writer, "rank": 3, "role": "rollout", "node": "node-1", "attempt": 2, "uid": 1000,
        }  # fmt: skip
        assert row["lsn"] == row["seq"] + 1
        assert row["step"] == (row["seq"] - 1 if row["kind"] == "metrics" else None)
        assert row["ts"] == datetime.fromtimestamp(WALL_NS // 10**9, UTC)
        assert row["recv_ts"] == datetime.fromtimestamp(WALL_NS // 10**9, UTC) + timedelta(milliseconds=1)


def test_an_old_shard_is_read_by_pyarrow_and_by_our_readers(tmp_path: Path):
    check_rows(pq.ParquetFile(GOLDEN / "shard_v1.parquet").read().to_pylist())
    digest = hashlib.sha256(golden("shard_v1.parquet")).hexdigest()[:12]
    key = ShardKey(slug("llama 3"), slug("r01"), "node-1", STORE_ID, Lsn(1), Lsn(10), digest)
    path = tmp_path / "store" / format_key(key)
    path.parent.mkdir(parents=True)
    shutil.copy(GOLDEN / "shard_v1.parquet", path)
    footer = read_footer(path)
    assert (footer.project, footer.run, footer.rows, footer.writers) == ("llama 3", "r01", 13, {RANK.writer: (0, 9)})
    question = "select seq, kind, key, value, text from records where kind <> 'start' order by seq, key"
    done = ranklog("query", question, "--to", str(tmp_path / "store"), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [tuple(row.values()) for row in json.loads(done.stdout)] == [
        tuple("Infinity" if cell == float("inf") else cell for cell in row) for row in CELLS
    ]
    assert "brave-river-1" in ranklog("ls", str(tmp_path / "store"), home=tmp_path).stdout


def test_todays_converter_makes_a_shard_with_the_same_content_schema_and_name(tmp_path: Path):
    path, state = sealed_in(tmp_path / "state")
    [key] = convert_segment(path, state).shards
    made = state.outbox / path.name / format_key(key)
    rows = pq.ParquetFile(made).read().to_pylist()
    check_rows(rows)
    assert pq.read_schema(made).remove_metadata() == pq.read_schema(GOLDEN / "shard_v1.parquet").remove_metadata()
    then, now = (pq.read_metadata(file).metadata for file in (GOLDEN / "shard_v1.parquet", made))
    assert {name: value for name, value in then.items() if name.startswith(b"ranklog.")}.items() <= now.items()
    assert format_key(key._replace(sha256="0" * 12)) == (
        "v1/project_id=llama-3-6cb5bf084d/run_id=r01/node-1.00112233445566aa.0000000000000001-000000000000000a.000000000000.parquet"
    )


def test_a_frame_file_is_created_with_these_very_bytes(tmp_path: Path):
    frame = encode_start(START)
    file = framefile.create(tmp_path, FileName(WRITER, 0, "journal"), frame, 4096)
    file.close()
    assert (tmp_path / f"{WRITER}.00000000.journal").read_bytes() == frame + bytes(4096 - len(frame))


