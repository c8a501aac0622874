"""What holds for every suite.

    RANKLOG_REQUIRE_ALL=1   a skipped test fails: continuous integration installs everything, so nothing may hide there
    -m full                 the long sweeps; without -m they are left out, and a sample of each runs in their place

At the end the time of each suite (a folder of tests) is printed.
"""

import logging
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REQUIRE_ALL = os.environ.get("RANKLOG_REQUIRE_ALL") == "1"

# A busy machine is no reason to fail a rule. Where everything is required, the same examples are tried each time.
settings.register_profile("ranklog", deadline=None, derandomize=REQUIRE_ALL)
settings.load_profile("ranklog")

# `nohup` and shells' background jobs start us with signals ignored, which every process started by a test would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A test that configures logging must not silence what the next one listens for."""
    root = logging.getLogger()
    level, disabled, handlers = root.level, logging.root.manager.disable, root.handlers[:]
    yield
    root.setLevel(level)
    logging.disable(disabled)
    root.handlers[:] = handlers


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and RANKLOG_REQUIRE_ALL=1 allows no skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report


class _Times:
    """Adds up how long each suite took."""

    def __init__(self) -> None:
        self._spent_s: dict[str, float] = defaultdict(float)
        self._tests: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = str(Path(report.nodeid.partition("::")[0]).parent)
        self._spent_s[suite] += report.duration
        self._tests[suite] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("time per suite")
        for suite, spent_s in sorted(self._spent_s.items(), key=lambda pair: -pair[1]):
            terminalreporter.write_line(f"{spent_s:8.1f} s  {self._tests[suite]:5d} tests  {suite}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Times())
