"""What can go wrong on the way to a Hub, switched on and off while it runs.

    with hub.fault("batch", status=503, times=2): …
    hub.fault("batch", drop_reply=True, times=1)        applied, and nobody is told
    hub.fault("batch", status=413, naming="run_id=a")   only requests whose body names such a path

A route's name is that of `server.ROUTES`; "*" is every route.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Fault:
    """One thing that goes wrong. Which of its fields are set says what; `times` how often (None: until ended)."""

    route: str
    status: int = 0
    """Answer with this status and do nothing."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error":"injected"}'
    content_type: str = "application/json"
    hang: bool = False
    """Read the request and say nothing until the fault ends."""
    slow: bool = False
    """Answer, one byte a second."""
    slow_head: bool = False
    """Begin to answer, and never come to the end of a header."""
    drop: bool = False
    """Close the connection before anything is done."""
    half: bool = False
    """Do everything, and close the connection in the middle of the answer."""
    drop_reply: bool = False
    """Do everything, and close the connection instead of answering."""
    fail_paths: str = ""
    """In a batch: refuse the paths that contain this, inside a 200."""
    naming: str = ""
    """Hit only requests whose body contains this."""
    expired_token: bool = False
    """Hand out a content-store token that has expired."""
    times: int | None = None
    skip: int = 0
    """Let so many requests pass before."""
    struck: int = 0
    """How often it happened."""
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let it happen no more; whoever hangs because of it goes on."""
        self.over.set()


class Faults:
    """Every fault that is switched on. Shared by the server's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Switch a fault on."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Switch everything off."""
        with self._lock:
            for fault in self._faults:
                fault.end()
            self._faults.clear()

    def strike(self, route: str, body: bytes = b"") -> Fault | None:
        """Return the fault that hits this request, and count it."""
        with self._lock:
            self._faults = [fault for fault in self._faults if not fault.over.is_set()]
            for fault in self._faults:
                if fault.route not in (route, "*") or fault.naming.encode() not in body:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.struck += 1
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                return fault
        return None
