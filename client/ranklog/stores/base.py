"""The Store protocol: what the uploader and the readers need of an object store, a contract for each method.

One conformance suite (tests/client/test_store_contract.py) runs against every implementation. Objects are immutable:
a key, once taken, keeps its bytes until it is deleted. Listing by prefix is the only index.

A new kind of store is one module with a function `open_url(url, options) -> Store` and one line in `_MODULES`. It is
imported only when a URL asks for it, so a directory store never loads a network library.
"""

import importlib
import re
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from ranklog import fs
from ranklog.errors import MissingExtra, StoreError, UsageError

KEY_SIZE_MAX = 1024
"""UTF-8 bytes of a key: the smallest limit among the stores we know."""

_PART_SIZE_MAX = 255  # What a directory entry may be long on every filesystem we know.
_BAD_CHARACTER = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class StoreOptions:
    """What a store needs to know beyond its URL. A directory needs none of it."""

    deadline_s: float = 120.0
    """A call on a network store ends by then."""
    token_file: Path | None = None
    """Where the Hub's token stands; None: the Hub's own login."""
    create: str = ""
    """`private` or `public`: create a missing bucket, once. Empty: never."""
    seen_marker: Path | None = None
    """A file that says that the bucket was seen: from then on it is not created. None: never create."""


class Allowance(NamedTuple):
    """What a store that limits requests said last of its limit."""

    left: int
    """Requests that may still be made …"""
    reset_s: float
    """… within these seconds."""
    limit: int = 0
    """Requests in a whole window; 0: it did not say."""
    window_s: float = 300.0


class ObjectInfo(NamedTuple):
    """One object as a listing shows it."""

    key: str
    size_bytes: int


class Upload(NamedTuple):
    """One local file on its way to a key."""

    source: Path
    key: str


class Download(NamedTuple):
    """One object on its way to a local file."""

    key: str
    target: Path


class Change(NamedTuple):
    """What a feed tells of one object."""

    key: str
    size_bytes: int
    gone: bool
    """It was deleted."""


Changes = list[Change]


class Store(Protocol):
    """A place for immutable objects. Every method raises StoreError, and nothing else, for what goes wrong outside.

    Keys are those of `ranklog.layout`, or any other that `check_key` lets pass; any other is a permanent StoreError.
    """

    url: str
    """Names this store in messages; `open_store` of it finds the same objects."""

    @property
    def allowance(self) -> Allowance | None:
        """How many requests may still be made; None for a store that does not limit them, or never said."""

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file at its key; return what became of each: None for success. A key may stand there only once.

        Idempotent: the same bytes at the same key succeed again, for after a crash the same shard is put again. Other
        bytes at an existing key are a permanent error; nothing is overwritten. An object appears whole or not at
        all, and once this returned None for it, it survives a power cut of the store. One file's error leaves the
        others alone; StoreError is raised only where the call failed as a whole.
        """

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        """Return the sizes of these objects as the store itself reports them now; what is missing is not there."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix` (a plain string, "" for all), sorted by key.

        Half-written objects never appear. One that is put or deleted meanwhile may appear or not.
        """

    def get(self, key: str, target: Path) -> None:
        """Write the object's bytes to `target`, replacing it; it appears whole or not at all.

        A permanent StoreError if there is no such object; `target` is then left as it was.
        """

    def fetch(self, downloads: Sequence[Download]) -> Iterator[str]:
        """Write many objects, in as few requests as the store can; yield each key once its file is whole.

        The targets are new names in a directory that nobody else looks at: after an error something half may lie
        there. Raises at the first failure; but for objects that are missing, a permanent error, after all others.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects, durably; those that are gone already are no error. Raises after having tried them all."""


@runtime_checkable
class Watched(Protocol):
    """What a store can do beside, if it tells by itself what changes in it."""

    def watch(self) -> Generator[Changes, None, None]:
        """Yield [] once the feed stands: all that happens from then on is told, so a listing made then misses nothing.

        Then the changes as they come, and [] now and then where there are none. Ends where something may have been
        left out: watch again, list again. Raises StoreError if the feed fails or the server has none.
        """


def get_by_fetch(store: Store, key: str, target: Path) -> None:
    """Be the `get` of a store over the network: fetch beside `target`, then rename it there."""
    temporary = target.with_name(f".get-{secrets.token_hex(8)}.tmp")
    try:
        try:
            for _ in store.fetch([Download(key, temporary)]):
                fs.publish(temporary, target)
        finally:
            fs.unlink(temporary)
    except OSError as exc:
        raise StoreError(f"cannot copy {key} to {target}: {exc}", permanent=False) from exc


def check_key(key: str) -> None:
    """Raise a permanent StoreError for a key that some store could not hold, or that leaves the store's root."""
    encoded = key.encode("utf-8", "replace")
    parts = key.split("/")
    if not key or len(encoded) > KEY_SIZE_MAX:
        reason = f"it is {len(encoded)} bytes long; the limit is 1..{KEY_SIZE_MAX}"
    elif _BAD_CHARACTER.search(key) or encoded.decode() != key:
        reason = "it holds a control character, a backslash or half a character"
    elif "" in parts:
        reason = "it starts or ends with a slash, or has two in a row"
    elif any(part.startswith(".") for part in parts):
        reason = "a part of it starts with a dot"
    elif any(len(part.encode("utf-8", "replace")) > _PART_SIZE_MAX for part in parts):
        reason = f"a part of it is longer than {_PART_SIZE_MAX} bytes"
    else:
        return
    raise StoreError(f"object key {key[:200]!r} is refused: {reason}", permanent=True)


_MODULES = {
    "": "ranklog.stores.dir",
    "file": "ranklog.stores.dir",
    "hf": "ranklog.stores.hf",
    "s3": "ranklog.stores.objects",
    "gs": "ranklog.stores.objects",
    "az": "ranklog.stores.objects",
}
"""URL scheme -> the module whose `open_url(url, options)` makes the store; "" is a plain path."""


def url_scheme(url: str) -> str:
    """Return a store URL's scheme, "" for a plain path, without any I/O; raises UsageError if no store goes by it."""
    if not url or "\0" in url:
        raise UsageError(f"store URL {url!r} names no place; give a directory, for example /data/ranklog")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    scheme = match[1].lower() if match else ""
    if scheme not in _MODULES:
        known = ", ".join(f"{name}://" for name in _MODULES if name)
        raise UsageError(
            f"store URL {url!r}: scheme {scheme!r} is not known. Use a directory or {known} "
            f"(a directory that is really named like this: ./{url})"
        )
    return scheme


def open_store(url: str, options: StoreOptions | None = None) -> Store:
    """Return the store a URL names, see `_MODULES`; raises UsageError, and MissingExtra where its library is absent.

    Does no I/O.
    """
    module = _MODULES[url_scheme(url)]
    try:
        store: Store = importlib.import_module(module).open_url(url, options or StoreOptions())
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("ranklog"):
            raise
        raise MissingExtra(f"the store {url}", "s3" if exc.name == "obstore" else "daemon", exc.name) from exc
    return store
