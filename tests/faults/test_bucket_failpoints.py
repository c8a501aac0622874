"""Every named point around an upload to a Bucket, while the Hub drops replies as well: one object, with the right bytes.

The shipper dies, fails or waits there; a line in RANKLOG_FAILPOINT_LOG proves that it came to the point. What it then
left in the cache must be in the bucket, whatever retention removed. -m full has every action, alone.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bucketnode import BUCKET, PREFIX, BucketNode, check
from hub.server import Hub
from node import wait_for

POINTS = (
    "upload.before", "upload.sent.before_reply", "upload.verified.before_mark", "mark.rename.after", "mark.sync.after",
    "retain.delete.mid",
)  # fmt: skip


@pytest.fixture
def node(tmp_path: Path) -> Iterator[BucketNode]:
    with Hub(tmp_path / "hub") as hub, BucketNode(tmp_path, hub) as node:
        yield node


def hits(node: BucketNode, point: str) -> int:
    """How often a shipper came to the point."""
    log = node.path / "reached"
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(line.startswith(f"{point} ") for line in lines)


def cached(node: BucketNode) -> dict[str, bytes]:
    """The shards in the cache."""
    room = node.state / "cache"
    return {str(path.relative_to(room)): path.read_bytes() for path in room.rglob("*.parquet")}


def meet(node: BucketNode, point: str, action: str, *, times: int = 1) -> None:
    """Have a shipper come to a point, `times` in a row, with a reply of the Hub lost meanwhile; nobody is left."""
    before = cached(node)
    if point.startswith("retain"):
        assert before, "there is something to let go"
    fault = node.hub.fault("batch", drop_reply=True, times=1)
    env = {"RANKLOG_FAILPOINT": f"{point}={action}", "RANKLOG_FAILPOINT_LOG": str(node.path / "reached")}
    env |= {"RANKLOG_CACHE_AGE_S": "0"} if point.startswith("retain") else {}
    daemon = node.start_daemon(**env)
    for number in range(times):
        due = hits(node, point) + 1
        node.train(f"{point.replace('.', '-')}-{action}-{number}")
        wait_for(lambda due=due: hits(node, point) >= due, f"{point} is met")
    daemon.kill()
    daemon.wait()
    fault.end()
    in_bucket = {key: node.hub.read(BUCKET, PREFIX + key) for key in node.keys}
    for key, content in (before | cached(node)).items():
        assert in_bucket[key] == content, f"{key} was let go of, or marked, and is not in the bucket"


def settle(node: BucketNode) -> None:
    """Let a sound daemon finish, and judge; nothing was registered twice, for a retry looks before it sends."""
    node.start_daemon()
    check(node)
    assert all(len(hashes) == 1 for hashes in node.bucket.writes.values()), node.bucket.writes


def test_a_shipper_killed_at_every_point_of_an_upload_in_turn_leaves_one_object_of_each_shard(node):
    for point in POINTS:
        meet(node, point, "kill")
    settle(node)


@pytest.mark.full
@pytest.mark.parametrize("action", ["kill", "err", "sleep"])
@pytest.mark.parametrize("point", POINTS)
def test_whatever_happens_at_a_point_of_an_upload_there_is_one_object_of_each_shard(node, point, action):
    if point.startswith("retain"):
        node.start_daemon()
        node.train("cached-a", "cached-b", "cached-c")
        node.upload()
        node.daemons[-1].kill()
        node.daemons[-1].wait()
    meet(node, point, action, times=3 if action == "kill" else 1)
    settle(node)
