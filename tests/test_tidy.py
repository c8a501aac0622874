"""The architecture as a test: who may import whom, what only one room may do, how large things may be.

A rule with exceptions lists them here, each with its reason; an exception that is no longer used fails too.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ranklog": ROOT / "client" / "ranklog", "ranklogd": ROOT / "daemon" / "ranklogd"}

MODULE_LINES_MAX, MODULE_LINES_MEDIAN_MAX, FUNCTION_LINES_MAX = 300, 130, 70
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "core", "base_utils"}

HANDS = {"os", "time", "threading", "socket", "select", "subprocess", "fcntl", "random", "zmq", "asyncio", "logging"}
"""What a module that calls itself pure may not import."""
PURE = {
    "ranklog.frame", "ranklog.start", "ranklog.wire", "ranklog.layout", "ranklog.names", "ranklog.launcher",
    "ranklog.values", "ranklogd.sequence", "ranklogd.seal", "ranklogd.retry", "ranklogd.wal.segment",
    "ranklogd.wal.salvage",
}  # fmt: skip
"""These say they are pure, and go on saying so."""

HEAVY = {"zmq", "pyarrow", "numpy", "duckdb", "huggingface_hub", "asyncio", "msgspec", "watchdog", "psutil", "pandas"}
INGEST = ("ranklogd.server", "ranklogd.ingest", "ranklogd.adopt", "ranklogd.requests", "ranklogd.wal.log")
CONVERTER = {"pyarrow", "numpy", "duckdb", "huggingface_hub", "msgspec", "obstore", "hf_xet", "httpx2"}
"""What may stall or exhaust a process: never in the one that acknowledges records."""

THIRD_PARTY = {
    "msgpack": ("ranklog", "ranklogd"),
    "zmq": ("ranklog.transport", "ranklogd.socket"),
    "pyarrow": ("ranklog.schema", "ranklog.reader", "ranklog.cli", "ranklogd.ship", "ranklogd.commands"),
    "duckdb": ("ranklog.reader", "ranklog.cli"),
    "numpy": ("ranklogd.ship",),
    "msgspec": ("ranklogd.ship",),
    "huggingface_hub": ("ranklog.stores",),
    "hf_xet": ("ranklog.stores.xet",),
    "httpx2": ("ranklog.stores.hub", "ranklog.stores.events"),
    "obstore": ("ranklog.stores.objects",),
    "watchdog": ("ranklogd.watch",),
    "psutil": ("ranklogd",),
}
"""Which rooms may import which package; no other package is imported at all."""

ENVIRONMENT = {"ranklog.config", "ranklog.identity", "ranklog.failpoint", "ranklogd.config"}
BROAD_EXCEPT = {
    "ranklog.shield": "the decorator of the public client API",
    "ranklog.values": "methods of the user's own objects raise whatever they like",
    "ranklog.sender": "the top of the sender's loop",
    "ranklogd.server": "the top of the ingest loop, for what a peer sends or leaves behind",
    "ranklogd.ship.guard": "the top of the shipper's loops",
}
POINTS_AT_DAEMON = {"ranklog.cli": "the table of commands: module paths, loaded when a command is called"}
DISK_CALLS = {"fsync", "fdatasync", "rename", "renames", "unlink", "rmdir", "removedirs", "rmtree", "hardlink_to"}
OS_CALLS = {"remove", "link", "truncate"}


class Module(NamedTuple):
    name: str
    path: Path
    source: str
    tree: ast.Module

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            source = path.read_text(encoding="utf-8")
            found.append(Module(name, path, source, ast.parse(source)))
    return tuple(found)


def imported(module: Module) -> set[str]:
    """Every name the module imports, at its top or later, but for what only type checkers see."""
    hidden = {
        inner
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(module.tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def ours(names: set[str]) -> set[str]:
    known = {module.name for module in modules()}
    return names & known


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def where(module: Module, node: ast.AST) -> str:
    return f"{module.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


def loaded_after(statement: str) -> set[str]:
    """The top-level packages in memory after `statement` in a fresh interpreter."""
    paths = [str(root.parent) for root in PACKAGES.values()]
    done = run("-I", "-c", f"import sys; sys.path[:0] = {paths}\n{statement}\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_client_never_imports_the_daemon() -> None:
    for module in modules():
        if module.name.partition(".")[0] == "ranklog":
            assert not [name for name in imported(module) if name.partition(".")[0] == "ranklogd"], module.name


def test_only_the_table_of_commands_points_at_the_daemon() -> None:
    daemons = {module.name for module in modules() if module.name.startswith("ranklogd.")}
    pointing = {
        module.name
        for module in modules()
        if module.name.partition(".")[0] == "ranklog"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value in daemons
    }
    assert pointing == set(POINTS_AT_DAEMON)


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    graph = {module.name: ours(imported(module)) - {module.name} for module in modules()}
    for package in PACKAGES:  # `from ranklog import fs` names the package, and its façade imports everything.
        for names in graph.values():
            names.discard(package)
    while leaves := {name for name, names in graph.items() if not names & graph.keys()}:
        graph = {name: names for name, names in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_what_calls_itself_pure_touches_nothing() -> None:
    pure = {module.name for module in modules() if re.search(r"\bPure[.:,]", module.docstring)}
    assert pure >= PURE
    for module in modules():
        if module.name in pure:
            touched = {name.partition(".")[0] for name in imported(module)} & HANDS
            assert not touched, f"{module.name} calls itself pure and imports {touched}"


def test_a_third_party_package_is_imported_only_in_its_rooms() -> None:
    used = set()
    for module in modules():
        for package in {name.partition(".")[0] for name in imported(module)}:
            if package in PACKAGES or package in sys.stdlib_module_names:
                continue
            assert package in THIRD_PARTY, f"{module.name} imports {package}, which is no dependency"
            rooms = THIRD_PARTY[package]
            assert any(f"{module.name}.".startswith(f"{room}.") for room in rooms), f"{module.name} imports {package}"
            used.add(package)
    assert used >= {"msgpack", "zmq", "pyarrow", "duckdb", "numpy", "msgspec", "watchdog"}


def test_the_ingest_process_can_reach_no_converter_and_no_network_library() -> None:
    by_name = {module.name: module for module in modules()}
    reached, waiting = set(), list(INGEST)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += ours(imported(by_name[name])) - {"ranklog"}
    for name in sorted(reached):
        packages = {other.partition(".")[0] for other in imported(by_name[name])}
        assert not packages & CONVERTER, f"{name}, which ingest reaches, imports {packages & CONVERTER}"


def test_the_ingest_process_loads_no_converter_and_no_network_library() -> None:
    loaded = loaded_after(f"import {', '.join(INGEST)}")
    assert "ranklogd" in loaded
    assert not loaded & CONVERTER


def test_importing_the_client_loads_nothing_heavy() -> None:
    loaded = loaded_after("import ranklog")
    assert "msgpack" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_a_module_is_small_and_says_what_it_is(module: Module) -> None:
    design, size = len(module.docstring), module.source.count("\n")
    assert design > 20, "a module opens with its design"
    assert size <= MODULE_LINES_MAX
    assert not set(module.name.split(".")) & BANNED_NAMES
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{where(module, node)} {node.name} has {lines} lines"


def test_most_modules_are_smaller_still() -> None:
    assert statistics.median(module.source.count("\n") for module in modules()) <= MODULE_LINES_MEDIAN_MAX


def test_only_one_module_syncs_renames_and_unlinks() -> None:
    for module in modules():
        if module.name == "ranklog.fs":
            continue
        for call in calls(module.tree):
            if not isinstance(call.func, ast.Attribute):
                continue
            owner, name = ast.unparse(call.func.value), call.func.attr
            # A list's or set's remove and a text's replace are no disk calls; a path's and os's are.
            if name == "replace":
                found = owner in ("os", "shutil") or (len(call.args) == 1 and not call.keywords)
            elif name in OS_CALLS:
                found = owner == "os"
            else:
                found = name in DISK_CALLS and owner != "fs"
            assert not found, f"{where(module, call)}: {owner}.{name}() belongs into ranklog.fs"


def test_the_environment_is_read_where_it_is_allowed() -> None:
    reading = {
        module.name
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
    }
    assert reading <= ENVIRONMENT, f"the environment is read in {sorted(reading - ENVIRONMENT)}"


def test_errors_of_every_kind_are_caught_only_where_it_is_allowed() -> None:
    catching = set()
    for module in modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = ast.walk(node.type) if node.type else [ast.Name("BaseException")]
            caught = {name.id for name in names if isinstance(name, ast.Name)}
            # One that cleans up and raises again catches nothing.
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if caught & {"Exception", "BaseException"} and not raises_again:
                catching.add(module.name)
    assert catching == set(BROAD_EXCEPT)


def test_nothing_is_printed_but_by_commands() -> None:
    for module in modules():
        if module.name.startswith(("ranklog.cli", "ranklogd.commands")):
            continue
        for call in calls(module.tree):
            assert ast.unparse(call.func) != "print", where(module, call)


def test_there_is_no_global_and_no_relative_import() -> None:
    for module in modules():
        for node in ast.walk(module.tree):
            assert not isinstance(node, ast.Global), where(module, node)
            assert not (isinstance(node, ast.ImportFrom) and node.level), where(module, node)


def test_nothing_is_left_undone_or_silenced_without_a_reason() -> None:
    undone = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b|type: ignore(?!\[)|noqa(?!: [A-Z]+\d+)")
    files = [path for folder in ("client", "daemon", "tests", "systemd") for path in (ROOT / folder).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".service", ".toml") and path != Path(__file__):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not undone.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_tests_wait_for_conditions_and_do_not_sleep() -> None:
    sleeping = {
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if not {"bench", "soak"} & set(path.parts)
        for call in calls(ast.parse(path.read_text(encoding="utf-8")))
        if ast.unparse(call.func) in ("time.sleep", "sleep")
    }
    assert sleeping <= {"node.py", "witness.py"}, "a test sleeps between two looks at a condition, or to pace a trainer"


def test_every_package_says_that_it_is_typed() -> None:
    for root in PACKAGES.values():
        assert (root / "py.typed").is_file()


def test_ruff_finds_nothing() -> None:
    if find_spec("ruff") is None:
        pytest.skip('needs ruff: pip install "ranklog[test]"')
    done = run("-m", "ruff", "check", "--no-cache", "client", "daemon", "tests")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr


def test_mypy_strict_finds_nothing() -> None:
    if find_spec("mypy") is None:
        pytest.skip('needs mypy: pip install "ranklog[test]"')
    done = run("-m", "mypy")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
