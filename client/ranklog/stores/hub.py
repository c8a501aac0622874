"""The Hub's HTTP API, as far as buckets need it: one request at a time, each with an end.

Made with huggingface_hub's own client session, so proxies, certificates, `HF_ENDPOINT` and the login are the user's;
but with time limits and errors of ours: the library's functions sleep as long as a server asks them to, and some of
them wait for ever. Every answer that is no success becomes a StoreError of one of three classes:

    transient   408, 429, 5xx, no connection, no answer, an answer that is not what the API says: try again later
    held        401, 403, 404, 409, a redirect: keep everything, ask slowly, a person must do something
    permanent   400, 413, 422 and the rest of 4xx: this request will never be taken

A token is looked up for each request and never kept, so a rotated one is picked up at once.
"""

import email.utils
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # Documented, not in its __all__.

from ranklog.errors import StoreError
from ranklog.stores.base import Allowance
from ranklog.version import __version__

CONNECT_S = 10.0
SILENCE_S = 30.0
"""A server that says nothing for so long is given up, whatever the deadline allows."""
ANSWER_SIZE_MAX = 64 << 20

_TRANSIENT = frozenset({408, 425, 429})
_HELD = frozenset({401, 403, 404, 409, 410, 423, 451})
_LIMIT = re.compile(r";\s*([rtqw])\s*=\s*(\d+)")


class Deadline:
    """When a call must be over, however many requests it takes."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._end_s = clock() + limit_s

    def left_s(self) -> float:
        """Return the seconds that are left; raises a transient StoreError if there are none."""
        left_s = self._end_s - self._clock()
        if left_s <= 0:
            raise StoreError(f"no answer within {self._limit_s:g} s (upload_deadline)", permanent=False)
        return left_s


class Hub:
    """The API of one Hub. May be used by several threads."""

    def __init__(self, find_token: Callable[[], str | None]) -> None:
        self.endpoint: str = constants.ENDPOINT
        self.allowance: Allowance | None = None
        self._find_token = find_token

    def headers(self) -> dict[str, str]:
        """Return the headers that say who asks, with the token of this moment."""
        token = self._find_token()
        headers: dict[str, str] = build_hf_headers(
            token=token or False, library_name="ranklog", library_version=__version__
        )
        return headers

    def call(
        self,
        deadline: Deadline,
        method: str,
        path: str,
        *,
        lines: list[dict[str, Any]] | None = None,
        value: Any = None,
    ) -> tuple[Any, Mapping[str, str]]:
        """Make one request and return (JSON, headers); `lines` go as NDJSON, `value` as JSON. Raises StoreError.

        `path` may be a whole URL, as pages of a listing name the next one.
        """
        url = path if path.startswith(("http://", "https://")) else f"{self.endpoint}{path}"
        headers = self.headers()
        content = None
        if lines is not None:
            content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            headers["Content-Type"] = "application/x-ndjson"
        elif value is not None:
            content = json.dumps(value).encode()
            headers["Content-Type"] = "application/json"
        status, answer_headers, body = self._exchange(deadline, method, url, headers, content)
        self._note_allowance(answer_headers)
        if status == 422 and lines is not None:
            status = 200  # Every operation failed: the body says so for each path.
        if status != 200:
            raise refusal(status, answer_headers, body, f"{method} {_short(url)}", time.time())
        try:
            return json.loads(body or b"null"), answer_headers
        except ValueError as exc:
            text = f"{method} {_short(url)} answered 200 with what is not JSON: {body[:80]!r}. Is a proxy in the way?"
            raise StoreError(text, permanent=False) from exc

    def _exchange(
        self, deadline: Deadline, method: str, url: str, headers: dict[str, str], content: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send and read to the end, however slowly it comes, but not beyond the deadline."""
        left_s = deadline.left_s()
        timeout = httpx2.Timeout(min(SILENCE_S, left_s), connect=min(CONNECT_S, left_s))
        body = bytearray()
        try:
            with get_session().stream(
                method, url, headers=headers, content=content, timeout=timeout, follow_redirects=False
            ) as response:
                for part in response.iter_bytes():
                    body += part
                    deadline.left_s()
                    if len(body) > ANSWER_SIZE_MAX:
                        raise StoreError(
                            f"{_short(url)} answers with more than {ANSWER_SIZE_MAX} bytes", permanent=False
                        )
                return response.status_code, response.headers, bytes(body)
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, RuntimeError) as exc:
            # RuntimeError: another thread closed the session meanwhile, as the library does after a lost connection.
            text = f"{method} {_short(url)}: {type(exc).__name__} {exc}".rstrip()
            raise StoreError(f"{text}; is {self.endpoint} reachable from this node?", permanent=False) from exc

    def _note_allowance(self, headers: Mapping[str, str]) -> None:
        found = read_allowance(headers)
        self.allowance = found or self.allowance


def refusal(status: int, headers: Mapping[str, str], body: bytes, what: str, now_s: float) -> StoreError:
    """Return the error that an answer means. Pure."""
    said = _said(body)
    text = f"{what} answered {status}{f': {said}' if said else ''}"
    if status == 401:
        text += '. Log in with "hf auth login", or put a valid token into the token file; no restart is needed'
    elif status == 403:
        text += ". The token may not do this: it needs write access to the bucket"
    elif status == 404:
        text += ". There is no such bucket, or the token may not see it"
    elif status == 429:
        text += ". The Hub's rate limit, which all nodes of a user share; uploads slow down by themselves"
    if status in _TRANSIENT or status >= 500:
        wait_s = retry_after_s(headers, now_s)
        # A 429 always asks to slow down, even where it does not say for how long.
        return StoreError(text, permanent=False, retry_after_s=0.0 if wait_s is None and status == 429 else wait_s)
    held = status in _HELD or 300 <= status < 400
    return StoreError(text, permanent=not held, held=held)


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return how long a server asks to be left alone, or None if it does not say, or nonsense. Pure."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
        except (ValueError, OverflowError):
            pass
    found = dict(_LIMIT.findall(headers.get("RateLimit", "")))
    return float(found["t"]) if found.get("r") == "0" and "t" in found else None


def read_allowance(headers: Mapping[str, str]) -> Allowance | None:
    """Return what `RateLimit: "api";r=987;t=55` and `RateLimit-Policy: …;q=1000;w=300` say, or None. Pure."""
    now, policy = (dict(_LIMIT.findall(headers.get(name, ""))) for name in ("RateLimit", "RateLimit-Policy"))
    if "r" not in now:
        return None
    whole = Allowance(int(now["r"]), float(now.get("t", 0)), int(policy.get("q", 0)))
    return whole._replace(window_s=float(policy["w"])) if int(policy.get("w", 0)) else whole


def _said(body: bytes) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    return str(value.get("error", ""))[:200] if isinstance(value, dict) else ""


def _short(url: str) -> str:
    return url.partition("?")[0]
