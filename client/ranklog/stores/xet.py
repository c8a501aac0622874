"""Bytes to and from the Hub's content store, through hf_xet: what is uploaded here has no name in a bucket yet.

    hash_files   what the store will call these bytes; no network
    upload       chunks, xorbs, shard; afterwards a bucket may refer to the hashes
    download     the bytes of a hash into a local file

Two things bound each call, for hf_xet's own retries take minutes: its settings below, and a timer that aborts it at
the deadline. The token comes from the Hub (`xet-write-token`) and is kept until shortly before it expires, so that an
upload costs no request for it; it never refreshes by itself inside hf_xet, where that could not be interrupted.
"""

import contextlib
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
    "shard.cache_size_limit": 1_000_000,  # Pruned at each commit; the default grows to 16 GB.
    "data.max_concurrent_file_ingestion": 2,  # Beside a training, two are plenty.
    "client.ac_max_upload_concurrency": 2,
    "telemetry.enabled": False,
}
EARLY_S = 60.0
"""A token is not used any more so long before it expires."""


class Grant(NamedTuple):
    """What the content store lets us do, and until when."""

    endpoint: str
    token: str
    expires_s: int


class Content:
    """The content store of one bucket. May be used by several threads."""

    def __init__(self, hub: Hub, bucket: str) -> None:
        self._hub = hub
        self._bucket = bucket
        self._session: Any = None
        self._grants: dict[str, tuple[Grant, str]] = {}
        self._lock = threading.Lock()

    def hash_files(self, paths: Sequence[Path]) -> list[str]:
        """Return the content hash of each file; raises OSError."""
        return [info.hash for info in hf_xet.hash_files([str(path) for path in paths])]

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
        grant = self._grant(deadline, "read")
        with self._bounded(deadline, "read"):
            group = self._group("new_file_download_group", grant)
            with _aborted_at(deadline, group):
                group.start_download_file(hf_xet.XetFileInfo(content_hash, size_bytes), str(target))
                group.wait_to_finish()

    def _group(self, kind: str, grant: Grant) -> Any:
        if self._session is None:
            self._session = hf_xet.XetSession(hf_xet.XetConfig().with_config(SETTINGS))
        return getattr(self._session, kind)(
            endpoint=grant.endpoint, token=grant.token, token_expiry_unix_secs=grant.expires_s
        )

    def _grant(self, deadline: Deadline, kind: str) -> Grant:
        """Return a token for the content store, from the last time if it is still good and the login is the same."""
        login = self._hub.headers().get("authorization", "")
        with self._lock:
            grant, whose = self._grants.get(kind, (None, ""))
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
            deadline.left_s()  # If it was the timer that ended it, that is the better reason.
            with self._lock:
                self._grants.pop(kind, None)  # Whatever it was: the next try asks for a token again.
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
