"""Whose records they are: what a segment's WRITER entries tell about a writer. Pure."""

from typing import NamedTuple

from ranklog.errors import FormatError
from ranklog.frame import body_at
from ranklogd.ship.decode import read_start

LOST = "_lost"
"""The project that takes what cannot be told to belong to a run."""

ATTEMPT_MAX = (1 << 31) - 1


class Source(NamedTuple):
    """The columns that all records of one writer share."""

    writer: str
    project: str
    run: str
    rank: int | None
    role: str | None
    """None for the training itself."""
    node: str
    attempt: int


def read_source(writer: bytes, attempt: int, frames: memoryview, node: str) -> Source:
    """Return the writer that the start frame at the head of `frames` describes; raises FormatError.

    `attempt` is what the daemon counted; `node` stands in for a missing one.
    """
    body = body_at(frames, 0)
    if body is None:
        raise FormatError("checksum of the start frame fails")
    start = read_start(body)
    if start.writer != writer.hex():
        raise FormatError(f"start frame of writer {start.writer} in the entry of {writer.hex()}")
    return Source(
        writer=start.writer,
        project=start.project,
        run=start.run,
        rank=start.rank,
        role=start.role or None,
        node=start.node or node,
        attempt=min(max(start.attempt, attempt), ATTEMPT_MAX),
    )


def lost_source(writer: bytes, node: str) -> Source:
    """Return what stands in for a writer whose WRITER entry is missing: its records stay readable, in `_lost`."""
    return Source(writer.hex(), LOST, f"writer-{writer.hex()}", None, None, node, 0)


def damage_source(store_id: str, node: str) -> Source:
    """Return what gap rows belong to for lsns of which not even the writer can be told any more."""
    return Source(bytes(16).hex(), LOST, f"store-{store_id}", None, None, node, 0)
