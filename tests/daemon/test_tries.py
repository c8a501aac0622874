import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ranklogd.ship.tries import Record, Tries, forget_orphans, judge, oom_kills

SEGMENT = "0000000000000001-0000000000000009.wal"


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("", Record(0, 0, "")),
        ("begin oom_kills=5\n", Record(0, 1, "")),
        ("begin oom_kills=5\nraised 'ValueError: x'\n", Record(1, 0, "raised 'ValueError: x'")),
        ("begin oom_kills=5\nFatal Python error: Segmentation fault\n\nCurrent thread …\n  File …\n",
         Record(1, 0, "Fatal Python error: Segmentation fault")),
        ("begin oom_kills=3\n", Record(1, 0, "the kernel killed the converter for lack of memory")),
        ("begin oom_kills=3\nbegin oom_kills=5\n", Record(1, 1, "the kernel killed the converter for lack of memory")),
        ("begin oom_kills=5\n" * 20, Record(0, 20, "")),
        ("begin oom_kills=5\nraised 'a'\nbegin oom_kills=5\nbegin oom_kills=5\nraised 'b'\n",
         Record(2, 1, "raised 'b'")),
        ("begin oom_kills=what\n", Record(1, 0, "the kernel killed the converter for lack of memory")),
        ("torn", Record(0, 0, "")),
    ],
)  # fmt: skip
def test_only_a_failure_through_the_segment_itself_is_a_strike(text, record):
    assert judge(text, 5) == record


CODE = """
import ctypes, os, signal, sys
from pathlib import Path
from ranklogd.ship.tries import Tries
with Tries(Path(sys.argv[1])).begun() as attempt:
    exec(sys.argv[2])
"""


def run(segment: Path, body: str) -> int:
    """Do something during a try in a process of its own; return the exit code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE, str(segment), body]
    return subprocess.run(command, env=env, capture_output=True, timeout=60, check=False).returncode


def test_a_crash_of_the_interpreter_leaves_its_reason(tmp_path):
    segment = tmp_path / SEGMENT
    assert run(segment, "ctypes.string_at(0)") == -signal.SIGSEGV
    assert run(segment, "os.abort()") == -signal.SIGABRT
    record = Tries(segment).read()
    assert record == Record(2, 0, "Fatal Python error: Aborted")


def test_being_killed_leaves_a_try_that_nobody_can_explain(tmp_path, monkeypatch):
    segment = tmp_path / SEGMENT
    count = oom_kills()
    for _ in range(5):
        assert run(segment, "os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    if oom_kills() == count:  # Else some other process of this machine was killed for memory just now.
        assert Tries(segment).read() == Record(0, 5, "")


def test_failed_tries_are_counted_and_withdrawn_ones_are_not(tmp_path):
    tries = Tries(tmp_path / SEGMENT)
    with tries.begun() as attempt:
        attempt.failed("ValueError: \n begin oom_kills=0 🎉" + "x" * 10_000)
    with tries.begun() as attempt:
        attempt.withdrawn()
    record = tries.read()
    assert (record.strikes, record.unexplained) == (1, 0)
    assert len(record.last) < 1100
    tries.forget()
    assert tries.read() == Record()
    assert list(tmp_path.iterdir()) == []


def test_orphans_go_and_those_of_waiting_segments_stay(tmp_path):
    for name in ("a.wal", "a.tries", "b.tries"):
        (tmp_path / name).write_text("")
    forget_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tries", "a.wal"]
