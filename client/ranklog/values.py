"""What `log()` and `config` may be given, and what becomes of it. Pure, and imports none of the libraries it knows.

    float, bool, None, str, int of up to 64 bits      kept; NaN and the infinities are floats
    larger int                                        JSON, exact
    numpy, torch, jax: a scalar, or one element       its number
    … more elements                                   JSON list, of ARRAY_SIZE_MAX elements at most
    dict, named tuple, dataclass, Namespace           flattened: {"a": {"b": 1}} is a/b = 1; an empty one is JSON {}
    list, tuple, set                                  JSON list; inside, NaN and the infinities are "NaN", "Infinity",
                                                      "-Infinity", for JSON has no such numbers; sets are sorted
    Decimal, Fraction, other things with __float__    float
    enum member                                       its value
    date, time                                        ISO text; a timedelta is a float of seconds
    path                                              text
    bytes                                             base64 text
    class, function                                   module.name
    anything else                                     its repr, as text

Keys are made text; an empty one is `_`, control characters become `_`, and what is over KEY_SIZE_MAX is cut, with a
hash. Keys that are equal after all this get `#2`, `#3`. A value that cannot be had (its method raises, it contains
itself, it is too large) costs its key one warning and the record nothing. Whether the whole record is too large is
decided by who packs it.
"""

import base64
import json
import math
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any, TypeAlias

import msgpack

from ranklog.foreign import PARTS_MAX, UnusableError, array_of, atom_of, is_array, key_text, parts_of, whole_of
from ranklog.frame import FRAME_SIZE_MAX, JSON_EXT
from ranklog.names import fit_text

Value: TypeAlias = "float | int | bool | str | msgpack.ExtType | None"
Warn: TypeAlias = Callable[[str], None]

KEY_SIZE_MAX = 256
"""UTF-8 bytes of a key."""
KEYS_MAX = PARTS_MAX
"""Keys of a record, after flattening."""
DEPTH_MAX = 32
"""Levels of dicts and lists: what is deeper contains itself, or might as well."""

_LOOKS_MAX = 1 << 17  # Values looked at for one record: more do not fit into one, and log() must return.
_PLAIN = frozenset({float, bool, type(None)})
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1  # What msgpack can hold.


class _FullError(Exception):
    """The record takes no more."""


def normalise(metrics: Any, *, warn: Warn) -> dict[str, Value]:
    """Return what will be packed: text keys, and values that msgpack takes. Never raises.

    `metrics` is a dict or another of the things that are flattened. Whatever is left out is told to `warn`, in words
    that are the same each time for the same key, so that they can be printed once.
    """
    return _Record(warn).fill(metrics)


flatten_config = normalise
"""A config follows the same rules; an argparse Namespace, a dataclass or a thing with `to_dict()` may be the dict."""


def check_keys(keys: tuple[Any, ...]) -> bool:
    """Return True if `normalise` would change none of these keys: only the values need a look then."""
    return len(keys) <= KEYS_MAX and all(type(key) is str and clean_key(key) == key for key in keys)


def clean_key(key: str) -> str:
    """Return a key as it can be stored."""
    return _clean_short_key(key) if len(key) <= KEY_SIZE_MAX else fit_text(key, KEY_SIZE_MAX)


@lru_cache(maxsize=16_384)
def _clean_short_key(key: str) -> str:
    return fit_text(key, KEY_SIZE_MAX) or "_"


def normalise_step(step: Any, *, warn: Warn) -> int | None:
    """Return `step` as an int of 64 bits; None, with a warning, for what is none."""
    if step is None:
        return None
    found: list[int] = []
    if _attempt(lambda: found.append(whole_of(step))) is None and -(1 << 63) <= found[0] < 1 << 63:
        return found[0]
    warn(f"a step of type {type(step).__name__} is no whole number of 64 bits; the step was counted on instead")
    return None


def _attempt(function: Callable[..., None], *args: Any) -> Exception | None:
    """Call a function that calls methods of the user's objects, and return what it raised."""
    try:
        function(*args)
    except Exception as exc:  # noqa: BLE001  A __repr__ or .item() of the user's may raise whatever it likes.
        return exc
    return None


class _Record:
    """One record while it is filled."""

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._values: dict[str, Value] = {}
        self._copies: dict[str, int] = {}
        self._looks = 0

    def fill(self, metrics: Any) -> dict[str, Value]:
        """Return the record."""
        failure = _attempt(self._fill, metrics)
        if isinstance(failure, _FullError):
            self._warn(f"a record takes {KEYS_MAX} keys and {_LOOKS_MAX} values at most; the others were left out")
        elif failure is not None:
            self._warn(f"a {type(metrics).__name__} is not a dict of values; nothing of it was logged")
        return self._values

    def _fill(self, metrics: Any) -> None:
        parts = parts_of(metrics)
        if parts is None and hasattr(type(metrics), "to_dict"):
            parts = parts_of(metrics.to_dict())
        if parts is None:
            raise UnusableError("it has no named parts")
        for key, value in parts:
            kind = type(value)
            if type(key) is str and (kind in _PLAIN or (kind is int and _INT_MIN <= value <= _INT_MAX)):
                self._store(clean_key(key), value)
            else:
                self._put("", key, value, 0)

    def _put(self, prefix: str, key: Any, value: Any, depth: int) -> None:
        """Add one value, with all its parts; what goes wrong costs that value only."""
        failure = _attempt(self._read, prefix, key, value, depth)
        if isinstance(failure, _FullError):
            raise failure
        if failure is not None:
            name = clean_key(prefix + (key if type(key) is str else f"<{type(key).__name__}>"))
            why = failure if isinstance(failure, UnusableError) else f"reading it raised {type(failure).__name__}"
            self._warn(f"the value of {name!r} was left out: {why}")

    def _read(self, prefix: str, key: Any, value: Any, depth: int) -> None:
        name = clean_key(prefix + key_text(key))
        if is_array(value):
            value = array_of(value)
        if type(value) in _PLAIN:
            self._store(name, value)
            return
        parts = parts_of(value)
        if not parts:
            self._store(name, self._packable({} if parts is not None else value))
            return
        self._look(depth)
        for inner, item in parts:
            self._put(f"{name}/", inner, item, depth + 1)

    def _store(self, name: str, value: Value) -> None:
        if len(self._values) >= KEYS_MAX:
            raise _FullError
        if name in self._values:
            copy = self._copies.get(name, 1) + 1
            while f"{name}#{copy}" in self._values:
                copy += 1
            self._copies[name] = copy
            self._warn(f"the key {name!r} came more than once in a record; the later values are logged as {name}#2 …")
            name = f"{name}#{copy}"
        self._values[name] = value

    def _look(self, depth: int) -> None:
        """Count a value that is looked at, `depth` levels down."""
        self._looks += 1
        if self._looks > _LOOKS_MAX:
            raise _FullError
        if depth >= DEPTH_MAX:
            raise UnusableError(f"it is nested deeper than {DEPTH_MAX} levels")

    def _packable(self, value: Any) -> Value:
        plain = self._plain(value, 0)
        if isinstance(plain, list | dict) or (isinstance(plain, int) and not _INT_MIN <= plain <= _INT_MAX):
            text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            return msgpack.ExtType(JSON_EXT, text.encode())
        number_or_text: Value = plain
        return number_or_text

    def _plain(self, value: Any, depth: int) -> Any:
        """Return a value as None, bool, int, float, text, or lists and dicts of these; `depth` is 0 outside of JSON."""
        self._look(depth)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Enum):
            return self._plain(value.value, depth)
        if isinstance(value, float):
            number = float.__float__(value)
            return number if depth == 0 else _json_number(number)
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, str):
            return _storable(str.__str__(value))
        parts = parts_of(value)
        if parts is not None:
            return {_storable(key_text(key)): self._plain(item, depth + 1) for key, item in parts}
        if isinstance(value, list | tuple):
            return [self._plain(item, depth + 1) for item in value]
        if isinstance(value, set | frozenset):
            return sorted((self._plain(item, depth + 1) for item in value), key=json.dumps)
        if isinstance(value, bytes | bytearray | memoryview):
            if memoryview(value).nbytes > FRAME_SIZE_MAX:
                raise UnusableError(f"it is more than {FRAME_SIZE_MAX} bytes")
            return base64.b64encode(value).decode()
        return self._plain(array_of(value) if is_array(value) else atom_of(value), depth)


def _storable(text: str) -> str:
    """Return `text` with half characters replaced: UTF-8 has none."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _json_number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
