import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranklog.errors import StoreError
from ranklog.layout import Lsn, ShardKey, format_key
from ranklog.stores import ObjectInfo, Upload, base
from ranklog.stores.base import Allowance
from ranklog.stores.dir import DirStore
from ranklogd.config import Config
from ranklogd.ship.holds import ASKED_SPREAD, PROBE_S, RETRY_AFTER_MAX_S
from ranklogd.ship.upload import HURRY_S, Uploader
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import sealed_name
from segments import STORE_ID, make_state


class FakeStore:
    """A store that does as it is told: the seam at which every failure of a real one can be had on demand."""

    url = "mem://x"
    allowance: Allowance | None = None

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls: list[list[str]] = []
        self.broken: StoreError | None = None
        """The whole call fails."""
        self.refuse: dict[str, StoreError] = {}
        """Part of a key -> what becomes of keys that hold it."""
        self.lose_reply = False
        """Store everything, then fail."""
        self.lie = False
        """Say that it worked, and store nothing."""
        self.silent: set[str] = set()
        self.head_error: StoreError | None = None
        self.sizes: dict[str, int] = {}
        self.poison: dict[str, StoreError] = {}
        """Part of a key -> how the whole call fails that holds such a key."""
        self.before: Callable[[Sequence[Upload]], None] = lambda _: None
        """Called first by each put."""

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        self.calls.append([upload.key for upload in uploads])
        self.before(uploads)
        for part, error in self.poison.items():
            if any(part in upload.key for upload in uploads):
                raise error
        if self.broken is not None and not self.lose_reply:
            raise self.broken
        results: dict[str, StoreError | None] = {}
        for source, key in uploads:
            results[key] = next((error for part, error in self.refuse.items() if part in key), None)
            if results[key] is None and not self.lie:
                data = source.read_bytes()
                if self.objects.setdefault(key, data) != data:
                    results[key] = StoreError("other bytes", permanent=True)
        if self.broken is not None:
            raise self.broken
        return {key: error for key, error in results.items() if key not in self.silent}

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        if self.head_error is not None:
            raise self.head_error
        sizes = {key: len(data) for key, data in self.objects.items()} | self.sizes
        return {key: ObjectInfo(key, sizes[key]) for key in keys if key in sizes}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from ()

    def get(self, key: str, target: Path) -> None:
        raise NotImplementedError

    def delete(self, keys: Sequence[str]) -> None:
        raise NotImplementedError


AWAY = StoreError("the store is away", permanent=False)
NEVER = StoreError("400 bad request", permanent=True)


class Clock:
    """Time that passes only when told."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class House:
    """A state directory with an outbox, a store, and an uploader between them."""

    def __init__(self, root: Path, **options: object) -> None:
        self.state = make_state(root)
        self.store = FakeStore()
        self.clock = Clock()
        self.config = Config(state_dir=root, to=str(options.pop("to", "/nowhere")), **options)  # type: ignore[arg-type]
        self.uploader = self.restart()
        self.made: dict[str, bytes] = {}

    def restart(self) -> Uploader:
        self.uploader = Uploader(self.store, self.state, self.config, clock=self.clock, dice=lambda: 1.0)
        return self.uploader

    def add(self, segment: int, run: str = "r", shards: int = 1, project: str = "p") -> list[str]:
        """Put shards of segment number `segment` into the outbox; return their keys."""
        keys = []
        for i in range(shards):
            first = segment * 100 + i
            data = f"{project} {run} {first}".encode()
            sha = hashlib.sha256(data).hexdigest()[:12]
            key = format_key(ShardKey(project, run, "n", STORE_ID, Lsn(first), Lsn(first), sha))
            path = self.state.outbox / sealed_name(segment * 100, segment * 100 + 99) / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.made[key] = data
            keys.append(key)
        return keys

    def drain(self, limit: int = 100) -> float | None:
        """Step until it would wait."""
        for _ in range(limit):
            wait_s = self.uploader.step()
            if wait_s != 0:
                return wait_s
        raise AssertionError("it never came to rest")

    def waiting(self) -> list[str]:
        return sorted(str(path.relative_to(self.state.outbox)).partition("/")[2] for path in self.shards())

    def shards(self) -> list[Path]:
        return list(self.state.outbox.rglob("*.parquet"))

    def left(self) -> list[str]:
        return sorted(path.name for path in self.state.outbox.iterdir())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "state", upload_batch_max=4)


@pytest.fixture
def far_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """Its store is not a directory, so it keeps a cache."""
    monkeypatch.setitem(base._MODULES, "mem", "no.module")
    return House(tmp_path / "state", upload_batch_max=4, to="mem://x")


def test_a_shard_goes_to_the_store_and_leaves_nothing_in_the_outbox(house):
    [key] = house.add(1)
    assert house.drain() is None
    assert house.store.objects == {key: house.made[key]}
    assert house.left() == []
    assert (house.uploader.uploaded_shards, house.uploader.uploaded_bytes) == (1, len(house.made[key]))
    assert list(house.state.cache.rglob("*")) == [], "a directory store is its own cache"


def test_the_oldest_segment_goes_first_in_batches(house):
    third, first, second = house.add(3, shards=3), house.add(1, shards=3), house.add(2, shards=3)
    house.drain()
    assert house.store.calls == [first + second[:1], second[1:] + third[:2], third[2:]]


def test_a_segment_is_left_alone_while_its_wal_file_is_there_or_it_is_not_finished(house):
    house.add(1)
    name = house.left()[0]
    (house.state.wal / name).write_bytes(b"still here")
    house.add(2)
    (house.state.outbox / house.left()[1]).rename(house.state.outbox / f"{house.left()[1]}.tmp")
    assert house.drain() is None
    assert house.store.calls == []
    assert len(house.left()) == 2
    (house.state.wal / name).unlink()
    house.drain()
    assert len(house.store.objects) == 1


def test_with_nothing_to_do_there_is_nothing_to_wait_for(house):
    assert house.uploader.step() is None
    assert house.uploader.next_try_s() == 0


def test_empty_segments_are_removed_as_a_crash_may_leave_them(house):
    (house.state.outbox / sealed_name(1, 2) / "v1" / "project_id=p").mkdir(parents=True)
    house.drain()
    assert house.left() == []


def test_files_that_somebody_else_removed_are_no_trouble(house):
    house.add(1, shards=2)
    house.add(2)
    house.uploader.outbox.refresh()
    assert house.uploader.outbox.totals().shards == 3
    for path in house.shards():
        path.unlink()
    assert house.drain() is None
    assert house.uploader.outbox.totals() == (0, 0, 0)
    assert house.left() == []


def test_bad_bytes_are_never_uploaded_but_kept_with_their_reason_while_others_flow(house):
    bad, good = house.add(1, shards=2)
    next(house.state.outbox.glob(f"*/{bad}")).write_bytes(b"rotten")
    house.drain()
    assert list(house.store.objects) == [good]
    kept = house.state.quarantine / Path(bad).name
    assert kept.read_bytes() == b"rotten"
    assert "were not uploaded" in kept.with_name(f"{kept.name}.reason").read_text()
    assert house.left() == []


def test_evidence_is_not_overwritten_by_evidence_of_the_same_name(house):
    for data in (b"rotten", b"more rotten"):
        [key] = house.add(1)
        next(house.state.outbox.glob(f"*/{key}")).write_bytes(data)
        house.drain()
    originals = [p.read_bytes() for p in house.state.quarantine.iterdir() if not p.name.endswith(".reason")]
    assert sorted(originals) == [b"more rotten", b"rotten"]


def test_a_file_that_is_no_shard_is_set_aside(house):
    house.add(1)
    (house.state.outbox / house.left()[0] / "v1" / "notes.txt").write_text("hello")
    house.drain()
    assert len(house.store.objects) == 1
    assert (house.state.quarantine / "notes.txt").read_text() == "hello"
    assert house.left() == []


@pytest.mark.parametrize("way", ["whole call", "each key", "no reply", "silent", "lie", "head fails"])
def test_a_transient_error_is_tried_again_for_ever_with_growing_waits_and_then_everything_arrives_once(house, way):
    keys = house.add(1, shards=3)
    store = house.store
    store.broken = AWAY if way in ("whole call", "no reply") else None
    store.lose_reply = way == "no reply"
    store.refuse = dict.fromkeys(keys, AWAY) if way == "each key" else {}
    store.silent = set(keys) if way == "silent" else set()
    store.lie = way == "lie"
    store.head_error = AWAY if way == "head fails" else None
    waits = []
    for _ in range(30):
        wait_s = house.drain()
        assert wait_s is not None
        waits.append(wait_s)
        house.clock.now_s += wait_s
    assert waits[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert set(waits[9:]) == {300}
    assert len(store.calls) == 30
    assert house.waiting() == sorted(keys)
    assert house.uploader.last_error_class == "transient"
    store.broken, store.refuse, store.silent, store.lie, store.head_error = None, {}, set(), False, None
    assert house.drain() is None
    assert store.objects == house.made
    assert house.left() == []
    assert house.uploader.last_error == ""


def test_before_its_time_nothing_is_tried_and_other_news_do_not_change_that(house):
    house.store.broken = AWAY
    house.add(1)
    assert house.drain() == 1
    house.add(2)
    house.clock.now_s += 0.5
    assert house.drain() == 0.5
    assert len(house.store.calls) == 1
    assert house.uploader.next_try_s() == 0.5


def test_a_run_that_fails_does_not_hold_up_another_however_much_of_it_waits(house):
    stuck = house.add(1, run="stuck", shards=50)
    flows = house.add(2, run="flows", shards=6)
    house.store.refuse = {"run_id=stuck": AWAY}
    house.drain()
    assert sorted(house.store.objects) == sorted(flows)
    more = house.add(3, run="flows", shards=2)
    house.drain()
    assert sorted(house.store.objects) == sorted(flows + more)
    assert house.waiting() == sorted(stuck)
    assert sum(any("stuck" in key for key in call) for call in house.store.calls) == 1


def test_once_one_run_that_failed_succeeds_no_other_waits_any_longer(house):
    house.store.broken = AWAY
    house.add(1, run="a")
    house.drain()
    house.clock.now_s += 0.9
    house.add(2, run="b")
    house.drain()
    house.clock.now_s += 0.2  # The turn of a, which waits for 1 s; b has 0.8 s to go.
    house.store.broken = None
    assert house.drain() is None
    assert len(house.store.objects) == 2


def test_order_within_a_run_is_kept_over_an_outage(house):
    house.store.broken = AWAY
    keys = [key for segment in range(1, 8) for key in house.add(segment, shards=2)]
    house.drain()
    house.store.broken = None
    house.store.calls.clear()
    house.uploader.hurry()
    house.drain()
    assert [key for call in house.store.calls for key in call] == keys


def test_hurry_ends_every_wait(house):
    house.store.broken = AWAY
    house.add(1)
    for _ in range(10):
        house.clock.now_s += house.drain()
        house.drain()
    assert house.drain() > 100
    house.store.broken = None
    house.uploader.hurry()
    assert house.drain() is None
    assert len(house.store.objects) == 1


@pytest.mark.parametrize("way", ["put", "head", "other size"])
def test_what_the_store_will_never_take_is_kept_as_a_dead_letter_and_the_others_flow(house, way):
    bad, *good = house.add(1, shards=3)
    if way == "put":
        house.store.refuse = {bad: NEVER}
    elif way == "head":
        house.store.head_error = NEVER
        good = []
    else:
        house.store.sizes = {bad: 3}
    assert house.drain() is None
    assert house.left() == []
    dead = house.state.deadletter / bad
    assert dead.read_bytes() == house.made[bad]
    reason = dead.with_name(f"{dead.name}.reason").read_text()
    assert ("3 bytes in mem://x" if way == "other size" else "400 bad request") in reason
    assert all((house.state.deadletter / key).exists() == (key not in good) for key in house.made)
    assert house.uploader.last_error_class in ("permanent", "")


def test_a_directory_store_that_holds_other_bytes_under_the_name_keeps_them_and_we_keep_ours(tmp_path):
    house = House(tmp_path / "state")
    [key] = house.add(1)
    there = tmp_path / "store" / key
    there.parent.mkdir(parents=True)
    there.write_bytes(b"somebody else's")
    house.store = DirStore(tmp_path / "store")  # type: ignore[assignment]
    house.restart()
    house.drain()
    assert there.read_bytes() == b"somebody else's"
    assert (house.state.deadletter / key).read_bytes() == house.made[key]


def test_a_verified_shard_goes_to_the_cache_where_the_store_is_elsewhere(far_house):
    [key] = far_house.add(1)
    os.utime(far_house.shards()[0], (1, 1))  # Its age in the cache counts from its upload: an outage may last days.
    far_house.drain()
    assert (far_house.state.cache / key).read_bytes() == far_house.made[key]
    assert far_house.store.objects == far_house.made
    assert far_house.left() == []
    assert (far_house.state.cache / key).stat().st_mtime > 1e9


def test_no_cache_is_kept_if_it_may_hold_nothing(far_house):
    far_house.config = replace(far_house.config, cache_size_bytes=0)
    far_house.restart()
    far_house.add(1)
    far_house.drain()
    assert list(far_house.state.cache.rglob("*")) == []
    assert far_house.left() == []


def test_a_new_uploader_takes_up_where_the_last_one_was_interrupted(house):
    house.add(1, shards=6)
    assert house.uploader.step() == 0
    assert len(house.waiting()) == 2
    house.restart()
    house.drain()
    assert house.store.objects == house.made


def test_the_totals_follow_the_files(house):
    house.add(1, run="a", shards=3)
    house.add(2, run="b", shards=3)
    outbox = house.uploader.outbox
    outbox.refresh()
    assert outbox.totals() == (2, 6, sum(map(len, house.made.values())))
    assert outbox.first_segment() == sealed_name(100, 199)
    house.uploader.step()
    assert outbox.totals()[:2] == (1, 2)
    assert outbox.first_segment() == sealed_name(200, 299)
    house.uploader.step()
    assert outbox.totals() == (0, 0, 0)
    assert outbox.first_segment() is None


# Calls that fail as a whole


def test_a_call_that_fails_as_a_whole_is_not_followed_by_one_for_each_run(house):
    house.store.broken = AWAY
    for number in range(1, 21):
        house.add(number, run=f"r{number}")
    assert house.drain() == 1
    assert len(house.store.calls) == 1
    house.clock.now_s += 1
    assert house.drain() == 2
    assert len(house.store.calls) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("culprits", [[0], [17], [63], [5, 6, 40]], ids=str)
def test_the_one_shard_that_makes_a_call_fail_for_good_is_found_and_the_others_arrive(tmp_path, status, culprits):
    house = House(tmp_path / "state", upload_batch_max=64)
    keys = house.add(1, shards=64)
    bad = {keys[i] for i in culprits}
    house.store.poison = dict.fromkeys(bad, StoreError(f"{status} not like this", permanent=True))
    assert house.drain() is None
    assert set(house.store.objects) == set(keys) - bad
    assert house.store.objects.items() <= house.made.items()
    for key in keys:
        dead = house.state.deadletter / key
        assert dead.exists() == (key in bad)
        if key in bad:
            assert dead.read_bytes() == house.made[key]
            assert str(status) in dead.with_name(f"{dead.name}.reason").read_text()
    assert len(house.store.calls) <= 20 * len(culprits), "and not one for each shard"
    assert house.left() == []


def test_after_a_culprit_was_found_calls_grow_to_their_full_size_again(house):
    bad, *_ = house.add(1, shards=4)
    house.store.poison = {bad: NEVER}
    house.add(2, shards=12)
    house.drain()
    assert [len(call) for call in house.store.calls] == [4, 2, 1, 1, 2, 4, 4, 4]


def test_while_a_culprit_is_looked_for_nothing_is_set_aside_and_the_status_says_what_goes_on(house):
    house.store.poison = {"run_id=r": NEVER}
    house.add(1, shards=4)
    house.uploader.step()
    assert len(house.waiting()) == 4
    assert house.uploader.last_error_class == "permanent"
    assert house.uploader.last_error == "one of 4 shards is looked for: 400 bad request"


def test_a_line_too_slow_for_a_full_call_gets_smaller_ones_and_everything_through(tmp_path):
    house = House(tmp_path / "state", upload_batch_max=64, upload_deadline_s=100)

    def crawl(uploads: Sequence[Upload]) -> None:
        needed_s = sum(upload.source.stat().st_size for upload in uploads)  # A byte a second.
        house.clock.now_s += min(needed_s, 100)
        if needed_s > 100:
            raise StoreError("no answer within 100 s", permanent=False)

    house.store.before = crawl
    house.add(1, shards=64)
    for _ in range(30):
        if (wait_s := house.drain()) is None:
            break
        house.clock.now_s += wait_s
    assert house.store.objects == house.made
    assert max(map(len, house.store.calls)) == 64
    assert len(house.store.calls) <= 25


def test_a_store_that_is_merely_away_does_not_make_later_calls_smaller(house):
    house.store.broken = AWAY
    house.add(1, shards=8)
    for _ in range(8):
        house.clock.now_s += house.drain()
    house.store.broken = None
    house.drain()
    assert [len(call) for call in house.store.calls] == [4] * 10


# What each kind of error says and does


@pytest.mark.parametrize(
    ("error", "kind", "next_s"),
    [
        (AWAY, "transient", 1),
        (StoreError("401", permanent=False, held=True), "held", PROBE_S),
        (StoreError("503", permanent=False, retry_after_s=77.0), "transient", 77 * (1 + ASKED_SPREAD)),
        (StoreError("429", permanent=False, retry_after_s=86_400.0), "transient", RETRY_AFTER_MAX_S * (1 + ASKED_SPREAD)),
        (StoreError("429", permanent=False, retry_after_s=math.inf), "transient", RETRY_AFTER_MAX_S * (1 + ASKED_SPREAD)),
    ],
    ids=["transient", "held", "asked", "asked for a day", "asked for ever"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["whole call", "one shard"])
def test_the_status_names_the_kind_of_an_error_and_when_the_next_try_is(house, error, kind, next_s, way):
    house.add(1)
    if way == "whole call":
        house.store.broken = error
    else:
        house.store.refuse = {"run_id=r": error}
    assert house.drain() == pytest.approx(next_s)
    assert house.uploader.last_error == str(error)
    assert house.uploader.last_error_class == kind
    assert house.uploader.next_try_s() == pytest.approx(next_s)
    house.clock.now_s += next_s + 1e-6
    house.store.broken, house.store.refuse = None, {}
    assert house.drain() is None
    assert (house.uploader.last_error, house.uploader.last_error_class, house.uploader.next_try_s()) == ("", "", 0)


def test_a_refused_login_is_probed_once_a_minute_and_uploads_go_on_once_it_is_good_again(house):
    keys = house.add(1, shards=6)
    house.store.broken = StoreError("401 log in again", permanent=False, held=True)
    for _ in range(60):
        house.clock.now_s += house.drain()
    assert len(house.store.calls) == 60
    assert house.clock.now_s == 1000 + 60 * PROBE_S
    assert house.waiting() == sorted(keys)
    house.store.broken = None
    assert house.drain() is None
    assert house.store.objects == house.made


# A store that counts calls


@pytest.fixture
def paced_house(tmp_path: Path) -> House:
    return House(tmp_path / "state", to="hf://buckets/me/logs", upload_interval_min_s=10.0, cache_size_bytes=0)


def run(house: House, until_s: float, *, each_s: float = 30.0, run_of: Callable[[int], str] = lambda _: "r") -> None:
    """Let time pass to `until_s` with a new shard every `each_s`, stepping when the uploader wants to."""
    number = round(house.clock.now_s / each_s)
    while house.clock.now_s < until_s:
        number += 1
        house.add(number, run=run_of(number))
        next_s = number * each_s
        while house.clock.now_s < next_s:
            wait_s = house.drain()
            house.clock.now_s = min(next_s, house.clock.now_s + (math.inf if wait_s is None else wait_s))


def test_a_backlog_makes_larger_calls_and_not_more_of_them(paced_house):
    house = paced_house
    for segment in range(1, 6):
        house.add(segment * 10, shards=500)
    began_s = house.clock.now_s
    while (wait_s := house.drain()) is not None:
        house.clock.now_s += wait_s
    assert [len(call) for call in house.store.calls] == [1000, 1000, 500]
    assert 2 * 7.5 <= house.clock.now_s - began_s <= 2 * 12.5
    assert house.store.objects == house.made


def test_an_outage_of_six_hours_ends_with_a_few_large_calls_oldest_first_and_no_storm(paced_house):
    house = paced_house
    house.store.broken = AWAY
    house.clock.now_s = 0
    run(house, 6 * 3600, run_of=lambda number: f"r{number % 8}")
    assert len(house.store.calls) < 6 * 3600 / 300 + 20, "one call in five minutes, whatever waits"
    assert len(house.waiting()) == 720
    house.store.broken = None
    house.store.calls.clear()
    back_s = house.clock.now_s
    while (wait_s := house.drain()) is not None:
        house.clock.now_s += wait_s
    order = [key for call in house.store.calls for key in call]
    assert order == list(house.made), "oldest first"
    assert len(house.store.calls) == 1
    assert house.clock.now_s - back_s <= 300, "it drains with the first try, and that is never far"


def test_failures_keep_the_least_distance_too_so_that_one_that_is_looked_for_costs_no_burst_of_calls(tmp_path):
    house = House(tmp_path / "state", to="hf://buckets/me/logs", upload_interval_min_s=600.0)
    house.store.broken = AWAY
    house.add(1)
    assert house.drain() == 750
    house.store.broken = None
    house.store.poison = {"run_id=r": NEVER}
    house.add(2, shards=3)
    for _ in range(3):
        house.clock.now_s += 750
        assert house.drain() == 750
    assert [len(call) for call in house.store.calls] == [1, 4, 2, 1], "the culprit is looked for at that pace as well"


def test_who_is_in_a_hurry_does_not_wait_for_the_pace_until_that_time_is_over(paced_house):
    house = paced_house
    house.add(1)
    house.drain()
    house.add(2)
    assert house.drain() == 12.5
    house.uploader.hurry()
    assert house.drain() is None
    house.add(3)
    assert house.drain() is None, "what was converted a moment later goes as well"
    house.clock.now_s += HURRY_S
    house.add(4)
    house.uploader.step()
    house.add(5)
    assert house.drain() > 0
    assert len(house.store.objects) == 4


def test_a_hurry_does_not_skip_what_the_store_asked_for_nor_tries_again_and_again(paced_house):
    house = paced_house
    house.add(1)
    house.store.broken = StoreError("429", permanent=False, retry_after_s=120.0)
    house.drain()
    house.uploader.hurry(600)
    assert house.drain() == pytest.approx(120 * (1 + ASKED_SPREAD))
    assert len(house.store.calls) == 1
    house.store.broken = AWAY
    house.clock.now_s += 150
    for _ in range(5):
        house.clock.now_s += house.drain()
    assert len(house.store.calls) == 6, "what fails in a hurry waits as ever"


FAULTS = st.sampled_from(
    ["none", "away", "lose reply", "refuse a", "lie", "silent", "restart", "add", "never b", "poison b", "asked"]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=14))
def test_whatever_fails_in_whatever_order_every_shard_arrives_or_is_kept(tmp_path_factory, monkeypatch, faults):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # Hundreds of states, and none of them loses power.
    house = House(tmp_path_factory.mktemp("state") / "s", upload_batch_max=3)
    for segment, fault in enumerate(faults, start=1):
        store = house.store
        store.broken = AWAY if fault in ("away", "lose reply") else None
        store.broken = StoreError("429", permanent=False, retry_after_s=0.5) if fault == "asked" else store.broken
        store.lose_reply = fault == "lose reply"
        store.poison = {"run_id=b": NEVER} if fault == "poison b" else {}
        store.refuse = {"refuse a": {"run_id=a": AWAY}, "never b": {"run_id=b": NEVER}}.get(fault, {})
        store.lie = fault == "lie"
        store.silent = set(house.made) if fault == "silent" else set()
        if fault == "restart":
            house.restart()
        house.add(segment, run="a", shards=2)
        house.add(segment, run="b", shards=2)
        house.uploader.step()
        house.clock.now_s += 0.7
        waiting = set(house.waiting())
        for key, data in house.made.items():
            dead = (house.state.deadletter / key).exists()
            assert dead + (key in waiting) <= 1
            assert dead or key in waiting or store.objects[key] == data
    house.store.broken, house.store.refuse, house.store.lie, house.store.silent = None, {}, False, set()
    house.store.poison = {}
    house.clock.now_s += 1
    house.uploader.hurry()
    assert house.drain() is None
    dead = {key for key in house.made if (house.state.deadletter / key).exists()}
    assert all("run_id=b" in key for key in dead)
    assert house.store.objects.items() >= {k: v for k, v in house.made.items() if k not in dead}.items()
    assert house.left() == []


def test_a_state_dir_has_a_room_for_every_place_a_shard_can_go(house):
    state = StateDir(house.state.root)
    assert {state.outbox, state.cache, state.deadletter, state.quarantine} <= set(state.rooms)
