"""The whole node as a state machine: hypothesis plays what a cluster does to it, in any order, and asks at the end
whether every record had the fate it was promised. `world` says what is real in it (nearly all).

    rows 1–11, 13–16    kills at any call that changes a file, of each process, any number of times
    row 17              power cuts at any such call, over a disk that keeps as little as it may (`simfs`)
    rows 18, 19         ENOSPC on journal, spool, state; EIO of writes and fdatasyncs, with fsync's lies afterwards
    rows 21, 51         a byte destroyed in a segment or a spool file; absent daemons; adoption in any order

Below the machine: sweeps over every crash point of one operation, what went wrong once, and negative controls: with a
part of the order taken away, the same checks must find the loss.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from model.simfs import SYNCS, WRITES, below, failing, full
from model.world import World
from ranklog import fs
from ranklog.backlog import Backlog
from ranklog.transport import Up
from ranklogd.ingest import Ingest, Reply
from ranklogd.ship import convert

CLIENTS_MAX = 4
SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

pick = st.integers(0, 7)
seeds = st.integers(0, 1 << 32)
fuses = st.one_of(st.none(), st.none(), st.none(), st.integers(0, 40))
"""Mostly nobody dies."""


@contextmanager
def a_world() -> Iterator[World]:
    # In memory: what is durable is for `simfs` to say, and the machine's own disk is slow.
    with tempfile.TemporaryDirectory(prefix="rl-", dir=SHM, ignore_cleanup_errors=True) as path, World(Path(path)) as w:
        yield w


class Node(RuleBasedStateMachine):
    """The rules. Each does one thing to the node; `teardown` judges."""

    def __init__(self) -> None:
        super().__init__()
        self._context = a_world()
        self.world = self._context.__enter__()

    def teardown(self) -> None:
        try:
            self.world.judge()
        finally:
            self._context.__exit__(None, None, None)

    def _client(self, number: int) -> Any:
        return self.world.living[number % len(self.world.living)]

    # Trainers.

    @precondition(lambda self: len(self.world.living) < 2 and len(self.world.clients) < CLIENTS_MAX)
    @rule()
    def new_client(self) -> None:
        self.world.new_client()

    @precondition(lambda self: self.world.living)
    @rule(who=pick, count=st.sampled_from([1, 2, 3, 5, 8, 13]), fuse=fuses)
    def log(self, who: int, count: int, fuse: int | None) -> None:
        self.world.log(self._client(who), count, fuse)

    @precondition(lambda self: self.world.living)
    @rule(who=pick, after_s=st.sampled_from([0.01, 0.11, 1.1, 3.5]), fuse=fuses)
    def sender(self, who: int, after_s: float, fuse: int | None) -> None:
        self.world.client_step(self._client(who), after_s, fuse)

    @precondition(lambda self: self.world.living)
    @rule(who=pick)
    def kill_client(self, who: int) -> None:
        self.world.kill_client(self._client(who))

    @precondition(lambda self: self.world.living)
    @rule(who=pick, fuse=fuses)
    def end_client(self, who: int, fuse: int | None) -> None:
        self.world.end_client(self._client(who), fuse)

    # The wire.

    @precondition(lambda self: self.world.to_daemon)
    @rule(what=st.sampled_from(["lose", "double", "swap"]), seed=pick)
    def disturb_messages(self, what: str, seed: int) -> None:
        _disturb(self.world.to_daemon, what, seed)

    @precondition(lambda self: any(client.inbox for client in self.world.living))
    @rule(what=st.sampled_from(["lose", "double", "swap"]), seed=pick)
    def disturb_answers(self, what: str, seed: int) -> None:
        inbox = next(client.inbox for client in self.world.living if client.inbox)
        if all(isinstance(event, tuple) for event in inbox):  # That a connection came or went is no message.
            _disturb(inbox, what, seed)

    # The daemon.

    @precondition(lambda self: self.world.server is not None)
    @rule(after_s=st.sampled_from([0.001, 0.03, 0.03, 1.1, 6.0]), limit=st.sampled_from([1, 1000]), fuse=fuses)
    def daemon(self, after_s: float, limit: int, fuse: int | None) -> None:
        self.world.daemon_step(after_s, limit, fuse)

    @precondition(lambda self: self.world.server is not None)
    @rule(fuse=fuses)
    def seal(self, fuse: int | None) -> None:
        self.world.seal(fuse)

    @precondition(lambda self: self.world.server is not None)
    @rule()
    def kill_daemon(self) -> None:
        self.world.kill_daemon()

    @precondition(lambda self: self.world.server is None)
    @rule(fuse=fuses)
    def start_daemon(self, fuse: int | None) -> None:
        self.world.start_daemon(fuse)

    # The shipper.

    @precondition(lambda self: self.world.server is not None)
    @rule(fuse=fuses)
    def convert(self, fuse: int | None) -> None:
        self.world.convert(fuse)

    @precondition(lambda self: self.world.server is not None)
    @rule(mood=st.sampled_from(["", "", "refused", "lost"]), after_s=st.sampled_from([0.0, 31.0]), fuse=fuses)
    def upload(self, mood: str, after_s: float, fuse: int | None) -> None:
        self.world.clock.now_s += after_s
        self.world.upload(fuse, mood)

    @rule()
    def kill_shipper(self) -> None:
        self.world.kill_shipper()

    # The node.

    @rule(seed=seeds)
    def power_cut(self, seed: int) -> None:
        self.world.power_cut(seed)

    @rule(where=st.sampled_from(["journal", "spool", "state", "data"]))
    def fill(self, where: str) -> None:
        fault = full(_room(self.world, where))
        if where == "journal":  # Its files are preallocated: what is reserved can be written.
            fault.calls = frozenset({"open", "posix_fallocate"})
        self.world.sim.faults.append(fault)

    @precondition(lambda self: self.world.sim.faults)
    @rule()
    def make_room(self) -> None:
        self.world.sim.faults = []

    @rule(where=st.sampled_from(["spool", "wal", "outbox", "data"]), calls=st.sampled_from(["writes", "syncs"]))
    def fail_once(self, where: str, calls: str) -> None:
        fault = failing(WRITES - {"open", "mkdir"} if calls == "writes" else SYNCS, _room(self.world, where))
        self.world.sim.faults.append(fault)

    @rule(what=st.sampled_from(["segment", "spool"]), seed=seeds)
    def rot(self, what: str, seed: int) -> None:
        destroy = self.world.rot_segment if what == "segment" else self.world.rot_spool
        destroy(Random(seed))


def _disturb(messages: Any, what: str, seed: int) -> None:
    place = seed % len(messages)
    if what == "lose":
        del messages[place]
    elif what == "double":
        messages.insert(seed % (len(messages) + 1), messages[place])
    else:
        messages.rotate(1)


def _room(world: World, name: str) -> Path:
    rooms = {"journal": world.journal, "spool": world.spool, "state": world.state.root, "data": world.data}
    return rooms.get(name, world.state.root / name)


QUICK = settings(
    max_examples=60, stateful_step_count=50, deadline=None, phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip


def test_every_record_has_the_fate_it_was_promised():
    run_state_machine_as_test(Node, settings=QUICK)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_record_has_the_fate_it_was_promised_in_many_more_histories():
    examples = int(os.environ.get("RANKLOG_MODEL_EXAMPLES", "5000"))
    thorough = settings(QUICK, max_examples=examples, stateful_step_count=100, derandomize=False)
    run_state_machine_as_test(Node, settings=thorough)


# One operation, and every call in it as the last one of its process, with a power cut behind it.


def acked(world: World, count: int = 3) -> None:
    """Bring records of a new client all the way to the ack."""
    client = world.new_client()
    world.log(client, count)
    for _ in range(3):
        world.client_step(client)
        world.daemon_step()
    world.client_step(client)
    assert client.sender._backlog.empty, "everything is acknowledged"


def sent(world: World) -> None:
    """As `acked`, and a batch more is on its way."""
    acked(world)
    world.log(world.clients[0], 4)
    world.client_step(world.clients[0])
    assert world.to_daemon


def sealed(world: World) -> None:
    acked(world)
    world.seal()


def converted(world: World) -> None:
    sealed(world)
    world.convert()
    assert list(world.state.outbox.iterdir())


def orphaned(world: World) -> None:
    """A dead client's journal and spool wait for a daemon that has a part of it."""
    sent(world)
    world.kill_daemon()
    client = world.clients[0]
    world.client_step(client, 1.5)
    world.client_step(client, 1.5)
    assert list(world.spool.iterdir())
    world.log(client, 2)
    world.kill_client(client)
    world.start_daemon()


def alone(world: World) -> None:
    """A client without a daemon, whose records have not been spooled."""
    sent(world)
    world.kill_daemon()
    world.client_step(world.clients[0], 0.5)


def poisoned(world: World) -> None:
    sent(world)
    world.sim.faults = [failing({"fdatasync"}, world.state.wal)]


def down(world: World) -> None:
    sent(world)
    world.daemon_step(fuse=1)
    assert world.server is None


OPERATIONS: dict[str, tuple[Callable[[World], None], Callable[[World, int], None], int]] = {
    "commit": (sent, lambda w, fuse: w.daemon_step(fuse=fuse), 2),
    "poisoned": (poisoned, lambda w, fuse: w.daemon_step(fuse=fuse), 10),
    "roll": (acked, lambda w, fuse: w.seal(fuse), 6),
    "recover": (down, lambda w, fuse: w.start_daemon(fuse) and None, 10),
    "adopt": (orphaned, lambda w, fuse: w.daemon_step(6.0, fuse=fuse, turns=8), 5),
    "spill": (alone, lambda w, fuse: w.client_step(w.clients[0], 1.5, fuse), 5),
    "convert": (sealed, lambda w, fuse: w.convert(fuse), 12),
    "upload": (converted, lambda w, fuse: w.upload(fuse), 10),
}
"""Name -> what goes before, the operation, and the least number of calls that it makes."""


def sweep(name: str, cuts: int) -> None:
    prepare, operate, calls_min = OPERATIONS[name]
    fuse, died = 0, True
    while died:
        for seed in range(cuts):
            with a_world() as world:
                prepare(world)
                before = len(world.deaths)
                operate(world, fuse)
                died = len(world.deaths) > before
                world.power_cut(seed)
                world.judge()
        fuse += 1
    assert fuse > calls_min, f"only {fuse - 1} calls were the last one"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_at_any_call_takes_nothing_that_was_promised(name: str):
    sweep(name, 2)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_at_any_call_takes_nothing_that_was_promised_in_many_ways(name: str):
    sweep(name, 60)


# What went wrong once.


def test_what_the_daemon_has_but_not_safely_is_not_released_at_its_welcome():
    with a_world() as world:
        acked(world)
        client, server = world.clients[0], world.server
        assert server is not None
        world.log(client, 3)
        world.client_step(client)
        server._last_commit_s = world.clock.now_s + 1  # Not yet.
        world.daemon_step(0.001)
        assert server._ingest.pending
        client.inbox.append(Up())
        world.client_step(client)
        world.daemon_step(0.001)
        world.client_step(client)
        assert server._ingest.pending, "the WELCOME came first"
        assert not client.sender._backlog.empty
        world.kill_daemon()
        world.judge()


def test_a_segment_that_an_fsync_error_poisoned_is_not_believed_by_the_next_start():
    """Found in review: killed between the two open segments, the next start took the poisoned one's pages for bytes."""
    for fuse in range(14):
        for seed in range(2):
            with a_world() as world:
                poisoned(world)
                world.daemon_step(fuse=fuse)
                if world.server is not None:
                    world.kill_daemon()
                world.sim.faults = []
                world.start_daemon()
                world.client_step(world.clients[0], 0.6)
                world.daemon_step()
                world.client_step(world.clients[0], 0.6)
                world.power_cut(seed)
                world.judge()


def test_the_header_of_a_new_segment_holds_only_what_is_durable_in_the_old_one():
    """Found in review: with the roll in another order, a power cut acknowledged what it had removed."""
    for fuse in range(14):
        with a_world() as world:
            sent(world)
            assert world.server is not None
            world.server._ask_seal()
            world.daemon_step(fuse=fuse, turns=2)
            world.power_cut(fuse)
            world.judge()


def test_a_client_whose_hello_or_its_answer_was_dropped_asks_again():
    for lost in ("to_daemon", "inbox"):
        with a_world() as world:
            client = world.new_client()
            world.log(client)
            world.client_step(client)
            if lost == "inbox":
                world.daemon_step()
            (world.to_daemon if lost == "to_daemon" else client.inbox).clear()
            for _ in range(60):
                world.client_step(client)
                world.daemon_step()
            assert client.sender._backlog.empty, "records went on to the daemon, not to the spool only"
            world.judge()


def test_a_spool_file_of_which_a_power_cut_left_the_name_has_its_start_frame():
    """Without, nobody could say whose it was: it was refused for ever, and told in every status."""
    for fuse in range(12):
        for seed in range(4):
            with a_world() as world:
                alone(world)
                world.client_step(world.clients[0], 1.5, fuse)
                world.power_cut(seed)
                assert all(path.stat().st_size for path in world.spool.glob("[!.]*"))
                world.judge()


def test_a_shard_that_a_power_cut_left_both_in_the_outbox_and_in_the_cache_leaves_the_outbox():
    """rename(2) does nothing between two names of one file: it was uploaded again and again, for ever."""
    with a_world() as world:
        converted(world)
        shard = next(world.state.outbox.rglob("*.parquet"))
        twin = world.state.cache.joinpath(*shard.relative_to(world.state.outbox).parts[1:])
        twin.parent.mkdir(parents=True)
        os.link(shard, twin)
        world.judge()


def test_what_a_crowded_journal_gave_to_a_spool_file_whose_fsync_failed_is_not_called_safe():
    """The next spill found nothing to do and said that all was on disk; a power cut then took it."""
    for seed in range(4):
        with a_world() as world:
            acked(world)
            world.kill_daemon()
            client = world.clients[0]
            world.client_step(client, 0.05)
            client.sender._last_spill_s = world.clock.now_s
            world.log(client, 100)
            world.client_step(client, 0.15)
            assert {chunk.file.path.suffix for chunk in client.sender._backlog._chain} == {".spool"}, (
                "moved, not synced"
            )
            world.sim.faults = [failing(SYNCS, world.spool)]
            world.client_step(client, 1.2)
            assert client.sender._backlog.spooled_below() == 4
            world.client_step(client, 1.2)
            assert client.sender._backlog.spooled_below() > 100
            world.power_cut(seed)
            world.judge()


def test_a_store_whose_root_a_killed_put_made_is_not_lost_in_a_power_cut():
    """The next put found the directory there and synced all but its own name: every shard went with it."""
    for seed in range(8):
        with a_world() as world:
            converted(world)
            world.upload(fuse=1)
            assert world.data.is_dir()
            assert "before fsync" in world.deaths[-1]
            world.upload()
            world.power_cut(seed)
            world.judge()


def test_a_segment_whose_unlink_was_not_synced_does_not_come_back_behind_its_shards():
    """Killed between the two, it came back in a power cut when its shards had left: rotten by then, they were others."""
    calls = OPERATIONS["convert"][2] + 30
    for fuse in range(10, calls):
        with a_world() as world:
            sealed(world)
            world.convert(fuse)
            for _ in range(4):
                world.upload()
            names = {path.name for path in world.state.wal.glob("*.wal")}
            durable = {name for name in world.sim.durable(world.state.wal) if name.endswith(".wal")}
            assert names or not durable or list(world.state.outbox.iterdir()), "uploaded, and it could come back"


def test_a_segment_that_cannot_be_converted_leaves_nothing_half_made_that_counts_as_waiting(
    monkeypatch: pytest.MonkeyPatch,
):
    """outbox/<segment>.tmp stayed until the next shipper, and `ranklog flush --uploaded` waited for it."""
    with a_world() as world:
        sealed(world)
        with monkeypatch.context() as patch:
            patch.setattr(convert, "encode_shard", _raise_memory_error)
            for _ in range(8):
                world.clock.now_s += 600
                world.convert()
        assert list(world.state.quarantine.glob("*.wal")), "after the third strike"
        assert list(world.state.outbox.iterdir()) == []


def _raise_memory_error(*_: Any) -> None:
    raise MemoryError


# Negative controls: with a part of the order taken away, the same checks find the loss.


def test_control_without_fdatasync_an_ack_is_found_to_lie(monkeypatch: pytest.MonkeyPatch):
    with a_world() as world:
        monkeypatch.setattr(fs, "sync_data", lambda _: None)
        with pytest.raises(AssertionError, match=r"I1 seq . was acknowledged"):
            acked(world)


def test_control_without_a_sync_of_directories_an_ack_is_found_to_lie(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fs, "sync_dir", lambda _: None)
    with a_world() as world, pytest.raises(AssertionError, match=r"I1 seq . was acknowledged"):
        acked(world)


def test_control_an_ack_before_the_sync_is_found(monkeypatch: pytest.MonkeyPatch):
    def hasty(ingest: Ingest, _now_ns: int) -> list[Reply]:
        unacked, ingest._unacked = ingest._unacked, {}
        for state in ingest._touched:
            state.durable = state.next_seq - 1
        ingest._touched = set()
        return ingest._acks(unacked)

    monkeypatch.setattr(Ingest, "commit", hasty)
    with a_world() as world, pytest.raises(AssertionError, match=r"I1 seq . was acknowledged"):
        acked(world)


@pytest.mark.parametrize(("room", "name"), [("outbox", "convert"), ("data", "upload"), ("spool", "spill")])
def test_control_a_room_whose_fsync_does_nothing_loses_what_was_promised(room: str, name: str):
    prepare, operate, _ = OPERATIONS[name]
    found = []
    for seed in range(12):
        with a_world() as world:
            world.sim.deaf = below(_room(world, room))
            prepare(world)
            operate(world, 1000)
            world.power_cut(seed)
            try:
                world.judge()
            except (AssertionError, ValueError) as exc:  # pyarrow says ValueError of a shard of zeros.
                found.append(str(exc))
    assert any(text.startswith(("I1", "Parquet")) for text in found), found


def test_control_release_at_welcome_is_found(monkeypatch: pytest.MonkeyPatch):
    """The first of the past bugs, put back."""
    resume = Backlog.resume

    def release(backlog: Backlog, expected: int) -> None:
        backlog.acknowledge(expected - 1)
        resume(backlog, expected)

    monkeypatch.setattr(Backlog, "resume", release)
    with pytest.raises(AssertionError):
        test_what_the_daemon_has_but_not_safely_is_not_released_at_its_welcome()
