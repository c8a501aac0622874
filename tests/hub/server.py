"""A Hub on loopback: enough of huggingface.co for the unmodified client, with faults that a test switches on.

    with Hub(tmp_path) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token(), "HF_HOME": fresh directory}

Bucket routes and the content-store routes live in one server. State is in the directory given: a second Hub on it, at
the same port, is the same Hub after a restart. `requests` counts by route what arrived, faults included.
"""

import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

from hub.buckets import Bucket, Buckets, File, Token, iso
from hub.cas import Cas
from hub.faults import Fault, Faults

PAGE_MAX = 5000
XET_TOKEN_S = 3600


class Answer(NamedTuple):
    """What goes back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012  Never changed.
    type: str = "application/json"


def answer_json(value: Any, status: int = 200, **headers: str) -> Answer:
    """Return an answer with a JSON body; underscores in header names stand for dashes."""
    return Answer(status, json.dumps(value).encode(), {name.replace("_", "-"): text for name, text in headers.items()})


class Refused(Exception):
    """The request ends here with this answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Request(NamedTuple):
    """One request, read to its end."""

    method: str
    parts: tuple[str, ...]
    query: dict[str, str]
    headers: Any
    body: bytes

    @property
    def range(self) -> tuple[int, int | None]:
        """The byte range asked for: first, last or None."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(match[1]), int(match[2]) if match[2] else None) if match else (0, None)


_ID = r"(?P<ns>[^/]+)/(?P<name>[^/]+)"
ROUTES: list[tuple[str, str, str]] = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("harnesses", "GET", r"/api/agent-harnesses"),
    ("create", "POST", rf"/api/buckets/{_ID}"),
    ("info", "GET", rf"/api/buckets/{_ID}"),
    ("remove", "DELETE", rf"/api/buckets/{_ID}"),
    ("write_token", "GET", rf"/api/buckets/{_ID}/xet-write-token"),
    ("read_token", "GET", rf"/api/buckets/{_ID}/xet-read-token"),
    ("batch", "POST", rf"/api/buckets/{_ID}/batch"),
    ("tree", "GET", rf"/api/buckets/{_ID}/tree(?:/(?P<path>.*))?"),
    ("paths", "POST", rf"/api/buckets/{_ID}/paths-info"),
    ("events", "GET", rf"/api/buckets/{_ID}/events"),
    ("resolve", "HEAD|GET", rf"/buckets/{_ID}/resolve/(?P<path>.*)"),
    ("bridge", "HEAD|GET", r"/bridge/(?P<content>[0-9a-f]{64})"),
    ("chunks", "GET", r"/v1/chunks/default/(?P<content>[0-9a-f]+)"),
    ("grant", "POST", r"/v1/xorb-grants/default/(?P<content>[0-9a-f]+)"),
    ("commit", "POST", r"/v1/xorb-commits/default/(?P<content>[0-9a-f]+)/grant/(?P<grant>\w+)"),
    ("put", "PUT", r"/put/(?P<content>[0-9a-f]+)"),
    ("xorbs", "POST", r"/v1/xorbs/default/(?P<content>[0-9a-f]+)"),
    ("shards", "POST", r"/v2/shards"),
    ("telemetry", "POST", r"/v1/telemetry"),
    ("reconstruct", "GET", r"/v2/reconstructions/(?P<content>[0-9a-f]{64})"),
    ("xorb", "GET", r"/xorb/(?P<content>[0-9a-f]+)"),
]
"""(name, methods, path): what this Hub answers; anything else is 404."""
API = frozenset({"whoami", "create", "info", "remove", "write_token", "read_token", "batch", "tree", "paths", "events"})
"""The routes that count against the rate limit of a user."""
_COMPILED = [(name, methods.split("|"), re.compile(path)) for name, methods, path in ROUTES]


class Hub:
    """The server. A context manager; `stop` and `start` are a restart at the same address."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.requests: Counter[str] = Counter()
        self.seen_tokens: set[str] = set()
        """Every bearer token that arrived."""
        self.arrivals: list[tuple[float, str]] = []
        """When a request was there whole (monotonic), and its route."""
        self.uplink_bytes_s = 0
        """How fast bodies of requests come in; 0: as fast as they do."""
        self.max_page = 1000
        self.faults = Faults()
        self._directory = directory
        self._xet_tokens: dict[str, tuple[bool, float]] = {}
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.load()

    def load(self) -> None:
        """Read the state again, as a restarted server does; tokens that a test issued stay."""
        tokens = self.buckets.tokens if hasattr(self, "buckets") else {}
        self.buckets = Buckets(self._directory / "buckets.jsonl")
        self.buckets.tokens = tokens
        self.cas = Cas(self._directory / "cas")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, at the port of the last time."""
        self.load()
        handler = type("Handler", (_Handler,), {"hub": self})
        server = _Server(("127.0.0.1", self._port), handler)
        self._port = server.server_address[1]
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections; those that are open are cut."""
        self.faults.clear()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None
        with self.buckets.changed:
            self.buckets.changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def token(self, user: str = "user", *, write: bool = True, valid_s: float = float("inf")) -> str:
        """Issue a bearer token. Until the first one is issued, nobody is asked for any."""
        text = f"hf_{secrets.token_hex(17)}"
        self.buckets.tokens[text] = Token(user, write, time.time() + valid_s)
        return text

    def revoke(self, token: str) -> None:
        """Make a token worth nothing."""
        self.buckets.tokens[token] = replace(self.buckets.tokens[token], expires_s=0.0)

    def fault(self, route: str, **fields: Any) -> Fault:
        """Switch a fault on."""
        assert route == "*" or route in {name for name, _, _ in ROUTES}, route
        return self.faults.add(Fault(route, **fields))

    def read(self, bucket_id: str, path: str) -> bytes:
        """Return a file's bytes, put together from what was uploaded."""
        bucket = self.buckets.get(bucket_id)
        assert bucket is not None
        return self.cas.read(bucket.files[path].hash)

    @property
    def api_calls(self) -> int:
        """Requests so far that count against the Hub's rate limit."""
        return sum(count for name, count in self.requests.items() if name in API)

    # What the handler asks.

    def route(self, request: Request, path: str) -> tuple[str, Callable[[], Answer]] | None:
        """Return the name of the route and what answers it."""
        for name, methods, pattern in _COMPILED:
            match = pattern.fullmatch(path)
            if match and request.method in methods:
                return name, lambda name=name, match=match: getattr(self, f"_{name}")(request, **match.groupdict())
        return None

    def _who(self, request: Request, bucket: Bucket | None, *, write: bool = False) -> Token:
        text = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if text:
            self.seen_tokens.add(text)
        if not self.buckets.tokens:
            return Token("user")
        token = self.buckets.tokens.get(text)
        if token is None or token.expires_s < time.time():
            if not text and bucket is not None and not bucket.private and not write:
                return Token("", write=False)
            raise Refused(answer_json({"error": "Invalid credentials"}, 401))
        if bucket is not None and bucket.id.split("/")[0] != token.user:
            if bucket.private:
                raise Refused(_not_found())
            if write:
                raise Refused(answer_json({"error": "Forbidden"}, 403))
        if write and not token.write:
            raise Refused(answer_json({"error": "this token may only read"}, 403))
        return token

    def _bucket(self, request: Request, ns: str, name: str, *, write: bool = False) -> Bucket:
        bucket = self.buckets.get(f"{ns}/{name}")
        self._who(request, bucket, write=write)
        if bucket is None:
            raise Refused(_not_found())
        return bucket

    def _whoami(self, request: Request) -> Answer:
        return answer_json({"name": self._who(request, None).user, "type": "user"})

    def _harnesses(self, request: Request) -> Answer:
        return answer_json({})

    def _create(self, request: Request, ns: str, name: str) -> Answer:
        token = self._who(request, None, write=True)
        ns = token.user if ns == "me" else ns
        if ns != token.user:
            return answer_json({"error": "Forbidden"}, 403)
        options = json.loads(request.body or b"{}")
        created = self.buckets.create(f"{ns}/{name}", private=options.get("visibility") == "private")
        told = {"url": f"{self.url}/buckets/{ns}/{name}", "name": f"{ns}/{name}", "id": f"{ns}/{name}"}
        return answer_json(told) if created else answer_json({"error": "exists", **told}, 409)

    def _info(self, request: Request, ns: str, name: str) -> Answer:
        bucket = self._bucket(request, ns, name)
        return answer_json({
            "_id": "0", "author": ns, "id": bucket.id, "private": bucket.private, "createdAt": iso(bucket.created_ms),
            "updatedAt": iso(bucket.created_ms), "size": sum(file.size for file in bucket.files.values()),
            "totalFiles": len(bucket.files), "repoType": "bucket", "cdnRegions": [],
        })  # fmt: skip

    def _remove(self, request: Request, ns: str, name: str) -> Answer:
        self.buckets.remove(self._bucket(request, ns, name, write=True).id)
        return Answer(200)

    def _write_token(self, request: Request, ns: str, name: str) -> Answer:
        self._bucket(request, ns, name, write=True)
        return self._xet_token(write=True)

    def _read_token(self, request: Request, ns: str, name: str) -> Answer:
        self._bucket(request, ns, name)
        return self._xet_token(write=False)

    def _xet_token(self, *, write: bool, valid_s: float = XET_TOKEN_S) -> Answer:
        text, expires_s = f"xet_{secrets.token_hex(12)}", time.time() + valid_s
        self._xet_tokens[text] = (write, expires_s)
        told = {"casUrl": self.url, "exp": int(expires_s), "accessToken": text}
        headers = {"X-Xet-Cas-Url": self.url, "X-Xet-Access-Token": text, "X-Xet-Token-Expiration": str(int(expires_s))}
        return Answer(200, json.dumps(told).encode(), headers)

    def expired_token(self) -> Answer:
        """Answer with a content-store token that is over already."""
        return self._xet_token(write=True, valid_s=-10)

    def _batch(self, request: Request, ns: str, name: str, fail_paths: str = "") -> Answer:
        bucket = self._bucket(request, ns, name, write=True)
        operations = [json.loads(line) for line in request.body.splitlines() if line]
        failed = []
        for operation in operations:
            error = self._apply(bucket, operation, fail_paths)
            if error:
                failed.append({"path": operation["path"], "error": error})
        done = len(operations) - len(failed)
        told = {"success": not failed, "processed": len(operations), "succeeded": done, "failed": failed}
        return answer_json(told, 422 if failed and not done else 200)

    def _apply(self, bucket: Bucket, operation: dict[str, Any], fail_paths: str) -> str:
        path = operation["path"]
        if fail_paths and fail_paths in path:
            return "injected"
        if re.search(r"^/|/$|//|(^|/)\.\.?(/|$)|\\|\0", path):
            return "invalid path"
        if operation["type"] == "deleteFile":
            self.buckets.delete(bucket.id, path)
            return ""
        size = self.cas.size(operation["xetHash"])
        if size is None:
            return "unknown content"
        self.buckets.add(bucket.id, path, operation["xetHash"], size, operation["mtime"])
        return ""

    def _tree(self, request: Request, ns: str, name: str, path: str | None) -> Answer:
        bucket = self._bucket(request, ns, name)
        limit = min(int(request.query.get("limit", self.max_page)), PAGE_MAX)
        after = request.query.get("cursor", "")
        prefix = unquote(path or "")
        entries: Iterator[Any] = self.buckets.files(bucket.id, prefix)
        if request.query.get("recursive", "true").lower() == "false":
            entries = _folders(entries, prefix)
        found = [entry for entry in entries if (entry if isinstance(entry, str) else entry.path) > after]
        page = found[:limit]
        headers = {}
        if len(found) > limit:
            last = page[-1] if isinstance(page[-1], str) else page[-1].path
            kept = f"&recursive={request.query['recursive']}" if "recursive" in request.query else ""
            where = f"{self.url}/api/buckets/{ns}/{name}/tree{'/' + path if path else ''}"
            headers["Link"] = f'<{where}?limit={limit}&cursor={_quoted(last)}{kept}>; rel="next"'
        return Answer(200, json.dumps([_entry(entry) for entry in page]).encode(), headers)

    def _paths(self, request: Request, ns: str, name: str) -> Answer:
        bucket = self._bucket(request, ns, name)
        paths = json.loads(request.body)["paths"]
        return answer_json([_entry(bucket.files[path]) for path in paths if path in bucket.files])

    def _resolve(self, request: Request, ns: str, name: str, path: str) -> Answer:
        bucket = self._bucket(request, ns, name)
        file = bucket.files.get(unquote(path))
        if file is None:
            return answer_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        token = f"{self.url}/api/buckets/{bucket.id}/xet-read-token"
        headers = {  # Another host name, as the CDN has: the client follows no redirect away from the Hub.
            "Location": f"http://localhost:{self._port}/bridge/{file.hash}", "X-Xet-Hash": file.hash, "X-Linked-Size": str(file.size),
            "ETag": f'"{file.hash}"', "Link": f'<{token}>; rel="xet-auth"',
        }  # fmt: skip
        if "xet-fileinfo" in request.headers.get("Accept", ""):
            return Answer(200, json.dumps({"hash": file.hash, "size": file.size}).encode(), headers)
        return Answer(302, b"", headers)

    def _bridge(self, request: Request, content: str) -> Answer:
        if self.cas.size(content) is None:
            return Answer(404)
        data = self.cas.read(content)
        if "Range" not in request.headers:
            return Answer(200, data, {"Accept-Ranges": "bytes"}, "application/octet-stream")
        first, last = request.range
        return _part(data, first, last)

    # The content store.

    def _require_xet(self, request: Request, *, write: bool) -> None:
        text = request.headers.get("Authorization", "").removeprefix("Bearer ")
        may_write, expires_s = self._xet_tokens.get(text, (False, 0.0))
        if expires_s < time.time() or (write and not may_write):
            raise Refused(answer_json({"error": "xet token"}, 401))

    def _chunks(self, request: Request, content: str) -> Answer:
        self._require_xet(request, write=False)
        return Answer(404)

    def _grant(self, request: Request, content: str) -> Answer:
        self._require_xet(request, write=True)
        if self.cas.has_xorb(content):
            return answer_json({})
        told = {"id": secrets.token_hex(8), "method": "PUT", "url": f"{self.url}/put/{content}", "headers": {}}
        return answer_json(told, 201)

    def _put(self, request: Request, content: str) -> Answer:
        self.cas.put_xorb(content, request.body)
        return Answer(200)

    def _xorbs(self, request: Request, content: str) -> Answer:
        self._require_xet(request, write=True)
        self.cas.put_xorb(content, request.body)
        return answer_json({"was_inserted": True})

    def _commit(self, request: Request, content: str, grant: str) -> Answer:
        self._require_xet(request, write=True)
        return answer_json({}) if self.cas.has_xorb(content) else Answer(404)

    def _shards(self, request: Request) -> Answer:
        self._require_xet(request, write=True)
        error = self.cas.put_shard(request.body)
        result = {"type": "error", "message": error, "retryable": False} if error else {"type": "result", "result": 1}
        lines = [{"type": "committing", "stage": "uploading"}, result]
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return Answer(200, body, {}, "application/x-ndjson")

    def _telemetry(self, request: Request) -> Answer:
        return answer_json({})

    def _reconstruct(self, request: Request, content: str) -> Answer:
        self._require_xet(request, write=False)
        first, last = request.range
        plan = self.cas.reconstruction(content, self.url, first, last)
        return Answer(416) if plan is None else answer_json(plan)

    def _xorb(self, request: Request, content: str) -> Answer:
        if not self.cas.has_xorb(content):
            return Answer(404)
        first, last = request.range
        data = self.cas.xorb_range(content, first, last + 1 if last is not None else 1 << 40)
        return Answer(
            206, data, {"Content-Range": f"bytes {first}-{first + len(data) - 1}/*"}, "application/octet-stream"
        )


def _not_found() -> Answer:
    return answer_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")


def _part(data: bytes, first: int, last: int | None) -> Answer:
    stop = len(data) if last is None else min(last + 1, len(data))
    if first >= len(data):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    where = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}", "Accept-Ranges": "bytes"}
    return Answer(206, data[first:stop], where, "application/octet-stream")


def _folders(files: Iterator[File], prefix: str) -> Iterator[File | str]:
    """Yield what stands directly in a folder: files, and each folder below it once."""
    base = f"{prefix.rstrip('/')}/" if prefix else ""
    told = set()
    for file in files:
        if not file.path.startswith(base):
            continue
        head, slash, _ = file.path[len(base) :].partition("/")
        if not slash:
            yield file
        elif base + head not in told:
            told.add(base + head)
            yield base + head


def _entry(entry: File | str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"type": "directory", "path": entry, "uploadedAt": iso(0)}
    times = {"mtime": iso(entry.mtime_ms), "uploadedAt": iso(entry.uploaded_ms)}
    return {"type": "file", "path": entry.path, "size": entry.size, "xetHash": entry.hash, **times}


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[Any] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what is tested here."""

    def cut(self) -> None:
        """Close every open connection."""
        for request in list(self._open):
            self.shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Be quiet: `requests` counts what came."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self._read_body()
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        request = Request(self.command, tuple(parts.path.split("/")), query, self.headers, body)
        found = self.hub.route(request, parts.path)
        if found is None:
            self.hub.requests["unknown"] += 1
            self._send(Answer(404, b'{"error":"no such route"}'))
            return
        name, work = found
        self.hub.requests[name] += 1
        self.hub.arrivals.append((time.monotonic(), name))
        fault = self.hub.faults.strike(name, body)
        if fault is not None and not self._go_on(fault):
            return
        try:
            if fault is not None and fault.expired_token and name == "write_token":
                answer = self.hub.expired_token()
            elif name == "events":
                self._events(request, **self._event_names(parts.path))
                return
            elif fault is not None and fault.fail_paths and name == "batch":
                answer = self.hub._batch(request, *parts.path.split("/")[3:5], fail_paths=fault.fail_paths)
            else:
                answer = work()
        except Refused as refused:
            answer = refused.answer
        if fault is not None and fault.drop_reply:
            self._cut()
        else:
            self._send(answer, slow=fault is not None and fault.slow, half=fault is not None and fault.half)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self._read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        """Read a body or a chunk of it, at the speed of the uplink."""
        parts, pause = [], threading.Event()
        while size > 0 and (rate := self.hub.uplink_bytes_s):
            part = self.rfile.read(min(size, max(1, rate // 10)))
            if not part:
                break
            parts.append(part)
            size -= len(part)
            pause.wait(len(part) / rate)
        return b"".join([*parts, self.rfile.read(size)])

    def _go_on(self, fault: Fault) -> bool:
        if fault.hang:
            fault.over.wait()
            self._cut()
            return False
        if fault.slow_head:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not fault.over.wait(0.1):
                self.wfile.write(b"x")
            self._cut()
            return False
        if fault.drop:
            self._cut()
            return False
        if fault.status:
            self._send(Answer(fault.status, fault.body, dict(fault.headers), fault.content_type))
            return False
        return True

    def _cut(self) -> None:
        self.close_connection = True
        self.server.shutdown_request(self.connection)

    def _send(self, answer: Answer, *, slow: bool = False, half: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if half:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self._cut()
            return
        if not slow:
            self.wfile.write(answer.body)
            return
        pause = threading.Event()
        for byte in answer.body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            pause.wait(1.0)

    @staticmethod
    def _event_names(path: str) -> dict[str, str]:
        _, _, _, ns, name, _ = path.split("/")
        return {"ns": ns, "name": name}

    def _events(self, request: Request, ns: str, name: str) -> None:
        """The feed of changes, for as long as somebody listens."""
        bucket = self.hub._bucket(request, ns, name)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        position = int(request.query.get("cursor", len(bucket.changes)))
        self._event("ready", {"cursor": str(position)})
        while self.hub.running:
            with self.hub.buckets.changed:
                if position == len(bucket.changes):
                    self.hub.buckets.changed.wait(1.0)
                news, position = bucket.changes[position:], len(bucket.changes)
            if news:
                self._event("changes", {"cursor": str(position), "changes": news})
            else:
                self.wfile.write(b": ping\n\n")
                self.wfile.flush()

    def _event(self, kind: str, value: Any) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()
