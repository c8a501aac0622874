"""How the commands print: aligned columns for people, JSON and CSV for programs.

What is printed was logged by somebody else. Control characters are shown as escapes, so a metric's name cannot move
the cursor or hide a line. A table fits the width it is given: long texts are cut first, then times, never numbers;
then columns at the right are left out, and what was left out is named.

JSON has no NaN and no infinities; they are the strings "NaN", "Infinity" and "-Infinity". Times are ISO 8601 in UTC.
"""

import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from enum import Enum
from typing import Any, NamedTuple


class Look(Enum):
    """How a column is aligned and cut."""

    TEXT = "text"
    TIME = "time"
    NUMBER = "number"


_WIDTH_MIN = {Look.TEXT: 10, Look.TIME: 17}
"""A cell is not cut shorter than this (a time: the minute); rather a column at the right is left out."""


_GAP = "  "
_ELLIPSIS = "…"
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's control, format, surrogate and line separators.


class Table(NamedTuple):
    """A table laid out for one width."""

    lines: list[str]
    hidden: list[str]
    """Columns for which there was no room."""


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], looks: Sequence[Look], width: int | None) -> Table:
    """Return the lines of a table at most `width` cells wide (None: no limit)."""
    cells = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(display_width(row[column]) for row in cells) for column in range(len(header))]
    if width is not None:
        widths = _narrow(widths, looks, width)
    lines = []
    for row in cells:
        parts = [_fit(row[column], widths[column], right=looks[column] is Look.NUMBER) for column in range(len(widths))]
        lines.append(_GAP.join(parts).rstrip())
    return Table(lines, list(header[len(widths) :]))


def _narrow(widths: Sequence[int], looks: Sequence[Look], width: int) -> list[int]:
    """Return the widths of as many columns as fit, the widest cut one cell at a time: texts first, then times."""
    least = [min(w, _WIDTH_MIN.get(look, w)) for w, look in zip(widths, looks, strict=True)]
    shown = len(widths)
    while shown > 1 and _total(least[:shown]) > width:
        shown -= 1
    narrowed = list(widths[:shown])
    for cut in (Look.TEXT, Look.TIME):
        loose = [column for column in range(shown) if looks[column] is cut]
        while _total(narrowed) > width and any(narrowed[column] > least[column] for column in loose):
            narrowed[max(loose, key=lambda column: narrowed[column])] -= 1
    return [min(w, width) for w in narrowed]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _fit(text: str, width: int, *, right: bool) -> str:
    taken = display_width(text)
    if taken > width:
        kept, taken = "", 1
        for character in text:
            taken += display_width(character)
            if taken > width:
                taken -= display_width(character)
                break
            kept += character
        text = kept + _ELLIPSIS
    padding = " " * (width - taken)
    return padding + text if right else text + padding


def display_width(text: str) -> int:
    """Return how many cells of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def printable(text: str) -> str:
    """Return the text with control, format and surrogate characters as backslash escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _INVISIBLE else c for c in text)


def number(value: float) -> str:
    """Return a float as people read it: exact while short, else 9 digits."""
    text = repr(value)
    return text if len(text) <= 12 else f"{value:.9g}"


def cell(value: Any) -> str:
    """Return a value as a table shows it; None is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "")
    if isinstance(value, dict | list):
        return json.dumps(json_value(value), ensure_ascii=False)
    return str(value)


def json_text(value: Any) -> str:
    """Return a value's JSON, or its text where JSON would quote a string."""
    plain = json_value(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def json_value(value: Any) -> Any:
    """Return what JSON can say of a value; bytes become hex digits, other types their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, datetime):
        return iso_utc(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def iso_utc(value: datetime) -> str:
    """Return a time in ISO 8601 with a Z; one without a zone is UTC."""
    moment = value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
    return f"{moment.isoformat()}Z"


def utc(time_us: int) -> datetime:
    """Return microseconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).replace(microsecond=time_us % 1_000_000)


def print_json(value: Any) -> None:
    """Print one JSON document on one line."""
    print(json.dumps(json_value(value), ensure_ascii=False, allow_nan=False))


def human_size(size_bytes: float) -> str:
    """Return bytes in the largest unit that keeps the number above 1, with 3 digits: `1.53 MB` is 1,530,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 999.5 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.3g} {unit}"


def arrow_rows(batch: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of an Arrow batch or table; its names may repeat. Times come out in UTC without a zone."""
    import pyarrow as pa

    # Python's datetime ends at microseconds, and a zone would need a database of zones.
    naive = pa.timestamp("us")
    columns = [
        column.cast(naive, safe=False) if pa.types.is_timestamp(column.type) else column for column in batch.columns
    ]
    yield from zip(*(column.to_pylist() for column in columns), strict=True)


def csv_column(column: Any) -> list[Any]:
    """Return an Arrow column as CSV holds it: null empty, numbers exact, times in UTC, nested values as JSON."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us"), safe=False)
    if pa.types.is_timestamp(kind) or pa.types.is_boolean(kind):
        column = column.cast(pa.string())  # In bulk: a value at a time is half of a large dump's time.
    values: list[Any] = column.to_pylist()
    if pa.types.is_primitive(kind) or pa.types.is_string(kind):
        return values
    return [None if value is None else json_text(value) for value in values]
