"""Every kind of finding of `ranklog fsck check`, made by real damage; and what `ranklog fsck repair` makes of it."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ranklog import fs
from ranklog.cli import main
from ranklog.start import encode_start
from ranklogd.repair.finding import Step
from ranklogd.repair.header import rebuild
from ranklogd.ship.convert import convert_segment
from ranklogd.ship.outbox import set_aside
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import decode_header, open_name, sealed_name
from repairing import WRITER, Killed, Place, builder, flip, headless, kill_at, metrics, wipe_frame
from segments import read_rows, start_of, writer_id


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    made.enter(monkeypatch)
    return made


@pytest.fixture
def fsck(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["fsck", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


# One function for each damage: it makes it and returns the file that is to be named.


def damaged_header(place: Place) -> Path:
    path = place.segment()
    flip(path, 30)
    return path


def damaged_head(place: Place) -> Path:
    """The header, and the first entries: by these the daemon would have found the others."""
    path = headless(place)
    place.segment(first_lsn=401, first_seq=400)
    return path


def damaged_open_head(place: Place) -> Path:
    path = place.state.wal / open_name(1)
    headless(place).rename(path)
    return path


def nothing_but_damage(place: Place) -> Path:
    path = place.state.wal / sealed_name(1, 6)
    path.write_bytes(b"RANKWAL1" + bytes(500))
    return path


def later_format(place: Place) -> Path:
    path = place.segment()
    path.write_bytes(b"RANKWAL2" + bytes(4) + path.read_bytes()[12:])
    return path


def damaged_entry(place: Place) -> Path:
    path = place.segment()
    flip(path, path.stat().st_size // 2 + 60)
    return path


def cut_short(place: Place) -> Path:
    path = place.segment()
    os.truncate(path, path.stat().st_size - 5)
    return path


def misnamed(place: Place) -> Path:
    path = place.segment(first_lsn=11, first_seq=0)
    wrong = path.with_name(sealed_name(1, 16))
    path.rename(wrong)
    return wrong


def overlapping(place: Place) -> Path:
    place.segment(first_lsn=1)
    return place.segment(first_lsn=4, first_seq=6)


def hole(place: Place) -> Path:
    place.segment(first_lsn=1)
    return place.segment(first_lsn=11, first_seq=10)


def stray_in_wal(place: Place) -> Path:
    path = place.state.wal / "backup.wal"
    path.write_bytes(b"?")
    return path


def lone_tries(place: Place) -> Path:
    path = place.state.wal / sealed_name(1, 2).replace(".wal", ".tries")
    path.write_bytes(b"begin oom_kills=0\n")
    return path


def unborn_segment(place: Place) -> Path:
    path = place.state.wal / f".{open_name(9)}"
    path.write_bytes(b"RANK")
    return path


def torn_tail(place: Place) -> Path:
    path = place.state.wal / open_name(1)
    path.write_bytes(bytes(builder().data) + b"torn")
    return path


def bad_frame(place: Place) -> Path:
    made = builder()
    made.batch(WRITER.writer, 6, 2, metrics(6) + b"\0" * 20)
    return made.seal(place.state)


def missing_seqs(place: Place) -> Path:
    made = builder()
    made.batch(WRITER.writer, 9, 1, metrics(9))
    return made.seal(place.state)


def doubled_seqs(place: Place) -> Path:
    made = builder()
    made.batch(WRITER.writer, 4, 1, metrics(4))
    return made.seal(place.state)


def shard_in_outbox(place: Place) -> Path:
    path = place.segment()
    convert_segment(path, place.state)
    [shard] = (place.state.outbox / path.name).rglob("*.parquet")
    return shard


def damaged_shard(place: Place) -> Path:
    path = shard_in_outbox(place)
    flip(path, 100)
    return path


def shard_of_another_range(place: Place) -> Path:
    path = shard_in_outbox(place)
    wrong = path.with_name(path.name.replace("0000000000000006.", "0000000000000009."))
    path.rename(wrong)
    return wrong


def no_shard(place: Place) -> Path:
    path = shard_in_outbox(place).with_name("notes.txt")
    path.write_text("?")
    return path


def unfinished_conversion(place: Place) -> Path:
    path = place.state.outbox / f"{sealed_name(1, 6)}.tmp"
    path.mkdir()
    return path


def stray_in_outbox(place: Place) -> Path:
    path = place.state.outbox / "loose.parquet"
    path.write_bytes(b"?")
    return path


def damaged_cache(place: Place) -> Path:
    shard = shard_in_outbox(place)
    room = place.state.outbox / sealed_name(1, 6)
    path = place.state.cache / shard.relative_to(room)
    path.parent.mkdir(parents=True)
    shard.rename(path)
    flip(path, 100)
    return path


def dead_letter(place: Place) -> Path:
    shard = shard_in_outbox(place)
    path = place.state.deadletter / shard.relative_to(place.state.outbox / sealed_name(1, 6))
    set_aside(shard, path, "the store said no")
    return path


def unexplained_dead_letter(place: Place) -> Path:
    path = dead_letter(place)
    path.with_name(f"{path.name}.reason").unlink()
    return path


def unfinished_evidence(place: Place) -> Path:
    path = place.state.quarantine / f".{sealed_name(1, 6)}.excerpt.tmp"
    path.write_bytes(b"half")
    return path


def lone_reason(place: Place) -> Path:
    path = place.state.quarantine / f"{sealed_name(1, 6)}.reason"
    path.write_text("gone\n")
    return path


def evidence(place: Place) -> Path:
    path = place.state.quarantine / f"{sealed_name(1, 6)}.excerpt"
    path.write_bytes(b"?")
    path.with_name(f"{path.name}.reason").write_text("writer=x seq=3\n")
    return path


def sound_spool(place: Place) -> Path:
    return place.spooled()


def torn_spool(place: Place) -> Path:
    path = place.spooled()
    os.truncate(path, path.stat().st_size - 3)
    return path


def damaged_spool(place: Place) -> Path:
    path = place.spooled()
    wipe_frame(path)
    return path


def flipped_spool(place: Place) -> Path:
    path = place.spooled()
    flip(path, len(encode_start(WRITER)) + 4 * len(metrics(1)) + 20)
    return path


def damaged_spool_head(place: Place) -> Path:
    path = place.spooled()
    place.spooled(first=10, number=1)
    flip(path, 40)
    return path


def spool_of_a_writer_in_the_wal(place: Place) -> Path:
    place.segment()
    path = place.spooled(first=6)
    flip(path, 40)
    return path


def nobodys_spool(place: Place) -> Path:
    path = place.spooled()
    flip(path, 40)
    return path


def planted_link(place: Place) -> Path:
    path = place.spool / f"{writer_id(5)}.00000000.spool"
    path.symlink_to("/etc/passwd")
    return path


def blank_journal(place: Place) -> Path:
    path = place.journal / f"{writer_id(6)}.00000000.journal"
    path.write_bytes(bytes(4096))
    return path


def spool_of_a_later_version(place: Place) -> Path:
    return place.spooled(start=start_of(1, protocol=99))


HEALED, STAYS = "the daemon's business", "nobody can"
DAMAGES: list[tuple[Callable[[Any], Path], str, str, Step | str]] = [
    (damaged_header, "damage", "segment header is damaged", HEALED),
    (damaged_head, "damage", "4 records behind the header can be read", Step.REBUILD),
    (damaged_open_head, "damage", "4 records behind the header can be read", Step.REBUILD),
    (nothing_but_damage, "damage", "no entry in it can be read", HEALED),
    (later_format, "damage", "upgrade ranklog", STAYS),
    (damaged_entry, "damage", "damaged bytes at offset", HEALED),
    (cut_short, "damage", "ends with lsn 6; entries can be read up to 4", HEALED),
    (misnamed, "damage", "its name says that it begins with lsn 1, its header 11", Step.RENAME),
    (overlapping, "damage", "its lsns overlap those of", HEALED),
    (hole, "note", "lsns 7..10 before it are not in the WAL", HEALED),
    (stray_in_wal, "warning", "no name of a segment", Step.SET_ASIDE),
    (lone_tries, "note", "notes on a segment that is gone", HEALED),
    (unborn_segment, "note", "was being created when the daemon died", HEALED),
    (torn_tail, "note", "4 bytes behind the last whole entry", HEALED),
    (bad_frame, "warning", "lsn 7: the frames of writer", HEALED),
    (missing_seqs, "damage", "seqs 6..8 are missing", HEALED),
    (doubled_seqs, "damage", "seq 4 once more, where 6 is due", HEALED),
    (damaged_shard, "damage", "are not those that were named", HEALED),
    (shard_of_another_range, "damage", "its name says lsns 1..9, its footer (1, 6)", HEALED),
    (no_shard, "warning", "no name of a shard", HEALED),
    (unfinished_conversion, "note", "a conversion that did not end", HEALED),
    (stray_in_outbox, "warning", "a file where directories of shards are", Step.SET_ASIDE),
    (damaged_cache, "damage", "are not those that were named", Step.SET_ASIDE),
    (dead_letter, "warning", "ranklog requeue --deadletter brings it back", HEALED),
    (unexplained_dead_letter, "note", "it has no .reason", Step.EXPLAIN),
    (unfinished_evidence, "note", "was being written when its process died", Step.SET_ASIDE),
    (lone_reason, "note", "the reason for a file that is not here", HEALED),
    (evidence, "note", "evidence: writer=x seq=3", HEALED),
    (sound_spool, "note", "left behind by a writer that is dead", HEALED),
    (torn_spool, "note", "its writer died while it wrote", HEALED),
    (damaged_spool, "damage", "4 records behind that can be read", Step.RESPOOL),
    (flipped_spool, "damage", "a frame at offset", HEALED),
    (damaged_spool_head, "damage", "9 records in it can be read", Step.RESPOOL),
    (spool_of_a_writer_in_the_wal, "damage", "9 records in it can be read", Step.RESPOOL),
    (nobodys_spool, "damage", "nothing tells whose they are", Step.SET_ASIDE),
    (blank_journal, "note", "not one byte of it reached the disk", HEALED),
    (spool_of_a_later_version, "warning", "upgrade ranklog", STAYS),
    (planted_link, "warning", "remove it by hand", HEALED),
]


@pytest.mark.parametrize(("make", "severity", "words", "outcome"), DAMAGES, ids=[row[0].__name__ for row in DAMAGES])
def test_a_damage_is_found_told_and_mended(place, fsck, make, severity, words, outcome):
    assert fsck("check")[1]["findings"] == []
    path = make(place)
    before = place.tree()
    code, report = fsck("check")
    named = [f for f in report["findings"] if f["file"] == str(path) and words in f["what"]]
    assert len(named) == 1, report
    assert named[0]["severity"] == severity
    assert code == (1 if report["damage"] else 0)
    assert bool(named[0]["repair"]) == isinstance(outcome, Step)
    plan = fsck("repair")[1]
    assert place.tree() == before, "neither a check nor a plan changes anything"
    if not isinstance(outcome, Step):
        assert not [step for step in plan["plan"] if step["file"] == str(path)]
        return
    assert [step["repair"]["step"] for step in plan["plan"] if step["file"] == str(path)] == [outcome.value]
    code, done = fsck("repair", "--apply")
    assert (code, done["done"]) == (0, len(plan["plan"]))
    again = fsck("check")[1]
    assert not [f for f in again["findings"] if f["repair"]], again
    assert outcome == Step.REBUILD or not again["damage"], "what went with the header itself stays damaged"
    after = place.tree()
    kept = {data for name, data in after.items() if "quarantine" in name} if outcome != Step.RENAME else after.values()
    if outcome != Step.EXPLAIN:
        assert before[str(path.relative_to(place.root))] in kept, "the original is kept"
    assert fsck("repair", "--apply")[1]["done"] == 0
    assert place.tree() == after, "a second repair does nothing"


def test_the_store_is_read_on_request(place, fsck):
    shard = shard_in_outbox(place)
    path = place.store / shard.relative_to(place.state.outbox / sealed_name(1, 6))
    path.parent.mkdir(parents=True)
    shard.rename(path)
    assert fsck("check", "--store")[1]["findings"] == []
    flip(path, 100)
    assert fsck("check")[0] == 0
    code, report = fsck("check", "--store")
    assert (code, [f["file"] for f in report["findings"]]) == (1, [str(path)])


def test_a_rebuilt_segment_converts_to_what_the_sound_one_held(place):
    path = place.segment()
    data = path.read_bytes()
    convert_segment(path, place.state)
    sound = read_rows(place.state.outbox)
    shutil.rmtree(place.state.outbox)
    found = rebuild(memoryview(b"?" * 77 + data[entries_offset_of(data) :]), 1, "node-1")
    assert found is not None
    assert (found.first_lsn, found.last_lsn, found.records) == (1, 6, 6)
    path.write_bytes(found.data)
    place.state.outbox.mkdir()
    convert_segment(path, place.state)
    assert read_rows(place.state.outbox) == sound


def test_what_is_missing_before_the_first_entry_becomes_a_gap_and_no_older_record_is_called_lost(place):
    data = bytes(builder(11, 10).data)
    first = entries_offset_of(data)
    _, size, *_ = struct.unpack_from("<QI", data, first)
    second_batch = data.index(data[first : first + 4], data.index(data[first : first + 4], first + 60) + 60)
    found = rebuild(memoryview(data[second_batch:]), 11, "node-1")
    assert found is not None
    path = place.state.wal / sealed_name(11, 16)
    path.write_bytes(found.data)
    convert_segment(path, place.state)
    rows = read_rows(place.state.outbox)
    gaps = [json.loads(row["text"]) for row in rows if row["kind"] == "gap"]
    assert [(gap["first"], gap["last"]) for gap in gaps] == [(11, 12)], "in lsns, of project _lost"
    assert {row["seq"] for row in rows if row["kind"] == "metrics"} == {12, 13, 14, 15}


def entries_offset_of(data: bytes) -> int:
    return decode_header(memoryview(data))[1]


def broken(root: Path) -> Place:
    """A place with one damage for each step of a repair."""
    place = Place(root)
    headless(place)
    headless(place, 501, 500).rename(place.state.wal / open_name(501))
    path = place.segment(first_lsn=1031, first_seq=900)
    path.rename(path.with_name(sealed_name(1021, 1036)))
    stray_in_wal(place)
    path = place.state.quarantine / "something"
    path.write_bytes(b"?")
    damaged_spool(place)
    other = start_of(2)
    spool = place.spooled(start=other)
    flip(spool, 40)
    place.spooled(start=other, first=10, number=1)
    return place


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.full), 9])
def test_a_repair_that_is_killed_anywhere_goes_on_to_the_same_end(tmp_path, monkeypatch, fsck, stride):
    """Killed before each change of the disk, and run again: the same files as without the kill, the same bytes."""
    broken(tmp_path / "model")
    ends = []
    killed = True
    nth = 2 - stride  # The first is the lock's, which a process that really dies gives back.
    while killed:
        nth += stride
        root = tmp_path / f"n{nth}"
        shutil.copytree(tmp_path / "model", root)
        place = Place.__new__(Place)
        place.root, place.state = root, StateDir(root / "state")
        place.journal, place.spool, place.store = root / "journal", root / "spool", root / "store"
        with monkeypatch.context() as patch:
            place.enter(patch)
            with patch.context() as dying:
                kill_at(dying, nth)
                try:
                    main(["fsck", "repair", "--apply"])
                    killed = False
                except Killed:
                    pass
            fsck("repair", "--apply")
            assert not [f for f in fsck("check")[1]["findings"] if f["repair"]], nth
        ends.append({name: data for name, data in place.tree().items() if ".repair-" not in name})
        shutil.rmtree(root)
    assert nth > 20, "the calls were counted"
    for number, end in enumerate(ends):
        assert same_but_numbers(end) == same_but_numbers(ends[-1]), number


def same_but_numbers(tree: dict[str, bytes]) -> set[tuple[str, bytes]]:
    """Paths begin below the place, and a rebuilt file's reason names a path in it."""
    return {(name, b"" if name.endswith(".reason") else data) for name, data in tree.items()}


def test_a_full_disk_stops_a_repair_with_words_and_the_next_one_goes_on(place, fsck, monkeypatch, capsys):
    path = damaged_head(place)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "publish", full)
        assert main(["fsck", "repair", "--apply"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert fsck("repair", "--apply")[1]["done"] == 1


def test_an_export_tells_every_value_and_where_it_stands(place, capsys):
    place.segment()
    place.spooled(first=6, count=3)
    capsys.readouterr()
    assert main(["fsck", "export"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = {(line["lsn"], line["seq"]): line["values"] for line in lines if line["kind"] == "metrics"}
    assert told == {(seq + 1, seq): {"loss": seq / 7, "note": f"n{seq}" * 4} for seq in range(1, 6)} | {
        (None, seq): {"loss": seq / 7, "note": f"n{seq}" * 4} for seq in range(6, 9)
    }
    assert {(line["project"], line["run"], line["rank"]) for line in lines} == {("demo", "run-1", 0)}


def test_an_export_leaves_out_what_nobody_can_read_and_says_so(place, capsys):
    headless(place)
    good = place.segment(first_lsn=401, first_seq=6)
    capsys.readouterr()
    assert main(["fsck", "export"]) == 1
    out, err = capsys.readouterr()
    assert {json.loads(line)["file"] for line in out.splitlines()} == {good.name}
    assert "left out" in err
    assert "ranklog fsck check" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--apply"], "--apply goes with"),
        (["repair", "--store"], "--store goes with"),
        (["check", "x.wal"], "files go with ranklog fsck export only"),
        (["export", "x.wal"], "is no file"),
        (["mend"], "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(place, capsys, arguments, words):
    assert main(["fsck", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_directory_that_is_no_state_is_refused_and_left_alone(place, capsys):
    empty = place.root / "elsewhere"
    assert main(["fsck", "check", "--state-dir", str(empty)]) == 1
    assert "is no state directory of a daemon" in capsys.readouterr().err
    assert not empty.exists()


def test_the_terminal_shows_what_is_there(place, capsys):
    place.segment()
    place.spooled()
    evidence(place)
    capsys.readouterr()
    assert main(["fsck"]) == 0
    text = capsys.readouterr().out
    for words in ("owned by nobody", "sealed", "1..6", "left behind", "1..9", "quarantine", "writer=x seq=3"):
        assert words in text
    assert max(map(len, text.splitlines()[4:])) <= 80
