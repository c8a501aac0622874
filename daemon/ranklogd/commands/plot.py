"""A line plot of a few thousand points in a few lines of text. Pure.

Each character holds 2 x 4 dots (Unicode's braille patterns: U+2800 plus a bit for each dot), or one star where the
terminal has no Unicode.
"""

import math
from collections.abc import Sequence

_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LABEL_WIDTH = 10  # -1.23e-308


def plot(points: Sequence[tuple[float, float]], *, width: int, height: int, ascii_only: bool = False) -> list[str]:
    """Return the lines of a plot of (x, y), `width` x `height` characters with its labels; none without two points.

    What falls between two points is joined, so that a steep line has no holes.
    """
    finite = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    if len(finite) < 2:
        return []
    across, down = (1, 1) if ascii_only else (2, 4)
    columns, rows = max(4, width - _LABEL_WIDTH - 2), max(2, height - 1)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    first, last = finite[0][0], finite[-1][0]
    cells = [[0] * columns for _ in range(rows)]
    before: tuple[int, int] | None = None
    for x, y in finite:
        column = round(_share(x, first, last) * (columns * across - 1))
        row = round(_share(y, high, low) * (rows * down - 1))
        for c, r in _joined(before, (column, row)):
            cells[r // down][c // across] |= 1 if ascii_only else _BITS[r % 4][c % 2]
        before = (column, row)
    labels = [f"{high:.3g}", *[""] * (rows - 2), f"{low:.3g}"]
    edge = "|" if ascii_only else "┤"
    lines = [
        f"{label:>{_LABEL_WIDTH}} {edge}{''.join(_character(cell, ascii_only=ascii_only) for cell in line)}"
        for label, line in zip(labels, cells, strict=True)
    ]
    axis = f"{first:.0f}"
    return [*lines, f"{'':{_LABEL_WIDTH + 2}}{axis}{f'{last:.0f}':>{max(0, columns - len(axis))}}"]


def _share(value: float, start: float, end: float) -> float:
    """Return how far `value` is on the way from start to end, 0 to 1; halved, for the way itself may be no float."""
    return (value / 2 - start / 2) / ((end / 2 - start / 2) or 1.0)


def _joined(start: tuple[int, int] | None, end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line."""
    if start is None:
        return [end]
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (start[0] + (end[0] - start[0]) * step // steps, start[1] + (end[1] - start[1]) * step // steps)
        for step in range(1, steps + 1)
    ]


def _character(cell: int, *, ascii_only: bool) -> str:
    if not cell:
        return " "
    return "*" if ascii_only else chr(0x2800 + cell)
