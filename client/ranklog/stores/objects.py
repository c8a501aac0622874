"""S3, Google Cloud Storage and Azure as object stores, through obstore: s3://bucket[/prefix], gs://…, az://….

A put is one conditional request (create only if absent), so two who put other bytes under one key cannot overwrite each
other; a key that is taken is read back and compared. Credentials, regions and endpoints are obstore's business: it
reads AWS_*, GOOGLE_* and AZURE_* like the vendors' own tools. Its retries are cut short: whoever calls has better ones.
"""

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import ObjectStore, from_url

from ranklog import fs
from ranklog.errors import StoreError, UsageError
from ranklog.stores.base import Allowance, ObjectInfo, StoreOptions, Upload, check_key

CONNECT_S = 10
RETRIES_MAX = 2
_CHUNK_SIZE = 1 << 20

_HELD = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, exceptions.NotFoundError)
_PERMANENT = (exceptions.InvalidPathError, exceptions.NotSupportedError)
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
    request_s = max(1, round(options.deadline_s / (RETRIES_MAX + 1)))
    try:
        remote = from_url(
            f"{parts.scheme}://{parts.netloc}",
            # Plain HTTP only where the user's own endpoint says so: a server on the node, or in a test.
            client_options={"timeout": f"{request_s}s", "connect_timeout": f"{CONNECT_S}s", "allow_http": True},
            retry_config={"max_retries": RETRIES_MAX, "retry_timeout": timedelta(seconds=options.deadline_s)},
        )
    except (exceptions.BaseError, ValueError) as exc:
        raise UsageError(f"store URL {url!r}: {exc}") from exc
    return ObjectsStore(url.rstrip("/"), remote, f"{prefix}/" if prefix else "")


class ObjectsStore:
    """A Store in a cloud's bucket, below an optional prefix. May be shared by threads."""

    def __init__(self, url: str, remote: ObjectStore, base: str) -> None:
        self.url = url
        self._remote = remote
        self._base = base

    @property
    def allowance(self) -> Allowance | None:
        """None: requests are not counted here."""
        return None

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file, a request each."""
        results: dict[str, StoreError | None] = {}
        for upload in uploads:
            assert upload.key not in results, f"key {upload.key!r} twice in one call"
            try:
                check_key(upload.key)
                results[upload.key] = self._put(upload)
            except StoreError as exc:
                results[upload.key] = exc
        return results

    def _put(self, upload: Upload) -> StoreError | None:
        try:
            data = upload.source.read_bytes()  # A shard is bounded; several parts could not be created conditionally.
        except OSError as exc:
            return StoreError(f"{upload.source} cannot be read: {exc}", permanent=False)
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
        return {key: info for key in keys if (info := self._head(key)) is not None}

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
        check_key(key)
        temporary = target.with_name(f".get-{secrets.token_hex(8)}.tmp")
        try:
            try:
                with self._told(f"cannot read {key}"), temporary.open("xb") as file:
                    for part in obstore.get(self._remote, self._base + key).stream(min_chunk_size=_CHUNK_SIZE):
                        file.write(part)
                fs.publish(temporary, target)
            finally:
                fs.unlink(temporary)
        except (FileNotFoundError, exceptions.NotFoundError) as exc:
            raise StoreError(f"no object {key} in {self.url}", permanent=True) from exc
        except OSError as exc:
            raise StoreError(f"cannot copy {key} to {target}: {exc}", permanent=False) from exc

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
            if "NoSuchBucket" in str(exc):
                text = f"{what} in {self.url}: there is no such bucket, or these credentials may not see it"
                raise StoreError(text, permanent=False, held=True) from exc
            raise
        except (exceptions.BaseError, OSError) as exc:
            text = f"{what} in {self.url}: {type(exc).__name__} {str(exc)[:300]}"
            held = isinstance(exc, _HELD)
            permanent = isinstance(exc, _PERMANENT)
            raise StoreError(text, permanent=permanent, held=held) from exc
