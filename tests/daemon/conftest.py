"""Daemons within the test's own process, in temporary places."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingesting import Inside
from node import ROOT
from ranklogd.config import Config, load_config


@pytest.fixture
def make_config(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Make a config whose places are all temporary."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "client"), str(ROOT / "daemon")]))
    runtime = tmp_path_factory.mktemp("r")

    def make(**options: object) -> Config:
        flags = {
            "to": tmp_path / "store", "state_dir": tmp_path / "state", "runtime_dir": runtime,
            "journal_dir": tmp_path / "journal", "spool_dir": tmp_path / "spool", "node_metrics_interval_s": 0,
            "disk_free_min_bytes": 0, "reserve_size_bytes": 4096,
        }  # fmt: skip
        return load_config({name: str(value) for name, value in (flags | options).items()}, env={"HOME": str(tmp_path)})

    return make


@pytest.fixture
def inside(make_config: Callable[..., Config]) -> Iterator[Callable[..., Inside]]:
    """Start daemons within this process; each is taken apart at the end."""
    made: list[Inside] = []

    def make(**options: object) -> Inside:
        made.append(Inside(make_config(**options)))
        return made[-1]

    yield make
    for daemon in made:
        daemon.parts.close()
