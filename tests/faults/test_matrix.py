"""The fault matrix names its tests, and cannot lag: MATRIX.md beside this file, checked row by row.

Every case has a number for life. A row names tests as `path::test_name`; each must exist and must not be left out by a
marker only (`full` sweeps have a sample beside them). Rows without tests are allowed for what is not built yet, and
say so in words.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent
TABLE = HERE / "MATRIX.md"
CASES = range(1, 53)
NOT_BUILT = {12: "compaction"}
"""Cases of parts that do not exist yet; the row must name the part."""
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


class Row(NamedTuple):
    """One line of a table of MATRIX.md."""

    number: str
    case: str
    promise: str
    tests: list[tuple[str, str]]
    text: str


def table(heading: str) -> list[Row]:
    """Return the rows of the table below a heading."""
    part = TABLE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")][2:]
    return [Row(cells[0].strip(), cells[1].strip(), cells[2].strip(), _TEST.findall(cells[3]), cells[3]) for cells in rows]


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return the test functions of a module, and `Test…` classes of state machines, by name."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.startswith("Test"):
            found[node.targets[0].id] = ast.ClassDef(name=node.targets[0].id, bases=[], keywords=[], body=[], decorator_list=[])
    return found


def is_full_only(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a test as a whole runs with `-m full` only."""
    return any(ast.unparse(decorator) == "pytest.mark.full" for decorator in node.decorator_list)


def test_every_case_has_its_row():
    assert [int(row.number) for row in table("Cases")] == list(CASES)


@pytest.mark.parametrize("row", table("Cases"), ids=lambda row: row.number)
def test_a_case_names_tests_that_exist_and_run_every_time(row: Row):
    part = NOT_BUILT.get(int(row.number))
    if part and not row.tests:
        assert part in row.text, f"case {row.number} has no test and does not say that {part} is not built yet"
        return
    assert row.tests, f"case {row.number} ({row.case}) names no test"
    found = {f"{path}::{name}": functions(TESTS / path).get(name) for path, name in row.tests}
    assert None not in found.values(), [test for test, node in found.items() if node is None]
    assert not all(is_full_only(node) for node in found.values() if node), f"case {row.number} runs with -m full only"


@pytest.mark.parametrize("row", table("Bugs that these tests found"), ids=lambda row: row.number)
def test_a_bug_keeps_the_test_that_found_it(row: Row):
    assert row.tests, f"bug {row.number} names no test"
    for path, name in row.tests:
        assert name in functions(TESTS / path), f"{path}::{name}"
