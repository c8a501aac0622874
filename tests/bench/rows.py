"""What a benchmark says: one row for each figure, with its budget and the floor measured in the same run. Pure.

A budget is an upper limit unless `at_least`; with `of_floor` it limits the ratio to the floor instead of the figure.
A row without a budget is there to be read beside the others: a maximum, a second definition, a peer of a figure.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


class Skipped(Exception):
    """A figure cannot be measured on this machine; the text says what it would need."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure."""

    figure: str
    measured: float
    unit: str
    budget: float | None = None
    at_least: bool = False
    of_floor: bool = False
    floor: float | None = None
    """The same figure of the floor, in the same unit and run."""
    floor_name: str = ""
    note: str = ""
    """How it was measured, as far as the figure's name does not say it."""

    def __post_init__(self) -> None:
        assert not self.of_floor or self.floor is not None, f"{self.figure}: a budget in floors, and no floor"

    @property
    def ratio(self) -> float | None:
        """The figure in floors."""
        return self.measured / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None without one."""
        value = self.ratio if self.of_floor else self.measured
        if self.budget is None or value is None:
            return None
        return value >= self.budget if self.at_least else value <= self.budget


def as_json(groups: dict[str, Sequence[Row] | str], machine: dict[str, Any]) -> str:
    """Return everything as JSON: for each name its rows, or the reason why there are none."""
    figures = {
        name: {"skipped": rows} if isinstance(rows, str) else {"rows": [_row_map(row) for row in rows]}
        for name, rows in groups.items()
    }
    return json.dumps({"machine": machine, "figures": figures}, indent=1)


def _row_map(row: Row) -> dict[str, Any]:
    return {**asdict(row), "ratio": row.ratio, "met": row.met}


HEADS = ("figure", "budget", "measured", "floor", "ratio", "met")


def as_table(groups: dict[str, Sequence[Row] | str]) -> str:
    """Return the table a person reads, in Markdown, notes and skipped figures below it."""
    cells, notes = [], []
    for name, rows in groups.items():
        if isinstance(rows, str):
            notes.append(f"{name}: not measured: {rows}")
            continue
        cells += [_cells(row) for row in rows]
        notes += [f"{row.figure}: {row.note}" for row in rows if row.note]
    widths = [max(map(len, column)) for column in zip(HEADS, *cells, strict=True)]
    lines = [_line(HEADS, widths), _line(["-" * width for width in widths], widths)]
    lines += [_line(row, widths) for row in cells]
    return "\n".join([*lines, "", *dict.fromkeys(notes)])


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _cells(row: Row) -> tuple[str, ...]:
    sign = "≥" if row.at_least else "≤"
    budget = "–" if row.budget is None else f"{sign} {short(row.budget)}{'×' if row.of_floor else ' ' + row.unit}"
    floor = f"{short(row.floor)} {row.floor_name}" if row.floor is not None else "–"
    ratio = f"{row.ratio:.2f}×" if row.ratio is not None else "–"
    met = {True: "yes", False: "NO", None: "–"}[row.met]
    return row.figure, budget, f"{short(row.measured)} {row.unit}", floor, ratio, met


def short(value: float) -> str:
    """Return a number with three significant digits, thousands separated."""
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
