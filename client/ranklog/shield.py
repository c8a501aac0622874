"""What stands between ranklog and the training: nothing raised in here reaches it, and each cause is told once.

Errors in the caller's own words (`UsageError`) pass, where the decorated function says so: they are raised at the
first line of a script, before hours of training depend on it.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ranklog.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

WARNINGS_MAX = 100  # Distinct warnings of one process: a metric name with a counter in it must not flood the log.


class Warner:
    """Tells each distinct thing once, on stderr, and stops at a bound."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._lock = threading.RLock()  # A signal handler may warn, too.

    def __call__(self, text: str) -> None:
        """Print `text` unless it was printed before."""
        with self._lock:
            if text in self._told or len(self._told) > WARNINGS_MAX:
                return
            self._told.add(text)
            if len(self._told) > WARNINGS_MAX:
                text = "more warnings are not shown"
        say(f"warning: {text}")

    def after_fork(self) -> None:
        """Replace the lock: another thread may have held it when the process was forked."""
        self._lock = threading.RLock()


def say(text: str) -> None:
    """Write one line to stderr; a closed one, or a signal amid another write, must not disturb the training."""
    try:
        sys.stderr.write(f"ranklog: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError, RuntimeError):
        return


warn = Warner()


def shielded(default: R, *, usage_errors: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function of the client: on any error it warns once and returns `default`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as exc:
                if usage_errors and isinstance(exc, UsageError):
                    raise
                warn(
                    f"{function.__name__.strip('_')}() failed: {type(exc).__name__}: {exc}. "
                    "Training goes on without this record."
                )
                return default

        return call

    return decorate
