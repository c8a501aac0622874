"""The loopback Hub answers the real client: what is uploaded is read back, byte for byte, by every way of reading."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy
import pytest

from hub.server import Hub

CLIENT = """
import sys
from pathlib import Path
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
api, here = huggingface_hub.HfApi(), Path(".")
def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except HfHubHTTPError as exc:
        return exc.response.status_code
exec(sys.argv[1])
"""

CONTENTS = {
    "random": Random(1).randbytes(300_000),
    "repeated": b"abcd" * 100_000,
    "doubles": numpy.arange(200_000, dtype="f8").tobytes(),
    "small": b"hello",
    "empty": b"",
}


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        yield hub


def client(hub: Hub, path: Path, code: str, token: str = "", home: str = "home") -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(path / home), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0",
    }  # fmt: skip
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run([sys.executable, "-c", CLIENT, code], env=env, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_files_of_every_kind_come_back_by_download_by_filesystem_and_by_range(hub, tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    token = hub.token()
    client(hub, tmp_path, f"""
api.create_bucket("user/b", private=True)
names = {list(CONTENTS)!r}
api.batch_bucket_files("user/b", add=[(name, f"x/{{name}}") for name in names])
api.download_bucket_files("user/b", [(f"x/{{name}}", f"got/{{name}}") for name in names])
fs = huggingface_hub.HfFileSystem()
for name in names:
    assert fs.cat_file(f"buckets/user/b/x/{{name}}") == Path(name).read_bytes(), name
assert fs.cat_file("buckets/user/b/x/random", start=70_000, end=200_001) == Path("random").read_bytes()[70_000:200_001]
""", token)  # fmt: skip
    for name, content in CONTENTS.items():
        assert (tmp_path / "got" / name).read_bytes() == content, name
        assert hub.read("user/b", f"x/{name}") == content, name
    assert hub.seen_tokens == {token}


def test_listings_come_in_pages_and_by_plain_prefix(hub, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    hub.max_page = 3
    code = """
api.create_bucket("user/b")
api.batch_bucket_files("user/b", add=[("f", f"logs{i % 2}/{i}") for i in range(10)])
print([len(list(api.list_bucket_tree("user/b", prefix=prefix, recursive=True))) for prefix in ("", "logs", "logs1/")])
"""
    assert client(hub, tmp_path, code) == "[10, 10, 5]"
    assert hub.requests["tree"] == 4 + 4 + 2


def test_a_restarted_hub_knows_everything_and_files_are_read_from_the_new_one(hub, tmp_path):
    (tmp_path / "f").write_bytes(CONTENTS["random"])
    client(hub, tmp_path, "api.create_bucket('user/b'); api.batch_bucket_files('user/b', add=[('f', 'f')])")
    hub.stop()
    hub.start()
    client(hub, tmp_path, "api.download_bucket_files('user/b', [('f', 'again')])", home="home2")
    assert (tmp_path / "again").read_bytes() == CONTENTS["random"]


def test_rights_follow_the_token(hub, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    owner, reader, stranger = hub.token(), hub.token(write=False), hub.token("other")
    client(hub, tmp_path, "api.create_bucket('user/b', private=True)", owner)
    look = "print(attempt(lambda: api.bucket_info('user/b').id))"
    assert client(hub, tmp_path, look, owner) == "user/b"
    assert client(hub, tmp_path, look, reader) == "user/b"
    assert client(hub, tmp_path, look, stranger) == "404"
    assert client(hub, tmp_path, look, hub.token(valid_s=-1)) == "401"
    delete = "print(attempt(api.batch_bucket_files, 'user/b', delete=['f']))"
    assert client(hub, tmp_path, delete, reader) == "403"
    hub.revoke(owner)
    assert client(hub, tmp_path, look, owner) == "401"


def test_a_batch_may_fail_in_part(hub, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    code = """
api.create_bucket("user/b")
try:
    api.batch_bucket_files("user/b", add=[("f", "good"), ("f", "bad")])
except huggingface_hub.errors.BucketBatchError as exc:
    print(exc.response.status_code, exc.failures)
"""
    with hub.fault("batch", fail_paths="bad"):
        assert client(hub, tmp_path, code) == "200 [{'path': 'bad', 'error': 'injected'}]"
    assert hub.read("user/b", "good") == b"1"


def test_a_dropped_reply_leaves_the_work_done(hub, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    client(hub, tmp_path, "api.create_bucket('user/b')")
    with hub.fault("batch", drop_reply=True, times=1) as fault:
        client(hub, tmp_path, "api.batch_bucket_files('user/b', add=[('f', 'f')])")
    assert fault.struck == 1
    bucket = hub.buckets.get("user/b")
    assert bucket.writes["f"] == [bucket.files["f"].hash] * 2, "the client sent it again"


def test_the_feed_tells_what_changed(hub, tmp_path):
    (tmp_path / "f").write_bytes(b"1")
    client(hub, tmp_path, "api.create_bucket('user/b'); api.batch_bucket_files('user/b', add=[('f', 'f')])")
    code = """
import httpx2
with httpx2.stream("GET", api.endpoint + "/api/buckets/user/b/events?cursor=0") as response:
    for line in response.iter_lines():
        if line.startswith("data") and "changes" in line:
            print(line)
            break
"""
    assert '"path": "f", "op": "add", "size": 1' in client(hub, tmp_path, code)
