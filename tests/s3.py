"""A server that speaks S3, in this process: one for all tests of a process, and a fresh bucket for each."""

import functools
import itertools
import json
import urllib.request
from typing import Any

from moto.server import ThreadedMotoServer

REGION = "us-east-1"
_numbers = itertools.count()


@functools.cache
def endpoint() -> str:
    """Return the URL of the server, started at the first call; it ends with this process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    return f"http://127.0.0.1:{port}"


def request(method: str, path: str, value: Any = None) -> Any:
    """Ask the server's own interface, or S3 without a signature."""
    data = None if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
    asked = urllib.request.Request(f"{endpoint()}/{path}", method=method, data=data)
    asked.add_header("Content-Type", "text/plain")
    return urllib.request.urlopen(asked, timeout=30).read()


def new_bucket() -> str:
    """Make a bucket and return its name."""
    name = f"bucket-{next(_numbers)}"
    request("PUT", name)
    return name


def environment(**more: str) -> dict[str, str]:
    """Return what a client finds its way by, as the vendor's own tools do."""
    return {
        "AWS_ENDPOINT": endpoint(), "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": REGION, **more,
    }  # fmt: skip
