"""`ranklog demo`: nothing lost, nothing doubled, checked against an independent reader; and a proof that can fail."""

import json
import math
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import environment, ranklog
from node import Node
from ranklogd.commands.demo import thinned
from ranklogd.commands.plot import plot
from ranklogd.commands.proof import KEYS, Rows

STEPS = "150"


def demo(home: Path, *arguments: str, **env: str) -> dict:
    done = ranklog("demo", "--json", "--steps", STEPS, *arguments, home=home, env=env, timeout_s=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_in(store: Path, run: str) -> list[tuple]:
    """(rank, attempt, records, rows) as a plain parquet reader counts them."""
    files = str(store / "v1/project_id=demo" / f"run_id={run}" / "*.parquet")
    what = "rank, attempt, count(DISTINCT step), count(*)"
    which = "kind = 'metrics' AND rank IS NOT NULL"
    return duckdb.sql(
        f"SELECT {what} FROM read_parquet('{files}') WHERE {which} GROUP BY 1, 2 ORDER BY 1, 2"
    ).fetchall()


def test_every_record_is_there_once_although_a_rank_and_the_daemon_are_killed(tmp_path):
    facts = demo(tmp_path, "--dir", str(tmp_path / "data"))
    attempts = facts["attempts"]
    assert facts["ok"]
    assert [(a["rank"], a["attempt"], a["killed"]) for a in attempts] == [
        (0, 0, False), (1, 0, False), (2, 0, True), (2, 1, False), (3, 0, False),
    ]  # fmt: skip
    assert all(a["logged"] == int(STEPS) for a in attempts if a["rank"] != 2)
    assert 0 < attempts[2]["logged"] < int(STEPS)
    assert [(a["lost"], a["doubled"]) for a in attempts] == [(0, 0)] * 5
    expected = [(a["rank"], a["attempt"], a["logged"] + a["unreturned"]) for a in attempts]
    assert rows_in(tmp_path / "data", facts["run"]) == [(*who, count, count * len(KEYS)) for *who, count in expected]


def test_it_can_be_run_again_in_the_same_place_and_with_another_number_of_ranks(tmp_path):
    first = demo(tmp_path, "--dir", str(tmp_path / "data"))
    second = demo(tmp_path, "--dir", str(tmp_path / "data"), "--ranks", "1")
    assert first["run"] != second["run"]
    assert [(a["rank"], a["killed"]) for a in second["attempts"]] == [(0, True), (0, False)]


def test_it_touches_no_daemon_and_no_configuration_of_this_node(tmp_path):
    with Node(tmp_path / "node-with-a-daemon") as node:
        node.path.mkdir()
        daemon = node.start_daemon()
        configured = {name: value for name, value in node.env.items() if "RANKLOG" in name}
        facts = demo(tmp_path, "--dir", str(tmp_path / "data"), **configured, RANK="5")
        assert facts["to"] == str(tmp_path / "data")
        assert node.ping() == daemon.pid
        assert node.status()["records"] == 0
        assert node.leftovers() == []


def test_a_directory_with_a_long_name_is_no_obstacle(tmp_path):
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    facts = demo(tmp_path, "--dir", str(deep))
    assert facts["ok"]
    assert list(deep.glob("v1/**/*.parquet"))


def test_on_a_terminal_of_80_columns_it_tells_proves_plots_and_says_what_to_try_next(tmp_path):
    # Started from elsewhere, with a relative directory: as people do.
    done = subprocess.run(
        [sys.executable, "-m", "ranklog.cli", "demo", "--steps", STEPS],
        env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for told in ("kill -9 rank 2", "kill -9 the daemon", "another daemon", "Nothing lost, nothing doubled."):
        assert told in done.stdout
    assert any(line.split()[:1] == ["all"] and line.split()[-2:] == ["0", "0"] for line in lines)
    assert any("⠉" in line or "⠒" in line for line in lines)
    next_steps = done.stdout.partition("Try next:\n")[2].replace("\\\n", " ").splitlines()
    for command in (next_steps[0], next_steps[1], next_steps[2]):
        tried = subprocess.run(
            f"ranklog() {{ {sys.executable} -m ranklog.cli \"$@\"; }}; {command}",
            shell=True, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert (tried.returncode, tried.stderr) == (0, ""), command
        assert len(tried.stdout.splitlines()) > 1


@pytest.mark.parametrize("arguments", [("--ranks", "0"), ("--ranks", "65"), ("--ranks", "four")])
def test_wrong_usage_starts_nothing(tmp_path, arguments):
    done = ranklog("demo", "--dir", str(tmp_path / "data"), *arguments, home=tmp_path)
    assert done.returncode == 2
    assert not (tmp_path / "data").exists()


def test_without_the_extra_it_prints_the_pip_line(tmp_path):
    done = ranklog("demo", "--dir", str(tmp_path / "data"), home=tmp_path, without=("pyarrow",))
    assert done.returncode == 2
    assert 'pip install "ranklog[all]"' in done.stderr


def shard(path: Path, records: list[tuple[int, int, int]], keys: tuple[str, ...] = KEYS) -> Path:
    """A parquet file with the columns that the proof reads: a row for each record (rank, attempt, step) and key."""
    rows = [(*record, "metrics", key, 0.5) for record in records for key in keys]
    names = ["rank", "attempt", "step", "kind", "key", "value"]
    pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}), path)
    return path


def test_the_proof_sees_a_lost_record_a_lost_value_and_a_doubled_one(tmp_path):
    whole = shard(tmp_path / "1.parquet", [(0, 0, step) for step in (0, 1, 3)])
    part = shard(tmp_path / "2.parquet", [(0, 0, 4)], KEYS[:-1])
    again = shard(tmp_path / "3.parquet", [(0, 0, 1), (1, 0, 0)])
    found = Rows([whole, part, again]).judge(0, 0, 0, 5, killed=False)
    assert (found.logged, found.in_parquet, found.lost, found.doubled, found.unreturned) == (5, 3, 2, len(KEYS), 0)


def test_a_record_whose_log_had_not_returned_is_neither_lost_nor_doubled(tmp_path):
    rows = Rows([shard(tmp_path / "1.parquet", [(0, 1, step) for step in range(10, 15)])])
    found = rows.judge(0, 1, 10, 4, killed=True)
    assert (found.in_parquet, found.lost, found.doubled, found.unreturned) == (4, 0, 0, 1)
    assert rows.loss() == [(step, 0.5) for step in range(10, 15)]


def test_a_falling_line_begins_top_left_and_ends_bottom_right():
    line = [(0, 1.0), (10, 0.5), (20, 0.0)]
    assert plot(line, width=32, height=5, ascii_only=True) == [
        "         1 |*****               ",
        "           |     *****          ",
        "           |          ********* ",
        "         0 |                   *",
        "            0                 20",
    ]
    assert plot(line, width=32, height=5) == [
        "         1 ┤⠉⠑⠢⠤⣀               ",
        "           ┤     ⠉⠑⠢⠤⣀          ",
        "           ┤          ⠉⠑⠒⠤⢄⡀    ",
        "         0 ┤               ⠈⠉⠒⠢⢄",
        "            0                 20",
    ]


@given(
    st.lists(st.tuples(st.floats(), st.floats(allow_nan=True, allow_infinity=True)), max_size=50),
    st.integers(1, 100),
    st.integers(1, 30),
    st.booleans(),
)
def test_a_plot_of_anything_keeps_its_size(points, width, height, ascii_only):
    lines = plot(points, width=width, height=height, ascii_only=ascii_only)
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    assert bool(lines) == (len(finite) >= 2)
    assert len(lines) in (0, max(3, height))
    body = lines[:-1]
    assert len({len(line) for line in body}) <= 1
    if ascii_only:
        assert all(line.isascii() for line in lines)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=300), st.integers(1, 60))
def test_thinning_keeps_to_its_limit_and_within_the_values(points, count_max):
    few = thinned(points, count_max)
    assert len(few) <= count_max
    assert bool(few) == bool(points)
    if points:
        low, high = min(y for _, y in points), max(y for _, y in points)
        assert all(low <= y * (1 + 1e-12) + 1e-12 and y <= high * (1 + 1e-12) + 1e-12 for _, y in few)
