"""`ranklog requeue`: each kind of thing that stands aside comes back once, or stays with a reason; killed anywhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ranklog.reader
from ingesting import Inside
from ranklog.cli import main
from ranklog.frame import spans
from ranklog.framefile import parse_name
from ranklog.layout import format_key, parse_key
from ranklogd.config import Config, load_config
from ranklogd.orphan import keep_evidence, open_orphan, pieces
from ranklogd.repair.requeue import REQUEUED
from ranklogd.ship.convert import convert_segment
from ranklogd.ship.outbox import set_aside
from ranklogd.ship.quarantine import quarantine_segment
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import open_name, sealed_name
from repairing import WRITER, Killed, Place, builder, flip, kill_at, metrics, wipe_frame
from segments import read_rows

SEGMENT = sealed_name(1, 6)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    made.enter(monkeypatch)
    return made


@pytest.fixture
def requeue(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["requeue", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def ship(place: Place) -> None:
    """Convert and upload all that is due, as the shipper does."""
    Shipper(load_config({"state_dir": str(place.state.root), "to": str(place.store)}, env={})).step()


def seqs(place: Place) -> list[int]:
    """The metrics' seqs in the store, each as often as it stands there."""
    return sorted(row["seq"] for row in read_rows(place.store) if row["key"] == "loss")


def dead_letter(place: Place) -> Path:
    path = place.segment()
    convert_segment(path, place.state)
    [shard] = (place.state.outbox / path.name).rglob("*.parquet")
    target = place.state.deadletter / shard.relative_to(place.state.outbox / path.name)
    set_aside(shard, target, "400: the store said no")
    shutil.rmtree(place.state.outbox / path.name)
    return target


def quarantined_segment(place: Place) -> Path:
    quarantine_segment(place.segment(), place.state, "3 tries to convert it failed. The last: MemoryError")
    return place.state.quarantine / SEGMENT


def quarantined_open_segment(place: Place) -> Path:
    """As `recover` leaves one of which it could read nothing."""
    path = place.state.quarantine / f"{open_name(1)}.0a1b2c3d"
    place.segment().rename(path)
    flip(path, 30)
    path.with_name(f"{path.name}.reason").write_text("segment header is damaged\n")
    return path


def quarantined_spool(place: Place) -> Path:
    """As adoption leaves one with damage in the middle; the fifth of nine frames is damaged."""
    path = place.spooled()
    wipe_frame(path)
    orphan = open_orphan(path, WRITER.writer)
    assert orphan is not None
    keep_evidence(orphan, [piece.end for piece in pieces(orphan, 0)][-1], place.state.quarantine)
    os.close(orphan.fd)
    return place.state.quarantine / path.name


ABLE: list[tuple[Callable[[Place], Path], str]] = [
    (dead_letter, "to the outbox, under its own key"),
    (quarantined_segment, "to wal/, under its own name"),
    (quarantined_open_segment, "to wal/, with a new header and a store_id of its own"),
    (quarantined_spool, "its unread frames to a spool file, for adoption"),
]


@pytest.mark.parametrize(("make", "way"), ABLE, ids=[make.__name__ for make, _ in ABLE])
def test_what_stands_aside_is_listed_and_comes_back_once(place, requeue, make, way):
    path = make(place)
    before = place.tree()
    code, plan = requeue()
    assert (code, [item["way"] for item in plan["items"]]) == (0, [way])
    assert plan["items"][0]["reason"]
    assert place.tree() == before, "a plan changes nothing"
    code, done = requeue("--all", "--apply")
    assert (code, done["done"]) == (0, 1)
    assert not path.exists()
    after = place.tree()
    assert requeue("--all", "--apply")[1]["done"] == 0
    assert place.tree() == after, "a second time does nothing"
    ship(place)
    assert main(["fsck", "check"]) == 0


def test_a_dead_letter_reaches_the_store_as_the_same_object(place, requeue):
    path = dead_letter(place)
    key, data = path.relative_to(place.state.deadletter), path.read_bytes()
    requeue("--deadletter", "--apply")
    ship(place)
    assert (place.store / key).read_bytes() == data
    assert seqs(place) == [1, 2, 3, 4, 5]
    assert list(place.state.deadletter.iterdir()) == []


def test_a_dead_letter_that_the_store_has_after_all_stays_one_object(place, requeue):
    path = dead_letter(place)
    there = place.store / path.relative_to(place.state.deadletter)
    there.parent.mkdir(parents=True)
    shutil.copy(path, there)
    assert requeue("--all", "--apply")[1]["done"] == 1
    ship(place)
    assert seqs(place) == [1, 2, 3, 4, 5]


def test_a_quarantined_segment_comes_back_with_its_lsns(place, requeue):
    quarantined_segment(place)
    requeue(SEGMENT, "--apply")
    ship(place)
    assert seqs(place) == [1, 2, 3, 4, 5]
    assert {row["lsn"] - row["seq"] for row in read_rows(place.store)} == {1}
    assert not [name for name in place.state.quarantine.iterdir() if not name.name.endswith(".reason")]


def test_a_segment_that_came_in_otherwise_meanwhile_is_still_read_once(place, requeue):
    """A client sends again what was never acknowledged: two store_ids then hold one record."""
    quarantined_open_segment(place)
    builder().seal(place.state)
    ship(place)
    requeue("--all", "--apply")
    ship(place)
    assert len(seqs(place)) > 5, "the store holds some twice"
    table = ranklog.reader.read(str(place.store), "demo", "run-1", keys="loss")
    assert sorted(table["seq"].to_pylist()) == [1, 2, 3, 4, 5]


@pytest.fixture
def serve(place: Place, make_config: Callable[..., Config]) -> Callable[[Callable[[], object]], None]:
    """Let a daemon run over the place until something is true, and stop it."""

    def run(condition: Callable[[], object]) -> None:
        config = make_config(
            state_dir=place.state.root, spool_dir=place.spool, journal_dir=place.journal, to=place.store
        )
        daemon = Inside(config)
        try:
            daemon.step_until(condition, "what the test waits for")
        finally:
            daemon.parts.close()

    return run


def test_the_frames_behind_the_damage_of_a_spool_come_back_with_a_gap_between(place, requeue, serve):
    """Through a real ingest: the readable part was adopted before, and nothing of it comes in again."""
    path = place.spooled()
    wipe_frame(path)
    serve((place.state.quarantine / path.name).exists)
    assert requeue("--quarantine", "--apply")[1]["done"] == 1
    assert path.exists()
    serve(lambda: not path.exists())
    serve(lambda: True)  # Seals what the one before wrote.
    ship(place)
    rows = read_rows(place.store)
    assert sorted(row["seq"] for row in rows if row["key"] == "loss") == [1, 2, 3, 4, 6, 7, 8, 9]
    gaps = [json.loads(row["text"]) for row in rows if row["kind"] == "gap"]
    assert [(gap["first"], gap["last"]) for gap in gaps] == [(5, 5)]


def test_a_spool_whose_writer_went_on_since_stays(place, requeue, serve):
    """Gap rows stand for its records already: a later file of the writer was adopted behind it."""
    path = place.spooled()
    wipe_frame(path)
    place.spooled(first=10, count=2, number=1)
    serve(lambda: not list(place.spool.iterdir()))
    [item] = requeue("--all", "--apply")[1]["items"]
    assert item["why_not"] == "no frame behind its damage can be read, or gap rows stand for them already"


def converted_segment(place: Place) -> Path:
    path = place.segment()
    flip(path, path.stat().st_size // 2 + 60)
    convert_segment(path, place.state)
    ship(place)
    return place.state.quarantine / SEGMENT


def excerpt(place: Place) -> Path:
    made = builder()
    made.batch(WRITER.writer, 6, 2, metrics(6) + b"\0" * 20)
    path = made.seal(place.state)
    convert_segment(path, place.state)
    ship(place)
    return place.state.quarantine / f"{path.name}.excerpt"


def shard_with_other_bytes(place: Place) -> Path:
    path = place.segment()
    convert_segment(path, place.state)
    [shard] = (place.state.outbox / path.name).rglob("*.parquet")
    flip(shard, 100)
    ship(place)
    return place.state.quarantine / shard.name


def damaged_dead_letter(place: Place) -> Path:
    path = dead_letter(place)
    flip(path, 100)
    return path


def dead_letter_of_a_taken_name(place: Place) -> Path:
    path = dead_letter(place)
    there = place.store / path.relative_to(place.state.deadletter)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"other bytes")
    return path


def dead_letter_that_was_compacted_over(place: Place) -> Path:
    path = dead_letter(place)
    key = parse_key(str(path.relative_to(place.state.deadletter)))
    assert key is not None
    there = place.store / format_key(key._replace(last_lsn=key.last_lsn + 10))
    there.parent.mkdir(parents=True)
    there.write_bytes(b"merged")
    return path


def segment_whose_name_is_taken(place: Place) -> Path:
    path = quarantined_segment(place)
    place.segment()
    return path


def later_format(place: Place) -> Path:
    path = quarantined_segment(place)
    path.write_bytes(b"RANKWAL2" + bytes(4) + path.read_bytes()[12:])
    return path


def anything(place: Place) -> Path:
    path = place.state.quarantine / "notes"
    path.write_text("?")
    return path


UNABLE: list[tuple[Callable[[Place], Path], str]] = [
    (converted_segment, "it was converted"),
    (excerpt, "its records are gap rows by now"),
    (shard_with_other_bytes, "must not be uploaded"),
    (damaged_dead_letter, "must not be uploaded"),
    (dead_letter_of_a_taken_name, "other bytes under this name: move that object away first"),
    (dead_letter_that_was_compacted_over, "readers would ignore it: its lsns lie within 1..16"),
    (segment_whose_name_is_taken, "try again when it is uploaded"),
    (later_format, "upgrade ranklog, then requeue it"),
    (anything, "nobody knows what it is"),
]


@pytest.mark.parametrize(("make", "why"), UNABLE, ids=[make.__name__ for make, _ in UNABLE])
def test_what_could_be_read_twice_or_never_stays_and_says_why(place, requeue, make, why):
    path = make(place)
    before = place.tree()
    code, report = requeue(path.name, "--apply")
    assert (code, report["done"]) == (1, 0), "it was named, and could not come back"
    [item] = report["items"]
    assert why in item["why_not"]
    assert place.tree() == before


@pytest.mark.parametrize(("make", "_"), ABLE, ids=[make.__name__ for make, _ in ABLE])
def test_killed_anywhere_and_run_again_it_comes_back_once(tmp_path, monkeypatch, requeue, make, _):
    make(Place(tmp_path / "model"))
    killed, nth, ends = True, 1, []  # The first change is the lock's, which a process that really dies gives back.
    while killed:
        nth += 1
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
                    main(["requeue", "--all", "--apply"])
                    killed = False
                except Killed:
                    pass
            requeue("--all", "--apply")
            told = {name: data for name, data in place.tree().items() if ".repair-" not in name}
            ship(place)
            spooled = [name for name in told if name.startswith("spool/")]
            ends.append((seqs(place), spooled))
        shutil.rmtree(root)
    assert nth > 4, "the calls were counted"
    assert all(end == ends[-1] for end in ends), ends
    assert ends[-1][0] or [parse_name(Path(name).name) for name in ends[-1][1]]


def test_what_came_back_from_a_copy_keeps_its_original(place, requeue):
    path = quarantined_spool(place)
    data = path.read_bytes()
    requeue("--all", "--apply")
    done = path.with_name(path.name + REQUEUED)
    assert done.read_bytes() == data
    assert done.with_name(f"{done.name}.reason").exists()


def test_a_spool_that_somebody_still_holds_stays(place, requeue):
    orphan = open_orphan(quarantined_spool(place), WRITER.writer)
    assert orphan is not None
    [item] = requeue("--all", "--apply")[1]["items"]
    os.close(orphan.fd)
    assert "a process still holds it" in item["why_not"]


def test_only_what_was_not_adopted_goes_to_the_spool_for_the_daemon_may_have_forgotten_the_writer(place, requeue):
    path = quarantined_spool(place)
    requeue("--all", "--apply")
    data = memoryview((place.spool / path.name).read_bytes())
    assert [span.first for span in spans(data)] == [0, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--apply"], "needs to know what"),
        (["x", "--all"], "not both"),
        (["no-such"], "does not stand aside"),
    ],
)
def test_wrong_usage_exits_with_2(place, capsys, arguments, words):
    assert main(["requeue", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_terminal_shows_the_plan_and_the_command(place, capsys):
    dead_letter(place)
    anything(place)
    capsys.readouterr()
    assert main(["requeue"]) == 0
    text = capsys.readouterr().out
    for words in (
        "400: the store said no",
        "goes to the outbox",
        "stays: nobody knows",
        "ranklog requeue --all --apply",
    ):
        assert words in text
