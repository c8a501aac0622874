"""The line of sealed segments: oldest first, one at a time, and none of them can stop it.

    try 1, 2, 3     with smaller cuts each time: less memory, and less lost where one record is the culprit
    after that      the whole segment goes to quarantine, with the reason of the last strike

Only a failure through the segment itself is such a strike (`ranklogd.ship.tries`). A full disk, one with I/O errors, a
read-only one or a lack of descriptors is none, nor is a segment that a later ranklog wrote, before somebody went back
to this version: it waits, with growing pauses, until that is over. What the disk does not give back of a segment for
some minutes counts as damage: the rest is converted. A segment during whose conversion this process died without a
reason goes behind the others, so that they are served whatever it does.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ranklog import fs
from ranklogd.config import Config
from ranklogd.retry import backoff_s
from ranklogd.ship.convert import Converted, convert_segment
from ranklogd.ship.guard import outcome
from ranklogd.ship.quarantine import quarantine_segment
from ranklogd.ship.tries import SUFFIX, Record, Tries, forget_orphans
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import LaterFormat, parse_sealed

_log = logging.getLogger("ranklogd.shipper")

VALUES_MAX = (600_000, 60_000, 6_000)
"""Values in a cut, by the number of strikes so far. There are as many tries as there are numbers here."""

_UNEXPLAINED_MAX = 2  # Deaths without a reason; from then on smaller cuts, in case it was memory after all.
_NO_WAIT = (0, 0.0)
_NOT_ITS_FAULT = fs.NO_SPACE | {
    errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EIO,
}  # fmt: skip
PATIENCE_FAILURES = 8
"""After so many failures in a row, some minutes, a segment that the disk does not give back is read around."""


class Conversion:
    """Converts what is sealed. Owned by the shipper's main loop."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.last_error = ""
        """Why a segment waits now; empty once none does."""
        self._state = state
        self._config = config
        self._clock = clock
        self._dice = dice
        self._waits: dict[str, tuple[int, float]] = {}

    def start(self) -> None:
        """Remove what an earlier process left unfinished; raises OSError."""
        for path in self._state.outbox.glob("*.tmp"):
            fs.remove_tree(path)
        forget_orphans(self._state.wal)
        # A segment that went just before we died must not come back in a power cut once its shards left the outbox.
        fs.sync_dir(self._state.wal)

    def hurry(self) -> None:
        """Forget every wait: the next round tries all segments."""
        self._waits.clear()

    def sealed(self) -> list[Path]:
        """Return the segments in the WAL that wait for their conversion, in the order they will be tried."""
        names = set(os.listdir(self._state.wal))
        paths = [self._state.wal / name for name in names if parse_sealed(name) is not None]
        behind = {path for path in paths if path.with_suffix(SUFFIX).name in names and Tries(path).read().unexplained}
        return sorted(paths, key=lambda path: (path in behind, path.name))

    def step(self) -> Converted | None:
        """Convert the first segment that is due; None if there is none. Raises OSError if the WAL cannot be read."""
        sealed = self.sealed()
        names = {path.name for path in sealed}
        self._waits = {name: wait for name, wait in self._waits.items() if name in names}
        if not self._waits:
            self.last_error = ""
        for path in sealed:
            if self._waits.get(path.name, _NO_WAIT)[1] > self._clock():
                continue
            done = outcome(partial(self._convert, path))
            if isinstance(done, Converted):
                self._waits.pop(path.name, None)
                return done
            self._hold(path, done)
        return None

    def _convert(self, path: Path) -> Converted:
        tries = Tries(path)
        record = tries.read()
        if record.strikes >= len(VALUES_MAX):
            _log.error("segment_quarantined name=%s reason=%s", path.name, record.last)
            reason = f"{record.strikes} tries to convert it failed. The last: {record.last}"
            fs.remove_tree(self._state.outbox / f"{path.name}.tmp")  # What stands in the outbox counts as waiting.
            quarantine_segment(path, self._state, reason)
            tries.forget()
            return Converted(damaged_stretches=1)
        around = self._waits.get(path.name, _NO_WAIT)[0] >= PATIENCE_FAILURES
        with tries.begun() as attempt:
            done = outcome(
                partial(convert_segment, path, self._state, values_max=_values_max(record), around_errors=around)
            )
            if isinstance(done, Exception):
                if _is_innocent(done):
                    attempt.withdrawn()
                else:
                    attempt.failed(f"{type(done).__name__}: {done}")
        if isinstance(done, Converted) or not os.path.lexists(path):
            tries.forget()
        if isinstance(done, Exception):
            raise done
        return done

    def _hold(self, path: Path, exc: Exception) -> None:
        failures = self._waits.get(path.name, _NO_WAIT)[0] + 1
        base_s, max_s = self._config.retry_base_s, self._config.retry_max_s
        wait_s = backoff_s(failures, base_s=base_s, max_s=max_s, dice=self._dice())
        self._waits[path.name] = (failures, self._clock() + wait_s)
        self.last_error = f"{path.name}: {type(exc).__name__}: {exc}"
        _log.warning("conversion_failed name=%s failures=%d", path.name, failures, exc_info=exc)


def _values_max(record: Record) -> int:
    return VALUES_MAX[max(record.strikes, 1 if record.unexplained >= _UNEXPLAINED_MAX else 0)]


def _is_innocent(exc: Exception) -> bool:
    """Return whether the trouble is not the segment's: the machine's, or that a later ranklog wrote it."""
    return isinstance(exc, LaterFormat) or (isinstance(exc, OSError) and exc.errno in _NOT_ITS_FAULT)
