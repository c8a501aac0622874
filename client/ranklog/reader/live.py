"""Following a store for hours: by its feed of changes where it has one, else by looking again and again.

A feed that breaks off, ends, says nothing or wants a new listing is given up: a listing then finds what it may not
have told, and after a while the feed is tried again. What was shown is known by lsn (`ranklog.reader.follow`), so
neither way shows a row twice, and every change of the way begins with a listing, so none is missed.

Looks at a store over a network become rarer while nothing comes, and are never so many that a large listing eats up
the requests that a user's daemons need. Trouble that passes is told once and waited out, as long as the server asks;
what a person must mend, such as a login, ends it.
"""

import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import pyarrow as pa

from ranklog.errors import StoreError
from ranklog.reader.follow import Follower
from ranklog.reader.local import in_place
from ranklog.stores import Store
from ranklog.stores.base import Watched

IDLE_MAX_S = 60.0
"""Between two looks at a store where nothing happens."""
REQUEST_S = 5.0
"""Pause for each request of a look: 60 in 5 minutes, of the 1,000 that a user of the free plan has for everything."""
PAGE_SIZE = 1000
TROUBLE_MAX_S = 300.0
COOLDOWN_MAX_S = 3600.0
"""A server that asks for a longer pause is asked after this one."""
RELIST_S = 600.0
"""A feed is not trusted for longer than this without a listing."""
LIVED_S = 60.0
"""A feed that lasted so long was a good one; the next may begin at once."""

Pause = Callable[[float], object]


def follow(
    store: Store,
    follower: Follower,
    interval_s: float,
    *,
    pause: Pause | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[pa.Table]:
    """Yield the rows of new shards as they arrive, for ever; raises StoreError for what waiting cannot mend."""
    pause = pause or threading.Event().wait  # Unlike time.sleep, returns at once when a signal's handler raises.
    network = in_place(store) is None
    idle = failures = feed_failures = 0
    feed_from_s = clock()
    while True:
        if isinstance(store, Watched) and clock() >= feed_from_s:
            begun_s = clock()
            wait_s = yield from _listen(store, follower, clock)
            feed_failures = 0 if clock() - begun_s > LIVED_S else feed_failures + 1
            feed_from_s = clock() + max(wait_s, pause_s(interval_s, network=True, failures=feed_failures))
        try:
            fresh = follower.fresh()
            trouble = follower.trouble
        except StoreError as exc:
            fresh, trouble = None, exc
        if fresh is not None:
            yield fresh
        if trouble is not None and (trouble.permanent or trouble.held):
            raise trouble
        if trouble is not None and not failures:
            sys.stderr.write(f"ranklog: {' '.join(str(trouble).split())}; trying again\n")
        elif trouble is None and failures:
            sys.stderr.write("ranklog: the store answers again\n")
        failures = failures + 1 if trouble is not None else 0
        idle = 0 if fresh is not None else idle + 1
        asked_s = (trouble.retry_after_s or 0.0) if trouble is not None else 0.0
        wait_s = pause_s(interval_s, network=network, idle=idle, objects=follower.objects, failures=failures)
        pause(max(wait_s, min(asked_s, COOLDOWN_MAX_S) * random.uniform(1.0, 1.2)))  # noqa: S311  Not all at once.


def _listen(store: Watched, follower: Follower, clock: Callable[[], float]) -> Generator[pa.Table, None, float]:
    """Yield what the feed brings, until it ends; return how long it asked to be left alone."""
    listed_s: float | None = None
    try:
        with closing(store.watch()) as feed:
            for changes in feed:
                if listed_s is None or clock() - listed_s > RELIST_S:
                    follower.deafen()
                    follower.listen()
                    listed_s = clock()
                follower.apply(changes)
                fresh = follower.fresh()
                if fresh is not None:
                    yield fresh
                if follower.trouble is not None:
                    return 0.0  # Shards are told and not to be had: look in the slower way, which says why.
    except StoreError as exc:
        return min(exc.retry_after_s or 0.0, COOLDOWN_MAX_S)
    finally:
        follower.deafen()
    return 0.0


def pause_s(interval_s: float, *, network: bool, idle: int = 0, objects: int = 0, failures: int = 0) -> float:
    """Return how long to wait before the next look. Pure.

    `idle` looks brought nothing, the last one listed so many `objects`, and so many `failures` came one upon another.
    """
    if not network and not failures:
        return interval_s
    if failures:
        return min(max(interval_s, 1.0) * 2.0 ** min(failures, 30), max(interval_s, TROUBLE_MAX_S))
    requests = 1 + objects // PAGE_SIZE
    return max(min(interval_s * 2.0 ** min(idle, 30), IDLE_MAX_S), requests * REQUEST_S, interval_s)
