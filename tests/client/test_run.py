"""A run as a training script sees it."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import Record, check_whole, logged, on_disk
from ranklog import run as run_module
from ranklog.config import Settings
from ranklog.frame import Kind
from ranklog.run import Run, child_start
from ranklog.start import Start
from ranklog.writer import Places, Writer


class Bench:
    """An offline run, and what it leaves on disk."""

    def __init__(self, path: Path, **env: str) -> None:
        self.directories = [path / "journal", path / "spool"]
        for directory in self.directories:
            directory.mkdir()
        self.settings = Settings.from_env({"HOME": str(path), **env})
        self.finished: list[bool | None] = []
        self.start = Start(writer=os.urandom(16).hex(), project="p", run="r", name="n", pid=os.getpid())
        self.run = Run(self.start, self._open, lambda _, complete: self.finished.append(complete))

    def _open(self, start: Start) -> Writer:
        return Writer(start, self.settings, Places([self.directories[0]], [self.directories[1]], None), lambda _: None)

    def records(self) -> list[Record]:
        found = on_disk(*self.directories)[self.start.writer]
        check_whole(found)
        return found[1:]

    def payloads(self, kind: Kind = Kind.METRICS) -> list[Any]:
        return [record.payload for record in self.records() if record.kind == kind]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.run.finish(wait=None)


def test_every_kind_of_record_is_what_it_was_logged_as(bench: Bench):
    bench.run.log({"loss": 0.5})
    bench.run.log_system({"cpu": 0.25})
    bench.run.alert("title", "text", "WARN")
    bench.run.config.update({"lr": 0.1, "model": {"depth": 3}})
    bench.run.define_metric("loss", step_metric="epoch", summary="min")
    assert [(r.kind, r.step, r.payload) for r in bench.records()[:4]] == [
        (Kind.METRICS, 0, {"loss": 0.5}),
        (Kind.SYSTEM, None, {"cpu": 0.25}),
        (Kind.ALERT, None, {"title": "title", "text": "text", "level": "WARN"}),
        (Kind.CONFIG, None, {"lr": 0.1, "model/depth": 3}),
    ]
    [key] = bench.records()[4].payload
    assert key == "_metric/loss"


class Broken:
    """Fails when it is touched, as a tensor on a lost device does."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __radd__(self, other: float) -> float:
        raise self.error("device lost")

    __float__ = __add__ = __radd__


def test_the_second_record_of_the_same_keys_is_what_the_first_was(bench: Bench):
    """Known keys take another way through log(); what comes out must not tell."""
    values: list[Any] = [
        1.5, 1, True, None, "text", np.float32(2.5), np.float64(0.1), np.int64(7), np.array(3.0), np.array([1.0, 2.0]), float("inf"), 1 << 63, 1 << 70, -(1 << 70), [1, 2], {"a": 1}, (1.0,), b"x",
    ]  # fmt: skip
    for number, value in enumerate(values):
        for _ in range(3):
            bench.run.log({f"k{number}": value, "other": 1.0})
    found = bench.payloads()
    assert len(found) == 3 * len(values)
    for first, second, third in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert repr(first) == repr(second) == repr(third)


def test_keys_that_change_their_values_type_go_on_as_before(bench: Bench):
    for value in (1.0, 2, np.float32(3.0), "four", None, 5.0, {"a": 6.0}):
        bench.run.log({"k": value})
    assert bench.payloads() == [{"k": 1.0}, {"k": 2}, {"k": 3.0}, {"k": "four"}, {"k": None}, {"k": 5.0}, {"k/a": 6.0}]


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ZeroDivisionError, AttributeError, KeyError, NotImplementedError])
def test_a_value_that_fails_costs_its_key_and_never_the_record(
    bench: Bench, error: type[Exception], capsys: pytest.CaptureFixture[str]
):
    key = f"bad {error.__name__}"
    bench.run.log({"good": 1.0, key: 2.0})
    for _ in range(3):
        bench.run.log({"good": 3.0, key: Broken(error)})
    assert bench.payloads() == [{"good": 1.0, key: 2.0}] + [{"good": 3.0}] * 3
    assert capsys.readouterr().err.count(f"{key!r} was left out") == 1


def test_a_record_is_logged_once_whichever_way_it_took(bench: Bench):
    for number in range(50):
        bench.run.log({"n": number, "t": np.float32(number) if number % 2 else float(number)})
    assert logged(bench.records(), "n") == list(range(50))
    assert logged(bench.records(), "t") == list(range(50))


@pytest.mark.parametrize("nonsense", [None, 5, "text", [1, 2], object(), {1, 2}, b"x", lambda: None])
def test_nonsense_never_raises(bench: Bench, nonsense: Any):
    bench.run.log(nonsense)
    bench.run.log({"n": 1}, step=nonsense)
    bench.run.log({nonsense if not isinstance(nonsense, list | set) else 1: 1.0})
    bench.run.log_system(nonsense)
    bench.run.alert(nonsense, nonsense, nonsense)
    bench.run.config.update(nonsense)
    bench.run.define_metric(nonsense)
    bench.run.log({"last": 1.0})
    assert bench.payloads()[-1] == {"last": 1.0}


def test_steps_count_on_and_an_explicit_one_may_go_back(bench: Bench):
    for step in (None, None, 7, None, 2, None):
        bench.run.log({"n": 1.0}, step)
    bench.run.log({"n": 1.0}, np.int64(40))
    bench.run.log({"n": 1.0})
    steps = [record.step for record in bench.records()]
    assert steps[:6] == [0, 1, 7, 8, 2, 3]
    assert steps[6:] == [40, 41]


def test_config_reads_like_a_mapping_and_logs_its_changes(bench: Bench, capsys: pytest.CaptureFixture[str]):
    config = bench.run.config
    config["lr"] = 0.1
    config.update({"lr": 0.2, "depth": 3}, allow_val_change=False)
    config.update(seed=1)
    assert dict(config) == {"lr": 0.1, "depth": 3, "seed": 1}
    assert (len(config), "lr" in config, config.get("x", 9), list(config)) == (3, True, 9, ["lr", "depth", "seed"])
    assert bench.payloads(Kind.CONFIG) == [{"lr": 0.1}, {"depth": 3}, {"seed": 1}]
    assert "keeps its value 0.1" in capsys.readouterr().err


def test_finish_ends_the_run_once(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.run.log({"n": 1.0})
    for code in (3, 4, None):
        bench.run.finish(code)
    bench.run.log({"n": 2.0})
    bench.run.log({"n": 3.0})
    assert bench.payloads() == [{"n": 1.0}]
    assert [record.payload for record in bench.records() if record.kind == Kind.END] == [{"exit_code": 3, "last": 2}]
    assert bench.finished == [False], "told once, and that no daemon has it"
    assert capsys.readouterr().err.count("log() after finish()") <= 1


@pytest.mark.parametrize(("error", "code"), [(None, 0), (ValueError, 1), (KeyboardInterrupt, 1)])
def test_a_with_block_finishes_with_its_outcome(tmp_path: Path, error: type[BaseException] | None, code: int):
    bench = Bench(tmp_path)
    if error is None:
        with bench.run:
            bench.run.log({"n": 1.0})
    else:
        with pytest.raises(error), bench.run:
            raise error
    assert bench.records()[-1].payload["exit_code"] == code


def test_finish_in_two_threads_at_once_ends_the_run_once(bench: Bench):
    threads = [threading.Thread(target=bench.run.finish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([record for record in bench.records() if record.kind == Kind.END]) == 1
    assert len(bench.finished) == 1


def test_ctrl_c_while_finish_waits_ends_the_run_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = Bench(tmp_path)
    bench.run.log({"n": 1.0})

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "drain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run.finish()
    assert list(bench.directories[0].iterdir()) == [], "moved to disk and closed"
    assert bench.records()[-1].kind == Kind.END
    assert bench.finished == [False]


def test_flush_is_true_once_the_records_are_on_a_disk(bench: Bench):
    assert bench.run.flush(5)
    bench.run.log({"n": 1.0})
    assert bench.run.flush(5)
    assert logged(on_disk(bench.directories[1])[bench.start.writer], "n") == [1.0]


def test_leaving_without_finish_takes_a_second_at_most_and_loses_nothing(bench: Bench):
    bench.run.log({"n": 1.0})
    began = time.monotonic()
    bench.run.at_exit()
    assert time.monotonic() - began < 1.1
    assert bench.payloads() == [{"n": 1.0}]
    bench.run.log({"n": 2.0})
    assert bench.payloads() == [{"n": 1.0}], "too late; it is told"


def test_a_run_whose_writer_could_not_be_made_drops_and_never_raises(capsys: pytest.CaptureFixture[str]):
    finished: list[bool | None] = []
    run = Run(Start(writer="0" * 32, project="p", run="r"), lambda _: None, lambda _, done: finished.append(done))
    run.log({"n": 1.0})
    run.config["a"] = 1
    assert run.flush(1)
    run.finish()
    run.log({"n": 2.0})
    assert finished == [None]
    assert "Traceback" not in capsys.readouterr().err


def test_a_child_is_a_writer_of_its_own_that_knows_its_parent():
    parent = Start(writer="a" * 32, project="p", run="r", rank=3, attempt=2, pid=1)
    child = child_start(parent)
    assert child.writer != parent.writer
    assert (child.parent, child.run, child.rank, child.attempt) == (parent.writer, "r", 3, 2)
    assert (child.pid, child.role) == (os.getpid(), "worker")
    assert child_start(Start(writer="a" * 32, project="p", run="r", role="rollout")).role == "rollout"
