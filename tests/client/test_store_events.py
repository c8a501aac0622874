"""The feed of a bucket: what its lines mean, and how it goes on or ends. A scripted server says what a Hub may say."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ranklog.errors import StoreError
from ranklog.stores import events
from ranklog.stores.base import Change
from ranklog.stores.events import Event, parse_events, watch

READY = ("ready", {"cursor": "7"})
ADD = {"path": "job/v1/a.parquet", "op": "add", "size": 3, "xetHash": "0", "uploadedAt": "", "mtime": ""}
DELETE = {"path": "job/v1/b.parquet", "op": "delete"}
OTHER = {"path": "jobs/v1/c.parquet", "op": "add", "size": 1}


def changes(cursor, *rows):
    return ("changes", {"cursor": cursor, "changes": list(rows)})


@contextmanager
def server(*connections, status=200, content_type="text/event-stream", stay=False):
    """Serve each connection its events, then close; `stay`: say nothing more instead. Yields (URL, requests)."""
    seen, over = [], threading.Event()
    scripts = iter(connections)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path.partition("?")[2], self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            for part in next(scripts, []):
                text = part if isinstance(part, str) else f"event: {part[0]}\ndata: {json.dumps(part[1])}\n\n"
                self.wfile.write(text.encode())
            self.wfile.flush()
            if stay:
                over.wait(60)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/events", seen
    finally:
        over.set()
        http.shutdown()
        http.server_close()


def told(url, token="hf_x"):
    return list(watch(url, lambda: token, "job/"))


def test_changes_below_the_prefix_are_told_with_its_keys():
    with server([READY, changes("8", ADD, OTHER, DELETE)]) as (url, seen):
        assert told(url) == [[], [Change("v1/a.parquet", 3, False), Change("v1/b.parquet", 0, True)]]
        assert seen == [("", "Bearer hf_x")]


def test_without_a_login_no_token_is_sent():
    with server([READY]) as (url, seen):
        assert told(url, None) == [[]]
        assert seen == [("", None)]


def test_a_ping_is_told_as_no_change():
    with server([READY, ": ping\n\n", ":\n"]) as (url, _):
        assert told(url) == [[], [], []]


def test_the_feed_goes_on_at_its_cursor_when_the_server_wants_the_connection_back():
    with server([READY, changes("8/a", ADD), ("reconnect", {"cursor": "8/a"})], [READY, changes("9", DELETE)]) as (
        url,
        seen,
    ):
        assert told(url) == [[], [Change("v1/a.parquet", 3, False)], [Change("v1/b.parquet", 0, True)]]
        assert [query for query, _ in seen] == ["", "cursor=8%2Fa"]


def test_a_server_that_only_wants_the_connection_back_is_given_up():
    with server(*[[("reconnect", {"cursor": "1"})]] * 50) as (url, seen):
        assert told(url) == []
        assert len(seen) == 4


@pytest.mark.parametrize("last", [("reset", {"reason": "too old"}), ("reconnect", {})], ids=["reset", "no cursor"])
def test_the_feed_ends_where_something_may_be_left_out(last):
    with server([("ready", {}), last, changes("9", ADD)], [READY]) as (url, seen):
        assert told(url) == [[]]
        assert len(seen) == 1


@pytest.mark.parametrize(
    "cut",
    [
        "event: changes\ndata: {\n\n",
        "event: changes\ndata: [1]\n\n",
        'event: changes\ndata: {"changes": 5}\n\n',
        'event: changes\ndata: {"changes": [{"op": "add"}]}\n\n',
    ],
)
def test_what_is_no_change_is_passing_trouble(cut):
    with server([READY, cut]) as (url, _):
        with pytest.raises(StoreError, match="feed of changes") as caught:
            told(url)
        assert not caught.value.permanent


def test_a_connection_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(events, "SILENCE_S", 0.2)
    with server([READY], stay=True) as (url, _), pytest.raises(StoreError, match="Timeout"):
        told(url)


def test_what_is_no_feed_is_said():
    with server([], content_type="text/html") as (url, _), pytest.raises(StoreError, match="no feed"):
        told(url)


@pytest.mark.parametrize(("status", "held"), [(404, True), (401, True), (429, False), (503, False)])
def test_a_server_that_has_none_or_refuses_is_an_error_of_the_usual_kind(status, held):
    with server([], status=status) as (url, _), pytest.raises(StoreError, match=f"answered {status}") as caught:
        told(url)
    assert caught.value.held is held


def test_nobody_there_is_passing_trouble():
    with server() as (url, _):
        pass
    with pytest.raises(StoreError) as caught:
        told(url)
    assert (caught.value.permanent, caught.value.held) == (False, False)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        (["data: {}", ""], []),
        (["event: x", ""], [Event("x", {})]),
        (["event:x", 'data:{"a":', "data: 1}", "", "id: 5", ""], [Event("x", {"a": 1})]),
        (["event: x", "data: {}"], []),
    ],
)
def test_lines_become_events(lines, expected):
    assert list(parse_events(lines)) == expected
