"""Who waits after a failed upload, and for how long. Pure: time and dice are arguments.

    folder      one run's shards failed alone: one directory that cannot be written to does not stop the neighbours
    store       a call failed as a whole: nothing is tried before its time, however many runs wait; a fleet that lost
                one store must not come back to it with a call for each run

    transient   full jitter, doubling, without end; at least what the store asked for, up to RETRY_AFTER_MAX_S
    held        a person must do something first: a slow probe, which finds out when that was done

As soon as one that failed succeeds, the store is back and nobody waits any longer. Who is in a hurry (a flush, a stop)
skips every wait but the one that the store asked for.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from ranklog.errors import StoreError
from ranklogd.retry import backoff_s

RETRY_AFTER_MAX_S = 900.0
"""No server may send us away for longer in one go."""
ASKED_SPREAD = 0.1
"""What is added to it at random, at most: all nodes of a fleet were told the same second."""
PROBE_S = 60.0
"""The longest wait between two tries of what is held; half of it the shortest."""


class Hold(NamedTuple):
    """One wait."""

    failures: int
    until_s: float
    asked_until_s: float
    """The part of it that the store asked for; -inf: none."""


class Holds:
    """Every wait of one uploader."""

    def __init__(self, *, base_s: float, max_s: float, dice: Callable[[], float]) -> None:
        self._base_s = base_s
        self._max_s = max_s
        self._dice = dice
        self._folders: dict[str, Hold] = {}
        self._store: Hold | None = None

    def __bool__(self) -> bool:
        return bool(self._folders) or self._store is not None

    def hold_folder(self, folder: str, error: StoreError, now_s: float) -> None:
        """One folder failed, and others may not have."""
        self._folders[folder] = self._next(self._folders.get(folder), error, now_s)

    def hold_store(self, error: StoreError, now_s: float) -> None:
        """A whole call failed."""
        self._store = self._next(self._store, error, now_s)

    def _next(self, last: Hold | None, error: StoreError, now_s: float) -> Hold:
        failures = last.failures + 1 if last else 1
        if error.held:
            wait_s = min(PROBE_S, self._max_s) * (0.5 + self._dice() / 2)
        else:
            wait_s = backoff_s(failures, base_s=self._base_s, max_s=self._max_s, dice=self._dice())
        if not error.retry_after_s:
            return Hold(failures, now_s + wait_s, -math.inf)
        asked_s = min(error.retry_after_s, RETRY_AFTER_MAX_S) * (1 + ASKED_SPREAD * self._dice())
        return Hold(failures, now_s + max(wait_s, asked_s), now_s + asked_s)

    def is_held(self, folder: str, now_s: float) -> bool:
        """Return whether a folder has to wait."""
        hold = self._folders.get(folder)
        return hold is not None and hold.until_s > now_s

    def store_wait_s(self, now_s: float) -> float:
        """Return seconds until the store may be called at all."""
        return 0.0 if self._store is None else max(0.0, self._store.until_s - now_s)

    def next_s(self, now_s: float) -> float:
        """Return seconds until something that waits is tried again; 0 if nothing waits."""
        folders = [hold.until_s - now_s for hold in list(self._folders.values())]
        return max(0.0, self.store_wait_s(now_s), min(folders, default=0.0))

    def keep(self, folders: Collection[str]) -> None:
        """Forget folders in which nothing waits any more; and the store, if nothing waits at all."""
        self._folders = {folder: hold for folder, hold in self._folders.items() if folder in folders}
        if not folders:
            self._store = None

    def came_through(self, folders: Collection[str]) -> bool:
        """Uploads into these folders succeeded: if they, or the store, had failed before, nobody waits any longer."""
        recovered = self._store is not None or not self._folders.keys().isdisjoint(folders)
        if recovered and folders:
            self._folders, self._store = {}, None
        return recovered and bool(folders)

    def hurry(self, now_s: float) -> None:
        """Let everything be tried now, but for what the store itself asked to wait for."""
        self._folders = {folder: cut for folder, hold in self._folders.items() if (cut := _asked(hold, now_s))}
        self._store = _asked(self._store, now_s)


def _asked(hold: Hold | None, now_s: float) -> Hold | None:
    """Return what is left of a wait if only the store's wish counts."""
    return None if hold is None or hold.asked_until_s <= now_s else hold._replace(until_s=hold.asked_until_s)
