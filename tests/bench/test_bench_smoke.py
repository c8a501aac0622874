"""The benchmarks run and say what they should; no figure is judged here, for a busy machine must not fail a test."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import FIGURES
from bench.load import latency, make_records, quantile
from bench.rows import Row, as_json, as_table

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as the README says."""
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments], capture_output=True, text=True, timeout=200, cwd=ROOT
    )


def test_the_cheapest_figures_are_measured_and_written_as_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = bench("--quick", "--only", "log-flat", "memory", "series", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| figure")
    said = json.loads(file.read_text())
    assert said["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert list(said["figures"]) == ["log-flat", "memory", "series"]
    for figure in said["figures"].values():
        for row in figure["rows"]:
            assert math.isfinite(row["measured"])
            assert row["measured"] > 0
            assert row["figure"] in done.stdout
            assert (row["ratio"] is None) == (row["floor"] is None)
            assert (row["met"] is None) == (row["budget"] is None)


def test_the_list_names_every_figure_and_an_unknown_one_is_a_usage_error() -> None:
    names = [line.split()[0] for line in bench("--list").stdout.splitlines()]
    assert names == list(FIGURES)
    assert bench("--only", "no-such-figure").returncode == 2


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row(figure="f", unit="µs", measured=3, budget=3), True),
        (Row(figure="f", unit="µs", measured=3.1, budget=3), False),
        (Row(figure="f", unit="records/s", measured=59, budget=60, at_least=True), False),
        (Row(figure="f", unit="µs", measured=3, floor=2, budget=1.5, of_floor=True), True),
        (Row(figure="f", unit="µs", measured=4, floor=2, budget=1.5, of_floor=True), False),
        (Row(figure="f", unit="µs", measured=4, floor=2), None),
    ],
)
def test_a_budget_limits_the_figure_or_its_ratio_to_the_floor(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_a_budget_in_floors_needs_a_floor() -> None:
    with pytest.raises(AssertionError):
        Row(figure="f", unit="µs", measured=3, budget=1.5, of_floor=True)


def test_a_figure_that_cannot_be_measured_is_in_table_and_json_with_its_reason() -> None:
    groups: dict[str, list[Row] | str] = {"a": [Row(figure="f", unit="µs", measured=1)], "b": "needs root"}
    assert "b: not measured: needs root" in as_table(groups)
    assert json.loads(as_json(groups, {}))["figures"]["b"] == {"skipped": "needs root"}


def test_percentiles_are_of_calls() -> None:
    assert quantile(range(100), 0.5) == 50
    assert latency([1000] * 99 + [9000]) == {"p50": 1, "p99": 9, "max": 9, "calls": 100}


def test_records_have_equal_keys_and_different_values() -> None:
    first, second = make_records(count=2)
    assert list(first) == list(second)
    assert not set(first.values()) & set(second.values())
