"""From the outbox to the store: put, verify, mark. The mark is the file leaving the outbox.

    read again, hash = the name's?   no: quarantine, for bad bytes must never be uploaded
    put, ask what is there           transient or held: it waits (`holds`), for ever if need be
                                     permanent: the next calls are halves of this one until the culprit stands alone,
                                     which goes to deadletter/<key> with its reason; the others flow on
    outbox/… -> cache/<key>          or unlinked, where no cache is kept; directories synced

Everything before the mark may happen twice: the same file goes to the same key. Order within a run is kept. Where the
store counts requests, uploads keep a pace (`pace`): a backlog makes larger calls, never more of them.

`step` never sleeps: it does one batch and says when to call again, so whoever owns the loop can always be woken.
"""

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ranklog import fs
from ranklog.errors import StoreError
from ranklog.failpoint import failpoint
from ranklog.layout import parse_key
from ranklog.stores.base import ObjectInfo, Store, Upload
from ranklogd.config import Config
from ranklogd.ship.holds import RETRY_AFTER_MAX_S, Holds
from ranklogd.ship.outbox import Outbox, folder_of, set_aside
from ranklogd.ship.pace import Pace
from ranklogd.ship.portion import Portion
from ranklogd.statedir import StateDir

_log = logging.getLogger("ranklogd.shipper")
UNREAD_PATIENCE_S = 600.0
"""A shard that the disk does not give back goes to quarantine after so long; there is no segment any more."""
_CHUNK_SIZE = 1 << 20
_LISTED_MAX = 200  # Names tried beside a taken one in the quarantine.
HURRY_S = 15.0
"""A flush is over by then, as a rule: the segment is sealed, converted and uploaded."""
_BATCH_SIZE_MAX = 256 << 20
"""Bytes of one call: they must get through before its deadline."""
_UNDECIDED = StoreError("not known yet", permanent=False)


class Uploader:
    """Uploads what is in the outbox. Owned by one thread; its counters may be read from others."""

    def __init__(
        self,
        store: Store,
        state: StateDir,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.outbox = Outbox(state)
        self.uploaded_shards = 0
        self.uploaded_bytes = 0
        self.last_upload_s = 0.0
        """When the last one was marked, seconds since the epoch; 0: none yet."""
        self.last_error = ""
        """Why something waits now; empty once everything flows again."""
        self.last_error_class = ""
        self.busy_since_s: float | None = None
        """The clock when the store call that is running now began."""
        self.answered = False
        """Whether any store call has ended yet."""
        self._store = store
        self._state = state
        self._config = config
        self._clock = clock
        self._dice = dice
        self._holds = Holds(base_s=config.retry_base_s, max_s=config.retry_max_s, dice=dice)
        self._pace = Pace(config.upload_interval_min_s, config.upload_interval_max_s) if config.is_paced else None
        self._portion = Portion(count_max=config.batch_max, size_max=_BATCH_SIZE_MAX)
        self._hurry_asked = False
        self._hurry_until_s = -math.inf
        self._unread_since_s: dict[str, float] = {}

    def step(self) -> float | None:
        """Upload one batch. Return seconds until the next call is of use: 0 now, None when nothing waits.

        Raises OSError if the state directory fails; calling again is then always right.
        """
        now_s = self._clock()
        if self._hurry_asked:
            self._hurry_asked = False
            self._holds.hurry(now_s)
        self.outbox.refresh()
        wait_s = max(self._holds.store_wait_s(now_s), self._pace_wait_s(now_s))
        if wait_s > 0 and self.outbox.first_segment() is not None:
            return wait_s
        batch = self._choose(now_s)
        if not batch:
            return self._rest(now_s)
        failpoint("upload.before")
        unread: dict[str, StoreError | None] = {}
        intact = [upload for upload in batch if self._is_intact(upload, unread)]
        results = self._send(intact)
        sent = [upload for upload in intact if results.get(upload.key, _UNDECIDED) is None]
        failpoint("upload.verified.before_mark")
        self._mark(sent)
        self._judge([upload for upload in batch if upload.key in results | unread], results | unread)
        self.outbox.settle(batch)
        return 0.0

    def hurry(self, for_s: float = HURRY_S) -> None:
        """Try everything now, and keep no pace for so long. May be called from any thread.

        Only what the store asked for is still waited for, and what fails now waits as ever.
        """
        self._hurry_until_s = self._clock() + for_s
        self._hurry_asked = True

    def next_try_s(self) -> float:
        """Return seconds until something that waits is tried; 0 if nothing waits for its time."""
        now_s = self._clock()
        return max(self._holds.next_s(now_s), self._pace_wait_s(now_s)) if self.outbox.first_segment() else 0.0

    def _pace_wait_s(self, now_s: float) -> float:
        return 0.0 if self._pace is None or now_s < self._hurry_until_s else self._pace.wait_s(now_s)

    def _choose(self, now_s: float) -> list[Upload]:
        batch: dict[str, Upload] = {}
        size_bytes = 0
        for upload in self.outbox.pending(lambda folder: self._holds.is_held(folder, now_s)):
            # A key may wait twice, where somebody put a segment back: a store takes one at a time.
            batch.setdefault(upload.key, upload)
            size_bytes += _size(upload.source)
            if len(batch) == self._portion.count or size_bytes >= self._portion.size_bytes:
                break
        return list(batch.values())

    def _rest(self, now_s: float) -> float | None:
        """Nothing can be sent now: tidy up, and return how long that will be so."""
        waiting = self.outbox.folders()
        if any(not self._holds.is_held(folder, now_s) for folder in waiting):
            self.outbox.forget()
            self.outbox.refresh()
            waiting = self.outbox.folders()
        self.outbox.settle([])
        self._holds.keep(waiting)
        if not self._holds:
            self.last_error = self.last_error_class = ""
            return None
        return self._holds.next_s(now_s)

    def _is_intact(self, upload: Upload, unread: dict[str, StoreError | None]) -> bool:
        """Return whether the file is what its name says; else move it to the quarantine, or note that it is gone.

        What the disk does not give back is put into `unread`, to be tried again for as long as there is patience.
        """
        key = parse_key(upload.key)
        try:
            if key is None:
                reason = f"{upload.key} is not a shard's name"
            elif not _sha256(upload.source).startswith(key.sha256):
                reason = f"{upload.key}: the bytes on disk are not those that were named; they were not uploaded"
            else:
                self._unread_since_s.pop(upload.key, None)
                return True
        except FileNotFoundError:
            return False
        except OSError as exc:
            reason = f"{upload.key} cannot be read: {exc}"
            if self._clock() - self._unread_since_s.setdefault(upload.key, self._clock()) < UNREAD_PATIENCE_S:
                unread[upload.key] = StoreError(reason, permanent=False)
                return False
        self._unread_since_s.pop(upload.key, None)
        self._report(reason, "damaged")
        set_aside(upload.source, _free_name(self._state.quarantine / upload.source.name), reason)
        return False

    def _send(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Put and verify; return what became of each key, nothing where that has to be found out with smaller calls."""
        if not uploads:
            return {}
        began_s = self.busy_since_s = self._clock()
        try:
            given = self._store.put(uploads)
            failpoint("upload.sent.before_reply")
            unanswered = StoreError(f"{self._store.url} said nothing about it", permanent=False)
            results = {u.key: given.get(u.key, unanswered) for u in uploads}
            self.busy_since_s = self._clock()  # A call of its own, with a deadline of its own.
            results |= self._verify([u for u in uploads if results[u.key] is None])
        except StoreError as exc:
            return self._failed(uploads, exc, self._clock() - began_s)
        finally:
            self.busy_since_s = None
            self.answered = True
        self._portion.accepted()
        if self._pace is not None:
            self._pace.accepted(self._clock(), self._store.allowance, self._dice())
        return results

    def _failed(self, uploads: Sequence[Upload], error: StoreError, took_s: float) -> dict[str, StoreError | None]:
        """A whole call failed: wait, or look for the one file that may be the reason."""
        now_s = self._clock()
        if self._pace is not None:
            if error.permanent or error.retry_after_s is None:
                self._pace.spent(now_s, self._dice())
            else:
                self._pace.refused(now_s, min(error.retry_after_s, RETRY_AFTER_MAX_S), self._dice())
        if error.permanent and len(uploads) > 1:
            self._report(f"one of {len(uploads)} shards is looked for: {error}", "permanent")
            self._portion.refused(len(uploads))
            return {}
        if not error.permanent:
            self._portion.failed(sum(_size(u.source) for u in uploads), took_s, self._config.upload_deadline_s)
            self._holds.hold_store(error, now_s)
        return dict.fromkeys((upload.key for upload in uploads), error)

    def _verify(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Ask the store itself what it has: a put that only says it worked is not enough to let a file go."""
        there = self._store.heads([upload.key for upload in uploads]) if uploads else {}
        return {upload.key: self._difference(upload, there.get(upload.key)) for upload in uploads}

    def _difference(self, upload: Upload, there: ObjectInfo | None) -> StoreError | None:
        size_bytes = upload.source.stat().st_size
        if there is None:
            return StoreError(f"{upload.key} was sent, but {self._store.url} does not have it", permanent=False)
        if there.size_bytes != size_bytes:
            text = f"{upload.key} has {there.size_bytes} bytes in {self._store.url}, and {size_bytes} here"
            return StoreError(text, permanent=True)
        return None

    def _mark(self, sent: Iterable[Upload]) -> None:
        changed: set[Path] = set()
        for upload in sent:
            size_bytes = upload.source.stat().st_size
            if self._config.keeps_cache:
                target = self._state.cache / upload.key
                fs.make_dir(target.parent)
                os.utime(upload.source)  # Its age in the cache counts from here.
                fs.rename(upload.source, target)
                changed.add(target.parent)
            else:
                fs.unlink(upload.source)
            failpoint("mark.rename.after")
            changed.add(upload.source.parent)
            self.uploaded_shards += 1
            self.uploaded_bytes += size_bytes
            self.last_upload_s = time.time()
        for directory in sorted(changed):
            fs.sync_dir(directory)
        failpoint("mark.sync.after")

    def _judge(self, uploads: Iterable[Upload], results: dict[str, StoreError | None]) -> None:
        """Hold the folders that failed and set aside what will never be taken; nobody waits once the store is back."""
        succeeded = {folder_of(upload.key) for upload in uploads if results[upload.key] is None}
        if self._holds.came_through(succeeded):
            _log.info("upload_recovered store=%s", self._store.url)
        now_s = self._clock()
        failed: dict[str, StoreError] = {}
        for upload in uploads:
            error = results[upload.key]
            if error is None:
                continue
            if not error.permanent:
                failed.setdefault(folder_of(upload.key), error)
                continue
            self._report(f"{upload.key} is in {self._state.deadletter}: {error}", "permanent")
            set_aside(upload.source, self._state.deadletter / upload.key, str(error))
        whole = self._holds.store_wait_s(now_s) > 0
        for folder, error in failed.items():
            if not whole:
                self._holds.hold_folder(folder, error, now_s)
            self._report(str(error), "held" if error.held else "transient")

    def _report(self, text: str, kind: str) -> None:
        if (text, kind) != (self.last_error, self.last_error_class):
            _log.warning("upload_failed class=%s error=%s", kind, text)
        self.last_error, self.last_error_class = text, kind


def _size(path: Path) -> int:
    """Return a file's size; 0 if somebody took it away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_SIZE):
            digest.update(chunk)
    return digest.hexdigest()


def _free_name(path: Path) -> Path:
    """Return `path`, or a name beside it that is not taken: evidence is never overwritten."""
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(2, _LISTED_MAX))]
    return next((name for name in names if not name.exists()), names[-1])
