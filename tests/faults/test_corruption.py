"""Matrix rows 20-23 (and the states of 6, 7, 11): damaged bytes in segments, journals, spools, shards and state files.

Every case goes from the bytes on disk to the parquet with the real code (`rot.Yard`): recovery, sealing, adoption,
conversion, upload; then the trainers go on, and the oracle judges. The promise: damage costs the records whose bytes it
hit and no other, each of them lies in a gap row, the original is kept byte for byte, and the daemon goes on by itself.

Sweeps run over every fourth byte here, each flipped in one way; `-m full` runs over each of them in more ways.
"""

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import May, Verdict, judge
from ranklog.cli.status import problems
from ranklog.frame import Kind, spans
from ranklog.stores.dir import DirStore
from ranklogd.ship.counters import ShipperReport
from ranklogd.ship.retention import retain
from ranklogd.ship.shipper import Shipper
from ranklogd.wal.segment import decode_header
from rot import Template, Yard, memory_dir

BATCHES = (("a", 2), ("b", 1), ("a", 1), ("b", 2))
RECORDS = sum(count for _, count in BATCHES)
BATCH_MAX = 2
FULL_BATCHES = (("a", 40), ("b", 3), ("a", 7), ("b", 30), ("a", 1), ("b", 1))


def opened(yard: Yard, batches: Iterable[tuple[str, int]] = BATCHES) -> Path:
    """An open segment, as a killed daemon leaves it; every record in it was acknowledged.

    Its writers are known from before: what is taken from one that is not is told by its first seq alone.
    """
    if not any(trainer.returned for trainer in yard.trainers.values()):
        for name in yard.trainers:
            yard.log(name, 1)
        yard.ship()
    for name, count in batches:
        yard.log(name, count)
    (path,) = yard.state.wal.glob("*.open")
    return path


def sealed(yard: Yard, batches: Iterable[tuple[str, int]] = BATCHES) -> Path:
    """The same sealed, with its empty successor."""
    opened(yard, batches)
    assert yard.half.wal.roll()
    (path,) = yard.state.wal.glob("*.wal")
    return path


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of recoveries tell what they found."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(level)


@pytest.fixture(scope="module", params=[opened, sealed], ids=["open", "sealed"])
def template(request: pytest.FixtureRequest) -> Iterator[Template]:
    unfolded = Template(request.param)
    yield unfolded
    unfolded.close()


@contextmanager
def settled(template: Template, data: bytes) -> Iterator[tuple[Yard, Verdict, ShipperReport]]:
    """A daemon starts over the damaged file, its trainers go on, everything is shipped and judged."""
    yard = template.unfold(data)
    yard.up()
    try:
        yield yard, *yard.finish(May.LOSE_COUNTED)
    finally:
        yard.close()


def lost(verdict: Verdict) -> int:
    return sum(verdict.missing.values())


def flipped(data: bytes, at: int, bits: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= bits
    return bytes(changed)


def sweep_flips(template: Template, places: Iterable[int], bits: Callable[[int], int]) -> None:
    """Flip bits at these places, one after the other, and look what each of them costs."""
    costs: Counter[int] = Counter()
    for at in places:
        damaged = flipped(template.data, at, bits(at))
        with settled(template, damaged) as (yard, verdict, report):
            costs[lost(verdict)] += 1
            if at < 8:
                assert lost(verdict) == 0, "the magic alone is no reason to disbelieve a header that checks"
            else:
                assert damaged in yard.evidence(), f"the original is gone: byte {at}"
                assert report.quarantined_files, "and nobody would know"
    assert max(costs) <= BATCH_MAX, f"more than the batch that was hit: {costs}"
    assert costs[2] < 0.03 * sum(costs.values()), f"one record is what a flipped byte costs, with few exceptions: {costs}"
    assert costs[0] > 0
    assert costs[1] > 0


# Segments: rows 21 and 22


def test_a_flipped_byte_anywhere_in_a_segment_costs_the_record_it_hit_and_keeps_the_original(template: Template) -> None:
    sweep_flips(template, range(1, len(template.data), 4), lambda at: 0xFF if at % 8 == 1 else 1 << (at // 8) % 8)


@pytest.mark.full
@pytest.mark.parametrize("bits", [0xFF, 0x01, 0x80])
def test_every_byte_of_a_segment_may_be_flipped(template: Template, bits: int) -> None:
    sweep_flips(template, range(len(template.data)), lambda _: bits)


def sweep_cuts(template: Template, sizes: Iterable[int]) -> None:
    """Cut the file at these sizes, shortest first: what is whole stays, the rest is counted."""
    _, start = decode_header(memoryview(template.data))
    costs = []
    for size in sizes:
        if size <= start:
            # With the whole header went what was known of the writers: their seqs alone tell what is missing.
            with _survived(template, template.data[:size]):
                continue
        with settled(template, template.data[:size]) as (_, verdict, _):
            costs.append(lost(verdict))
    assert costs == sorted(costs, reverse=True), "a longer piece never costs more"
    assert costs[-1] <= BATCH_MAX


def test_a_segment_cut_at_any_length_keeps_what_is_whole_and_counts_the_rest(template: Template) -> None:
    sweep_cuts(template, sorted({0, 1, 8, 15, 16, *range(90, len(template.data), 19), len(template.data) - 1}))


@pytest.mark.full
def test_a_segment_may_be_cut_at_every_length(template: Template) -> None:
    sweep_cuts(template, range(len(template.data)))


def sweep_zeros(template: Template, sizes: Iterable[int]) -> None:
    """Zero the tail, as a power cut leaves blocks that were never written."""
    _, start = decode_header(memoryview(template.data))
    costs: list[int] = []
    for size in sizes:
        left = len(template.data) - size
        damaged = template.data[:left] + bytes(size)
        if left <= start:
            with _survived(template, damaged):
                continue
        with settled(template, damaged) as (yard, verdict, _):
            costs.append(lost(verdict))
            assert not template.victim.name.endswith(".wal") or not lost(verdict) or damaged in yard.evidence()
    assert costs == sorted(costs), "more zeros never cost less"
    assert 0 < costs[0] <= BATCH_MAX


def test_a_tail_of_zeros_of_any_length_is_counted(template: Template) -> None:
    sweep_zeros(template, range(1, len(template.data), 47))


@pytest.mark.full
def test_a_tail_of_zeros_of_every_length_is_counted(template: Template) -> None:
    sweep_zeros(template, range(1, len(template.data)))


def test_a_sector_of_zeros_in_the_middle_is_counted_and_what_follows_is_kept(template: Template) -> None:
    for at in range(0, len(template.data), 512):
        end = min(at + 512, len(template.data))
        damaged = template.data[:at] + bytes(end - at) + template.data[end:]
        with settled(template, damaged) as (_, verdict, _):
            # Up to three batches lie in a sector of so small a segment; the last one reads as a write cut short.
            assert lost(verdict) < RECORDS


@pytest.mark.parametrize("tail", [b"\xff" * 700, bytes(4096), b"RANKWAL1" + bytes(90), b"\x01"])
def test_garbage_behind_the_last_entry_costs_nothing(template: Template, tail: bytes) -> None:
    for appended in (tail, tail + template.data[-300:]):
        with settled(template, template.data + appended) as (_, verdict, _):
            assert lost(verdict) == 0


def scribbled(template: Template, seed: int, most: int) -> bytes:
    """Overwrite, remove or double one to `most` stretches."""
    rng = random.Random(seed)
    data = bytearray(template.data)
    for _ in range(rng.randint(1, most)):
        at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 40, 300))
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == 1:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == 2:
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
        data = data or bytearray(1)
    return bytes(data)


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=40)
def test_no_damage_at_all_makes_up_a_record_or_stops_the_daemon(template: Template, seed: int) -> None:
    with _survived(template, scribbled(template, seed, 3)):
        pass


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", [opened, sealed])
def test_a_thousand_kinds_of_damage_to_larger_segments(make: Callable[..., Path]) -> None:
    large = Template(lambda yard: make(yard, FULL_BATCHES))
    try:
        for seed in range(1000):
            with _survived(large, scribbled(large, seed, 5)):
                pass
    finally:
        large.close()


@contextmanager
def _survived(template: Template, data: bytes) -> Iterator[Yard]:
    """As `settled`, but what many wounds took may be told by lsn only: a writer's gap needs a frame that names it."""
    yard = template.unfold(data)
    yard.up()
    try:
        for name in yard.trainers:
            yard.log(name, 1)
        report = yard.ship()
        assert (report.last_error, report.backlog_segments, report.backlog_shards) == ("", 0, 0)
        found = Counter((row["writer"], row["seq"], row["key"]) for row in yard.rows() if row["kind"] != "gap")
        assert max(found.values(), default=1) == 1, "twice"
        for name, trainer in yard.trainers.items():
            assert found[trainer.start.writer, trainer.next_seq - 1, "n"] == 1, f"what {name} logged afterwards is missing"
        yield yard
    finally:
        yard.close()


def test_of_two_open_segments_the_older_counts_as_whole_however_damaged() -> None:
    """A kill in the middle of a roll: the younger one's header says that all of the older was durable."""

    def rolled(yard: Yard) -> Path:
        path = sealed(yard)
        return path.rename(path.with_name(f"{path.name[:16]}.open"))

    template = Template(rolled)
    try:
        for at in range(105, len(template.data), 37):
            damaged = flipped(template.data, at, 0x10)
            with settled(template, damaged) as (yard, verdict, _):
                assert lost(verdict) <= BATCH_MAX
                assert damaged in yard.evidence()
        for size in range(200, len(template.data), 150):
            with settled(template, template.data[:size]) as (yard, _, _):
                assert template.data[:size] in yard.evidence()
    finally:
        template.close()


def test_a_segment_that_cannot_be_read_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    """Row 20: /proc/self/mem answers a read at 0 with EIO, as a failing disk does."""
    yard = Yard(tmp_path / "yard")
    path = sealed(yard)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    yard.log("a", 1)
    yard.half.wal.roll()
    clock = [0.0]
    shipper = Shipper(yard.config, clock=lambda: clock[0])
    for _ in range(10):
        shipper.step()
        clock[0] += 1000.0
    assert not list(yard.state.wal.glob("*.wal")), "tried a few times, then out of the way"
    assert os.readlink(yard.state.quarantine / path.name) == "/proc/self/mem"
    assert "damaged" in (yard.state.quarantine / f"{path.name}.reason").read_text()
    (gap,) = [json.loads(str(row["text"])) for row in yard.rows() if row["kind"] == "gap"]
    assert (gap["first"], gap["last"]) == (5, 4 + RECORDS), "whose they were nobody can tell: their lsns are counted"
    assert sorted(row["seq"] for row in yard.rows() if row["key"] == "n") == [1, 1, 5]
    assert shipper.step().damaged_stretches == 1
    yard.close()


# Journal and spool files


def spooled(kind: str) -> Callable[[Yard], Path]:
    """Two files of a dead trainer, the first of them to be damaged; another trainer's beside them."""

    def make(yard: Yard) -> Path:
        path = yard.leave("a", kind, 0, 3, room=2048 if kind == "journal" else 0)
        yard.leave("a", kind, 1, 2)
        yard.leave("b", kind, 0, 2)
        return path

    return make


@pytest.fixture(scope="module", params=["spool", "journal"])
def left(request: pytest.FixtureRequest) -> Iterator[Template]:
    unfolded = Template(spooled(request.param))
    yield unfolded
    unfolded.close()


def adopt_damaged(left: Template, data: bytes) -> int:
    """Adopt files of which the first is damaged; return how many records that cost."""
    yard = left.unfold(data)
    yard.up()
    name = left.victim.name
    try:
        adopter = yard.adopt()
        stays = (yard.root / left.victim).exists()
        report = yard.ship()
        # Nobody had acknowledged what is in a file that waits.
        accounts = {name: account._replace(durable=0) for name, account in yard.accounts().items()}
        # Where the first frame of the first file is not whole, nobody may know that the writer began before the second.
        frame_end = first_frame_end(left)
        uncounted = stays or data[:frame_end] != left.data[:frame_end]
        verdict = judge(yard.rows(), accounts, May.LOSE_UNACKNOWLEDGED if uncounted else May.LOSE_COUNTED)
        assert set(verdict.missing) <= {"a"}, "the neighbour is whole"
        if stays:
            # Its own start frame is damaged: nobody can tell whose records these are. They wait for a person.
            assert (yard.root / left.victim).read_bytes() == data
            assert any(name in path for path in adopter.refused), "and nobody would know"
        elif lost(verdict) and name.endswith(".spool") and not is_whole(data):
            assert data in yard.evidence(), "the original is gone"
            assert adopter.quarantined == 1
            assert report.quarantined_files == 1
        assert len(list(yard.root.rglob(f"{name}*"))) <= 2
        return lost(verdict)
    finally:
        yard.close()


def is_whole(data: bytes) -> bool:
    """Whether nothing but frames is in a file: then nobody can see that it was longer. Zeros alone are no file, either."""
    return max((span.end for span in spans(memoryview(data))), default=0) == len(data) or not data.strip(b"\0")


def first_frame_end(left: Template) -> int:
    """Where the first frame behind the start frame ends."""
    first, second, *_ = spans(memoryview(left.data))
    assert first.kind == Kind.START
    return second.end


def sweep_files(left: Template, places: Iterable[int]) -> None:
    costs: Counter[int] = Counter()
    for at in places:
        cost = adopt_damaged(left, flipped(left.data, at, 0xFF if at % 2 else 1 << at % 8))
        if at >= first_frame_end(left):
            costs[cost] += 1
    # Only a flipped size costs what is behind it in that file: nobody can tell where the next frame begins.
    assert max(costs) <= 2, costs
    assert costs[1] > 5 * costs[2], costs


def test_a_flipped_byte_in_a_journal_or_spool_file_is_counted_and_the_neighbours_are_whole(left: Template) -> None:
    sweep_files(left, range(0, len(left.data.rstrip(b"\0")), 5))


@pytest.mark.full
def test_every_byte_of_a_journal_or_spool_file_may_be_flipped(left: Template) -> None:
    sweep_files(left, range(len(left.data)))


def test_a_journal_or_spool_file_cut_at_any_length_is_counted(left: Template) -> None:
    size = len(left.data.rstrip(b"\0"))
    for cut in sorted({0, 1, 7, 8, *range(9, size, 29), size - 1}):
        adopt_damaged(left, left.data[:cut])
        adopt_damaged(left, left.data[:cut] + bytes(size - cut))


@pytest.mark.full
def test_a_journal_or_spool_file_may_be_cut_at_every_length(left: Template) -> None:
    for cut in range(len(left.data)):
        adopt_damaged(left, left.data[:cut])


# Shards and state files: row 23


@pytest.fixture
def yard() -> Iterator[Yard]:
    one = Yard(memory_dir("yard") / "yard")
    yield one
    one.close()
    one.root.parent.rmdir()


def converted(yard: Yard) -> tuple[Shipper, list[Path]]:
    """Two segments converted, nothing uploaded."""
    for _ in range(2):
        opened(yard)
        yard.half.wal.roll()
    shipper = Shipper(yard.config)
    while shipper.convert_one() is not None:
        continue
    shards = sorted(yard.state.outbox.rglob("*.parquet"))
    assert len(shards) == 2
    return shipper, shards


def told(yard: Yard, report: ShipperReport) -> list[str]:
    """What `ranklog status` tells a person to see to."""
    from dataclasses import asdict

    quiet = {"full": "", "poisoned_segments": 0, "refused": {}, "adoption_refused": {}, "offline_waiting": 0}
    return problems({**quiet, "shipper": asdict(report), "state_dir": str(yard.state.root)})


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "zeros", "longer", "other"])
def test_a_damaged_shard_is_never_uploaded_but_kept_and_told(yard: Yard, how: str) -> None:
    shipper, (bad, good) = converted(yard)
    data = bad.read_bytes()
    damaged = {
        "flip": flipped(data, len(data) // 2, 1), "cut": data[:-1], "empty": b"", "zeros": bytes(len(data)),
        "longer": data + b"\0", "other": good.read_bytes(),
    }[how]  # fmt: skip
    bad.write_bytes(damaged)
    name = good.name
    report = shipper.step()
    assert name in {path.name for path in yard.store.rglob("*.parquet")}
    assert bad.name not in {path.name for path in yard.store.rglob("*.parquet")}
    assert yard.evidence() == [damaged]
    assert "were not uploaded" in next(yard.state.quarantine.glob("*.reason")).read_text()
    assert (report.quarantined_files, report.backlog_shards) == (1, 0)
    assert any("1 damaged file set aside" in line for line in told(yard, report))
    assert not list(yard.state.outbox.iterdir()), "tried once, not again and again"


def test_every_byte_of_a_shard_is_under_the_hash_in_its_name(yard: Yard) -> None:
    shipper, (bad, _) = converted(yard)
    data = bad.read_bytes()
    for count, at in enumerate(range(0, len(data), max(1, len(data) // 40)), start=1):
        bad.parent.mkdir(parents=True, exist_ok=True)
        bad.write_bytes(flipped(data, at, 1))
        report = shipper.step()
        assert report.quarantined_files == count, "evidence is not overwritten by evidence of the same name"
        assert bad.name not in {path.name for path in yard.store.rglob("*.parquet")}
    bad.parent.mkdir(parents=True, exist_ok=True)
    bad.write_bytes(data)
    yard.finish(May.LOSE_NOTHING)


def test_a_copy_that_came_out_shorter_in_the_store_is_no_reason_to_let_the_original_go(yard: Yard) -> None:
    class Losing(DirStore):
        """A store that says it worked and has half of it."""

        def put(self, uploads):  # type: ignore[no-untyped-def]
            done = super().put(uploads)
            for upload in uploads:
                os.truncate(self.root / upload.key, 100)
            return done

    _, shards = converted(yard)
    kept = {path.read_bytes() for path in shards}
    shipper = Shipper(yard.config, store=Losing(yard.store))
    report = shipper.step()
    assert {path.read_bytes() for path in yard.state.deadletter.rglob("*.parquet")} == kept
    assert report.dead_letters == 2
    assert any("2 shards refused" in line for line in told(yard, report))


@pytest.mark.parametrize("name", ["shipper.json", "reserve", "lock"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"{", b"[]", b'{"uploaded_shards": "many"}'])
def test_no_content_of_a_state_file_stops_anything(yard: Yard, name: str, content: bytes) -> None:
    opened(yard)
    yard.ship()
    yard.down()
    (yard.state.root / name).write_bytes(content)
    yard.up()
    yard.finish(May.LOSE_NOTHING)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"begin oom_kills=-1\n", b"raised x\n" * 1000, b"begin oom_kills=0\nraised x\n" * 2]
)
def test_no_content_of_a_tries_file_sends_a_sound_segment_to_quarantine(yard: Yard, content: bytes) -> None:
    path = sealed(yard)
    path.with_suffix(".tries").write_bytes(content)
    yard.finish(May.LOSE_NOTHING)
    assert not yard.evidence()


# The states that a kill leaves behind: rows 6, 7, 11 and 13


def test_a_half_written_shard_is_built_again_to_the_same_bytes(yard: Yard) -> None:
    path = sealed(yard)
    content = path.read_bytes()
    shipper = Shipper(yard.config)
    shipper.convert_one()
    (shard,) = yard.state.outbox.rglob("*.parquet")
    data, key = shard.read_bytes(), shard.relative_to(yard.state.outbox / path.name)
    # As if killed in the middle of writing it: the segment is still there, its shards only half, under .tmp.
    (yard.state.outbox / path.name).rename(yard.state.outbox / f"{path.name}.tmp")
    (yard.state.outbox / f"{path.name}.tmp" / key).write_bytes(data[: len(data) // 2])
    path.write_bytes(content)
    yard.finish(May.LOSE_NOTHING)
    assert (yard.store / key).read_bytes() == data


def test_a_segment_whose_shards_are_committed_is_not_converted_twice(yard: Yard) -> None:
    path = sealed(yard)
    content = path.read_bytes()
    Shipper(yard.config).convert_one()
    path.write_bytes(content)  # The rename was durable, the unlink was not.
    verdict, _ = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == RECORDS + 4
    assert not path.exists()


def test_a_shard_that_comes_back_after_its_upload_goes_to_the_same_name_again(yard: Yard) -> None:
    shipper, shards = converted(yard)
    before = {path: path.read_bytes() for path in shards}
    shipper.step()
    for path, data in before.items():  # Uploaded and verified; the unlink was lost in a power cut.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    yard.finish(May.LOSE_NOTHING)
    assert len(list(yard.store.rglob("*.parquet"))) == 4


def test_retention_looks_at_the_cache_alone(yard: Yard) -> None:
    """Row 13: what is not verified is in the outbox, in quarantine/ or in deadletter/, and stays whatever its age."""
    _, shards = converted(yard)
    (yard.state.quarantine / "evidence").write_bytes(b"x")
    (yard.state.deadletter / "letter.parquet").write_bytes(b"x")
    for path in (*shards, yard.state.quarantine / "evidence", yard.state.deadletter / "letter.parquet"):
        os.utime(path, (0, 0))
    cached = yard.state.cache / "v1" / "old.parquet"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    os.utime(cached, (0, 0))
    assert retain(yard.state.cache, age_max_s=1.0, size_max=0) == 1
    assert not cached.exists()
    assert all(path.exists() for path in shards)
    verdict, _ = yard.finish(May.LOSE_NOTHING)
    assert verdict.delivered == 2 * RECORDS + 4
