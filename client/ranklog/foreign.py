"""What a user's objects stand for: numbers, texts, lists of these, or named parts. Imports none of their libraries.

Everything here calls methods of foreign objects, which may raise whatever they like: only `values` calls it, and
catches that. Methods are looked for on the type, for some objects claim to have any method one asks for.
"""

import math
from collections.abc import Mapping
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

ARRAY_SIZE_MAX = 10_000
"""Elements of an array. A larger one is data rather than a metric."""
PARTS_MAX = 1 << 16
"""Named parts that are looked at."""
_REPR_SIZE_MAX = 10_000
_ATOMS = frozenset({float, int, bool, str, type(None)})


class UnusableError(Exception):
    """A value that cannot be logged; the text says why."""


def parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return (key, value) of each named part, None for a value that has none."""
    kind = type(value)
    if kind in _ATOMS:
        return None
    if isinstance(value, Mapping):
        return list(islice(value.items(), PARTS_MAX + 1))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return list(value._asdict().items())
    if hasattr(kind, "__dataclass_fields__"):
        return [(name, getattr(value, name)) for name in kind.__dataclass_fields__]
    if isinstance(value, SimpleNamespace) or (kind.__module__, kind.__name__) == ("argparse", "Namespace"):
        return list(vars(value).items())
    return None


def is_array(value: Any) -> bool:
    """Return True for arrays and scalars of numpy, torch and their like."""
    return hasattr(type(value), "tolist") and not isinstance(value, memoryview)


def array_of(value: Any) -> Any:
    """Return the number in an array of one element, nested lists for a longer; raises UnusableError for a large one."""
    shape = getattr(value, "shape", None)
    size = len(value) if shape is None else math.prod(shape)
    if size > ARRAY_SIZE_MAX:
        raise UnusableError(f"it is an array of more than {ARRAY_SIZE_MAX} elements; log a summary of it")
    if size != 1 or not hasattr(type(value), "item"):
        return value.tolist()
    item = value.item()
    return float(item) if type(item) is type(value) else item  # numpy's longdouble gives itself.


def atom_of(value: Any) -> float | str:
    """Return a number or a text for a thing that is neither, nor made of other things."""
    kind = type(value)
    if hasattr(kind, "isoformat"):
        return str(value.isoformat())
    if hasattr(kind, "total_seconds"):
        return float(value.total_seconds())
    if hasattr(kind, "__float__"):
        return float(value)
    if hasattr(kind, "__fspath__"):
        path = value.__fspath__()
        return path.decode("utf-8", "replace") if isinstance(path, bytes) else str(path)
    if isinstance(value, type | FunctionType | BuiltinFunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)[:_REPR_SIZE_MAX]


def whole_of(value: Any) -> int:
    """Return a whole number; raises UnusableError, or anything, for a value that is none."""
    number = value.item() if hasattr(type(value), "item") else value
    if isinstance(number, int) and not isinstance(number, bool):
        return int.__int__(number)
    if isinstance(number, bool) or not hasattr(type(number), "__float__"):
        raise UnusableError("it is no number")
    whole = float(number)
    if not whole.is_integer():
        raise UnusableError("it is no whole number")
    return int(whole)


def key_text(key: Any) -> str:
    """Return a key as plain text."""
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    return str.__str__(key if isinstance(key, str) else str(key))
