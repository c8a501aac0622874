"""The Store protocol: what the uploader and the readers need of an object store, a contract for each method.

One conformance suite (tests/client/test_store_contract.py) runs against every implementation.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from ranklog.errors import StoreError, UsageError


class ObjectInfo(NamedTuple):
    """One object as a listing shows it."""

    key: str
    size_bytes: int


class Upload(NamedTuple):
    """One local file on its way to a key."""

    source: Path
    key: str


class Store(Protocol):
    """A place for immutable objects. Keys are those of `ranklog.layout`; every method raises StoreError."""

    url: str
    """What `open_store` was given, for messages."""

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file at its key; return what became of each: None for success.

        Idempotent: the same bytes at the same key succeed again, for after a crash the same shard is put again. Other
        bytes at an existing key are a permanent error; nothing is overwritten. An object appears whole or not at
        all, and once this returned None for it, it survives a power cut of the store.
        """

    def head(self, key: str) -> ObjectInfo | None:
        """Return the object's size as the store reports it, or None if there is no such object."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix`, sorted by key; half-written ones never appear."""

    def get(self, key: str, target: Path) -> None:
        """Write the object's bytes to `target`, which appears whole or not at all; raises if there is no such object."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects; those that are gone already are no error."""


_KINDS = {"": "ranklog.stores.dir:DirStore", "file": "ranklog.stores.dir:DirStore"}
"""URL scheme -> module:class. A class takes the URL and whether it may write."""


def open_store(url: str) -> Store:
    """Return the store a URL names: a directory path or file:// URL; raises UsageError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in _KINDS:
        known = ", ".join(f"{scheme}://" for scheme in _KINDS if scheme)
        raise UsageError(f"store URL {url!r}: scheme {parts.scheme!r} is not known; use a directory path or {known}")
    if not url or (parts.scheme == "file" and parts.netloc not in ("", "localhost")):
        raise UsageError(f"store URL {url!r} names no local directory; write file:///absolute/path or a plain path")
    module, _, name = _KINDS[parts.scheme].partition(":")
    path = unquote(parts.path) if parts.scheme else url
    store: Store = getattr(importlib.import_module(module), name)(Path(path).expanduser().absolute())
    return store
