"""`ranklog status`: four answers on one screen, and whatever needs a person, with what to do."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import ranklog
from node import Node, wait_for
from ranklog.cli.output import display_width
from ranklog.cli.status import age, describe, describe_absence, only_run, problems, why_not_uploaded
from ranklog.errors import RanklogError
from ranklogd.report import RunStatus, Status, Watermarks

NOW_S = 1_800_000_000.0
LOG = """
import os, time, ranklog
ranklog.init(project="job", id="a", name="first try")
for n in range(30):
    ranklog.log({"n": n})
open("logged", "w").close()
while not os.path.exists("enough"):
    time.sleep(0.01)
ranklog.finish()
"""


def run_status(**changes: object) -> RunStatus:
    fields = {
        "project": "llama", "run": "r01jx", "name": "brave-river-417", "ranks": 8, "world_size": 16, "records": 12400,
        "state": "running", "last_s": 0.2,
    }  # fmt: skip
    return RunStatus(**(fields | changes))


def snapshot(**changes: object) -> dict:
    """A daemon with nothing to complain about, as its status request answers, but for `changes`."""
    calm = {"last_upload_s": NOW_S - 14, "last_error": "", "last_error_class": "", "next_try_s": 0.0}
    shipper = calm | changes.pop("shipper", {})
    fields = {
        "version": "1.2.0", "pid": 4121, "node": "gpu-17", "store_id": "0" * 16, "to": "/data/logs",
        "socket": "/run/ranklog/ranklog.sock", "state_dir": "/var/lib/ranklog", "uptime_s": 3 * 3600 + 12 * 60.0,
        "watermarks": Watermarks(uploaded=1000, sealed=1000, durable=1000, received=1000), "used_bytes": 0, "full": "",
        "records": 1000, "duplicates": 0, "refused": {}, "writers": 16, "adopted": 0, "adoption_refused": {},
        "offline_waiting": 0, "poisoned_segments": 0, "runs": [run_status()],
    }  # fmt: skip
    return json.loads(Status(**(fields | changes), shipper=shipper).to_json())


def test_the_four_answers_fit_on_a_screen_of_80_columns():
    marks = Watermarks(uploaded=980_000, sealed=990_000, durable=999_950, received=1_000_000)
    runs = [run_status(), run_status(name="sft-eval", run="r01jw", ranks=7, world_size=8, last_s=41.3, records=880)]
    assert describe(snapshot(watermarks=marks, used_bytes=1_234_000, runs=runs), now_s=NOW_S, width=80) == [
        "ranklogd 1.2.0 · up 3 h 12 m · gpu-17 · pid 4121                              OK",
        "ranks     15 ranks here in 2 live runs, last record just now",
        "safe      999,950 records durable, 50 on the way to the disk",
        "uploaded  98 %, 20,000 records (1.23 MB) to go; last upload 14 s ago",
        "store     /data/logs",
        "",
        "RUN              RANKS  RECORDS   LAST  STATE    PROJECT  ID",
        "brave-river-417   8/16   12,400  0.2 s  running  llama    r01jx",
        "sft-eval           7/8      880   41 s  running  llama    r01jw",
    ]


def test_a_daemon_that_has_nothing_yet_says_so():
    marks = Watermarks(uploaded=0, sealed=0, durable=0, received=0)
    lines = describe(snapshot(watermarks=marks, runs=[], shipper={"last_upload_s": 0.0}), now_s=NOW_S, width=80)
    assert lines[1:] == [
        "ranks     no run is live here",
        "safe      0 records durable",
        "uploaded  nothing has arrived yet",
        "store     /data/logs",
    ]


def test_it_says_everything_only_if_it_is_everything():
    marks = Watermarks(uploaded=999_999, sealed=1_000_000, durable=1_000_000, received=1_000_000)
    assert "uploaded  99.9 %, 1 record" in "\n".join(describe(snapshot(watermarks=marks), now_s=NOW_S, width=80))
    assert "uploaded  everything; last" in "\n".join(describe(snapshot(), now_s=NOW_S, width=80))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"full": "the quota is used up"}, "no room: the quota is used up. New records stay with their writers"),
        ({"poisoned_segments": 1}, "1 WAL segment replaced after an fsync error"),
        (
            {"shipper": {"last_error": "503 Slow down", "last_error_class": "transient", "next_try_s": 8.04}},
            "upload: 503 Slow down (transient; next try in 8.0 s). Everything waits on this node's disk",
        ),
        ({"shipper": {"last_error": "no answer for 9 s", "last_error_class": "hung"}}, "upload: no answer for 9 s ("),
        (
            {"shipper": {"dead_letters": 2}},
            "2 shards refused by the store for good: kept, with reasons, in /var/lib/ranklog/deadletter",
        ),
        (
            {"shipper": {"quarantined_records": 3, "damaged_stretches": 1}},
            "3 unreadable records, 1 damaged stretch: gaps in the data",
        ),
        ({"refused": {"malformed": 2, "foreign": 1, "unknown_writer": 9}}, "refused messages: 1 foreign, 2 malformed."),
        ({"adoption_refused": {"/spool/x": "it has 2 names (hard link)"}}, "left alone: /spool/x (it has 2 names"),
        ({"offline_waiting": 1}, "1 writer in offline mode: bring the records in with: ranklog sync"),
    ],
)  # fmt: skip
def test_whatever_needs_a_person_is_told_with_what_to_do(changes, told):
    lines = describe(snapshot(**changes), now_s=NOW_S, width=80)
    assert lines[0].endswith("1 problem")
    assert any(line.startswith(f"! {told}") for line in lines), lines


def test_getting_in_step_again_after_a_restart_is_no_problem():
    assert problems(snapshot(refused={"unknown_writer": 8, "sequence": 2, "damaged": 1})) == []


def test_many_refused_files_do_not_fill_the_screen():
    found = problems(snapshot(adoption_refused={f"/spool/{n}": "symbolic link" for n in range(50)}))
    assert len(found) == 4
    assert found[-1] == "left alone: 47 more files (ranklog status --json)"


def test_a_daemon_whose_shipper_has_not_reported_yet_is_shown(tmp_path):
    young = snapshot() | {"shipper": {}}
    assert why_not_uploaded(young) == ""
    assert describe(young, now_s=NOW_S, width=80)[0].endswith("OK")


def test_one_run_can_be_asked_for_by_id_and_by_name():
    both = snapshot(runs=[run_status(), run_status(name="other", run="r2", project="p")])
    for wanted in ("r2", "other", "p/r2"):
        assert [row["run"] for row in only_run(both, wanted)["runs"]] == ["r2"]
    with pytest.raises(RanklogError, match="brave-river-417, other"):
        only_run(both, "othre")


def test_no_daemon_says_how_to_start_one_and_what_waits():
    assert describe_absence("/run/x.sock", "ranklogd", "", 2) == [
        "No daemon answers on /run/x.sock.",
        "",
        "start one       ranklogd",
        "or with a job   ranklog run -- torchrun train.py",
        "",
        "2 writers on this node hold records that no daemon has taken yet. They are safe.",
        "bring them in   ranklog sync",
    ]
    assert 'install it      pip install "ranklog[daemon]"' in describe_absence("/run/x.sock", "ranklogd", "pyarrow", 0)


def test_names_cannot_move_the_cursor():
    lines = describe(snapshot(runs=[run_status(name="\x1b[2Jgone")], full="\x1b[31m"), now_s=NOW_S, width=80)
    assert not any("\x1b" in line for line in lines)


RUNS = st.builds(run_status, name=st.text(max_size=80), records=st.integers(0, 10**12))


@given(st.integers(40, 200), st.lists(RUNS, max_size=20))
def test_the_table_keeps_to_the_width(width, runs):
    lines = describe(snapshot(runs=runs), now_s=NOW_S, width=width)
    header = next((index for index, line in enumerate(lines) if line.startswith("RUN")), len(lines))
    assert all(display_width(line) <= width for line in lines[header:] if not line.startswith("and "))
    assert len(lines) <= 6 + 1 + 12 + 1


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.9, "59 s"), (60, "1 m 0 s"), (3599, "59 m 59 s"),
        (11520, "3 h 12 m"), (90000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_durations_are_told_in_two_units(seconds, told):
    assert age(seconds) == told


def test_without_a_daemon_it_is_3_and_json_says_what_to_run(tmp_path):
    done = ranklog("status", home=tmp_path)
    assert done.returncode == 3
    assert "start one       ranklogd\n" in done.stdout
    answer = json.loads(ranklog("status", "--json", home=tmp_path).stdout)
    assert (answer["start"], answer["waiting_writers"]) == ("ranklogd", 0)
    assert str(tmp_path / "runtime/ranklog.sock") in answer["error"]


def test_a_live_run_a_waiting_one_and_the_screen_that_is_watched(tmp_path):
    with Node(tmp_path) as node:
        node.start_daemon()
        assert node.python(LOG.replace("while not", "while False and not"), RANKLOG_MODE="offline").returncode == 0
        (tmp_path / "logged").unlink()
        job = subprocess.Popen([sys.executable, "-c", LOG.replace('id="a"', 'id="b"')], env=node.env, cwd=tmp_path)
        try:
            wait_for((tmp_path / "logged").exists, "the job has logged")
            wait_for(lambda: node.status()["offline_waiting"] and node.status()["runs"], "the daemon has seen both")
            done = ranklog("status", home=tmp_path, env=node.env)
            assert (done.returncode, done.stderr) == (0, "")
            assert re.search(r"^first try +1/1 +31 +\S+ s +running +job +b$", done.stdout, re.MULTILINE), done.stdout
            assert "! 1 writer in offline mode" in done.stdout
            answer = json.loads(ranklog("status", "b", "--json", home=tmp_path, env=node.env).stdout)
            assert [(row["run"], row["state"]) for row in answer["runs"]] == [("b", "running")]
            unknown = ranklog("status", "c", home=tmp_path, env=node.env)
            assert (unknown.returncode, unknown.stdout) == (1, "")
            assert "first try" in unknown.stderr
            watching = subprocess.Popen(
                [sys.executable, "-m", "ranklog.cli", "status", "--watch", "--interval", "0.1"],
                env=node.env, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert len(first(watching, 3)) == 3
            watching.terminate()
            watching.communicate(timeout=20)
        finally:
            (tmp_path / "enough").touch()
            assert job.wait(30) == 0


def first(process: "subprocess.Popen[str]", count: int) -> list[str]:
    """The first lines that begin a screen."""
    screens: list[str] = []
    while len(screens) < count and (line := process.stdout.readline()):
        if line.startswith("ranklogd"):
            screens.append(line)
    return screens


@pytest.mark.parametrize("interval", ["0", "-1", "1e9", "often"])
def test_an_interval_out_of_bounds_is_wrong_usage(tmp_path, interval):
    assert ranklog("status", "--watch", f"--interval={interval}", home=tmp_path).returncode == 2
