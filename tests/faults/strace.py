"""Errors and kills in the system calls of real processes: strace, attached to a process that runs already.

    Warm            an interpreter with everything imported. It forks a child for each load, so that a case costs no
                    start, and strace counts from the load's first call, not from those of its imports
    rehearsal       a run without a fault: which calls the load makes at the files in question
    fault           the same run with one call made to fail, or with SIGKILL in its place

strace counts the calls "per syscall and per tracee": `when=3` is the third pwrite64 of each thread. A call that is
made to fail is not made at all; `Outcome.hits` are those that really were.
"""

import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, Self

import pytest

from node import ROOT, wait_for

NEEDS_STRACE = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed. Run: apt-get install strace"
)
_PR_SET_PTRACER = 0x59616D61
_LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")  # Without a thread where only one is traced.
_RESUMED = re.compile(r"(?:(\d+) +)?<\.\.\. (\w+) resumed>(.*)")


class Fault(NamedTuple):
    """What strace shall do: the `nth` call of `call` (with `for_ever`, every one from then on) fails, or is a kill."""

    call: str
    error: str
    """EIO, ENOSPC, …, or KILL."""
    nth: int
    for_ever: bool = False
    path: Path | None = None
    """Count, and see, only calls at this file."""

    @property
    def options(self) -> list[str]:
        """What strace must be told."""
        what = "signal=KILL" if self.error == "KILL" else f"error={self.error}"
        when = f"{self.nth}{'+' if self.for_ever else ''}"
        return ["-e", f"inject={self.call}:{what}:when={when}", *(["-P", str(self.path)] if self.path else [])]

    def __str__(self) -> str:
        return f"{self.error}-{self.call}-{self.nth}{'+' if self.for_ever else ''}"


class Call(NamedTuple):
    """One call in a trace: the `nth` of its name in its thread."""

    thread: int
    name: str
    nth: int
    text: str
    """Arguments and result, as strace writes them."""

    @property
    def injected(self) -> bool:
        """True if strace made it fail."""
        return "(INJECTED)" in self.text


@dataclass
class Outcome:
    """How a load ended."""

    code: int
    """Its exit code; -9 if it was killed."""
    calls: list[Call] = field(default_factory=list)
    said: str = ""
    """What it wrote to stdout and stderr."""

    @property
    def hits(self) -> list[Call]:
        """The calls that failed by our doing; for a kill, those in whose place it came."""
        if self.code == -signal.SIGKILL:
            return [call for call in self.calls if call.text.endswith("= ?") or "<unfinished" in call.text]
        return [call for call in self.calls if call.injected]

    def points(self, *roots: Path) -> list[tuple[str, int]]:
        """Return (call, nth) of every call that names a file below `roots`, without those that open for reading."""
        found = set()
        for call in self.calls:
            changes = call.name != "openat" or "O_CREAT" in call.text
            if changes and any(f"{root}/" in call.text for root in roots):
                found.add((call.name, call.nth))
        return sorted(found)


def read_trace(path: Path) -> list[Call]:
    """Return the calls of a trace, in order."""
    counts: Counter[tuple[int, str]] = Counter()
    calls: list[Call] = []
    for line in path.read_text(errors="replace").splitlines():
        if match := _LINE.match(line):
            thread, name = int(match[1] or 0), match[2]
            counts[thread, name] += 1
            calls.append(Call(thread, name, counts[thread, name], match[3]))
        elif match := _RESUMED.match(line):
            thread, name = int(match[1] or 0), match[2]
            for index in range(len(calls) - 1, -1, -1):
                if calls[index][:2] == (thread, name):
                    text = calls[index].text.removesuffix("<unfinished ...>") + match[3]
                    calls[index] = calls[index]._replace(text=text)
                    break
    return calls


@contextmanager
def attached(pid: int, trace: Path, *options: str, follow: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    """Trace a running thread, or with `follow` its process and all that comes of it. At the end it is let go."""
    words = trace.with_name(f"{trace.name}.strace")
    with words.open("wb") as out:
        strace = subprocess.Popen(
            ["strace", *(["-f"] if follow else []), "-y", "-s", "0", "-o", trace, *options, "-p", str(pid)],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        wait_for(lambda: b"attached" in words.read_bytes() or strace.poll() is not None, "strace is attached")
        yield strace
    finally:
        if strace.poll() is None:
            strace.terminate()
        strace.wait(30)
        assert b"attached" in words.read_bytes(), words.read_text()


class Warm:
    """An interpreter that has `module` imported and runs functions of it in forked children, one at a time."""

    def __init__(self, module: str) -> None:
        path = os.pathsep.join(str(ROOT / room) for room in ("client", "daemon", "tests"))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RANKLOG_", "XDG_", "TORCHELASTIC_", "SLURM_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.strace", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env | {"PYTHONPATH": path}, bufsize=0,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, load: str, root: Path, calls: str = "", fault: Fault | None = None, *, thread: int = -1) -> Outcome:
        """Run one load and return how it ended. With `calls`, these are traced: of all threads, or of one by number."""
        said, trace = root / "said", root / "trace"
        self._tell({"load": load, "root": str(root), "said": str(said), "stop": bool(calls)})
        pid = int(self._hear())
        if calls:
            wait_for(lambda: _state(pid) == "T", "the load is ready")
            tids = sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
            options = ["-e", f"trace={calls}", *(fault.options if fault else [])]
            with attached(tids[max(thread, 0)], trace, *options, follow=thread < 0) as strace:
                os.kill(pid, signal.SIGCONT)
                code = int(self._hear())
                strace.wait(60)
        else:
            code = int(self._hear())
        return Outcome(code, read_trace(trace) if calls else [], said.read_text(errors="replace"))

    def _tell(self, job: dict[str, object]) -> None:
        _pipe(self._process.stdin).write(json.dumps(job).encode() + b"\n")

    def _hear(self) -> str:
        line = _pipe(self._process.stdout).readline()
        assert line, "the warm interpreter died"
        return line.decode()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _serve(module: str) -> None:
    loads = importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            _child(loads, job)
        os.write(1, f"{pid}\n".encode())
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


def _wait_for_strace() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # Where only a parent may trace.
    os.kill(os.getpid(), signal.SIGSTOP)


def _child(loads: object, job: dict[str, str]) -> None:
    code = 70
    try:
        said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = getattr(loads, job["load"])(Path(job["root"]), _wait_for_strace if job["stop"] else lambda: None)
    except BaseException:  # noqa: BLE001  A forked child must not come back into the loop.
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
