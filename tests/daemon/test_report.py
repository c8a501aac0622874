"""The marks, recomputed from file names, and the snapshot."""

import json
import os
import time
from pathlib import Path

import pytest

from ranklogd.report import RunStatus, Status, Watermarks, backlog, shipper_report, uploaded_lsn, watermarks
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import open_name, sealed_name
from segments import make_state


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return make_state(tmp_path / "state")


def test_without_anything_waiting_all_that_is_sealed_is_uploaded(state: StateDir) -> None:
    (state.wal / open_name(41)).touch()
    assert uploaded_lsn(state, 41) == 40
    assert uploaded_lsn(state, 1) == 0


@pytest.mark.parametrize("room", ["wal", "outbox", "tmp"])
def test_the_oldest_thing_that_waits_is_the_mark(state: StateDir, room: str) -> None:
    (state.wal / open_name(41)).touch()
    for first in (11, 21, 31):
        name = sealed_name(first, first + 9)
        if room == "wal":
            (state.wal / name).touch()
        else:
            (state.outbox / (f"{name}.tmp" if room == "tmp" else name)).mkdir()
    assert uploaded_lsn(state, 41) == 10


def test_names_of_others_do_not_count(state: StateDir) -> None:
    for name in (".x", "0-1.wal", "0000000000000001-0000000000000005.tries", "notes", open_name(1)):
        (state.wal / name).touch()
        (state.outbox / name).mkdir()
    assert uploaded_lsn(state, 41) == 40


def test_a_segment_on_its_way_from_wal_to_outbox_is_never_seen_in_neither(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipper commits to the outbox first and unlinks then: whoever lists the WAL first cannot miss it."""
    name = sealed_name(11, 20)
    (state.wal / name).touch()
    real, listed = os.listdir, []

    def listing(path: Path) -> list[str]:
        found = real(path)
        listed.append(Path(path).name)
        if len(listed) == 1:  # Between the two listings.
            (state.outbox / name).mkdir()
            (state.wal / name).unlink()
        return found

    monkeypatch.setattr(os, "listdir", listing)
    assert uploaded_lsn(state, 41) == 10
    assert listed == ["wal", "outbox"]


def test_ten_thousand_names_are_looked_through_quickly(state: StateDir) -> None:
    for first in range(1, 20_001, 2):
        (state.outbox / sealed_name(first, first + 1)).mkdir()
    began = time.perf_counter()
    assert uploaded_lsn(state, 30_000) == 0
    assert time.perf_counter() - began < 0.1


def test_the_marks_are_ordered_whatever_they_are_made_of() -> None:
    assert watermarks(received=50, durable=45, open_first=41, uploaded=10) == Watermarks(10, 40, 45, 50)
    assert watermarks(received=0, durable=0, open_first=1, uploaded=0) == Watermarks(0, 0, 0, 0)
    assert watermarks(received=40, durable=40, open_first=41, uploaded=40) == Watermarks(40, 40, 40, 40)
    with pytest.raises(AssertionError):
        Watermarks(uploaded=2, sealed=1, durable=5, received=5)


def test_the_backlog_is_what_waits_in_either_room(state: StateDir) -> None:
    (state.wal / sealed_name(11, 20)).touch()
    (state.outbox / sealed_name(1, 10)).mkdir()
    assert backlog(state) == ([(11, 20)], [(1, 10)])
    assert backlog(StateDir(state.root / "missing")) == ([], [])


def test_the_shippers_report_is_read_as_it_is_and_missing_ones_are_empty(state: StateDir) -> None:
    assert shipper_report(state) == {}
    state.shipper_report.write_text("{ half")
    assert shipper_report(state) == {}
    state.shipper_report.write_text('{"pid": 7}')
    assert shipper_report(state) == {"pid": 7}


def test_the_snapshot_is_one_json_object(state: StateDir) -> None:
    run = RunStatus("p", "r", "n", 1, 2, 3, "running", 0.5)
    status = Status(
        version="1", pid=1, node="n", store_id="s", to="/x", socket="/s", state_dir="/d", uptime_s=1.0,
        watermarks=Watermarks(1, 2, 3, 4), used_bytes=5, full="", records=6, duplicates=7, refused={"foreign": 1}, writers=2,
        adopted=1, adoption_refused={"/a": "why"}, offline_waiting=0, poisoned_segments=0, shipper={}, runs=[run],
    )  # fmt: skip
    told = json.loads(status.to_json())
    assert told["watermarks"] == {"uploaded": 1, "sealed": 2, "durable": 3, "received": 4}
    assert told["runs"][0]["state"] == "running"
    assert (told["adoption_stuck"], told["quarantined_spools"], told["shipper_restarts"]) == (0, 0, 0)
