"""Buckets, their files and the tokens of the loopback Hub. Kept in one log file, so a restarted server knows them."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class File:
    """One path of a bucket."""

    path: str
    hash: str
    size: int
    mtime_ms: int
    uploaded_ms: int


@dataclass
class Bucket:
    """One bucket."""

    id: str
    private: bool
    created_ms: int
    files: dict[str, File] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What the events feed tells, oldest first; the index is the cursor."""
    writes: dict[str, list[str]] = field(default_factory=dict)
    """Path -> every hash that was ever registered there: an overwrite with other bytes shows here."""


@dataclass(frozen=True)
class Token:
    """What a bearer token may do."""

    user: str
    write: bool = True
    expires_s: float = float("inf")


class Buckets:
    """All buckets of a Hub. Every method may be called from any thread."""

    def __init__(self, log: Path) -> None:
        self.tokens: dict[str, Token] = {}
        """Token -> its rights."""
        self.changed = threading.Condition()
        self._log = log
        self._buckets: dict[str, Bucket] = {}
        if log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                self._apply(json.loads(line))

    def _write(self, entry: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._apply(entry)
        self.changed.notify_all()

    def _apply(self, entry: dict[str, Any]) -> None:
        match entry["op"]:
            case "create":
                self._buckets[entry["id"]] = Bucket(entry["id"], entry["private"], entry["at_ms"])
            case "remove":
                self._buckets.pop(entry["id"], None)
            case "add":
                bucket = self._buckets[entry["id"]]
                known = entry["path"] in bucket.files
                file = File(entry["path"], entry["hash"], entry["size"], entry["mtime_ms"], entry["at_ms"])
                bucket.files[file.path] = file
                bucket.writes.setdefault(file.path, []).append(file.hash)
                bucket.changes.append(_change(file, "update" if known else "add"))
            case "delete":
                bucket = self._buckets[entry["id"]]
                if (gone := bucket.files.pop(entry["path"], None)) is not None:
                    bucket.changes.append(_change(gone, "delete"))

    def get(self, bucket_id: str) -> Bucket | None:
        """Return a bucket, or None."""
        return self._buckets.get(bucket_id)

    def create(self, bucket_id: str, *, private: bool) -> bool:
        """Create a bucket; False if it is there."""
        with self.changed:
            if bucket_id in self._buckets:
                return False
            self._write({"op": "create", "id": bucket_id, "private": private, "at_ms": _now_ms()})
            return True

    def remove(self, bucket_id: str) -> None:
        """Remove a bucket with everything in it."""
        with self.changed:
            self._write({"op": "remove", "id": bucket_id})

    def add(self, bucket_id: str, path: str, file_hash: str, size: int, mtime_ms: int) -> None:
        """Register a file, in place of whatever stood there."""
        with self.changed:
            at_ms = _now_ms()
            entry = {"op": "add", "id": bucket_id, "path": path, "hash": file_hash, "size": size}
            self._write(entry | {"mtime_ms": mtime_ms, "at_ms": at_ms})

    def delete(self, bucket_id: str, path: str) -> None:
        """Remove a path."""
        with self.changed:
            self._write({"op": "delete", "id": bucket_id, "path": path})

    def files(self, bucket_id: str, prefix: str) -> Iterator[File]:
        """Yield the files whose path starts with `prefix`, sorted."""
        bucket = self._buckets[bucket_id]
        with self.changed:
            found = sorted(path for path in bucket.files if path.startswith(prefix))
            yield from [bucket.files[path] for path in found]


def _change(file: File, op: str) -> dict[str, Any]:
    times = {"uploadedAt": iso(file.uploaded_ms), "mtime": iso(file.mtime_ms)}
    return {"path": file.path, "op": op, "size": file.size, "xetHash": file.hash, **times}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def iso(ms: int) -> str:
    """Return a time as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms / 1000)) + f".{ms % 1000:03}Z"
