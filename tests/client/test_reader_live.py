"""Following a bucket: the feed of changes, and looking again and again where it fails. Rows are shown once, and all."""

import threading

import pytest

from bucketroom import BUCKET, BucketRoom
from node import wait_for
from ranklog.errors import StoreError
from ranklog.reader import live
from ranklog.reader.follow import Follower
from ranklog.reader.live import follow, pause_s
from ranklog.stores import events, open_store
from shards import STORE_A, STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")


@pytest.fixture
def room(tmp_path):
    with BucketRoom(tmp_path) as room:
        yield room


class Stop(Exception):
    """The test is over."""


class Watcher:
    """Somebody who follows in a thread of his own, with short pauses, and notes what he sees."""

    def __init__(self, store, *, project=None, run=None, newest=0):
        self.seqs: list[int] = []
        self.pauses: list[float] = []
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._follower = Follower(store, project, run, "kind = 'metrics'")
        self._follower.newest(newest)
        self._store = store
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self):
        try:
            for table in follow(self._store, self._follower, 0.05, pause=self._pause):
                self.seqs += table.column("seq").to_pylist()
        except (Stop, StoreError) as exc:
            self.error = exc

    def _pause(self, seconds):
        self.pauses.append(seconds)
        if self._over.wait(0.02):
            raise Stop

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def saw(self, *seqs):
        wait_for(lambda: len(self.seqs) >= len(seqs) or not self._thread.is_alive(), f"{seqs} are shown: {self.seqs}")
        assert self.seqs == list(seqs), self.error

    def ended(self):
        wait_for(lambda: not self._thread.is_alive(), "it ends")
        return self.error


def add(room, seq, **columns):
    store_id = columns.pop("store_id", STORE_A)
    return room.add(records(A, [{"loss": float(seq)}], first_seq=seq, **columns), store_id=store_id)


def listens(room, count=1):
    wait_for(lambda: room.hub.requests["events"] >= count, "it listens")


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(live, "REQUEST_S", 0.01)
    monkeypatch.setattr(live, "TROUBLE_MAX_S", 0.01)


def test_the_feed_tells_of_new_shards_and_no_listing_is_asked_for_them(room):
    add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        add(room, 2)
        watcher.saw(2)
        listed = room.hub.requests["tree"]
        for seq in range(3, 8):
            add(room, seq)
            watcher.saw(*range(2, seq + 1))
        assert room.hub.requests["tree"] == listed
        assert watcher.pauses == []
        room.hub.stop()


def test_what_comes_between_the_first_rows_and_the_feed_is_shown(room):
    add(room, 1)
    watcher = Watcher(room.store)
    add(room, 2)
    with watcher:
        watcher.saw(2)
        room.hub.stop()


def test_a_merged_shard_of_the_feed_shows_nothing_again(room):
    first = add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        second = add(room, 2)
        watcher.saw(2)
        room.add(records(A, [{"loss": 1.0}, {"loss": 2.0}], first_seq=1))
        room.remove(first, second)
        add(room, 3)
        watcher.saw(2, 3)
        room.hub.stop()


def test_a_run_is_found_by_its_display_name_when_it_begins(room):
    with Watcher(room.store, project="proj", run="otter") as watcher:
        listens(room)
        add(room, 1, run="other")
        room.add(start(B, name="otter", run="run-9") + records(B, [{"loss": 1.0}] * 2, run="run-9"), store_id=STORE_B)
        watcher.saw(1, 2)
        room.hub.stop()


def test_a_hub_that_restarts_is_followed_on_and_nothing_is_shown_twice_or_missed(room):
    add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        for seq in (2, 4, 6):
            add(room, seq)
            wait_for(lambda: seq in watcher.seqs, "it is shown")  # noqa: B023
            room.hub.stop()
            wait_for(lambda: watcher.pauses, "it waits")
            room.hub.start()
            add(room, seq + 1)
        watcher.saw(2, 3, 4, 5, 6, 7)
        room.hub.stop()


@pytest.mark.parametrize(
    "fault", [{"status": 404}, {"status": 429, "headers": {"Retry-After": "7"}}, {"status": 200}, {"drop": True}]
)
def test_without_a_feed_the_store_is_listed_again_and_again(room, fault):
    add(room, 1)
    with room.hub.fault("events", **fault), Watcher(room.store) as watcher:
        for seq in (2, 3, 4):
            add(room, seq)
            watcher.saw(*range(2, seq + 1))
        room.hub.stop()


def test_a_feed_that_says_nothing_is_given_up(room, monkeypatch):
    monkeypatch.setattr(events, "SILENCE_S", 0.3)
    add(room, 1)
    with room.hub.fault("events", hang=True), Watcher(room.store) as watcher:
        listens(room)
        add(room, 2)
        watcher.saw(2)
        room.hub.stop()


def test_a_feed_that_comes_back_is_listened_to_again(room):
    with room.hub.fault("events", status=503, times=2), Watcher(room.store) as watcher:
        listens(room, 3)
        add(room, 1)
        watcher.saw(1)
        room.hub.stop()


def test_listings_that_fail_are_told_once_and_waited_out(room, capsys):
    add(room, 1)
    with room.hub.fault("events", status=404), Watcher(room.store) as watcher:
        with room.hub.fault("tree", status=503) as fault:
            wait_for(lambda: fault.struck >= 3, "it tries on")
            add(room, 2)
        watcher.saw(2)
        wait_for(lambda: "answers again" in capsys_text(capsys), "it says so")
        room.hub.stop()
    assert TEXT[0].count("answered 503") == 1


TEXT = [""]


def capsys_text(capsys):
    TEXT[0] += capsys.readouterr().err
    return TEXT[0]


def test_a_server_that_asks_for_a_pause_gets_it(room):
    add(room, 1)
    with room.hub.fault("events", status=404), Watcher(room.store) as watcher:
        with room.hub.fault("tree", status=429, headers={"Retry-After": "90"}):
            wait_for(lambda: any(seconds >= 90 for seconds in watcher.pauses), "it waits so long")
        room.hub.stop()
    assert max(watcher.pauses) <= 108


def test_a_lost_login_ends_it_with_what_to_do(room):
    add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        room.hub.revoke(room.token)
        room.hub.token()
        room.hub.stop()
        room.hub.start()
        assert "hf auth login" in str(watcher.ended())


def test_a_shard_that_cannot_be_fetched_at_once_is_not_forgotten(room):
    add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        with room.hub.fault("reconstruct", status=403, times=2):
            add(room, 2)
            watcher.saw(2)
        room.hub.stop()


def test_a_feed_is_not_trusted_for_ever(room, monkeypatch):
    monkeypatch.setattr(live, "RELIST_S", -1.0)
    add(room, 1)
    with Watcher(room.store) as watcher:
        listens(room)
        listed = room.hub.requests["tree"]
        add(room, 2)
        watcher.saw(2)
        wait_for(lambda: room.hub.requests["tree"] > listed + 1, "it lists beside")
        room.hub.stop()


def test_a_directory_is_looked_at_in_the_interval_that_was_asked_for(tmp_path):
    with Watcher(open_store(str(tmp_path))) as watcher:
        write_shard(tmp_path, records(A, [{"loss": 1.0}]))
        watcher.saw(1)
    assert set(watcher.pauses) <= {0.05}


def test_the_newest_rows_of_a_bucket_take_the_last_shards_only(room):
    for seq in range(1, 10):
        add(room, seq)
    add(room, 50, run="run-2", store_id=STORE_B)
    follower = Follower(room.store, None, None, "kind = 'metrics'")
    assert follower.newest(2).column("seq").to_pylist() == [9, 50]
    assert len(room.cached()) == 2
    assert follower.newest(4).column("seq").to_pylist() == [7, 8, 9, 50]
    assert len(room.cached()) == 5
    assert len(follower.newest(100)) == 10
    assert len(room.hub.buckets.get(BUCKET).files) == 10


@pytest.mark.parametrize(
    ("expected", "asked"),
    [
        (2.0, {"network": False, "idle": 9, "objects": 10**6}),
        (5.0, {"network": True}),
        (5.0, {"network": True, "idle": 1}),
        (16.0, {"network": True, "idle": 3}),
        (60.0, {"network": True, "idle": 10**6}),
        (50.0, {"network": True, "objects": 9_500}),
        (4.0, {"network": True, "failures": 1}),
        (8.0, {"network": False, "failures": 2}),
        (300.0, {"network": True, "failures": 10**6}),
    ],
)
def test_pauses_grow_while_nothing_comes_and_with_what_a_look_costs(expected, asked, monkeypatch):
    monkeypatch.undo()
    assert pause_s(2.0, **asked) == expected


def test_an_interval_that_was_asked_for_is_never_cut_short():
    assert pause_s(3600.0, network=True) == pause_s(3600.0, network=True, failures=1) == 3600.0
