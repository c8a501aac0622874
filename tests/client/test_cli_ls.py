import json
import re

import pytest

from cli import ranklog
from ranklog import framefile
from ranklog.cli.ls import rank_ranges
from ranklog.framefile import FileName
from ranklog.start import Start, encode_start
from shards import STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    for rank, letter in enumerate("abcd"):
        rows = start(writer(letter), rank=rank, name="brave otter") + records(
            writer(letter), [{"x": 1.0, "y": 2.0}] * 3, rank=rank
        )
        write_shard(root, rows, store_id=f"{rank:016x}")
    write_shard(
        root, records(writer("e"), [{"x": 1.0}], project="../x 🙂", run="run-2", first_seq=3600), store_id=STORE_B
    )
    (root / "README").write_text("not ours")
    return str(root)


def test_runs_are_listed_with_the_latest_last(tmp_path, store):
    done = ranklog("ls", store, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    header, first, second = done.stdout.splitlines()
    assert re.split("  +", header) == [
        "project", "name", "run", "ranks", "records", "last (UTC)", "size", "shards", "rows", "first (UTC)",
    ]  # fmt: skip
    assert re.split("  +", first)[:6] == ["proj", "brave otter", "run-1", "0-3", "16", "2026-11-22 12:00"]
    assert second.startswith("../x 🙂")
    assert "2026-11-22 13:00" in second


def test_json_has_every_figure(tmp_path, store):
    done = ranklog("ls", "--to", store, "--json", home=tmp_path)
    first, second = json.loads(done.stdout)
    size_bytes = first.pop("size_bytes")
    assert size_bytes > 1000
    assert first == {
        "project": "proj", "run": "run-1", "name": "brave otter", "ranks": [0, 1, 2, 3], "writers": 4, "records": 16,
        "rows": 28, "shards": 4, "first_ts": "2026-11-22T12:00:00Z", "last_ts": "2026-11-22T12:00:03Z",
    }  # fmt: skip
    assert second["project"] == "../x 🙂"


@pytest.mark.parametrize(
    "which", [["--project", "../x 🙂"], ["--run", "run-2"], ["--project", "../x 🙂", "--run", "run-2"]]
)
def test_a_run_is_chosen_by_its_true_name(tmp_path, store, which):
    assert [run["run"] for run in json.loads(ranklog("ls", store, "--json", *which, home=tmp_path).stdout)] == ["run-2"]


def test_a_display_name_chooses_its_run(tmp_path, store):
    done = ranklog("ls", store, "--run", "brave otter", "--json", home=tmp_path)
    assert [run["run"] for run in json.loads(done.stdout)] == ["run-1"]


def test_an_empty_store_is_no_error(tmp_path):
    done = ranklog("ls", str(tmp_path / "nothing"), home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"No runs in {tmp_path / 'nothing'}.\n"
    assert ranklog("ls", str(tmp_path / "nothing"), "--json", home=tmp_path).stdout == "[]\n"


def test_the_store_comes_from_the_environment_and_then_from_xdg(tmp_path, store):
    assert "run-1" in ranklog("ls", home=tmp_path, env={"RANKLOG_TO": store}).stdout
    done = ranklog("ls", home=tmp_path)
    assert done.stderr == f"No runs in {tmp_path}/.local/share/ranklog.\n"


def test_two_different_stores_are_refused(tmp_path):
    done = ranklog("ls", "a", "--to", "b", home=tmp_path)
    assert done.returncode == 2
    assert "two stores given" in done.stderr


def test_a_kind_of_store_that_does_not_exist_is_wrong_usage(tmp_path):
    done = ranklog("ls", "ftp://host/x", home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'ftp'" in done.stderr


def test_records_that_wait_on_this_node_are_announced_with_the_command(tmp_path, store):
    spool = tmp_path / "spool"
    spool.mkdir()
    for count, letter in enumerate("xy", 1):
        writer_id = f"{count:032x}"
        frame = encode_start(Start(writer=writer_id, project="proj", run=letter))
        framefile.create(spool, FileName(writer_id, 0, "spool"), frame, 0).close()
        done = ranklog("ls", store, "--json", home=tmp_path)
        json.loads(done.stdout)
        subject = "1 writer on this node holds" if count == 1 else "2 writers on this node hold"
        assert done.stderr == f"{subject} records that no daemon has taken yet. Run: ranklog sync\n"
        assert done.returncode == 0


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], ""), ([0], "0"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9], "0,2-3,9"), (list(range(512)), "0-511")],
)
def test_ranks_are_shown_as_ranges(ranks, text):
    assert rank_ranges(ranks) == text
