import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from hub.server import Hub
from node import wait_for
from ranklog.errors import StoreError
from ranklog.frame import Kind
from ranklog.layout import parse_key
from ranklog.stores import base
from ranklog.stores.base import Upload
from ranklogd.config import Config
from ranklogd.ship.counters import ShipperReport, read_counts, write_report
from ranklogd.ship.shipper import Shipper
from ranklogd.statedir import StateDir
from ranklogd.supervise import EXIT_HUNG, HURRY
from segments import SegmentBuilder, frame, make_state, read_rows, start_of


class Place:
    """A state directory and a directory store."""

    def __init__(self, root: Path) -> None:
        self.state = make_state(root / "state")
        self.store = root / "store"
        self.next_lsn = 1

    def config(self, **options: object) -> Config:
        fast = {"retry_base_s": 0.05, "retry_max_s": 0.2, "rescan_interval_s": 0.2, "to": str(self.store)}
        return Config(state_dir=self.state.root, **(fast | options))  # type: ignore[arg-type]

    def seal(self, number: int, records: int = 5) -> Path:
        """Seal a segment with records of two runs."""
        builder = SegmentBuilder(first_lsn=self.next_lsn)
        for run in ("a", "b"):
            start = start_of(number * 10 + ord(run), run=run)
            builder.writer(start)
            frames = b"".join(frame(Kind.METRICS, 1 + i, {"loss": i + 0.5, "lr": 1.0}) for i in range(records))
            builder.batch(start.writer, 1, records, frames)
        self.next_lsn = builder.next_lsn
        written = self.state.wal / f"{builder.first_lsn:016x}.open"
        written.write_bytes(builder.data)
        return written.rename(self.state.wal / builder.name)  # As ingest does.

    def open_segment(self) -> None:
        """The one that ingest writes: everything below it is sealed."""
        for path in self.state.wal.glob("*.open"):
            path.unlink()
        (self.state.wal / f"{self.next_lsn:016x}.open").write_bytes(b"")

    def shards(self) -> list[str]:
        return sorted(str(path.relative_to(self.store)) for path in self.store.rglob("*.parquet"))

    def at_rest(self) -> bool:
        """Return whether every segment is a shard in the store, and every room is empty again."""
        rooms = (self.state.outbox, self.state.quarantine, self.state.deadletter)
        return not any(list(room.iterdir()) for room in rooms) and not list(self.state.wal.glob("*-*"))

    def report(self) -> dict[str, object]:
        try:
            return dict(json.loads(self.state.shipper_report.read_text()))
        except FileNotFoundError:
            return {}

    @contextmanager
    def shipper(
        self, config: Config | None = None, *, code: str = "", log: Path | None = None, **env: str
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A real shipper process, killed at the end; with `code`, which is to call its `main`."""
        process = subprocess.Popen(
            [sys.executable, *(("-c", code) if code else ("-m", "ranklogd.ship.shipper"))], stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
            stderr=None if log is None else log.open("wb"),
        )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write((config or self.config()).to_json().encode() + b"\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()
            process.wait(20)
            process.stdin.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def content(store: Path) -> list[tuple[object, ...]]:
    """Return every row's identity and value; sorted, so that the number of shards does not matter."""
    return sorted((r["run"], r["writer"], r["seq"], r["lsn"], r["key"], r["value"]) for r in read_rows(store))


# In one process, step by step


def test_a_step_takes_sealed_segments_all_the_way_into_the_store(place):
    for number in range(3):
        place.seal(number)
    place.open_segment()
    report = Shipper(place.config()).step()
    assert place.at_rest()
    assert len(place.shards()) == 6
    assert all(parse_key(key) for key in place.shards())
    rows = content(place.store)
    assert len(rows) == len(set(rows)) == 60
    assert (report.converted_segments, report.shards, report.rows, report.uploaded_shards) == (3, 6, 60, 6)
    assert report.uploaded_bytes == sum((place.store / key).stat().st_size for key in place.shards())
    assert (report.backlog_segments, report.backlog_shards, report.backlog_bytes) == (0, 0, 0)
    assert report.uploaded_lsn == place.next_lsn - 1 == 30
    assert report.last_upload_s > 1e9
    assert report.last_error == ""
    assert place.report() == asdict(report)


def test_the_mark_of_what_is_uploaded_stays_below_everything_that_waits(place):
    store = place.store
    store.parent.mkdir(exist_ok=True)
    store.write_text("in the way")
    shipper = Shipper(place.config())
    place.seal(1)
    place.open_segment()
    report = shipper.step()
    assert report.uploaded_lsn == 0
    assert (report.backlog_segments, report.backlog_shards) == (0, 2)
    assert report.backlog_bytes > 0
    assert report.last_error_class == "transient"
    assert "in the way" not in report.last_error
    assert str(store) in report.last_error
    store.unlink()
    shipper.uploader.hurry()
    assert shipper.step().uploaded_lsn == 10
    place.seal(2)
    report = shipper.report()
    assert report is not None
    assert (report.uploaded_lsn, report.backlog_segments) == (10, 1)


def test_conversion_goes_on_while_the_store_is_away_and_drains_by_itself(place):
    place.store.write_text("in the way")
    shipper = Shipper(place.config())
    for number in range(4):
        place.seal(number)
        report = shipper.step()
        assert report.converted_segments == number + 1
        assert report.backlog_shards == 2 * (number + 1)
        assert report.next_try_s > 0 or report.last_error
    place.store.unlink()
    wait_for(lambda: shipper.step().backlog_shards == 0, "the backlog is gone")
    assert len(content(place.store)) == 80


def test_conversion_goes_on_while_the_store_does_not_answer_and_the_report_says_so(place):
    class Hanging:
        url = "mem://hangs"
        asked, answer = threading.Event(), threading.Event()

        def put(self, uploads: list[Upload]) -> dict[str, StoreError | None]:
            self.asked.set()
            assert self.answer.wait(60)
            return {upload.key: StoreError("too late", permanent=False) for upload in uploads}

    now_s = [0.0]
    store = Hanging()
    shipper = Shipper(place.config(upload_deadline_s=120), store=store, clock=lambda: now_s[0])  # type: ignore[arg-type]
    place.seal(1)
    shipper.convert_one()
    thread = threading.Thread(target=shipper.upload_some)
    thread.start()
    try:
        assert store.asked.wait(20)
        place.seal(2)
        assert shipper.convert_one() is not None
        assert shipper.report().last_error == ""  # type: ignore[union-attr]
        now_s[0] = 121
        report = shipper.report()
        assert report is not None
        assert (report.last_error_class, report.backlog_shards) == ("hung", 4)
        assert "has not answered for 121 s" in report.last_error
    finally:
        store.answer.set()
        thread.join(20)


def test_a_store_that_raises_what_it_must_not_is_reported_and_the_shipper_lives_on(place):
    class Broken:
        url = "mem://broken"

        def put(self, _: list[Upload]) -> dict[str, StoreError | None]:
            raise ZeroDivisionError("a bug")

    shipper = Shipper(place.config(), store=Broken())  # type: ignore[arg-type]
    place.seal(1)
    report = shipper.step()
    assert report.last_error_class == "internal"
    assert "ZeroDivisionError: a bug" in report.last_error
    assert report.backlog_shards == 2
    place.seal(2)
    assert shipper.step().converted_segments == 2


def test_counts_go_on_over_a_restart_and_a_damaged_report_is_no_trouble(place):
    place.seal(1)
    Shipper(place.config()).step()
    place.seal(2)
    assert Shipper(place.config()).step().uploaded_shards == 4
    place.state.shipper_report.write_text("{")
    assert Shipper(place.config()).step().uploaded_shards == 0


def test_a_report_reads_back_only_its_counts(tmp_path):
    path = tmp_path / "shipper.json"
    write_report(path, ShipperReport(pid=7, shards=3, rows=9, backlog_shards=5, last_error="x", last_upload_s=1.5))
    assert read_counts(path) == ShipperReport(shards=3, rows=9, last_upload_s=1.5)
    assert [p.name for p in tmp_path.iterdir()] == ["shipper.json"]
    for text in ("[]", '{"shards": "many", "rows": 2}', ""):
        path.write_text(text)
        assert read_counts(path) in (ShipperReport(), ShipperReport(rows=2))


def test_a_damaged_segment_is_shipped_as_far_as_it_goes_and_counted(place):
    path = place.seal(1)
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0xFF
    path.write_bytes(data)
    report = Shipper(place.config()).step()
    assert report.quarantined_records + report.damaged_stretches > 0
    assert not list(place.state.wal.iterdir())
    assert place.shards()


# As a process


def test_what_is_there_is_shipped_and_sigterm_ends_it_with_exit_code_0(place):
    place.seal(1)
    with place.shipper() as process:
        wait_for(lambda: len(place.shards()) == 2 and place.at_rest(), "both shards are in the store")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert place.report()["uploaded_shards"] == 2


def test_a_newly_sealed_segment_wakes_it_without_a_rescan(place):
    with place.shipper(place.config(rescan_interval_s=600)) as process:
        wait_for(lambda: place.report().get("pid") == process.pid, "it is up")
        for number in range(3):
            place.seal(number)
            wait_for(lambda shards=2 * number + 2: len(place.shards()) == shards, "its shards are there", 20)
            wait_for(lambda shards=2 * number + 2: place.report()["uploaded_shards"] == shards, "and are reported", 20)


def test_sigterm_drains_what_is_sealed_first(place):
    place.store.write_text("in the way")
    for number in range(5):
        place.seal(number)
    with place.shipper(place.config(retry_base_s=3600, retry_max_s=3600, stop_deadline_s=30)) as process:
        wait_for(lambda: place.report().get("last_error_class") == "transient", "an upload has failed")
        place.store.unlink()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert place.at_rest()
    assert len(place.shards()) == 10


def test_a_drain_ends_at_its_deadline_and_what_remains_is_found_by_the_next(place):
    place.store.write_text("in the way")
    place.seal(1)
    with place.shipper(place.config(stop_deadline_s=0.5)) as process:
        wait_for(lambda: place.report().get("last_error_class") == "transient", "an upload has failed")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert place.report()["backlog_shards"] == 2
    place.store.unlink()
    Shipper(place.config()).step()
    assert place.at_rest()


def test_a_second_signal_ends_it_at_once(place):
    place.store.write_text("in the way")
    place.seal(1)
    with place.shipper(place.config(stop_deadline_s=3600)) as process:
        wait_for(lambda: place.report().get("last_error_class") == "transient", "an upload has failed")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    assert len(list(place.state.outbox.rglob("*.parquet"))) == 2


def test_it_ends_when_its_stdin_does(place):
    with place.shipper() as process:
        wait_for(lambda: place.report().get("pid") == process.pid, "it is up")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_it_dies_with_its_parent_even_if_somebody_else_keeps_its_stdin_open(place):
    code = (
        "import os, subprocess, sys\n"
        "reader, writer = os.pipe()\n"
        "os.set_inheritable(writer, True)\n"
        "sitter = subprocess.Popen(['sleep', '60'], pass_fds=[writer])\n"
        "child = subprocess.Popen([sys.executable, '-m', 'ranklogd.ship.shipper'], stdin=reader)\n"
        "os.write(writer, sys.argv[1].encode() + b'\\n')\n"
        "print(sitter.pid, child.pid, flush=True)\n"
        "child.wait()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, place.config().to_json()]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        sitter, child = map(int, parent.stdout.readline().split())
        try:
            wait_for(lambda: place.report().get("pid") == child, "it is up")
            parent.kill()
            wait_for(lambda: gone(child), "it died with its parent", 20)
        finally:
            os.kill(sitter, signal.SIGKILL)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_it_keeps_no_descriptor_of_its_parent_and_takes_second_place(place):
    lock = os.open(place.state.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "ranklogd.ship.shipper"], stdin=subprocess.PIPE, pass_fds=[lock],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(place.config().to_json().encode() + b"\n")
        process.stdin.flush()
        wait_for(lambda: place.report().get("pid") == process.pid, "it is up")
        held = {os.path.realpath(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert str(place.state.lock) not in held
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
        os.close(lock)
        other = os.open(place.state.lock, os.O_RDWR)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    finally:
        process.kill()
        process.wait(20)
        process.stdin.close()


def test_a_config_it_cannot_read_ends_it_with_exit_code_78(place):
    for text in (b"", b"{}x\n", b'{"seal_age_s": 0}\n'):
        done = subprocess.run(
            [sys.executable, "-m", "ranklogd.ship.shipper"], input=text, capture_output=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 78
        assert b"ranklogd shipper: " in done.stderr


# Stores that never answer


def hanging(how: str, standstill_s: float = 1800) -> str:
    """Return the code of a shipper whose store, mem://, hangs in this way; deadlines as in the config."""
    return (
        "import ctypes, os, sys, threading, types\n"
        "from ranklog.errors import StoreError\n"
        "from ranklog.stores import base\n"
        "from ranklogd.ship import shipper\n"
        "class Hanging:\n"
        "    url, allowance = 'mem://x', None\n"
        f"    def put(self, uploads): {how}\n"
        "sys.modules['hanging'] = types.SimpleNamespace(open_url=lambda url, options: Hanging())\n"
        "base._MODULES['mem'] = 'hanging'\n"
        f"shipper.STANDSTILL_S = {standstill_s}\n"
        "os._exit(shipper.main())\n"
    )


@pytest.fixture
def mem(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(base._MODULES, "mem", "hanging")
    return "mem://x"


@pytest.mark.parametrize("how", ["threading.Event().wait()", "ctypes.CDLL(None).pause()"], ids=["python", "native"])
def test_a_call_that_is_not_back_long_after_its_deadline_ends_the_process_with_a_code_of_its_own(
    place, mem, tmp_path, how
):
    place.seal(1)
    log = tmp_path / "log"
    with place.shipper(place.config(to=mem, upload_deadline_s=0.5), code=hanging(how), log=log) as process:
        assert process.wait(60) == EXIT_HUNG
    assert log.read_text().count("store_hung error=mem://x has not answered for ") == 1
    report = place.report()
    assert report["last_error_class"] == "hung"
    assert (report["backlog_segments"], report["backlog_shards"]) == (0, 2), "nothing is lost by it"
    assert not list(place.state.outbox.glob("*.tmp")), "and no conversion was cut short"


def test_what_was_sealed_while_the_store_hung_is_converted_before_the_process_ends(place, mem):
    place.seal(1)
    with place.shipper(place.config(to=mem, upload_deadline_s=4), code=hanging("threading.Event().wait()")) as process:
        wait_for(lambda: place.report().get("backlog_shards") == 2, "the first one is converted")
        place.seal(2)
        assert process.wait(60) == EXIT_HUNG
    assert place.report()["converted_segments"] == 2


def test_a_library_that_lets_no_thread_run_any_more_is_ended_too(place, mem, tmp_path):
    place.seal(1)
    log = tmp_path / "log"
    code = hanging("ctypes.PyDLL(None).pause()", standstill_s=2)
    with place.shipper(place.config(to=mem), code=code, log=log) as process:
        assert process.wait(60) == 1
    assert "in put" in log.read_text(), "the log shows where it stood"
    assert len(list(place.state.outbox.rglob("*.parquet"))) == 2


def test_calls_that_were_given_up_but_never_end_do_not_pile_up_over_the_months(place, mem, tmp_path):
    place.seal(1)
    log = tmp_path / "log"
    how = (
        "threading.Thread(target=threading.Event().wait, daemon=True).start();"
        " raise StoreError('given up', permanent=False)"
    )
    with place.shipper(place.config(to=mem), code=hanging(how), log=log) as process:
        assert process.wait(60) == EXIT_HUNG
    assert "threads, most of them in calls that never came back" in log.read_text()
    assert len(list(place.state.outbox.rglob("*.parquet"))) == 2


def test_a_directory_may_take_its_time(place):
    now_s = [0.0]
    shipper = Shipper(place.config(upload_deadline_s=1), clock=lambda: now_s[0])
    shipper.uploader.busy_since_s = 0.0
    now_s[0] = 3600
    assert shipper._error()[1] == "hung", "it is reported"
    assert not shipper._hang(), "and not ended: a slow disk gets on"


def test_what_the_last_one_hung_at_is_reported_until_the_store_answers(place):
    hung = ShipperReport(last_error="x has not answered for 150 s", last_error_class="hung")
    write_report(place.state.shipper_report, hung)
    place.seal(1)
    shipper = Shipper(place.config())
    shipper.convert_one()
    report = shipper.report()
    assert report is not None
    assert (report.last_error, report.last_error_class) == (hung.last_error, "hung")
    assert shipper.step().last_error == ""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


def hub_env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": hub.token()}


def test_a_line_on_its_stdin_makes_it_upload_what_waits_for_the_pace(place, hub, tmp_path):
    config = place.config(to="hf://buckets/user/b", create_bucket="private", upload_interval_min_s=1000)
    place.seal(1)
    with place.shipper(config, **hub_env(hub, tmp_path)) as process:
        wait_for(lambda: place.report().get("uploaded_shards") == 2, "the first ones are uploaded at once")
        place.seal(2)
        wait_for(lambda: place.report()["backlog_shards"] == 2, "the next ones wait")
        assert place.report()["next_try_s"] > 700
        process.stdin.write(HURRY)
        process.stdin.flush()
        wait_for(lambda: place.report()["uploaded_shards"] == 4, "they are uploaded")


def test_sigterm_uploads_the_rest_whatever_the_pace(place, hub, tmp_path):
    config = place.config(to="hf://buckets/user/b", create_bucket="private", upload_interval_min_s=1000)
    place.seal(1)
    with place.shipper(config, **hub_env(hub, tmp_path)) as process:
        wait_for(lambda: place.report().get("uploaded_shards") == 2, "the first ones are uploaded at once")
        place.seal(2)
        wait_for(lambda: place.report()["backlog_shards"] == 2, "the next ones wait")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert place.report()["uploaded_shards"] == 4


def test_sigterm_ends_a_wait_that_the_store_asked_for_and_does_not_break_its_wish(place, hub, tmp_path):
    config = place.config(to="hf://buckets/user/b", create_bucket="private", stop_deadline_s=1)
    hub.fault("*", status=429, headers={"Retry-After": "86400"})
    place.seal(1)
    with place.shipper(config, **hub_env(hub, tmp_path)) as process:
        wait_for(lambda: place.report().get("next_try_s", 0) > 800, "it is sent away for a day, and waits 15 minutes")
        assert place.report()["last_error_class"] == "transient"
        asked = hub.api_calls
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert hub.api_calls == asked
    assert place.report()["backlog_shards"] == 2


def test_killed_again_and_again_in_the_same_conversion_a_sound_segment_never_goes_to_quarantine(place):
    place.seal(1)
    for _ in range(5):
        with place.shipper(RANKLOG_FAILPOINT="shard.write.mid=kill") as process:
            assert process.wait(60) == -signal.SIGKILL
    Shipper(place.config()).step()
    assert place.at_rest()
    assert len(content(place.store)) == 20


def test_no_record_is_in_two_places_once_all_is_at_rest(place):
    place.seal(1)
    Shipper(place.config()).step()
    state = StateDir(place.state.root)
    assert not [path for room in state.rooms for path in room.rglob("*") if path.is_file()]
