"""A state directory to break and to mend, and a process that dies before a chosen change of the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ranklog import fs
from ranklog.frame import Kind
from ranklog.start import encode_start
from ranklogd.wal.segment import decode_header
from segments import SegmentBuilder, frame, make_state, start_of

WRITER = start_of(1)


class Place:
    """A state directory with the writers' directories and a store beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = make_state(root / "state")
        self.journal, self.spool, self.store = root / "journal", root / "spool", root / "store"
        for path in (self.journal, self.spool, self.store):
            path.mkdir()

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let commands find it."""
        monkeypatch.setenv("HOME", str(self.root))
        for name, path in {
            "STATE_DIR": self.state.root, "JOURNAL_DIR": self.journal, "SPOOL_DIR": self.spool, "TO": self.store,
            "RUNTIME_DIR": self.root,
        }.items():  # fmt: skip
            monkeypatch.setenv(f"RANKLOG_{name}", str(path))

    def segment(self, *, first_lsn: int = 1, first_seq: int = 0, count: int = 6, **kwargs: Any) -> Path:
        """A sealed segment of one writer, three batches."""
        return builder(first_lsn, first_seq, count).seal(self.state)

    def spooled(self, *, first: int = 1, count: int = 9, number: int = 0, start: Any = WRITER) -> Path:
        """A spool file whose writer is dead."""
        path = self.spool / f"{start.writer}.{number:08x}.spool"
        path.write_bytes(encode_start(start) + b"".join(metrics(seq) for seq in range(first, first + count)))
        return path

    def tree(self) -> dict[str, bytes]:
        """Every file but the lock, by name."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and not path.is_symlink() and path.name != "lock"
        }


def metrics(seq: int) -> bytes:
    return frame(Kind.METRICS, seq, {"loss": seq / 7, "note": f"n{seq}" * 4}, step=seq)


def builder(first_lsn: int = 1, first_seq: int = 0, count: int = 6) -> SegmentBuilder:
    made = SegmentBuilder(first_lsn)
    made.writer(WRITER)
    for begin in range(first_seq, first_seq + count, 2):
        frames = b"".join(metrics(seq) if seq else encode_start(WRITER) for seq in (begin, begin + 1))
        made.batch(WRITER.writer, begin, 2, frames)
    return made


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def wipe_frame(path: Path, number: int = 5) -> None:
    """Zero a frame of a spool file, size and all: adoption cannot tell where the next one begins."""
    data = path.read_bytes()
    begin = len(encode_start(WRITER)) + (number - 1) * len(metrics(1))
    path.write_bytes(data[:begin] + bytes(len(metrics(1))) + data[begin + len(metrics(1)) :])


def lose_head(path: Path) -> None:
    """Zero all before the second batch."""
    data = path.read_bytes()
    header, offset = decode_header(memoryview(data))
    salt = header.salt.to_bytes(4, "little")
    third = data.index(salt, data.index(salt, offset + 40) + 40)
    path.write_bytes(bytes(third) + data[third:])


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


DISK_CALLS = ("rename", "publish", "unlink", "sync_dir", "make_dir", "write_all")


def kill_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Let the process die before its nth change of the disk; return the list that the calls so far are noted in."""
    calls: list[str] = []

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(fs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == nth:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in DISK_CALLS:
        monkeypatch.setattr(fs, name, dying(name))
    return calls


HEAD = 300
"""Records that go with a lost head: so many that the daemon stops looking for the next entry."""


def headless(place: Place, first_lsn: int = 1, first_seq: int = 0) -> Path:
    """A sealed segment of which the header and the first 300 records are lost; four records are left."""
    made = SegmentBuilder(first_lsn)
    made.writer(WRITER)
    seqs = range(first_seq, first_seq + HEAD)
    made.batch(WRITER.writer, first_seq, HEAD, b"".join(metrics(seq) if seq else encode_start(WRITER) for seq in seqs))
    for begin in (seqs.stop, seqs.stop + 2):
        made.batch(WRITER.writer, begin, 2, metrics(begin) + metrics(begin + 1))
    path = made.seal(place.state)
    lose_head(path)
    return path
