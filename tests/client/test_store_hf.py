"""The Bucket when things go wrong: the real huggingface_hub and hf_xet against the Hub on loopback.

Each case says of which class the error is, that the call ended in time, and, once the trouble is over, that the same
store object stores the same file under the same name, once and with its own bytes.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub.server import Hub
from node import ROOT, wait_for
from ranklog.errors import StoreError, UsageError
from ranklog.stores import hf
from ranklog.stores import hub as hub_api
from ranklog.stores.base import Download, ObjectInfo, Store, StoreOptions, Upload, open_store

URL = "hf://buckets/user/b/some/prefix"
PATH = "some/prefix/"
KEY = "v1/x.parquet"
DEADLINE_S = 1.5
GRACE_S = 15.0
"""What a loaded machine may add. Without a deadline the calls below take 30 s and more, most of them for ever."""
TRANSIENT, HELD, PERMANENT = "transient", "held", "permanent"
DATA = os.urandom(5000)


class Room:
    """A Hub, a token file, and files to upload."""

    def __init__(self, path: Path, hub: Hub) -> None:
        self.path = path
        self.hub = hub
        self.token_file = path / "token"
        self.login(hub.token())
        self.count = 0

    def login(self, token: str) -> None:
        """Replace the token, as a person or a service manager does."""
        new = self.path / "token.new"
        new.touch(0o600)
        new.write_text(f"{token}\n")
        new.rename(self.token_file)
        self.token = token

    def store(self, url: str = URL, **options: object) -> Store:
        fields: dict[str, object] = {"deadline_s": 60.0, "token_file": self.token_file} | options
        return open_store(url, StoreOptions(**fields))  # type: ignore[arg-type]

    def file(self, data: bytes = DATA) -> Path:
        self.count += 1
        path = self.path / f"file-{self.count}"
        path.write_bytes(data)
        return path

    def check_there(self, key: str = KEY, data: bytes = DATA, bucket: str = "user/b") -> None:
        """Check that the bucket has exactly these bytes, and that nothing else ever stood there."""
        found = self.hub.buckets.get(bucket)
        assert found is not None
        assert self.hub.read(bucket, PATH + key) == data
        assert found.writes[PATH + key] == [found.files[PATH + key].hash], "registered once, never overwritten"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.buckets.create("user/b", private=True)
        yield hub


@pytest.fixture
def room(tmp_path: Path, hub: Hub) -> Room:
    return Room(tmp_path, hub)


def kind(error: StoreError) -> str:
    return PERMANENT if error.permanent else HELD if error.held else TRANSIENT


def failing(call: Callable[[], object], token: str, *, within_s: float = GRACE_S) -> StoreError:
    """Return the error that a call raises; check that it came in time and does not show the token."""
    start_s = time.monotonic()
    with pytest.raises(StoreError) as caught:
        call()
    assert time.monotonic() - start_s < within_s, "a call outlived its deadline"
    chain: BaseException | None = caught.value
    while chain is not None:
        assert token not in f"{chain!r} {chain}"
        chain = chain.__cause__ or chain.__context__
    return caught.value


def fails_and_recovers(room: Room, route: str, **fault: object) -> StoreError:
    """Put while the fault is on, return the error; then put again, with everything in order."""
    store, upload = room.store(deadline_s=DEADLINE_S), Upload(room.file(), KEY)
    with room.hub.fault(route, **fault) as on:
        error = failing(lambda: store.put([upload]), room.token)
        assert on.struck
    store._options = StoreOptions(deadline_s=60.0, token_file=room.token_file)  # type: ignore[attr-defined]
    assert store.put([upload]) == {KEY: None}
    assert store.heads([KEY]) == {KEY: ObjectInfo(KEY, len(DATA))}
    room.check_there()
    return error


# Every status on every route.


@pytest.mark.parametrize("route", ["paths", "batch"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, PERMANENT), (413, PERMANENT), (422, PERMANENT), (401, HELD), (402, HELD), (403, HELD), (404, HELD),
        (409, HELD), (307, HELD), (408, TRANSIENT), (429, TRANSIENT), (500, TRANSIENT), (503, TRANSIENT), (504, TRANSIENT),
    ],
)  # fmt: skip
def test_a_refused_request_about_files_is_of_the_class_of_its_status(room, route, status, expected):
    assert kind(fails_and_recovers(room, route, status=status)) == expected


@pytest.mark.parametrize(("status", "expected"), [(400, HELD), (401, HELD), (403, HELD), (404, HELD), (409, HELD), (429, TRANSIENT), (500, TRANSIENT), (503, TRANSIENT)])  # fmt: skip
def test_a_refused_token_for_the_content_store_is_never_the_fault_of_a_file(room, status, expected):
    assert kind(fails_and_recovers(room, "write_token", status=status)) == expected


@pytest.mark.parametrize("route", ["grant", "commit", "shards"])
@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 503])
def test_whatever_the_content_store_refuses_is_tried_again_and_never_held_against_a_file(room, route, status):
    assert kind(fails_and_recovers(room, route, status=status)) == TRANSIENT


@pytest.mark.parametrize(
    ("headers", "low_s", "high_s"),
    [
        ({"Retry-After": "60"}, 60, 60),
        ({"Retry-After": "86400"}, 86400, 86400),
        ({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, 3000, 3600),
        ({"Retry-After": "in a while"}, 0, 0),
        ({}, 0, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55, 55),
    ],
    ids=["seconds", "a day", "date", "garbage", "nothing", "RateLimit"],
)
@pytest.mark.parametrize("route", ["paths", "write_token", "batch"])
def test_a_429_tells_how_long_to_wait_and_the_call_itself_waits_not_at_all(room, route, headers, low_s, high_s):
    error = fails_and_recovers(room, route, status=429, headers=headers)
    assert low_s <= error.retry_after_s <= high_s


def test_the_rate_limit_that_comes_with_any_answer_is_remembered(room):
    store = room.store()
    assert store.allowance is None
    body = b"[]"
    headers = {"RateLimit": '"api";r=41;t=9', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}
    with room.hub.fault("paths", status=200, body=body, headers=headers):
        store.heads([KEY])
    store.heads([KEY])
    assert store.allowance[:3] == (41, 9.0, 1000), "an answer without the headers says nothing new"


# No answer, half an answer, an answer that is none.


@pytest.mark.parametrize("route", ["paths", "write_token", "grant", "put", "commit", "shards", "batch"])
def test_a_put_that_is_never_answered_ends_at_the_deadline(room, route):
    error = fails_and_recovers(room, route, hang=True)
    assert kind(error) == TRANSIENT


@pytest.mark.parametrize("route", ["paths", "read_token", "reconstruct", "xorb"])
def test_a_get_that_is_never_answered_ends_at_the_deadline_and_leaves_nothing_behind(room, route):
    room.store().put([Upload(room.file(), KEY)])
    target = room.path / "folder" / "target"
    target.parent.mkdir()
    store = room.store(deadline_s=DEADLINE_S)
    with room.hub.fault(route, hang=True) as on:
        assert kind(failing(lambda: store.get(KEY, target), room.token)) == TRANSIENT
        assert on.struck
    assert list(target.parent.iterdir()) == []
    room.store().get(KEY, target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("call", ["heads", "list", "delete"])
def test_other_calls_that_are_never_answered_end_at_the_deadline(room, call):
    store = room.store(deadline_s=DEADLINE_S)
    calls: dict[str, Callable[[], object]] = {
        "heads": lambda: store.heads([KEY]), "list": lambda: list(store.list("")), "delete": lambda: store.delete([KEY]),
    }  # fmt: skip
    with room.hub.fault("*", hang=True):
        assert kind(failing(calls[call], room.token)) == TRANSIENT


@pytest.mark.parametrize("fault", [{"slow": True, "status": 0}, {"slow_head": True}], ids=["body", "head"])
@pytest.mark.parametrize("route", ["paths", "write_token", "batch"])
def test_an_answer_that_drips_ends_at_the_deadline_and_its_thread_soon_after(room, route, fault):
    store, upload = room.store(deadline_s=DEADLINE_S), Upload(room.file(), KEY)
    with room.hub.fault(route, **fault) as on:
        assert kind(failing(lambda: store.put([upload]), room.token)) == TRANSIENT
        assert on.struck
        # While the server still drips: else each attempt of an outage would leave a thread behind.
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "hub-request"], "no thread")
    assert room.store().put([upload]) == {KEY: None}
    room.check_there()


def test_a_hub_that_is_not_there_is_waited_for(room):
    store, upload = room.store(), Upload(room.file(), KEY)
    room.hub.stop()
    error = failing(lambda: store.put([upload]), room.token)
    assert kind(error) == TRANSIENT
    assert "reachable" in str(error)
    room.hub.start()
    assert store.put([upload]) == {KEY: None}
    room.check_there()


@pytest.mark.parametrize("route", ["paths", "write_token", "batch"])
@pytest.mark.parametrize("when", ["drop", "drop_reply"])
def test_a_connection_that_is_cut_before_or_after_the_work_is_transient_and_nothing_is_done_twice(room, route, when):
    error = fails_and_recovers(room, route, times=1, **{when: True})
    assert kind(error) == TRANSIENT


@pytest.mark.parametrize("route", ["grant", "put", "commit", "shards"])
@pytest.mark.parametrize("when", ["drop", "drop_reply"])
def test_a_cut_connection_to_the_content_store_costs_a_retry_at_most(room, route, when):
    store, upload = room.store(), Upload(room.file(), KEY)
    with room.hub.fault(route, times=1, **{when: True}) as on:
        try:
            assert store.put([upload]) == {KEY: None}
        except StoreError as error:
            assert kind(error) == TRANSIENT
            assert store.put([upload]) == {KEY: None}
        assert on.struck
    room.check_there()


NONSENSE = {
    "a proxy's page": b"<html>sign in</html>", "nothing": b"", "null": b"null", "text": b'"ok"', "a number": b"7",
    "an empty object": b"{}", "a list of numbers": b"[1, 2]", "a list of objects": b'[{"a": 1}]', "half": b'{"succ',
    "bytes": b"\xff\xfe\x00", "a bomb": b"[" * 200_000, "a failure of nothing": b'{"success": false, "failed": [{}]}',
    "a failure of another": b'{"success": false, "failed": [{"path": "other", "error": "x"}]}',
    "failures of no list": b'{"success": true, "failed": 7}', "a row of holes": b'[{"path": null, "xetHash": 1, "size": "x"}]',
}  # fmt: skip


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("route", ["paths", "write_token", "batch"])
def test_a_200_with_anything_else_in_it_is_transient_and_believed_by_nobody(room, route, body):
    error = fails_and_recovers(room, route, status=200, body=body)
    assert kind(error) == TRANSIENT


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_a_listing_of_anything_else_is_transient(room, body):
    with room.hub.fault("tree", status=200, body=body):
        assert kind(failing(lambda: list(room.store().list("")), room.token)) == TRANSIENT


def test_an_answer_without_end_is_not_read_to_its_end(room, monkeypatch):
    monkeypatch.setattr(hub_api, "ANSWER_SIZE_MAX", 10_000)
    error = fails_and_recovers(room, "paths", status=200, body=b"[" + b" " * 100_000 + b"]")
    assert kind(error) == TRANSIENT
    assert "more than 10000 bytes" in str(error)


# A batch is no transaction, a token expires, a content store forgets.


def test_of_a_batch_that_fails_in_part_only_the_failed_paths_are_sent_again(room):
    store = room.store()
    uploads = [Upload(room.file(bytes([i]) * 100), f"v1/{i}") for i in range(5)]
    with room.hub.fault("batch", fail_paths="v1/3"):
        results = store.put(uploads)
    assert {key for key, error in results.items() if error} == {"v1/3"}
    assert kind(results["v1/3"]) == TRANSIENT
    assert "injected" in str(results["v1/3"])
    assert set(store.put(uploads).values()) == {None}
    for i in range(5):
        room.check_there(f"v1/{i}", bytes([i]) * 100)


def test_a_batch_that_fails_as_a_whole_path_by_path_is_tried_again(room):
    store, upload = room.store(), Upload(room.file(), KEY)
    with room.hub.fault("batch", fail_paths=KEY):
        assert kind(store.put([upload])[KEY]) == TRANSIENT
    assert store.put([upload]) == {KEY: None}
    room.check_there()


def test_the_token_of_the_content_store_is_asked_for_once_and_again_when_it_is_refused(room):
    store = room.store()
    for i in range(3):
        assert store.put([Upload(room.file(bytes([i])), f"v1/{i}")]) == {f"v1/{i}": None}
    assert room.hub.requests["write_token"] == 1
    room.hub._xet_tokens.clear()
    error = failing(lambda: store.put([Upload(room.file(), KEY)]), room.token)
    assert kind(error) == TRANSIENT
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}
    assert room.hub.requests["write_token"] == 2


def test_a_token_of_the_content_store_that_comes_expired_is_asked_for_again(room):
    store, upload = room.store(), Upload(room.file(), KEY)
    with room.hub.fault("write_token", expired_token=True, times=1):
        assert kind(failing(lambda: store.put([upload]), room.token)) == TRANSIENT
    assert store.put([upload]) == {KEY: None}
    room.check_there()


def test_a_content_store_that_lost_everything_gets_the_bytes_again_from_a_client_that_remembers_sending_them(
    room, tmp_path
):
    store, upload = room.store(), Upload(room.file(), KEY)
    assert store.put([upload]) == {KEY: None}
    for path in (tmp_path / "hub" / "cas").iterdir():
        path.unlink()
    room.hub.buckets.remove("user/b")
    room.hub.buckets.create("user/b", private=True)
    room.hub.stop()
    room.hub.start()
    assert store.put([upload]) == {KEY: None}
    room.check_there()


def test_an_address_that_the_content_store_signed_is_not_told_to_a_log(room):
    room.store().put([Upload(room.file(), KEY)])
    xorb = "a" * 64
    plan = {
        "offset_into_first_range": 0,
        "terms": [{"hash": xorb, "unpacked_length": len(DATA), "range": {"start": 0, "end": 1}}],
        "xorbs": {xorb: [{"url": f"{room.hub.url}/gone?X-Signature=SECRET", "ranges": [{"chunks": {"start": 0, "end": 1}, "bytes": {"start": 0, "end": 99}}]}]},
    }  # fmt: skip
    with room.hub.fault("reconstruct", status=200, body=json.dumps(plan).encode()):
        error = failing(lambda: room.store().get(KEY, room.path / "target"), room.token)
    assert kind(error) == TRANSIENT
    assert "/gone" in str(error)
    assert "SECRET" not in str(error)


def test_a_file_that_changes_between_two_looks_is_not_registered(room, monkeypatch):
    store, source = room.store(), room.file()
    hash_file = store._content.hash_file

    def hash_then_change(path: Path) -> str:
        found = hash_file(path)
        path.write_bytes(b"other")
        return found

    monkeypatch.setattr(store._content, "hash_file", hash_then_change)
    assert kind(store.put([Upload(source, KEY)])[KEY]) == TRANSIENT
    assert list(store.list("")) == []


# Who is asked, and who is not.


def test_a_listing_that_goes_on_at_another_server_is_refused_and_the_token_does_not_go_there(room, tmp_path):
    with Hub(tmp_path / "thief") as thief:
        link = {"Link": f'<{thief.url}/api/buckets/user/b/tree?cursor=1>; rel="next"'}
        with room.hub.fault("tree", status=200, body=b"[]", headers=link):
            error = failing(lambda: list(room.store().list("")), room.token)
        assert kind(error) == HELD
        lookalike = {"Link": f'<{room.hub.url}@{thief.url[7:]}/api>; rel="next"'}
        with room.hub.fault("tree", status=200, body=b"[]", headers=lookalike):
            assert kind(failing(lambda: list(room.store().list("")), room.token)) == HELD
        assert not thief.requests
        assert not thief.seen_tokens


def test_a_redirect_to_another_server_is_not_followed(room, tmp_path):
    with Hub(tmp_path / "thief") as thief:
        for status in (301, 302, 307, 308):
            elsewhere = {"Location": f"{thief.url}/api/buckets/user/b/paths-info"}
            with room.hub.fault("paths", status=status, headers=elsewhere):
                error = failing(lambda: room.store().heads([KEY]), room.token)
            assert kind(error) == HELD
            assert thief.url in str(error)
        assert not thief.requests


def test_a_listing_that_goes_round_in_circles_ends(room):
    start = f"{room.hub.url}/api/buckets/user/b/tree?cursor=1"
    with room.hub.fault("tree", status=200, body=b"[]", headers={"Link": f'<{start}>; rel="next"'}):
        assert kind(failing(lambda: list(room.store().list("")), room.token)) == TRANSIENT


def test_a_listing_in_any_order_and_with_repetitions_comes_out_sorted_and_whole(room):
    names = ["z", "a", "m", "a", "b/c", "b-c"]
    rows = [f'{{"type":"file","path":"{PATH}{name}","size":1,"xetHash":"0"}}' for name in names]
    rows += ['{"type":"directory","path":"some/prefix/b"}', '{"type":"file","path":"other","size":1,"xetHash":"0"}']
    with room.hub.fault("tree", status=200, body=f"[{','.join(rows)}]".encode()):
        assert [info.key for info in room.store().list("")] == ["a", "b-c", "b/c", "m", "z"]


def test_a_listing_takes_as_many_pages_as_there_are(room, monkeypatch):
    monkeypatch.setattr(hf, "PAGE_SIZE", 3)
    store = room.store()
    store.put([Upload(room.file(b"x"), f"v1/{i}") for i in range(10)])
    assert [info.key for info in store.list("v1/")] == [f"v1/{i}" for i in range(10)]
    assert room.hub.requests["tree"] == 4


def test_more_paths_than_a_request_may_name_go_in_several(room, monkeypatch):
    monkeypatch.setattr(hf, "OPERATIONS_MAX", 4)
    store = room.store()
    uploads = [Upload(room.file(bytes([i])), f"v1/{i}") for i in range(10)]
    assert set(store.put(uploads).values()) == {None}
    assert (room.hub.requests["batch"], len(store.heads([u.key for u in uploads]))) == (3, 10)
    store.delete([u.key for u in uploads])
    assert list(store.list("")) == []


def test_the_whole_path_must_fit_and_not_the_key_alone(room):
    key = "/".join(["k" * 200] * 5)
    assert len(key) <= 1024 < len(PATH) + len(key) + 10
    store = room.store("hf://buckets/user/b/a-longer-prefix-than-fits")
    assert kind(store.put([Upload(room.file(), key)])[key]) == PERMANENT
    assert kind(failing(lambda: store.heads([key]), room.token)) == PERMANENT
    assert not room.hub.requests


@pytest.mark.parametrize("url", ["hf://buckets/a", "hf://buckets/../x", "hf://buckets/a/..", "hf://buckets/a/b/../c", "hf://buckets/a/b/c//d", "hf://datasets/a/b", "hf://buckets/a b/c", "hf://buckets//b", "hf://buckets/a/b\n"])  # fmt: skip
def test_a_url_that_is_no_bucket_is_a_usage_error(url):
    with pytest.raises(UsageError):
        open_store(url)


def test_many_threads_share_one_store_and_one_of_them_in_trouble_disturbs_no_other(room):
    store, errors = room.store(), []
    impatient = room.store(deadline_s=DEADLINE_S)

    def work(number: int) -> None:
        for i in range(3):
            key = f"v1/{number}-{i}"
            try:
                assert store.put([Upload(sources[number], key)]) == {key: None}
                assert key in {info.key for info in store.list("v1/")}
                assert list(store.fetch([Download(key, room.path / f"got-{number}-{i}")])) == [key]
            except (StoreError, AssertionError) as exc:
                errors.append(exc)

    sources = [room.file(os.urandom(3000)) for _ in range(5)]
    with room.hub.fault("paths", hang=True, naming="of-the-impatient"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        assert kind(failing(lambda: impatient.heads(["v1/of-the-impatient"]), room.token)) == TRANSIENT
        for thread in threads:
            thread.join(120)
    # The session that the impatient one closed was everybody's: whoever was in it may have to try again.
    assert all(isinstance(error, StoreError) and kind(error) == TRANSIENT for error in errors), errors
    for number, source in enumerate(sources):
        for i in range(3):
            key = f"v1/{number}-{i}"
            assert store.put([Upload(source, key)]) == {key: None}
            room.check_there(key, source.read_bytes())


FORKING = """
import os, sys
from pathlib import Path
from ranklog.stores.base import StoreOptions, Upload, open_store
store = open_store(sys.argv[1], StoreOptions(deadline_s=60, token_file=Path(sys.argv[2])))
source = Path(sys.argv[3])
assert store.put([Upload(source, "v1/before")]) == {"v1/before": None}
child = os.fork()
if not child:
    assert store.put([Upload(source, "v1/child")]) == {"v1/child": None}
    os._exit(0)
assert store.put([Upload(source, "v1/parent")]) == {"v1/parent": None}
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_store_goes_on_working_on_both_sides_of_a_fork(room):
    paths = [str(ROOT / "client"), str(ROOT / "daemon")]
    env = os.environ | {"HF_ENDPOINT": room.hub.url, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", FORKING, URL, str(room.token_file), str(room.file())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("before", "child", "parent"):
        room.check_there(f"v1/{name}")


# Tokens.


def test_a_token_that_was_replaced_in_its_file_is_used_at_once(room):
    store = room.store()
    store.put([Upload(room.file(b"1"), "v1/1")])
    old = room.token
    room.hub.revoke(old)
    error = failing(lambda: store.put([Upload(room.file(b"2"), "v1/2")]), old)
    assert kind(error) == HELD
    assert "hf auth login" in str(error)
    room.login(room.hub.token())
    assert store.put([Upload(room.file(b"2"), "v1/2")]) == {"v1/2": None}
    assert room.hub.requests["write_token"] == 2, "another login, another token for the content store"
    assert room.hub.seen_tokens == {old, room.token}


def test_the_login_of_the_hub_is_read_again_for_each_request(room, monkeypatch):
    login = Path(constants.HF_TOKEN_PATH)
    login.parent.mkdir()
    store = room.store(token_file=None)
    assert kind(failing(lambda: store.heads([KEY]), "no token yet")) == HELD
    login.write_text(room.token)
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}
    room.hub.revoke(room.token)
    assert kind(failing(lambda: store.heads([KEY]), room.token)) == HELD
    login.write_text(room.hub.token())
    assert store.heads([KEY]) == {KEY: ObjectInfo(KEY, len(DATA))}
    other = room.hub.token()
    monkeypatch.setenv("HF_TOKEN", other)
    store.heads([KEY])
    assert other in room.hub.seen_tokens


def test_a_token_that_may_only_read_is_held_with_what_it_needs(room):
    room.store().put([Upload(room.file(b"1"), "v1/1")])
    room.login(room.hub.token(write=False))
    store = room.store()
    assert [info.key for info in store.list("")] == ["v1/1"], "reading works"
    store.get("v1/1", room.path / "got")
    for call in (lambda: store.put([Upload(room.file(), KEY)]), lambda: store.delete(["v1/1"])):
        error = failing(call, room.token)
        assert kind(error) == HELD
        assert "write access" in str(error)


def test_somebody_elses_private_bucket_looks_as_if_it_were_not_there(room):
    room.login(room.hub.token("other"))
    error = failing(lambda: room.store().put([Upload(room.file(), KEY)]), room.token)
    assert kind(error) == HELD
    assert "may not see it" in str(error)


def _empty(file: Path) -> None:
    file.write_text(" \n")


def _missing(file: Path) -> None:
    file.unlink()


def _directory(file: Path) -> None:
    file.unlink()
    file.mkdir(0o700)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _for_the_group(file: Path) -> None:
    file.chmod(0o640)


def _for_everybody(file: Path) -> None:
    file.chmod(0o604)


def _two_words(file: Path) -> None:
    file.write_text(f"{file.read_text().strip()}\nX-Header: injected")


def _no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes())


BAD_FILES = {
    _empty: "is empty", _missing: "cannot be read", _directory: "is no file", _fifo: "is no file",
    _for_the_group: "chmod 600", _for_everybody: "chmod 600", _two_words: "no token", _no_text: "no token",
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "text"), BAD_FILES.items(), ids=[spoil.__name__[1:] for spoil in BAD_FILES])
def test_a_token_file_that_cannot_be_used_is_held_until_it_can_and_nothing_of_it_is_told(room, spoil, text):
    store, token = room.store(), room.token
    spoil(room.token_file)
    error = failing(lambda: store.put([Upload(room.file(), KEY)]), token)
    assert kind(error) == HELD
    assert str(room.token_file) in str(error)
    assert text in str(error)
    assert not room.hub.requests, "nobody is asked without a token where there should be one"
    if room.token_file.is_dir():
        room.token_file.rmdir()
    room.login(token)
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}


def test_a_token_shows_in_no_representation(room):
    store = room.store()
    store.put([Upload(room.file(), KEY)])
    parts = [store, store._options, store._hub, store._content, vars(store), vars(store._hub)]
    assert room.token not in " ".join(map(repr, parts))


# The bucket itself.

NEW = "hf://buckets/user/new/some/prefix"


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_a_missing_bucket_is_created_once_where_that_is_allowed(room, visibility):
    marker = room.path / "seen"
    for i in range(3):
        store = room.store(NEW, create=visibility, seen_marker=marker)
        assert store.put([Upload(room.file(bytes([i])), f"v1/{i}")]) == {f"v1/{i}": None}
    assert room.hub.requests["create"] == 1
    assert room.hub.buckets.get("user/new").private == (visibility == "private")
    assert marker.read_text() == "user/new\n"


def test_without_leave_a_missing_bucket_is_held_with_the_command_that_creates_it(room):
    for options in ({}, {"seen_marker": room.path / "seen"}, {"create": "private"}):
        store = room.store(NEW, **options)
        error = failing(lambda store=store: store.put([Upload(room.file(), KEY)]), room.token)
        assert kind(error) == HELD
        assert "hf buckets create user/new --private" in str(error)
    assert room.hub.requests["create"] == 0
    room.hub.buckets.create("user/new", private=True)
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}, "no restart is needed"


def test_a_bucket_that_vanished_is_an_alarm_and_stays_one_over_restarts_until_a_person_decides(room):
    marker = room.path / "seen"
    room.store(NEW, create="private", seen_marker=marker).put([Upload(room.file(), KEY)])
    room.hub.buckets.remove("user/new")
    for _ in range(3):
        store = room.store(NEW, create="private", seen_marker=marker)
        for call in (
            partial(store.put, [Upload(room.file(), KEY)]),
            partial(store.heads, [KEY]),
            partial(store.list, ""),
        ):
            error = failing(call, room.token)
            assert kind(error) == HELD
            assert str(marker) in str(error)
    assert room.hub.requests["create"] == 1
    marker.unlink()
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}
    assert room.hub.requests["create"] == 2


def test_a_bucket_that_was_there_from_the_start_is_not_created_when_it_vanishes(room):
    marker = room.path / "seen"
    room.store(create="private", seen_marker=marker).heads([KEY])
    room.hub.buckets.remove("user/b")
    assert kind(failing(lambda: room.store(create="private", seen_marker=marker).heads([KEY]), room.token)) == HELD
    assert room.hub.requests["create"] == 0


def test_what_was_seen_of_one_bucket_says_nothing_of_another(room):
    marker = room.path / "seen"
    room.store(create="private", seen_marker=marker).heads([KEY])
    assert room.store(NEW, create="private", seen_marker=marker).heads([KEY]) == {}
    assert marker.read_text().split() == ["user/b", "user/new"]


def test_many_daemons_that_find_the_bucket_missing_at_one_moment_all_go_on(room):
    barrier, results = threading.Barrier(6), {}
    stores = [room.store(NEW, create="private", seen_marker=room.path / f"seen-{i}") for i in range(6)]
    sources = [room.file(bytes([i])) for i in range(6)]

    def work(i: int) -> None:
        barrier.wait()
        results.update(stores[i].put([Upload(sources[i], f"v1/{i}")]))

    for i in range(6):  # Each of them asks once before the bucket is there.
        missing = {"X-Error-Code": "RepoNotFound"}
        room.hub.fault("paths", status=404, headers=missing, naming=f"v1/{i}", times=1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == dict.fromkeys((f"v1/{i}" for i in range(6)), None)
    assert room.hub.requests["create"] == 6, "five of them were told 409"


def test_a_bucket_that_may_not_be_created_is_held(room):
    room.login(room.hub.token(write=False))
    store = room.store(NEW, create="private", seen_marker=room.path / "seen")
    assert kind(failing(lambda: store.put([Upload(room.file(), KEY)]), room.token)) == HELD


@pytest.mark.parametrize("fault", [{"drop_reply": True}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "9"}}, {"hang": True}], ids=str)  # fmt: skip
def test_a_creation_that_fails_on_the_way_is_tried_again(room, fault):
    marker = room.path / "seen"
    store = room.store(NEW, create="private", seen_marker=marker, deadline_s=DEADLINE_S)
    with room.hub.fault("create", times=1, **fault):
        assert kind(failing(lambda: store.put([Upload(room.file(), KEY)]), room.token)) == TRANSIENT
    assert not marker.exists()
    store = room.store(NEW, create="private", seen_marker=marker)
    assert store.put([Upload(room.file(), KEY)]) == {KEY: None}
    assert room.hub.buckets.get("user/new").private


def test_a_404_that_is_not_about_the_bucket_creates_none(room):
    store = room.store(NEW, create="private", seen_marker=room.path / "seen")
    with room.hub.fault("paths", status=404, body=b"<html>", content_type="text/html"):
        error = failing(lambda: store.put([Upload(room.file(), KEY)]), room.token)
    assert kind(error) == HELD
    assert "proxy" in str(error)
    assert room.hub.requests["create"] == 0


def test_a_state_directory_that_cannot_be_written_to_is_told_and_creates_no_second_bucket(room):
    store = room.store(create="private", seen_marker=room.path / "no such directory" / "seen")
    error = failing(lambda: store.heads([KEY]), room.token)
    assert kind(error) == TRANSIENT
    assert "no such directory" in str(error)
