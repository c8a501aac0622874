"""A short soak in each run of the tests: two minutes where everything is required, half of one otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINUTES = "2" if os.environ.get("RANKLOG_REQUIRE_ALL") == "1" else "0.4"


@pytest.mark.timeout(600)
def test_a_node_under_random_faults_loses_doubles_and_changes_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "soak.png"
    command = [sys.executable, "-m", "tests.soak", "--minutes", MINUTES, "--png", str(picture)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost, none doubled, none changed" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
