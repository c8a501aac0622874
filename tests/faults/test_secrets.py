"""A token is told to the Hub and to nobody else: a whole node with a distinctive one, and a search for it everywhere.

The Hub refuses, breaks off and hangs, and the daemon logs at `debug`: the paths on which secrets leak are those of
errors. Searched are logs, every answer and file of the node, and what any process may read of the daemon's processes.
"""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bucketnode import BUCKET, BucketNode
from hub.buckets import Token
from hub.server import Hub
from node import wait_for

TOKEN = "hf_CanaryCanaryCanaryCanaryCanaryCanary"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        yield hub


def by_file(node: BucketNode) -> None:
    node.token_file.write_text(TOKEN)


def by_environment(node: BucketNode) -> None:
    node.token_file.unlink()
    del node.env["RANKLOG_TOKEN_FILE"]
    node.env["HF_TOKEN"] = TOKEN


def by_login(node: BucketNode) -> None:
    node.token_file.unlink()
    del node.env["RANKLOG_TOKEN_FILE"]
    home = Path(node.env["HF_HOME"])
    home.mkdir(parents=True)
    (home / "token").touch(0o600)
    (home / "token").write_text(TOKEN)


def with_trouble(node: BucketNode, hub: Hub) -> None:
    """Let uploads fail in every way, and succeed in the end."""
    for route, fault in (
        ("paths", {"status": 503}), ("write_token", {"status": 500}), ("paths", {"drop": True}), ("batch", {"status": 429}),
        ("grant", {"status": 403}), ("batch", {"drop_reply": True}), ("paths", {"status": 200, "body": b"<html>"}),
    ):  # fmt: skip
        with hub.fault(route, times=1, **fault) as on:
            node.train(f"run-{route}-{next(iter(fault.values()))}", count=3)
            wait_for(lambda on=on: on.struck, f"the Hub did {fault} on {route}")
    hub.buckets.tokens[TOKEN] = Token("user", write=False)
    node.train("run-refused", count=3)
    node.wait_for_trouble("held", "403")
    hub.buckets.tokens[TOKEN] = Token("user", expires_s=0.0)
    node.wait_for_trouble("held", "401")


def processes(daemon_pid: int) -> list[psutil.Process]:
    daemon = psutil.Process(daemon_pid)
    return [daemon, *daemon.children(recursive=True)]


def holding(node: BucketNode, secret: bytes) -> list[str]:
    """Return every file of the node that has the secret in it, but for the one that is there to hold it."""
    own = {node.token_file, Path(node.env["HF_HOME"]) / "token"}
    places = [node.path, node.journal, node._short]
    files = [Path(folder) / name for place in places for folder, _, names in os.walk(place) for name in names]
    found = []
    for path in files:
        if path in own or path.is_socket() or path.is_fifo() or node.path / "hub" in path.parents:
            continue
        try:
            if secret in path.read_bytes():
                found.append(str(path))
        except FileNotFoundError:
            continue  # Uploaded, or acknowledged, meanwhile.
    return found


@pytest.mark.parametrize("hand_over", [by_file, by_environment, by_login])
def test_the_token_is_in_no_log_answer_file_or_process_after_failures_of_every_kind(tmp_path, hub, hand_over):
    hub.buckets.tokens[TOKEN] = Token("user")
    with BucketNode(tmp_path, hub) as node:
        hand_over(node)
        node.env |= {"RANKLOG_LOG_LEVEL": "debug", "RUST_LOG": "debug"}
        daemon = node.start_daemon()
        with_trouble(node, hub)
        assert TOKEN in hub.seen_tokens
        ingest, shipper = processes(daemon.pid)

        outputs = {"daemon.log": (node.path / "daemon.log").read_text()}
        for words in (["status"], ["status", "--json"], ["doctor"], ["doctor", "--json"], ["ping"], ["ls"]):
            done = node.run([sys.executable, "-m", "ranklog.cli", *words])
            outputs[" ".join(words)] = done.stdout + done.stderr
        assert "401" in outputs["status --json"], "the refusal is told"
        for where, text in outputs.items():
            assert TOKEN not in text, where

        for process in (ingest, shipper):
            assert TOKEN not in " ".join(process.cmdline())
            assert process.rlimit(resource.RLIMIT_CORE)[0] <= 1, "no core file: memory holds tokens"
        assert TOKEN not in str(shipper.environ()), "what a child is born with can be read by every tool of the user"
        if hand_over is not by_environment:
            assert TOKEN not in str(ingest.environ())

        # The content store's own tokens are worth an hour of writing to the bucket.
        secrets = [TOKEN.encode(), *(text.encode() for text in hub._xet_tokens)]
        assert len(secrets) > 1
        assert holding(node, BUCKET.encode()), "this search finds what is told"
        for secret in secrets:
            assert holding(node, secret) == []

        hub.buckets.tokens[TOKEN] = Token("user")
        node.upload(60)
        assert len(node.keys) >= 8, "and all of it was uploaded in the end"
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(60) == 0
        for secret in secrets:
            assert holding(node, secret) == []
        assert hub.buckets.get(BUCKET) is not None


def test_a_crash_of_the_shipper_leaves_no_core_file_with_the_token(tmp_path, hub):
    hub.buckets.tokens[TOKEN] = Token("user")
    with BucketNode(tmp_path, hub) as node:
        by_environment(node)
        daemon = node.start_daemon()
        node.train("run", count=3)
        node.upload(60)
        shipper = wait_for(lambda: processes(daemon.pid)[1:], "a shipper runs")[0]
        shipper.send_signal(signal.SIGSEGV)
        wait_for(lambda: [other for other in processes(daemon.pid)[1:] if other.pid != shipper.pid], "another one runs")
        assert holding(node, TOKEN.encode()) == []
        node.train("run-2", count=3)
        node.upload(60)
