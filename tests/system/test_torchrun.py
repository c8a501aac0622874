"""Real torchrun, real data, every rank: what `log()` returned for is in the parquet exactly once, in order."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from node import Node

pytest.importorskip("torch", reason='pip install "ranklog[test-all]"')
pytest.importorskip("sklearn", reason='pip install "ranklog[test-all]"')

import ranklog

SCRIPT = Path(__file__).with_name("train_digits.py")
STEPS = 60
RANKS = 4
Record = tuple[int, float, float, float]


def torchrun(node: Node, proofs: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *options]
    return node.run([*launcher, str(SCRIPT), str(proofs), str(STEPS)], timeout_s=240, OMP_NUM_THREADS="1", **env)


def proven(proofs: Path) -> dict[tuple[int, int], list[Record]]:
    """What log() returned for, by (rank, attempt)."""
    found = {}
    for path in proofs.iterdir():
        rank, attempt, _ = path.name.split(".")
        rows = [line.split() for line in path.read_text().splitlines()]
        found[int(rank), int(attempt)] = [(int(s), *map(float.fromhex, values)) for s, *values in rows]
    return found


def stored(node: Node) -> dict[tuple[int, int], list[Record]]:
    """What the parquet holds, by (rank, attempt), in the writer's order; every doubled row would show."""
    table = ranklog.read(node.url, project="digits")
    cells: dict[tuple[int, int], dict[tuple[str, int], dict[str, tuple[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    raw = node.raw_rows("kind = 'metrics'")
    assert table.num_rows == len(raw), "deduplication had something to do: a record was stored twice"
    for row in raw:
        record = cells[row["rank"], row["attempt"]][row["writer"], row["seq"]]
        assert row["key"] not in record, f"doubled: {row}"
        record[row["key"]] = (row["step"], row["value"])
    found = {}
    for who, records in cells.items():
        assert len({writer for writer, _ in records}) == 1, "one writer for a rank and attempt"
        in_order = [records[key] for key in sorted(records, key=lambda key: key[1])]
        found[who] = [(r["loss"][0], r["loss"][1], r["grad_norm"][1], r["step_time"][1]) for r in in_order]
    return found


def check(node: Node, proofs: Path, killed: tuple[int, int] | None = None) -> None:
    logged, read = proven(proofs), stored(node)
    for who, records in logged.items():
        # A killed rank may have logged one record more than it lived to note down.
        found = read.get(who, [])
        spare = len(found) - len(records)
        assert found[: len(records)] == records, f"rank {who[0]} attempt {who[1]}"
        assert spare == 0 or (who[1] == 0 and killed is not None and spare == 1), (who, spare)
    assert set(read) == set(logged)


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node


@pytest.fixture
def proofs(tmp_path):
    path = tmp_path / "proofs"
    path.mkdir()
    return path


def test_every_rank_of_a_training_is_in_the_parquet(node, proofs):
    node.start_daemon()
    done = torchrun(node, proofs)
    assert done.returncode == 0, done.stderr
    node.upload()
    check(node, proofs)
    assert set(proven(proofs)) == {(rank, 0) for rank in range(RANKS)}
    assert all(len(records) == STEPS for records in proven(proofs).values())
    assert sum("ranklog: run" in line for line in done.stderr.splitlines()) == 2, "two lines, from local rank 0 only"
    assert len(node.raw_rows("kind = 'end'")) == RANKS
    assert len({row["run"] for row in node.raw_rows("true")}) == 1, "one run for the job"


def test_a_killed_rank_and_the_restart_by_torchrun_lose_nothing(node, proofs):
    node.start_daemon()
    done = torchrun(node, proofs, "--max-restarts", "1", KILL_RANK="2", KILL_STEP="25")
    assert done.returncode == 0, done.stderr
    node.upload()
    check(node, proofs, killed=(2, 0))
    assert {who for who in proven(proofs) if who[1] == 1} == {(rank, 1) for rank in range(RANKS)}
    assert len(proven(proofs)[2, 0]) >= 25
    assert len({row["run"] for row in node.raw_rows("true")}) == 1, "a restart of the same job is the same run"


def test_without_a_daemon_the_job_spools_and_a_later_daemon_brings_everything_in(node, proofs):
    done = torchrun(node, proofs, "--max-restarts", "1", KILL_RANK="1", KILL_STEP="30")
    assert done.returncode == 0, done.stderr
    assert "ranklog sync" in done.stderr, "the command that brings the records in is printed"
    node.start_daemon()
    node.upload()
    check(node, proofs, killed=(1, 0))
    assert not node.leftovers(), "adopted files are gone"
