"""Sizes, times and modes as people write them. Pure.

    size       64MiB, 64M, 64 MB, 1.5GiB, 67108864        K, M, G, T are binary with or without i and B
    duration   20ms, 10s, 5m, 48h, 7d, 1.5                a bare number is seconds
    mode       0600, 600, 0o600                           always octal

Every function raises ValueError with a text that says what would be right.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,9})?) ?([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_SIZE_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DURATION = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?(ms|s|m|min|h|d|)", re.IGNORECASE)
_DURATION_FACTORS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_MODE = re.compile(r"(?:0o)?([0-7]{3,4})")


def parse_size(text: str) -> int:
    """Return bytes; a fraction of a byte is cut off."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a size; write bytes or a unit, such as 67108864, 64MiB or 2 GB")
    number, factor = match[1], _SIZE_FACTORS[match[2].lower()]
    return int(number) * factor if "." not in number else int(float(number) * factor)


def parse_duration(text: str) -> float:
    """Return seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a time; write seconds or a unit, such as 10, 20ms, 10s, 5m or 48h")
    return float(match[1]) * _DURATION_FACTORS[match[2].lower()]


def parse_mode(text: str) -> int:
    """Return permission bits."""
    match = _MODE.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a file mode; write octal digits, such as 0600 or 0660")
    return int(match[1], 8)


def format_value(name: str, value: object) -> str:
    """Return an option's value as people write it; the suffix of its name says what it counts. "" for no value."""
    if value is None or value == Path():
        return ""
    if name == "socket_mode":
        return f"{value:04o}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and name.endswith("_bytes"):
        return _in_units(int(value), (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)), "")
    if isinstance(value, int | float) and name.endswith("_s"):
        milliseconds = math.floor(value * 1000 + 0.5)
        return _in_units(milliseconds, (("h", 3_600_000), ("m", 60_000), ("s", 1000)), "ms")
    return str(value)


def _in_units(count: int, units: Iterable[tuple[str, int]], smallest: str) -> str:
    for unit, factor in units:
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return f"{count}{smallest}" if count else "0"
