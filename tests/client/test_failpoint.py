"""Failpoints in a process of their own: the crash tests rely on them, so they must hit, once, and be proven to."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ranklog import failpoint as module

CLIENT = Path(module.__file__).parent.parent
SCRIPT = """
import time
from ranklog.failpoint import failpoint
for number in range(1, 4):
    began = time.monotonic()
    try:
        failpoint("journal.write.after")
        failpoint("journal.write.before")
    except OSError as exc:
        print("error", number, exc)
    else:
        print("slept" if time.monotonic() - began > 0.4 else "passed", number)
"""


def run(spec: str | None, tmp_path: Path) -> tuple[int, list[str], str]:
    log = tmp_path / "log"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CLIENT), "RANKLOG_FAILPOINT_LOG": str(log)}
    if spec is not None:
        env["RANKLOG_FAILPOINT"] = spec
    command = [sys.executable, "-u", "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout.splitlines(), log.read_text() if log.exists() else ""


@pytest.mark.parametrize("spec", [None, "", "wal.sync.after=kill"])
def test_an_unarmed_point_does_nothing(spec: str | None, tmp_path: Path) -> None:
    assert run(spec, tmp_path) == (0, ["passed 1", "passed 2", "passed 3"], "")


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit", 86)])
def test_an_armed_point_ends_the_process_at_its_nth_pass(action: str, code: int, tmp_path: Path) -> None:
    found, lines, log = run(f"journal.write.after:2={action}", tmp_path)
    assert (found, lines) == (code, ["passed 1"])
    assert re.fullmatch(rf"journal\.write\.after {action} \d+\n", log)


def test_a_point_can_fail_or_wait_once(tmp_path: Path) -> None:
    code, lines, log = run("journal.write.after:2=err,journal.write.before:1=sleep", tmp_path)
    assert (code, lines) == (0, ["slept 1", "error 2 [Errno 5] failpoint journal.write.after", "passed 3"])
    assert [line.split()[:2] for line in log.splitlines()] == [
        ["journal.write.before", "sleep"], ["journal.write.after", "err"],
    ]  # fmt: skip


@pytest.mark.parametrize("spec", ["no.such.point=kill", "journal.write.after=explode"])
def test_a_misspelt_point_is_no_silent_pass(spec: str, tmp_path: Path) -> None:
    assert run(spec, tmp_path)[0] == 1
