"""Bytes to and from the Hub's content store, through hf_xet: what is uploaded here has no name in a bucket yet.

    hash_files   what the store will call these bytes; no network
    upload       chunks, xorbs, shard; afterwards a bucket may refer to the hashes
    download     the bytes of a hash into a local file

Two things bound each call, for hf_xet's own retries take minutes: its settings below, and a timer that aborts it at
the deadline. The token comes from the Hub (`xet-write-token`) and is kept until shortly before it expires, so that an
upload costs no request for it; it never refreshes by itself inside hf_xet, where that could not be interrupted.

hf_xet remembers on disk what it uploaded, so as not to send it again. For files that never repeat that is of no use,
and where the Hub has lost the bytes (a bucket deleted and made anew) it would name them for ever without sending them:
so its memory is set to nothing. What it sends twice, the content store recognises.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hf_xet

from ranklog.errors import StoreError
from ranklog.stores.hub import Deadline, Hub

SETTINGS = {
    "client.connect_timeout": "10s",
    "client.read_timeout": "30s",
    "client.retry_max_attempts": 2,
    "client.retry_base_delay": "1s",
    "deduplication.global_dedup_query_enabled": False,  # A request for each file, for parquet that never repeats.
    "shard.cache_size_limit": 1,  # Bytes; 0 would mean no limit. Pruned at each commit; the default grows to 16 GB.
    "shard.chunk_index_table_max_size": 0,
    "data.max_concurrent_file_ingestion": 2,  # Beside a training, two are plenty.
    "client.ac_max_upload_concurrency": 2,
    "telemetry.enabled": False,
}
SESSION_CALLS_MAX = 50
"""Then a new session: one keeps about 2 kB of each call for as long as it lives, 0.5 GB in a month of steady work."""
EARLY_S = 60.0
"""A token is not used any more so long before it expires."""


class Grant(NamedTuple):
    """What the content store lets us do, and until when."""

    endpoint: str
    token: str
    expires_s: int


class Wanted(NamedTuple):
    """Content on its way to a local file."""

    hash: str
    size_bytes: int
    target: Path


class Content:
    """The content store of one bucket. May be used by several threads."""

    def __init__(self, hub: Hub, bucket: str) -> None:
        self._hub = hub
        self._bucket = bucket
        self._session: Any = None
        self._session_pid = self._session_calls = 0
        self._grants: dict[str, tuple[Grant, bytes]] = {}
        self._lock = threading.Lock()

    def hash_file(self, path: Path) -> str:
        """Return the content hash of a file; raises OSError."""
        content_hash: str = hf_xet.hash_files([str(path)])[0].hash
        return content_hash

    def upload(self, deadline: Deadline, paths: Sequence[Path]) -> list[str]:
        """Upload the bytes of each file and return their hashes; raises StoreError, OSError."""
        grant = self._grant(deadline, "write")
        with self._bounded(deadline, "write"):
            commit = self._group("new_upload_commit", grant)
            with _aborted_at(deadline, commit):
                handles = [commit.start_upload_file(str(path), sha256=hf_xet.SKIP_SHA256) for path in paths]
                commit.wait_to_finish()
                return [handle.result().xet_info.hash for handle in handles]

    def download(self, deadline: Deadline, content_hash: str, size_bytes: int, target: Path) -> None:
        """Write the bytes of a hash to `target`; raises StoreError, OSError."""
        self.download_all(deadline, [Wanted(content_hash, size_bytes, target)])

    def download_all(self, deadline: Deadline, wanted: Sequence[Wanted]) -> None:
        """Write the bytes of each hash to its target, in one call for all; raises StoreError, OSError."""
        grant = self._grant(deadline, "read")
        with self._bounded(deadline, "read"):
            group = self._group("new_file_download_group", grant)
            with _aborted_at(deadline, group):
                for file in wanted:
                    group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size_bytes), str(file.target))
                group.wait_to_finish()

    def _group(self, kind: str, grant: Grant) -> Any:
        with self._lock:
            self._session_calls += 1
            # A session made before a fork refuses to work in the child.
            if self._session_pid != os.getpid() or self._session_calls > SESSION_CALLS_MAX:
                self._session_pid, self._session_calls = os.getpid(), 1
                self._session = hf_xet.XetSession(hf_xet.XetConfig().with_config(SETTINGS))
            session = self._session
        return getattr(session, kind)(
            endpoint=grant.endpoint, token=grant.token, token_expiry_unix_secs=grant.expires_s
        )

    def _grant(self, deadline: Deadline, kind: str) -> Grant:
        """Return a token for the content store, from the last time if it is still good and the login is the same."""
        login = self._hub.login  # Of the request just made: each use begins with a look.
        with self._lock:
            grant, whose = self._grants.get(kind, (None, b""))
        if grant is not None and whose == login and grant.expires_s - EARLY_S > time.time():
            return grant
        told, _ = self._hub.call(deadline, "GET", f"/api/buckets/{self._bucket}/xet-{kind}-token")
        try:
            grant = Grant(str(told["casUrl"]), str(told["accessToken"]), int(told["exp"]))
        except (TypeError, KeyError, ValueError) as exc:
            raise StoreError(f"the Hub's xet-{kind}-token has no {exc}", permanent=False) from exc
        with self._lock:
            self._grants[kind] = (grant, login)
        return grant

    @contextlib.contextmanager
    def _bounded(self, deadline: Deadline, kind: str) -> Iterator[None]:
        """Turn whatever hf_xet raises into a StoreError: it tells HTTP statuses in words only."""
        try:
            yield
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as exc:
            with self._lock:
                self._grants.pop(kind, None)  # Whatever it was: the next try asks for a token again.
            deadline.left_s()  # If it was the timer that ended it, that is the better reason.
            raise StoreError(f"the content store failed: {type(exc).__name__} {exc}", permanent=False) from exc


@contextlib.contextmanager
def _aborted_at(deadline: Deadline, group: Any) -> Iterator[None]:
    timer = threading.Timer(deadline.left_s(), group.abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
