"""The Hub's HTTP API, as far as buckets need it: one request at a time, each with an end.

Made with huggingface_hub's own client session, so proxies, certificates, `HF_ENDPOINT` and the login are the user's;
but with time limits and errors of ours: the library's functions sleep as long as a server asks them to, and some of
them wait for ever. Every answer that is no success becomes a StoreError of one of three classes:

    transient   408, 425, 429, 5xx, no connection, no answer, an answer that is not what the API says: try again later
    permanent   400, 413, 414, 422, if the request is about files: it will never be taken
    held        every other 4xx, and redirects: keep everything, ask slowly, a person must do something

A token is looked up for each request and never kept, so a rotated one is picked up at once. It goes to this Hub only.

Each request runs in a thread of its own: name servers, logins that refresh themselves and servers that send a header
in an hour heed no time limit, so whoever waits for them must be able to walk away.
"""

import email.utils
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import close_session, constants, get_session

from ranklog.errors import StoreError
from ranklog.stores.base import Allowance
from ranklog.version import __version__

CONNECT_S = 10.0
SILENCE_S = 30.0
"""A server that says nothing for so long is given up, whatever the deadline allows."""
ANSWER_SIZE_MAX = 64 << 20

_TRANSIENT = frozenset({408, 425, 429})
_PERMANENT = frozenset({400, 413, 414, 422})
_REMEDIES = {
    401: 'Log in with "hf auth login", or put a valid token into the token file; no restart is needed',
    402: "The account's plan or storage does not allow it",
    403: "The token may not do this: it needs write access to the bucket",
    404: "There is no such bucket, or the token may not see it",
    429: "The Hub's rate limit, which all nodes of a user share; uploads slow down by themselves",
}
_LIMIT = re.compile(r";\s*([rtqw])\s*=\s*(\d{1,12})(?!\d)")


class Refusal(StoreError):
    """The Hub answered, and not with a success."""

    def __init__(
        self,
        text: str,
        status: int,
        code: str = "",
        *,
        permanent: bool = False,
        held: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(text, permanent=permanent, held=held, retry_after_s=retry_after_s)
        self.status = status
        self.code = code
        """What the Hub calls it, for example RepoNotFound; often nothing."""


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


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Hub:
    """The API of one Hub. May be used by several threads."""

    def __init__(self, find_token: Callable[[], str | None]) -> None:
        self.endpoint: str = constants.ENDPOINT
        self.allowance: Allowance | None = None
        self.login = b""
        """Tells one login from another: a digest of the last token that was used."""
        self._find_token = find_token

    def call(
        self,
        deadline: Deadline,
        method: str,
        path: str,
        *,
        lines: list[dict[str, Any]] | None = None,
        value: Any = None,
        files: bool = False,
    ) -> tuple[Any, Mapping[str, str]]:
        """Make one request and return (JSON, headers); `lines` go as NDJSON, `value` as JSON. Raises StoreError.

        `path` may be a whole URL, as pages of a listing name the next one. `files` says that the request names files,
        so that it may be one of those that the Hub does not like.
        """
        url = self._url(path)
        what = f"{method} {url.partition('?')[0]}"
        headers = {"User-Agent": f"ranklog/{__version__}"}
        content = None
        if lines is not None:
            content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            headers["Content-Type"] = "application/x-ndjson"
        elif value is not None:
            content = json.dumps(value).encode()
            headers["Content-Type"] = "application/json"
        answer = self._exchange(deadline, what, lambda: self._send(deadline, method, url, headers, content))
        self.allowance = read_allowance(answer.headers) or self.allowance
        # A batch of which every operation failed answers 422, and says so for each path.
        if not 200 <= answer.status < 300 and not (
            answer.status == 422 and lines is not None and _tells_paths(answer.body)
        ):
            raise refusal(answer.status, answer.headers, answer.body, what, time.time(), files=files)
        try:
            return json.loads(answer.body or b"null"), answer.headers
        except (ValueError, RecursionError) as exc:
            text = (
                f"{what} answered {answer.status} with what is not JSON: {answer.body[:80]!r}. Is a proxy in the way?"
            )
            raise StoreError(text, permanent=False) from exc

    def _url(self, path: str) -> str:
        if not path.startswith(("http://", "https://")):
            return f"{self.endpoint}{path}"
        if not path.startswith(f"{self.endpoint}/"):  # The token must not go there.
            text = f"{self.endpoint} sends us to another server, {path.partition('?')[0]}: refused"
            raise StoreError(text, permanent=False, held=True)
        return path

    def _exchange(self, deadline: Deadline, what: str, send: Callable[[], _Answer]) -> _Answer:
        """Return what `send` returns or raise its StoreError, but not after the deadline, whatever it does."""
        outcome: list[_Answer | StoreError] = []

        def work() -> None:
            try:
                outcome.append(send())
            except StoreError as exc:
                outcome.append(exc)

        thread = threading.Thread(target=work, name="hub-request", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise StoreError(f"{what}: no thread to be had on this node: {exc}", permanent=False) from exc
        thread.join(deadline.left_s())
        if not outcome:
            if thread.is_alive():
                close_session()  # Its connection with it: the thread ends at its next byte. Others open a new one.
                deadline.left_s()
            raise StoreError(f"{what}: no answer within the deadline", permanent=False)
        if isinstance(outcome[0], StoreError):
            raise outcome[0]
        return outcome[0]

    def _send(
        self, deadline: Deadline, method: str, url: str, headers: dict[str, str], content: bytes | None
    ) -> _Answer:
        token = self._find_token()
        self.login = hashlib.sha256((token or "").encode()).digest()
        if token:
            headers = headers | {"Authorization": f"Bearer {token}"}
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
                        text = f"{method} {url.partition('?')[0]} answers with more than {ANSWER_SIZE_MAX} bytes"
                        raise StoreError(text, permanent=False)
                return _Answer(response.status_code, response.headers, bytes(body))
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, RuntimeError, ValueError) as exc:
            # RuntimeError: another thread closed the session meanwhile, as the library does after a lost connection.
            text = f"{method} {url.partition('?')[0]}: {type(exc).__name__} {exc}".rstrip()
            raise StoreError(f"{text}; is {self.endpoint} reachable from this node?", permanent=False) from exc


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, what: str, now_s: float, *, files: bool = False
) -> Refusal:
    """Return the error that an answer means; `files`: the request named files. Pure."""
    code = headers.get("X-Error-Code", "")[:80]
    said = _said(body)
    text = f"{what} answered {status}{f': {said}' if said else ''}"
    remedy = _REMEDIES.get(status, "")
    if status == 404 and code != "RepoNotFound":
        remedy = "Is that a Hub, and is there no proxy in the way?"
    elif 300 <= status < 400:
        remedy = f"It sends us to {headers.get('Location', 'nowhere')[:200]!r}: was the bucket renamed?"
    text += f". {remedy}" if remedy else ""
    if status in _TRANSIENT or status >= 500:
        wait_s = retry_after_s(headers, now_s)
        # A 429 always asks to slow down, even where it does not say for how long.
        return Refusal(text, status, code, retry_after_s=0.0 if wait_s is None and status == 429 else wait_s)
    permanent = files and status in _PERMANENT
    return Refusal(text, status, code, permanent=permanent, held=not permanent)


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return how long a server asks to be left alone, or None if it does not say, or nonsense. Pure."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
        except (ValueError, TypeError, IndexError, OverflowError):
            pass
    found = dict(_LIMIT.findall(headers.get("RateLimit", "")))
    return float(found["t"]) if "t" in found and int(found.get("r", 1)) == 0 else None


def read_allowance(headers: Mapping[str, str]) -> Allowance | None:
    """Return what `RateLimit: "api";r=987;t=55` and `RateLimit-Policy: …;q=1000;w=300` say, or None. Pure."""
    now, policy = (dict(_LIMIT.findall(headers.get(name, ""))) for name in ("RateLimit", "RateLimit-Policy"))
    if "r" not in now:
        return None
    whole = Allowance(int(now["r"]), float(now.get("t", 0)), int(policy.get("q", 0)))
    return whole._replace(window_s=float(policy["w"])) if int(policy.get("w", 0)) else whole


def _tells_paths(body: bytes) -> bool:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value.get("failed"))


def _said(body: bytes) -> str:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return str(value.get("error", ""))[:200] if isinstance(value, dict) else ""
