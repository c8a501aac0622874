"""Object stores through obstore: what goes wrong with them, in words and in three classes; and a whole node on S3."""

import io
import socket
import subprocess
import time

import pyarrow.parquet as pq
import pytest

import s3
from cli import ranklog
from node import Node, wait_for
from oracle import judge, ledgers_of, witness
from ranklog.errors import StoreError, UsageError
from ranklog.stores import Store, Upload, open_store
from ranklog.stores.base import StoreOptions
from witness import read_ledgers


@pytest.fixture
def credentials(monkeypatch):
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def closed_to_strangers():
    """From here on the server wants real credentials, and knows none."""
    bucket = s3.new_bucket()
    s3.request("POST", "moto-api/reset-auth", b"0")
    yield bucket
    s3.request("POST", "moto-api/reset-auth", b"inf")


@pytest.fixture
def nobody():
    """An endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def refusals(store: Store, path) -> list[StoreError]:
    """What each of the calls raises, where the whole store is away."""
    path.write_bytes(b"bytes")
    found = []
    calls = [lambda: store.put([Upload(path, "a/b"), Upload(path, "a/c")]), lambda: list(store.list(""))]
    for call in [*calls, lambda: store.get("a/b", path.with_name("target"))]:
        with pytest.raises(StoreError) as refused:
            call()
        found.append(refused.value)
    return found


def test_a_missing_bucket_is_held_for_a_person_and_never_created(credentials, tmp_path):
    for error in refusals(open_store("s3://no-such-bucket/logs"), tmp_path / "file"):
        assert (error.held, error.permanent) == (True, False)
        assert "s3://no-such-bucket/logs: there is no such bucket" in str(error)
    assert b"no-such-bucket" not in s3.request("GET", "")


def test_wrong_credentials_are_held_and_the_text_says_what_is_wanted(credentials, closed_to_strangers, tmp_path):
    for error in refusals(open_store(f"s3://{closed_to_strangers}"), tmp_path / "file"):
        assert (error.held, error.permanent) == (True, False)
        assert "answered 403 InvalidAccessKeyId. The daemon needs credentials" in str(error)
    with pytest.raises(StoreError, match="answered 403") as refused:
        open_store(f"s3://{closed_to_strangers}").heads(["a/b"])
    assert refused.value.held


def test_a_server_that_is_away_is_trouble_that_passes_and_is_told_in_the_same_words_each_time(credentials, tmp_path):
    credentials.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    store = open_store("s3://bucket/logs")
    first, second = (refusals(store, tmp_path / "file") for _ in range(2))
    assert [(error.held, error.permanent) for error in first] == [(False, False)] * 3
    assert list(map(str, first)) == list(map(str, second)), "a log that is new each time would fill the disk"


def test_no_call_outlives_its_deadline_however_many_files_it_is_for(credentials, nobody, tmp_path):
    credentials.setenv("AWS_ENDPOINT", nobody)
    store = open_store("s3://bucket/logs", StoreOptions(deadline_s=8))
    (tmp_path / "file").write_bytes(b"bytes")
    uploads = [Upload(tmp_path / "file", f"a/{number}") for number in range(20)]
    for call in (lambda: store.put(uploads), lambda: store.heads([upload.key for upload in uploads])):
        began_s = time.monotonic()
        with pytest.raises(StoreError) as refused:
            call()
        assert time.monotonic() - began_s < 8
        assert (refused.value.held, refused.value.permanent) == (False, False)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://bucket/../x", "s3://bucket?x=1", "gs://", "az:///c"])
def test_a_url_without_a_bucket_is_a_usage_error(credentials, url):
    with pytest.raises(UsageError):
        open_store(url)


def test_without_obstore_the_pip_line_is_told(tmp_path):
    done = ranklog("ls", "s3://bucket/logs", home=tmp_path, without=["obstore"])
    assert (done.returncode, done.stdout) == (2, "")
    assert 'pip install "ranklog[s3]"' in done.stderr


def rows_of(bucket: str) -> list[dict]:
    """Every row of every shard, read with another client than ours."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=s3.endpoint(), aws_access_key_id="k", aws_secret_access_key="s", region_name=s3.REGION
    )
    keys = [
        item["Key"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for item in page.get("Contents", [])
    ]
    assert all(key.startswith("logs/v1/project_id=faults/run_id=job/") for key in keys), keys
    files = (client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys)
    return [row for data in files for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def test_a_whole_node_on_s3_loses_nothing_through_an_outage_and_wrong_credentials(tmp_path, closed_to_strangers):
    bucket = closed_to_strangers
    with Node(tmp_path) as node:
        node.env |= s3.environment(RANKLOG_TO=f"s3://{bucket}/logs", RANKLOG_SEAL_AGE_S="0.3", RANKLOG_RETRY_MAX_S="1")
        daemon = node.start_daemon()
        job = subprocess.Popen(
            witness("a", node, "--pause", "0.002", "--flush-every", "100"), env=node.env, cwd=node.path
        )
        wait_for(lambda: node.status()["shipper"].get("last_error_class") == "held", "the store refuses us")
        assert "answered 403 InvalidAccessKeyId" in node.status()["shipper"]["last_error"]
        daemon.kill()  # Beside it all, a daemon that dies.
        daemon.wait()
        node.start_daemon(AWS_ENDPOINT="http://127.0.0.1:9")
        wait_for(lambda: node.status()["shipper"].get("last_error_class") == "transient", "the server is away")
        node.daemons[-1].kill()
        node.daemons[-1].wait()
        s3.request("POST", "moto-api/reset-auth", b"inf")
        node.start_daemon()
        wait_for(lambda: node.status()["shipper"].get("uploaded_shards"), "shards go up beside the training")
        (node.path / "enough").touch()
        assert job.wait(60) == 0
        node.upload(60)
        verdict = judge(rows_of(bucket), read_ledgers(ledgers_of(node)))
        assert not verdict.missing
        assert verdict.delivered > 200
        done = ranklog("ls", f"s3://{bucket}/logs", "--json", home=tmp_path, env=node.env)
        assert done.returncode == 0, done.stderr
        assert '"job"' in done.stdout
