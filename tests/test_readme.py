"""The README is true: every block in it is extracted from it and run, and every promise names a test that exists.

A fence's info string says how: `bash` blocks run in order in one directory; `python train.py` is saved under that name,
other python blocks are run; a second word says what a block needs. `text` is not run.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from hub.server import Hub
from node import ROOT, Node

README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    language: str
    tag: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.language}-{self.tag}-{self.text.strip().splitlines()[0][:40]}"


BLOCKS = [Block(*match) for match in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
NEEDS = {"torch": "torch", "import pandas": "pandas", "import polars": "polars"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the README's training script, whose PATH has this checkout's commands and nothing else new."""
    with furnished(tmp_path_factory.mktemp("readme")) as node:
        yield node


@contextmanager
def furnished(path: Path) -> Iterator[Node]:
    with Node(path) as node:
        commands = node.path / "bin"
        commands.mkdir()
        modules = {"ranklog": "ranklog.cli", "ranklogd": "ranklogd", "torchrun": "torch.distributed.run"}
        for name, module in [("python", ""), *((name, f"-m {module}") for name, module in modules.items())]:
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            (commands / name).chmod(0o755)
        node.env["PATH"] = f"{commands}:{os.environ['PATH']}"
        (node.path / "train.py").write_text(next(b.text for b in BLOCKS if b.tag == "train.py"))
        yield node


def run(node: Node, block: Block) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = node.run([*command, block.text], timeout_s=240)
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    return done


RUNNABLE = [b for b in BLOCKS if b.language in ("bash", "python") and b.tag in ("", "torch", "train.py")]
READERS = [b for b in BLOCKS if b.tag == "read"]


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.name)
def test_a_block_runs_as_written(place, block):
    if block.tag == "torch":
        pytest.importorskip("torch", reason='pip install -e ".[test-all]"')
    run(place, block)


@pytest.fixture(scope="module")
def logs(place):
    """What `ranklog run` left in ./logs."""
    run(place, Block("bash", "", "rm -rf logs && ranklog run --to ./logs -- python train.py"))
    return place


@pytest.mark.parametrize("block", READERS, ids=lambda block: block.name)
def test_a_reader_prints_the_losses_that_were_logged(logs, block):
    for words, module in NEEDS.items():
        if words in block.text:
            pytest.importorskip(module, reason='pip install -e ".[test-all]"')
    assert re.search(r"\b(1\.0|0\.5|0\.01|1|20\d|30\d|2\d\d)\b", run(logs, block).stdout)


BUCKET_READERS = [b for b in BLOCKS if b.tag == "bucket"]


@pytest.fixture(scope="module")
def bucket(place, tmp_path_factory):
    """What `ranklog run` left in a bucket of a Hub; the node's environment leads there."""
    path = tmp_path_factory.mktemp("bucket")
    with Hub(path / "hub") as hub:
        place.env |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token("you"), "HF_HOME": str(path / "home"),
            "HF_XET_CACHE": str(path / "xet"), "RANKLOG_READ_CACHE_DIR": str(path / "cache"),
        }  # fmt: skip
        hub.buckets.create("you/logs", private=True)
        run(place, Block("bash", "", "ranklog run --to hf://buckets/you/logs -- python train.py"))
        yield place


@pytest.mark.parametrize("block", BUCKET_READERS, ids=lambda block: block.name)
def test_a_reader_prints_the_losses_that_are_in_the_bucket(bucket, block):
    for words, module in NEEDS.items():
        if words in block.text:
            pytest.importorskip(module, reason='pip install -e ".[test-all]"')
    assert re.search(r"\b(1\.0+|0\.5|100)\b", run(bucket, block).stdout)


def test_the_section_on_the_bucket_runs_as_written_from_a_bucket_that_is_not_there_to_three_runs_in_it(tmp_path):
    with Hub(tmp_path / "hub") as hub, furnished(tmp_path) as node:
        node.env |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token("you"), "HF_HOME": str(tmp_path / "home"),
            "HF_XET_CACHE": str(tmp_path / "xet"), "RANKLOG_UPLOAD_INTERVAL_MIN_S": "0.5",
        }  # fmt: skip
        said = [run(node, block) for block in BLOCKS if block.tag == "upload"]
        assert len(said) == 3
        assert "hf://buckets/you/logs answers" in said[1].stdout
        assert "1 writer brought in" in said[2].stdout
        assert len({key.split("/")[2] for key in hub.buckets.get("you/logs").files}) == 3


def test_the_table_of_the_fleet_is_what_the_simulation_prints():
    command = [sys.executable, "-m", "tests.bench.fleet"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() in README


def test_every_block_is_run_or_known():
    known = {"install", "tests", "read", "bucket", "upload", "torch", "train.py", ""}
    assert {b.tag for b in BLOCKS if b.language in ("bash", "python")} <= known
    assert {b.language for b in BLOCKS} <= {"bash", "python", "text"}


def test_the_first_command_works_in_a_new_environment(tmp_path):
    """Slow but honest: a fresh clone, a new virtual environment, the README's line, the demo's proof."""
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in kept.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANKLOG_", "PYTHON"))}
    env |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    line = next(b.text for b in BLOCKS if b.tag == "install")
    done = subprocess.run(
        ["bash", "-c", line], cwd=clone, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_ci_runs_the_readmes_test_command():
    line = next(b.text for b in BLOCKS if b.tag == "tests").strip()
    assert re.fullmatch(r"pip install .*&& python -m pytest", line), "what .ci/run looks for"
    assert 'eval "$command"' in (ROOT / ".ci" / "run").read_text()


def promised() -> list[str]:
    section = README.split("## What is promised")[1].split("\n## ")[0]
    return re.findall(r"`(tests/[\w/.]+::\w+)`", section)


@pytest.mark.parametrize("name", promised())
def test_a_promise_names_a_test_that_exists(name):
    path, function = name.split("::")
    assert re.search(rf"^def {function}\(", Path(ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_row_of_the_promises_names_a_test():
    section = README.split("## What is promised")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| event")]
    assert len(rows) >= 6
    assert all("`tests/" in row for row in rows)
