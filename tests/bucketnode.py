"""A node that uploads to a Bucket of the loopback Hub, and what must hold there beside what the oracle asks for.

    every path of the bucket was registered with one content only, and its bytes are those its name tells
    a shard that left the outbox is in the bucket; dead letters are those the case is about, and no others

Whatever a case does to the Hub, `check` judges once the trouble is over.
"""

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import oracle
from hub.buckets import Bucket
from hub.server import Hub
from node import Node, wait_for
from oracle import May, Verdict, files_below
from ranklog.layout import parse_key

BUCKET = "user/logs"
PREFIX = "job/"
CREW = """
import sys
from pathlib import Path
import ranklog
from witness import Witness
ledgers, count, *runs = sys.argv[1:]
for run in runs:
    ranklog.init(project="faults", id=run)
    witness = Witness(run, Path(ledgers))
    for _ in range(int(count)):
        witness.log()
    ranklog.finish(timeout=20)
"""
"""Trainers of several runs, one after the other, in one process."""


class BucketNode(Node):
    """A node whose store is a bucket. Waits are short, so that a case takes seconds."""

    def __init__(self, path: Path, hub: Hub) -> None:
        super().__init__(path)
        self.hub = hub
        self.url = f"hf://buckets/{BUCKET}/{PREFIX.rstrip('/')}"
        self.token_file = path / "token"
        self.new_token()
        self.env = {name: value for name, value in self.env.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(path / "home"), "HF_XET_CACHE": str(path / "xet"),
            "RANKLOG_TO": self.url, "RANKLOG_TOKEN_FILE": str(self.token_file), "RANKLOG_CREATE_BUCKET": "private",
            "RANKLOG_SEAL_AGE_S": "0.1", "RANKLOG_RESCAN_INTERVAL_S": "0.3", "RANKLOG_STOP_DEADLINE_S": "6",
            "RANKLOG_RETRY_BASE_S": "0.1", "RANKLOG_RETRY_MAX_S": "0.4", "RANKLOG_UPLOAD_DEADLINE_S": "10",
            "RANKLOG_UPLOAD_INTERVAL_MIN_S": "0.1", "RANKLOG_UPLOAD_INTERVAL_MAX_S": "1",
        }  # fmt: skip

    def new_token(self, **rights: Any) -> str:
        """Issue a token and put it where the daemon looks."""
        token = self.hub.token(**rights)
        self.token_file.write_text(f"{token}\n")
        self.token_file.chmod(0o600)
        return token

    @property
    def bucket(self) -> Bucket:
        """The bucket, which must be there."""
        bucket = self.hub.buckets.get(BUCKET)
        assert bucket is not None, f"{BUCKET} is not there"
        return bucket

    @property
    def keys(self) -> list[str]:
        """The keys of the objects in the bucket."""
        bucket = self.hub.buckets.get(BUCKET)
        return [path.removeprefix(PREFIX) for path in sorted(bucket.files)] if bucket else []

    def raw_rows(self, where: str) -> list[dict[str, Any]]:
        """Return rows of the shards as any parquet reader sees them, without deduplication."""
        import duckdb

        tables = [pyarrow.parquet.read_table(io.BytesIO(self.hub.read(BUCKET, PREFIX + key))) for key in self.keys]
        if not tables:
            return []
        shards = pyarrow.concat_tables(tables)  # noqa: F841  DuckDB finds it by name.
        return duckdb.sql(f"select * from shards where {where}").arrow().read_all().to_pylist()

    def waiting(self) -> dict[str, Path]:
        """Return the shards in the outbox, key -> file, oldest segment first."""
        found = {}
        for segment in sorted((self.state / "outbox").glob("*")):
            if segment.suffix != ".tmp":
                found |= {str(path.relative_to(segment)): path for path in files_below(segment)}
        return found

    def letters(self) -> dict[str, str]:
        """Return the dead letters, key -> reason."""
        room = self.state / "deadletter"
        paths = sorted(room.rglob("*.parquet"))
        return {str(path.relative_to(room)): path.with_name(f"{path.name}.reason").read_text() for path in paths}

    def train(self, *runs: str, count: int = 12, **env: str) -> None:
        """Have a trainer for each run, to its end."""
        done = self.python(CREW, str(oracle.ledgers_of(self)), str(count), *runs, **env)
        assert done.returncode == 0, done.stderr

    def shipper(self) -> dict[str, Any]:
        """Return what the shipper reports of itself."""
        return dict(self.status()["shipper"])

    def wait_for_trouble(self, kind: str, text: str) -> None:
        """Wait until the status tells of an upload error of this class."""
        wait_for(
            lambda: self.shipper().get("last_error_class") == kind and text in self.shipper()["last_error"],
            lambda: f"the status tells of {text!r} ({kind}), but of {self.shipper()}",
        )

    def wait_for_shards(self, count: int) -> None:
        """Wait until so many shards wait in the outbox and nothing waits before it."""
        found = f"{count} shards wait"
        wait_for(lambda: len(self.waiting()) >= count and not self.sealed(), lambda: f"{found}: {self.waiting()}")

    def sealed(self) -> list[Path]:
        """Return the sealed segments that wait to be converted."""
        return sorted((self.state / "wal").glob("*.wal"))

    def ranklog(self, *command: str, timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run `ranklog …`."""
        return self.run([sys.executable, "-m", "ranklog.cli", *command], timeout_s)


def check(node: BucketNode, may: May = May.LOSE_NOTHING, *, cleared: tuple[str, ...] = ()) -> Verdict:
    """The oracle's verdict, and the bucket's. `cleared`: keys that a person freed of other bytes in between."""
    verdict = oracle.check(node, may)
    assert verdict.delivered, "something was there to lose"
    check_objects(node, cleared)
    assert node.letters() == {}, "nothing that is delivered is a dead letter as well"
    return verdict


def check_objects(node: BucketNode, cleared: tuple[str, ...] = ()) -> None:
    """Exactly one content under each name, and the one it names."""
    for path, hashes in node.bucket.writes.items():
        key = path.removeprefix(PREFIX)
        assert key in cleared or len(set(hashes)) == 1, f"{key} was overwritten with other bytes: {hashes}"
    for key in node.keys:
        name = parse_key(key)
        assert name is not None, f"{key} is no shard"
        assert hashlib.sha256(node.hub.read(BUCKET, PREFIX + key)).hexdigest().startswith(name.sha256), key
    for key in node.waiting():
        assert key not in node.letters(), f"{key} waits and is a dead letter"
