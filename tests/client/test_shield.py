"""What stands between ranklog and the training."""

import io
import subprocess
import sys
import threading

import pytest

from node import ROOT
from ranklog import shield
from ranklog.errors import FormatError, UsageError
from ranklog.shield import WARNINGS_MAX, Warner, say, shielded


def test_a_thing_is_said_once(capsys: pytest.CaptureFixture[str]):
    warn = Warner()
    for _ in range(3):
        warn("one")
        warn("two")
    assert capsys.readouterr().err == "ranklog: warning: one\nranklog: warning: two\n"


def test_many_different_things_are_said_up_to_a_bound(capsys: pytest.CaptureFixture[str]):
    warn = Warner()
    for number in range(10 * WARNINGS_MAX):
        warn(f"metric {number}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == WARNINGS_MAX + 1
    assert lines[-1] == "ranklog: warning: more warnings are not shown"


class Failing(io.StringIO):
    """A stderr that fails as real ones do."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(32, "broken pipe"), ValueError("closed file"), RuntimeError("reentrant call inside <_io.BufferedWriter>")]
)
def test_a_stderr_that_fails_is_no_reason_to_fail(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Failing(error))
    say("unheard")
    monkeypatch.setattr(sys, "stderr", None)
    say("unheard, too")


def test_a_warning_amid_a_warning_does_not_wait_for_itself(monkeypatch: pytest.MonkeyPatch):
    """A signal handler may warn while the thread it interrupted does, in the middle of it."""
    warn = Warner()
    said: list[str] = []

    class Interrupting(set[str]):
        def add(self, text: str) -> None:
            super().add(text)
            if text == "outer":
                warn("inner")

    monkeypatch.setattr(shield, "say", said.append)
    warn._told = Interrupting()
    thread = threading.Thread(target=warn, args=("outer",), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert sorted(said) == ["warning: inner", "warning: outer"]


def test_an_error_of_ours_costs_a_warning_and_gives_the_default(capsys: pytest.CaptureFixture[str]):
    @shielded("default")
    def fails(text: str) -> str:
        raise FormatError(text)

    assert fails("some bytes") == "default"
    assert fails("some bytes") == "default"
    assert capsys.readouterr().err == (
        "ranklog: warning: fails() failed: FormatError: some bytes. Training goes on without this record.\n"
    )


def test_usage_errors_pass_only_where_it_is_said():
    @shielded(None)
    def quiet() -> None:
        raise UsageError("mode='onlin'")

    @shielded(None, usage_errors=True)
    def loud() -> None:
        raise UsageError("mode='onlin'")

    quiet()
    with pytest.raises(UsageError):
        loud()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_meant_for_the_script_passes(error: type[BaseException]):
    @shielded(None)
    def interrupted() -> None:
        raise error

    with pytest.raises(error):
        interrupted()


def test_a_process_without_stderr_logs_all_the_same():
    source = "import os, sys; os.close(2); sys.stderr = None\nimport ranklog\nranklog.log({'a': 1})\nprint('fine')"
    env = {"PYTHONPATH": str(ROOT / "client"), "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, env=env)
    assert done.stdout == "fine\n"
