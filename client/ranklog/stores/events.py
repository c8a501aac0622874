"""A bucket's feed of changes: server-sent events of the Hub, `GET /api/buckets/<bucket>/events`.

    event: ready        {"cursor"}              from here on everything is told
    event: changes      {"cursor", "changes"}   each: path, op (add, update, delete), size
    event: reconnect    {"cursor"}              the server wants the connection back; go on at the cursor
    event: reset        {"reason"}              something may be left out: list again
    : ping              every 30 s

A connection that says nothing for `SILENCE_S` is dead, whatever TCP thinks of it.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2
from huggingface_hub import get_session

from ranklog.errors import StoreError
from ranklog.stores.base import Change, Changes
from ranklog.stores.hub import CONNECT_S, refusal
from ranklog.version import __version__

FindToken = Callable[[], str | None]

SILENCE_S = 75.0
"""Two pings and a half."""
RECONNECTS_MAX = 3
"""A server that only ever asks to come again is no feed."""


class Event(NamedTuple):
    """One event; a comment, which is how servers say that they are still there, has the kind `ping`."""

    kind: str
    value: dict[str, Any]


def watch(feed: str, find_token: FindToken, base: str) -> Generator[Changes, None, None]:
    """Yield what the feed at this URL tells of paths below `base` (empty or ending in a slash); see `Watched.watch`."""
    cursor, ready, reconnects = "", False, 0
    while reconnects <= RECONNECTS_MAX:
        reconnects += 1
        url = f"{feed}?cursor={quote(cursor, safe='')}" if cursor else feed
        for event in parse_events(_lines(url, find_token())):
            if event.kind == "reset":
                return
            if event.kind == "reconnect":
                cursor = str(event.value.get("cursor", "")) or cursor
                break
            if event.kind == "ready" and not ready:
                ready = True
                yield []
            elif event.kind == "changes":
                reconnects = 0
                yield _changes(event.value, base)
            elif event.kind == "ping" and ready:
                reconnects = 0
                yield []
            cursor = str(event.value.get("cursor", "")) or cursor
        else:
            return  # Cut off: where it was is not sure.
        if not cursor:
            return


def _lines(url: str, token: str | None) -> Iterator[str]:
    """Yield the lines of a feed as they come, until the server ends it; raises StoreError where it breaks off."""
    headers = {"User-Agent": f"ranklog/{__version__}", "Accept": "text/event-stream"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    what = f"GET {url.partition('?')[0]}"
    timeout = httpx2.Timeout(SILENCE_S, connect=CONNECT_S)
    try:
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, response.headers, b"", what, time.time())
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise StoreError(f"{what} answered with what is no feed", permanent=False)
            yield from response.iter_lines()
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as exc:
        # RuntimeError: the session was closed meanwhile, as happens after a lost connection.
        raise StoreError(f"{what}: {type(exc).__name__} {exc}".rstrip(), permanent=False) from exc


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of a stream's lines; raises a transient StoreError for data that is not JSON. Pure."""
    kind, data = "", ""
    for line in lines:
        if line.startswith(":"):
            yield Event("ping", {})
        elif line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()
        elif not line:
            if kind:
                yield Event(kind, _object(data))
            kind, data = "", ""


def _object(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StoreError(f"the feed of changes says what is no JSON object: {data[:80]!r}", permanent=False)
    return value


def _changes(value: dict[str, Any], base: str) -> Changes:
    try:
        return [
            Change(str(row["path"]).removeprefix(base), int(row.get("size") or 0), row["op"] == "delete")
            for row in value["changes"]
            if str(row["path"]).startswith(base)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise StoreError(f"the feed of changes tells what is no change: {exc!r}", permanent=False) from exc
