"""The shipper's one broad `except`: what fails in one segment or one upload must not end the work on the others."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def outcome(work: Callable[[], T]) -> T | Exception:
    """Return what `work` returned, or the exception it raised. Whoever calls this looks at which of the two it is."""
    try:
        return work()
    except Exception as exc:  # noqa: BLE001  The top of the shipper's two loops; nothing above could do better.
        return exc
