"""A Hugging Face Bucket as object store: hf://buckets/<namespace>/<bucket>[/prefix].

    put      hash locally ─▶ what is there? (paths-info) ─▶ bytes (content store) ─▶ register paths (batch)
    heads    what is there now? (paths-info)

The API can neither create-if-absent nor answer whether a lost request was applied: so paths are looked up before.
Equal bytes that are there already are a success, and other bytes are never overwritten. A batch is not a transaction:
each path has its own fate. An upload and its verification cost three requests, however many files they are for.

The bucket is created only where the user allowed it (`StoreOptions.create`), and never a second time: one that was
seen before and is gone is for a person to judge.
"""

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from huggingface_hub import get_token

from ranklog import fs
from ranklog.errors import StoreError, UsageError
from ranklog.stores.base import Allowance, ObjectInfo, StoreOptions, Upload, check_key
from ranklog.stores.hub import Deadline, Hub
from ranklog.stores.xet import Content

OPERATIONS_MAX = 1000
"""Paths of one request, for all endpoints that take several."""
PAGE_SIZE = 1000

_URL = re.compile(r"hf://buckets/(?P<bucket>[\w.-]+/[\w.-]+)(?:/(?P<prefix>.*))?", re.ASCII)


class _File(NamedTuple):
    """A path of the bucket, as the Hub reports it."""

    hash: str
    size_bytes: int


def open_url(url: str, options: StoreOptions) -> "BucketStore":
    """Return the store of a bucket's URL, without any request; raises UsageError."""
    match = _URL.fullmatch(url)
    prefix = (match["prefix"] or "").strip("/") if match else ""
    if match is None:
        raise UsageError(f"store URL {url!r} names no bucket; write hf://buckets/<namespace>/<bucket>[/prefix]")
    if prefix:
        try:
            check_key(prefix)
        except StoreError as exc:
            raise UsageError(f"store URL {url!r}: {exc}") from exc
    return BucketStore(match["bucket"], prefix, options)


class BucketStore:
    """A Store in a bucket, below an optional prefix. May be shared by threads."""

    def __init__(self, bucket: str, prefix: str, options: StoreOptions) -> None:
        self.url = f"hf://buckets/{bucket}{f'/{prefix}' if prefix else ''}"
        self._bucket = bucket
        self._base = f"{prefix}/" if prefix else ""
        self._options = options
        self._hub = Hub(self._find_token)
        self._content = Content(self._hub, bucket)
        self._seen = options.seen_marker is not None and options.seen_marker.exists()

    @property
    def allowance(self) -> Allowance | None:
        """What the Hub said is left for this user, on whichever node."""
        return self._hub.allowance

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file; one upload and one batch for up to a thousand of them."""
        results: dict[str, StoreError | None] = {}
        for start in range(0, len(uploads), OPERATIONS_MAX):
            results |= self._put(uploads[start : start + OPERATIONS_MAX], Deadline(self._options.deadline_s))
        return results

    def _put(self, uploads: Sequence[Upload], deadline: Deadline) -> dict[str, StoreError | None]:
        results: dict[str, StoreError | None] = {}
        hashes: dict[str, str] = {}
        for upload in uploads:
            assert upload.key not in results.keys() | hashes.keys(), f"key {upload.key!r} twice in one call"
            try:
                check_key(upload.key)
                hashes[upload.key] = self._content.hash_files([upload.source])[0]
            except OSError as exc:
                results[upload.key] = StoreError(f"{upload.source} cannot be read: {exc}", permanent=False)
            except StoreError as exc:
                results[upload.key] = exc
        there = self._look(list(hashes), deadline)
        missing = [upload for upload in uploads if upload.key in hashes and upload.key not in there]
        for key in there.keys() & hashes.keys():
            results[key] = self._differs(key, hashes[key], there[key])
        if missing:
            results |= self._send(missing, hashes, deadline)
        return results

    def _send(
        self, uploads: Sequence[Upload], hashes: dict[str, str], deadline: Deadline
    ) -> dict[str, StoreError | None]:
        """Upload what is not there and register it; whether the bucket has it then is for `heads` to tell."""
        try:
            sent = self._content.upload(deadline, [upload.source for upload in uploads])
        except OSError as exc:
            raise StoreError(f"an upload could not be prepared on this node: {exc}", permanent=False) from exc
        results: dict[str, StoreError | None] = {}
        lines = []
        for upload, content_hash in zip(uploads, sent, strict=True):
            if content_hash != hashes[upload.key]:
                results[upload.key] = StoreError(f"{upload.source} changed while it was uploaded", permanent=False)
                continue
            mtime_ms = os.stat(upload.source).st_mtime_ns // 1_000_000
            path = self._base + upload.key
            lines.append({"type": "addFile", "path": path, "xetHash": content_hash, "mtime": mtime_ms})
        told, _ = self._hub.call(deadline, "POST", f"/api/buckets/{self._bucket}/batch", lines=lines)
        failed = {row["path"]: str(row.get("error", "")) for row in _list_of(told, "failed")}
        for path, reason in failed.items():
            text = f"{self.url} did not take {path}: {reason[:200]}"
            results[path.removeprefix(self._base)] = StoreError(text, permanent=False)
        return {upload.key: results.get(upload.key) for upload in uploads}

    def _differs(self, key: str, content_hash: str, there: _File) -> StoreError | None:
        if there.hash == content_hash:
            return None
        text = f"{self.url} holds other bytes under {key} (hash {there.hash[:12]}, {there.size_bytes} bytes)"
        return StoreError(f"{text}; nothing was overwritten", permanent=True)

    def _look(self, keys: Sequence[str], deadline: Deadline) -> dict[str, _File]:
        """Return what the bucket holds of these keys: one request for a thousand."""
        found = {}
        for start in range(0, len(keys), OPERATIONS_MAX):
            paths = [self._base + key for key in keys[start : start + OPERATIONS_MAX]]
            told, _ = self._call(deadline, "POST", f"/api/buckets/{self._bucket}/paths-info", value={"paths": paths})
            for row in _rows(told):
                if row.get("type", "file") == "file":
                    found[str(row["path"]).removeprefix(self._base)] = _File(str(row["xetHash"]), int(row["size"]))
        return found

    def _call(self, deadline: Deadline, method: str, path: str, *, value: Any = None) -> tuple[Any, Any]:
        """Make a request; where the bucket turns out to be missing, create it if that is allowed."""
        try:
            answer = self._hub.call(deadline, method, path, value=value)
        except StoreError as exc:
            if not (exc.held and "answered 404" in str(exc) and self._create(deadline)):
                raise
            answer = self._hub.call(deadline, method, path, value=value)
        self._note_seen()
        return answer

    def _create(self, deadline: Deadline) -> bool:
        """Create the bucket if the user allowed it and it was never seen before; return whether it is there now."""
        marker = self._options.seen_marker
        if not self._options.create or marker is None:
            return False
        if marker.exists():
            text = (
                f"{self.url} was there before and is gone. It is not created again by itself: if it was deleted on "
                f"purpose, remove {marker}"
            )
            raise StoreError(text, permanent=False, held=True)
        visibility = {"visibility": self._options.create}
        try:
            self._hub.call(deadline, "POST", f"/api/buckets/{self._bucket}", value=visibility)
        except StoreError as exc:
            if "answered 409" not in str(exc):  # Another node was faster.
                raise
        return True

    def _note_seen(self) -> None:
        """Remember on disk that the bucket is there, so that it is never created in the place of a lost one."""
        marker = self._options.seen_marker
        if marker is None or self._seen:
            return
        try:
            temporary = marker.with_name(f".{marker.name}.tmp")
            temporary.write_text(f"{self.url}\n", encoding="utf-8")
            fs.publish(temporary, marker)
        except OSError as exc:
            raise StoreError(f"{marker} cannot be written: {exc}", permanent=False) from exc
        self._seen = True

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        """Look up all of them, a thousand in a request."""
        for key in keys:
            check_key(key)
        found = self._look(keys, Deadline(self._options.deadline_s))
        return {key: ObjectInfo(key, file.size_bytes) for key, file in found.items()}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Ask page by page; each page is a request of its own with its own deadline."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        return self._pages(self._base + prefix)

    def _pages(self, start: str) -> Iterator[ObjectInfo]:
        query = urlencode({"recursive": "true", "limit": PAGE_SIZE})
        tree = f"/api/buckets/{self._bucket}/tree{'/' + quote(start, safe='') if start else ''}"
        path: str | None = f"{tree}?{query}"
        last = ""
        while path:
            told, headers = self._call(Deadline(self._options.deadline_s), "GET", path)
            for row in _rows(told):
                key = str(row["path"]).removeprefix(self._base)
                if row.get("type") == "file" and str(row["path"]).startswith(start) and key > last:
                    last = key
                    yield ObjectInfo(key, int(row["size"]))
            path = _next_page(headers.get("Link", ""))
            if path is not None and not path.startswith(f"{self._hub.endpoint}/"):
                raise StoreError(f"a listing goes on at another server, {path}: refused", permanent=False, held=True)

    def get(self, key: str, target: Path) -> None:
        """Download beside `target` and rename it there."""
        check_key(key)
        deadline = Deadline(self._options.deadline_s)
        file = self._look([key], deadline).get(key)
        if file is None:
            raise StoreError(f"no object {key} in {self.url}", permanent=True)
        temporary = target.with_name(f".get-{secrets.token_hex(8)}.tmp")
        try:
            try:
                if file.size_bytes:
                    self._content.download(deadline, file.hash, file.size_bytes, temporary)
                else:
                    temporary.touch()
                fs.publish(temporary, target)
            finally:
                fs.unlink(temporary)
        except OSError as exc:
            raise StoreError(f"cannot copy {key} to {target}: {exc}", permanent=False) from exc

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the paths, a thousand in a request."""
        for key in keys:
            check_key(key)
        failed: list[str] = []
        for start in range(0, len(keys), OPERATIONS_MAX):
            part = keys[start : start + OPERATIONS_MAX]
            lines = [{"type": "deleteFile", "path": self._base + key} for key in part]
            deadline = Deadline(self._options.deadline_s)
            told, _ = self._hub.call(deadline, "POST", f"/api/buckets/{self._bucket}/batch", lines=lines)
            refused = [str(row["path"]) for row in _list_of(told, "failed")]
            if refused:  # A path that was gone already may be told as failed.
                failed += self._look([path.removeprefix(self._base) for path in refused], deadline)
        if failed:
            raise StoreError(f"{self.url} did not delete {failed[0]} and {len(failed) - 1} more", permanent=False)

    def _find_token(self) -> str | None:
        """Return the token of this moment: from the token file if one is configured, else from the Hub's own login."""
        file = self._options.token_file
        if file is None:
            token: str | None = get_token()
            return token
        try:
            return file.read_text(encoding="utf-8").strip() or None
        except OSError as exc:
            raise StoreError(f"the token file cannot be read: {exc}", permanent=False, held=True) from exc


def _rows(told: Any) -> list[dict[str, Any]]:
    if not isinstance(told, list):
        raise StoreError("the Hub answered with what is no list of files", permanent=False)
    return told


def _list_of(told: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(told, dict) or not isinstance(told.get(name, []), list):
        raise StoreError(f"the Hub's answer to a batch says nothing about what {name}", permanent=False)
    found: list[dict[str, Any]] = told.get(name, [])
    return found


def _next_page(link: str) -> str | None:
    match = re.search(r'<([^>]+)>;\s*rel="next"', link)
    return match[1] if match else None
