"""S3, Google Cloud Storage and Azure as object stores, through obstore: s3://bucket[/prefix], gs://…, az://….

A put is one conditional request (create only if absent), so two who put other bytes under one key cannot overwrite each
other; a key that is taken is read back and compared. Credentials, regions and endpoints are obstore's business: it
reads AWS_*, GOOGLE_* and AZURE_* like the vendors' own tools. Its retries are cut short: whoever calls has better ones.

The deadline of a call is kept in quarters: no request of it begins in the second half, none takes longer than a
quarter, and none is tried again once a quarter is over.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import ObjectStore, from_url

from ranklog.errors import StoreError, UsageError
from ranklog.stores.base import Allowance, Download, ObjectInfo, StoreOptions, Upload, check_key, get_by_fetch

CONNECT_S = 10
RETRIES_MAX = 2
FETCH_THREADS = 8  # Small objects wait for round trips, not for bandwidth.
_CHUNK_SIZE = 1 << 20

_HELD = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, exceptions.NotFoundError)
_PERMANENT = (exceptions.InvalidPathError, exceptions.NotSupportedError)
_NO_BUCKET = "NoSuchBucket"
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_TOOK = re.compile(r" in [\d.]+[mµn]?s\b")
_HELD_STATUS = frozenset({"401", "403"})
_TAKEN = (exceptions.AlreadyExistsError, exceptions.PreconditionError)


def open_url(url: str, options: StoreOptions) -> "ObjectsStore":
    """Return the store of an s3://, gs:// or az:// URL, without any request; raises UsageError."""
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if not parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"store URL {url!r} names no bucket; write {parts.scheme}://<bucket>[/prefix]")
    if prefix:
        try:
            check_key(prefix)
        except StoreError as exc:
            raise UsageError(f"store URL {url!r}: {exc}") from exc
    quarter_s = max(1.0, options.deadline_s / 4)
    try:
        remote = from_url(
            f"{parts.scheme}://{parts.netloc}",
            # Plain HTTP only where the user's own endpoint says so: a server on the node, or in a test.
            client_options={
                "timeout": f"{round(quarter_s * 1000)}ms",
                "connect_timeout": f"{round(min(CONNECT_S, quarter_s) * 1000)}ms",
                "allow_http": True,
            },
            retry_config={"max_retries": RETRIES_MAX, "retry_timeout": timedelta(seconds=quarter_s)},
        )
    except (exceptions.BaseError, ValueError) as exc:
        raise UsageError(f"store URL {url!r}: {exc}") from exc
    return ObjectsStore(url.rstrip("/"), remote, f"{prefix}/" if prefix else "", 2 * quarter_s)


class ObjectsStore:
    """A Store in a cloud's bucket, below an optional prefix. May be shared by threads."""

    def __init__(self, url: str, remote: ObjectStore, base: str, begin_s: float) -> None:
        """`begin_s`: how long a call may go on to begin requests."""
        self.url = url
        self._remote = remote
        self._base = base
        self._begin_s = begin_s

    @property
    def allowance(self) -> Allowance | None:
        """None: requests are not counted here."""
        return None

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file, a request each; once the server fails or refuses us, the others are not even tried."""
        results: dict[str, StoreError | None] = {}
        end_s = time.monotonic() + self._begin_s
        for upload in uploads:
            assert upload.key not in results, f"key {upload.key!r} twice in one call"
            try:
                check_key(upload.key)
                data = upload.source.read_bytes()  # A shard is bounded; parts could not be created conditionally.
            except StoreError as exc:
                results[upload.key] = exc
                continue
            except OSError as exc:
                results[upload.key] = StoreError(f"{upload.source} cannot be read: {exc}", permanent=False)
                continue
            try:
                self._require_time(end_s)
                results[upload.key] = self._put(upload, data)
            except StoreError as exc:
                results[upload.key] = exc
                if not exc.permanent and None not in results.values():
                    raise  # Nobody is there, or nobody may come in: all who wait should know.
                if not exc.permanent:
                    return {**dict.fromkeys((each.key for each in uploads), exc), **results}
        return results

    def _require_time(self, end_s: float) -> None:
        if time.monotonic() >= end_s:
            text = f"{self.url} is too slow for all of one call in {2 * self._begin_s:g} s (upload_deadline)"
            raise StoreError(text, permanent=False)

    def _put(self, upload: Upload, data: bytes) -> StoreError | None:
        with self._told(f"cannot store {upload.key}"):
            try:
                obstore.put(self._remote, self._base + upload.key, data, mode="create", use_multipart=False)
            except _TAKEN:
                return self._compare(upload, data)
        return None

    def _compare(self, upload: Upload, data: bytes) -> StoreError | None:
        """Return None if the object that has the name already holds our bytes: an earlier try came through."""
        if bytes(obstore.get(self._remote, self._base + upload.key).bytes()) == data:
            return None
        return StoreError(f"{self.url} holds other bytes under {upload.key}; nothing was overwritten", permanent=True)

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        """Ask for each; a request each."""
        end_s = time.monotonic() + self._begin_s
        found: dict[str, ObjectInfo] = {}
        for key in keys:
            self._require_time(end_s)
            if (info := self._head(key)) is not None:
                found[key] = info
        return found

    def _head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        with self._told(f"cannot look at {key}"):
            try:
                return ObjectInfo(key, int(obstore.head(self._remote, self._base + key)["size"]))
            except (FileNotFoundError, exceptions.NotFoundError):
                return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List the folder of the prefix, for these stores know whole parts of a path only, and filter."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        return self._pages(self._base + folder, self._base + prefix)

    def _pages(self, folder: str, start: str) -> Iterator[ObjectInfo]:
        with self._told("cannot list the objects"):
            rows = [
                ObjectInfo(row["path"].removeprefix(self._base), int(row["size"]))
                for page in obstore.list(self._remote, prefix=folder.rstrip("/") or None)
                for row in page
                if row["path"].startswith(start)
            ]
        yield from sorted(rows)

    def get(self, key: str, target: Path) -> None:
        """Download beside `target` and rename it there."""
        get_by_fetch(self, key, target)

    def fetch(self, downloads: Sequence[Download]) -> Iterator[str]:
        """Download several at a time, a request each."""
        for download in downloads:
            check_key(download.key)
        missing: StoreError | None = None
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            running = {pool.submit(self._download, download): download.key for download in downloads}
            try:
                for done in as_completed(running):
                    try:
                        done.result()
                    except StoreError as exc:
                        if not exc.permanent:
                            raise
                        missing = missing or exc
                    else:
                        yield running[done]
            finally:
                pool.shutdown(cancel_futures=True)
        if missing is not None:
            raise missing

    def _download(self, download: Download) -> None:
        try:
            with self._told(f"cannot read {download.key}"):
                parts = obstore.get(self._remote, self._base + download.key).stream(min_chunk_size=_CHUNK_SIZE)
                with download.target.open("xb") as file:
                    for part in parts:
                        file.write(part)
        except (FileNotFoundError, exceptions.NotFoundError) as exc:
            raise StoreError(f"no object {download.key} in {self.url}", permanent=True) from exc

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects."""
        for key in keys:
            check_key(key)
        for key in keys:
            with self._told(f"cannot delete {key}"), contextlib.suppress(FileNotFoundError, exceptions.NotFoundError):
                obstore.delete(self._remote, self._base + key)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what obstore raises into a StoreError; a missing object stays what it is, for the caller to judge."""
        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError) as exc:
            if _NO_BUCKET in str(exc):
                raise self._error(what, exc) from exc
            raise
        except (exceptions.BaseError, OSError) as exc:
            raise self._error(what, exc) from exc

    def _error(self, what: str, exc: Exception) -> StoreError:
        said = str(exc)
        status, code = _STATUS.search(said), _CODE.search(said)
        # A listing that is refused comes as a GenericError: only the text tells.
        held = isinstance(exc, _HELD) or (status is not None and status[1] in _HELD_STATUS) or _NO_BUCKET in said
        if _NO_BUCKET in said:
            text = "there is no such bucket, or these credentials may not see it"
        elif status is not None:
            text = f"answered {status[1]}{f' {code[1]}' if code else ''}"
        else:
            # Without the sources of the error, for programmers, and how long it took, which is never the same.
            text = " ".join(_TOOK.sub("", said.partition("Debug source:")[0]).split())[:300]
        if held and _NO_BUCKET not in said:
            text += ". The daemon needs credentials that may write there: AWS_*, GOOGLE_* or AZURE_*, read at its start"
        permanent = isinstance(exc, _PERMANENT) and not held
        return StoreError(f"{what} in {self.url}: {text}", permanent=permanent, held=held)
