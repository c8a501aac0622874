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
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from ranklog.errors import StoreError, UsageError
from ranklog.stores.base import Allowance, Changes, Download, ObjectInfo, StoreOptions, Upload, check_key, get_by_fetch
from ranklog.stores.events import watch
from ranklog.stores.fetch import fetch_all
from ranklog.stores.hub import Deadline, Hub, Refusal
from ranklog.stores.login import find_token
from ranklog.stores.seen import note_seen, read_seen
from ranklog.stores.xet import Content

OPERATIONS_MAX = 1000
"""Paths of one request, for all endpoints that take several."""
PAGE_SIZE = 1000

_URL = re.compile(r"hf://buckets/(?P<bucket>\w[\w.-]*/\w[\w.-]*)(?:/(?P<prefix>.*))?", re.ASCII)


class File(NamedTuple):
    """A path of the bucket, as the Hub reports it."""

    path: str
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
        self._find_token = partial(find_token, options.token_file)
        self._hub = Hub(self._find_token)
        self._content = Content(self._hub, bucket)
        self._noted = False

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
                self._path(upload.key)
                hashes[upload.key] = self._content.hash_file(upload.source)
            except OSError as exc:
                results[upload.key] = StoreError(f"{upload.source} cannot be read: {exc}", permanent=False)
            except StoreError as exc:
                results[upload.key] = exc
        there = self.look(list(hashes), deadline)
        missing = [upload for upload in uploads if upload.key in hashes and upload.key not in there]
        for key in there.keys() & hashes.keys():
            results[key] = self._difference(key, hashes[key], there[key])
        if missing:
            results |= self._send(missing, hashes, deadline)
        return results

    def _send(
        self, uploads: Sequence[Upload], hashes: dict[str, str], deadline: Deadline
    ) -> dict[str, StoreError | None]:
        """Upload what is not there and register it; whether the bucket has it then is for `heads` to tell."""
        results: dict[str, StoreError | None] = {}
        lines = []
        try:
            sent = self._content.upload(deadline, [upload.source for upload in uploads])
            for upload, content_hash in zip(uploads, sent, strict=True):
                if content_hash != hashes[upload.key]:
                    text = f"{upload.source} changed while it was uploaded"
                    results[upload.key] = StoreError(text, permanent=False)
                    continue
                results[upload.key] = None
                mtime_ms = os.stat(upload.source).st_mtime_ns // 1_000_000
                path = self._path(upload.key)
                lines.append({"type": "addFile", "path": path, "xetHash": content_hash, "mtime": mtime_ms})
        except OSError as exc:
            raise StoreError(f"an upload could not be prepared on this node: {exc}", permanent=False) from exc
        for path, reason in self._batch(lines, deadline).items():
            text = f"{self.url} did not take {path}: {reason}"
            results[path.removeprefix(self._base)] = StoreError(text, permanent=False)
        return results

    def _batch(self, lines: list[dict[str, Any]], deadline: Deadline) -> dict[str, str]:
        """Make changes in the bucket; return the paths that failed, each with its reason."""
        if not lines:
            return {}
        told, _ = self._hub.call(deadline, "POST", f"/api/buckets/{self._bucket}/batch", lines=lines, files=True)
        failed = told.get("failed", []) if isinstance(told, dict) else None
        if not isinstance(failed, list) or not (failed or told.get("success") is True):
            raise StoreError("the Hub's answer to a batch does not say what became of it", permanent=False)
        asked = {line["path"] for line in lines}
        found = {str(row.get("path")): str(row.get("error", ""))[:200] for row in failed if isinstance(row, dict)}
        if len(found) != len(failed) or not found.keys() <= asked:
            raise StoreError("the Hub's answer to a batch tells of paths that were not in it", permanent=False)
        return found

    def _difference(self, key: str, content_hash: str, there: File) -> StoreError | None:
        if there.hash == content_hash:
            return None
        text = f"{self.url} holds other bytes under {key} (hash {there.hash[:12]}, {there.size_bytes} bytes)"
        return StoreError(f"{text}; nothing was overwritten", permanent=True)

    def _path(self, key: str) -> str:
        """Return a key's path in the bucket; raises a permanent StoreError for one that cannot be."""
        path = self._base + key
        check_key(path)
        return path

    def look(self, keys: Sequence[str], deadline: Deadline) -> dict[str, File]:
        """Return what the bucket holds of these keys: one request for a thousand."""
        keys_of = {self._path(key): key for key in keys}
        paths = list(keys_of)
        found: dict[str, File] = {}
        for start in range(0, len(paths), OPERATIONS_MAX):
            asked = {"paths": paths[start : start + OPERATIONS_MAX]}
            told, _ = self._call(deadline, "POST", f"/api/buckets/{self._bucket}/paths-info", value=asked)
            found |= {keys_of[file.path]: file for file in _files(told) if file.path in keys_of}
        return found

    def _call(self, deadline: Deadline, method: str, path: str, *, value: Any = None) -> tuple[Any, Any]:
        """Make a request; where the bucket turns out to be missing, create it if that is allowed."""
        ask = partial(self._hub.call, deadline, method, path, value=value, files=value is not None)
        try:
            answer = ask()
        except Refusal as exc:
            if exc.status != 404 or exc.code != "RepoNotFound":
                raise
            self._create(deadline, exc)
            answer = ask()
        self._note_seen()
        return answer

    def _create(self, deadline: Deadline, missing: Refusal) -> None:
        """Create the bucket if the user allowed it and it was never seen before; else raise what to do."""
        marker = self._options.seen_marker
        if marker is not None and self._bucket in read_seen(marker):
            text = (
                f"{self.url} was there before and is gone, or the token may not see it any more. It is not created "
                f"again by itself: if it was deleted on purpose, remove {marker}, or create it yourself"
            )
            raise StoreError(text, permanent=False, held=True)
        if not self._options.create or marker is None:
            private = " --private" if self._options.create != "public" else ""
            text = f"{missing}. To create it: hf buckets create {self._bucket}{private}   (or set create_bucket)"
            raise StoreError(text, permanent=False, held=True) from missing
        visibility = {"visibility": self._options.create}
        try:
            self._hub.call(deadline, "POST", f"/api/buckets/{self._bucket}", value=visibility)
        except Refusal as exc:
            if exc.status != 409:  # Another node was faster.
                raise

    def _note_seen(self) -> None:
        """Remember on disk that the bucket is there, so that it is never created in the place of a lost one."""
        if self._options.seen_marker is not None and not self._noted:
            note_seen(self._options.seen_marker, self._bucket)
            self._noted = True

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        """Look up all of them, a thousand in a request."""
        found = self.look(keys, Deadline(self._options.deadline_s))
        return {key: ObjectInfo(key, file.size_bytes) for key, file in found.items()}

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Ask page by page, each with its own deadline; sorted here, for in which order a Hub lists it does not say."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        start = self._base + prefix
        query = urlencode({"recursive": "true", "limit": PAGE_SIZE})
        page: str | None = f"/api/buckets/{self._bucket}/tree{'/' + quote(start, safe='') if start else ''}?{query}"
        sizes: dict[str, int] = {}
        asked = set()
        while page:
            if page in asked:
                raise StoreError(f"a listing of {self.url} goes round in circles", permanent=False)
            asked.add(page)
            told, headers = self._call(Deadline(self._options.deadline_s), "GET", page)
            sizes |= {file.path: file.size_bytes for file in _files(told) if file.path.startswith(start)}
            page = _next_page(headers.get("Link", ""))
        return (ObjectInfo(path.removeprefix(self._base), sizes[path]) for path in sorted(sizes))

    def get(self, key: str, target: Path) -> None:
        """Download beside `target` and rename it there."""
        get_by_fetch(self, key, target)

    def fetch(self, downloads: Sequence[Download]) -> Iterator[str]:
        """Look up a thousand in a request; the bytes then cost the Hub no request at all."""
        there = self.look([download.key for download in downloads], Deadline(self._options.deadline_s))
        return fetch_all(self._content, self._options.deadline_s, self.url, downloads, there)

    def watch(self) -> Generator[Changes, None, None]:
        """Follow the bucket's feed of changes."""
        url = f"{self._hub.endpoint}/api/buckets/{self._bucket}/events"
        return watch(url, self._find_token, self._base)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the paths, a thousand in a request."""
        paths = [self._path(key) for key in keys]
        failed: list[str] = []
        for start in range(0, len(paths), OPERATIONS_MAX):
            lines = [{"type": "deleteFile", "path": path} for path in paths[start : start + OPERATIONS_MAX]]
            deadline = Deadline(self._options.deadline_s)
            refused = self._batch(lines, deadline)
            if refused:  # A path that was gone already may be told as failed.
                failed += self.look([path.removeprefix(self._base) for path in refused], deadline)
        if failed:
            raise StoreError(f"{self.url} did not delete {failed[0]} and {len(failed) - 1} more", permanent=False)


def _files(told: Any) -> list[File]:
    """Return the files of a list of entries; raises StoreError if it is none."""
    files = []
    # What is no list, or no object, counts as a file without anything a file has.
    for row in told if isinstance(told, list) else [told]:
        entry = row if isinstance(row, dict) else {}
        if entry.get("type", "file") != "file":
            continue
        file = File(entry.get("path", ""), entry.get("xetHash", ""), entry.get("size", -1))
        if [type(value) for value in file] != [str, str, int] or not file.path or file.size_bytes < 0:
            raise StoreError("the Hub answered with what is no list of files", permanent=False)
        files.append(file)
    return files


def _next_page(link: str) -> str | None:
    match = re.search(r'<([^>]+)>;\s*rel="next"', link)
    return match[1] if match else None
