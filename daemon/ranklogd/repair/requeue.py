"""What stands aside, and how it comes back into the line. The rule: a reader sees each record once.

    dead letter            back to the outbox under its own key. The same bytes to the same name: whatever the store
                           took of it before, there is one object. A shard whose lsns lie within those of one in the
                           store would be ignored by readers, and one whose name the store holds with other bytes
                           would be refused again: both stay, and the reason is told.
    segment, unconverted   back to wal/ under its own name: its store_id and lsns are still its own, for no lsn is
                           given out twice within a store_id and none of its records ever had a row.
    … without its header   with a new one and so a store_id of its own (see `header`). Records that came in otherwise
                           meanwhile are in two store_ids then, which readers compare by (writer, seq).
    spool file             the frames behind its damage, from the first seq that was not adopted, in a spool file of
                           their own. Adoption takes what the WAL does not have; what lies between becomes a gap.
                           Where a later file of the writer was adopted since, gap rows stand for those seqs already,
                           and those frames stay. Only once the daemon has forgotten the writer (48 h after its end)
                           can a record come in for which there is a gap row: the record wins, for a gap row says
                           what was missing at its time.

All else is refused: an excerpt and a segment that was converted (every record of theirs that can be read has a row,
and the others a gap row), a shard with other bytes than its name says, and the originals of repairs.

What was brought in from a copy stays in quarantine/ as `<name>.requeued`, so it comes in once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ranklog import fs
from ranklog.errors import FormatError, RanklogError, StoreError
from ranklog.framefile import parse_name
from ranklog.layout import ShardKey, parse_key
from ranklog.stores import Store
from ranklogd.repair.finding import Mend
from ranklogd.repair.frames import SEARCH_SIZE_MAX, read_frame_file, sound_frames
from ranklogd.repair.mend import rebuild_to, respool
from ranklogd.repair.shards import REASON, files_in, hidden_by, reason_of, trouble_of
from ranklogd.repair.survey import last_seqs
from ranklogd.repair.wal import headless_mend, names_in
from ranklogd.ship.quarantine import UNCONVERTED
from ranklogd.statedir import StateDir
from ranklogd.wal.segment import LaterFormat, decode_header, parse_sealed

REQUEUED = ".requeued"


class Way(Enum):
    """How something comes back."""

    OUTBOX = "to the outbox, under its own key"
    WAL = "to wal/, under its own name"
    REBUILD = "to wal/, with a new header and a store_id of its own"
    SPOOL = "its unread frames to a spool file, for adoption"
    NONE = "stays"


@dataclass(frozen=True)
class Item:
    """One file that stands aside."""

    room: str
    """`deadletter` or `quarantine`."""
    name: str
    path: Path
    reason: str
    """Why it stands aside."""
    way: Way
    why_not: str = ""
    """For one that stays."""
    mend: Mend | None = None
    head: bytes = b""
    due: int = 0

    def as_json(self) -> dict[str, str]:
        """Return it as `--json` prints it."""
        return {
            "room": self.room, "name": self.name, "reason": self.reason, "way": self.way.value, "why_not": self.why_not,
        }  # fmt: skip


def items(state: StateDir, store: Store, node: str) -> Iterator[Item]:
    """Yield everything that stands aside, with the way it would come back."""
    for path in files_in(state.deadletter):
        if not path.name.endswith(REASON) and not path.name.startswith("."):
            yield _dead_letter(state, store, path)
    last = last_seqs(state)
    for name in names_in(state.quarantine):
        path = state.quarantine / name
        if path.is_file() and not name.endswith((REASON, REQUEUED)) and not name.startswith("."):
            yield _evidence(state, path, node, last)


def _dead_letter(state: StateDir, store: Store, path: Path) -> Item:
    key = str(path.relative_to(state.deadletter))
    name = parse_key(key)
    why = "its name is no shard's" if name is None else _dead_for(store, path, key, name)
    return Item("deadletter", key, path, reason_of(path), Way.NONE if why else Way.OUTBOX, why)


def _dead_for(store: Store, path: Path, key: str, name: ShardKey) -> str:
    """Return why a dead letter must stay; "" if it may go."""
    trouble = trouble_of(path, name)
    if trouble:
        return f"{trouble}: it must not be uploaded"
    try:
        there = store.heads([key]).get(key)
        hidden = hidden_by(store, name)
    except StoreError as exc:
        return f"the store cannot be asked: {exc}"
    if there is not None and there.size_bytes != path.stat().st_size:
        return f"{store.url} has other bytes under this name: move that object away first"
    if hidden is not None:
        return f"readers would ignore it: its lsns lie within {hidden.first_lsn:,}..{hidden.last_lsn:,} of the store"
    return ""


def _evidence(state: StateDir, path: Path, node: str, last: dict[str, int]) -> Item:
    reason = reason_of(path)
    name = path.name
    if parse_name(name) is not None:
        return _spool(path, reason, last)
    if parse_sealed(name) is not None or ".open." in name:
        return _segment(state, path, reason, node)
    why = "nobody knows what it is"
    if ".original-" in name:
        why = "it is the original of a repair, whose records are in the line"
    elif name.endswith(".excerpt"):
        why = "its records are gap rows by now, and this version of ranklog reads no more of them"
    elif ".parquet" in name:
        why = "its bytes are not those that were named: they must not be uploaded"
    return Item("quarantine", name, path, reason, Way.NONE, why)


def _segment(state: StateDir, path: Path, reason: str, node: str) -> Item:
    def item(way: Way, why: str = "", mend: Mend | None = None) -> Item:
        return Item("quarantine", path.name, path, reason, way, why, mend)

    told = path.with_name(path.name + REASON)
    text = told.read_text(encoding="utf-8", errors="replace") if told.exists() else ""
    if parse_sealed(path.name) is not None and UNCONVERTED not in text:
        return item(Way.NONE, "it was converted: what can be read is in shards, gap rows stand for the rest")
    if "told by their frames" in text:
        return item(Way.NONE, "it is a copy: the segment itself was converted")
    buffer = memoryview(path.read_bytes())
    mend: Mend | None = None
    try:
        decode_header(buffer)
        if ".open." in path.name:
            return item(Way.NONE, "its header can be read, so it may have been converted")
    except LaterFormat as exc:
        return item(Way.NONE, f"{exc}, then requeue it")
    except FormatError:
        mend = headless_mend(state.wal, path, buffer, node)
        if mend is None:
            return item(Way.NONE, "no entry in it can be read")
    target = mend.target.name if mend else path.name
    if (state.wal / target).exists() or (state.outbox / target).exists():
        return item(Way.NONE, f"another segment {target} is on its way: try again when it is uploaded")
    return item(Way.REBUILD if mend else Way.WAL, mend=mend)


def _spool(path: Path, reason: str, last: dict[str, int]) -> Item:
    name = parse_name(path.name)
    found = None if name is None else read_frame_file(path, name)
    if found is None or found.refused or not found.start_frame:
        why = found.refused if found else "it is gone"
        return Item("quarantine", path.name, path, reason, Way.NONE, f"its start frame cannot be read: {why}")
    if found.alive:
        return Item(
            "quarantine", path.name, path, reason, Way.NONE, "a process still holds it: try again when it is gone"
        )
    if found.size_bytes > SEARCH_SIZE_MAX:
        return Item("quarantine", path.name, path, reason, Way.NONE, "it is larger than any client's spool file")
    due = max(found.last_seq, last.get(found.name.writer, -1)) + 1
    spans = list(sound_frames(memoryview(path.read_bytes()), due))
    if not spans:
        why = "no frame behind its damage can be read, or gap rows stand for them already"
        return Item("quarantine", path.name, path, reason, Way.NONE, why)
    return Item("quarantine", path.name, path, reason, Way.SPOOL, head=found.start_frame, due=due)


def bring_back(item: Item, state: StateDir, spool: Path | None, node: str) -> None:
    """Bring one item back, durably; safe to do again after a crash anywhere in it. Raises OSError, RanklogError."""
    if item.way == Way.OUTBOX:
        # No name of a segment: the converter believes a segment converted whose directory is there.
        target = state.outbox / f"requeued-{item.path.name.split('.')[-2]}" / item.name
        _rename(item.path, target)
        fs.unlink(_told(item.path))
        if fs.remove_empty_dirs(state.deadletter / "v1"):
            fs.sync_dir(state.deadletter)
    elif item.way == Way.WAL:
        _rename(item.path, state.wal / item.name)
        fs.unlink(_told(item.path))
    elif item.way == Way.REBUILD:
        assert item.mend is not None, "found out together with the way"
        rebuild_to(item.mend, node)
        _settle(item.path)
    elif item.way == Way.SPOOL:
        if spool is None:
            raise RanklogError("no spool directory can be used: name one with RANKLOG_SPOOL_DIR")
        respool(item.path, spool / item.path.name, item.head, item.due)
        _settle(item.path)


def _rename(source: Path, target: Path) -> None:
    fs.make_dir(target.parent)
    fs.rename(source, target)
    fs.sync_dir(target.parent)
    fs.sync_dir(source.parent)


def _told(path: Path) -> Path:
    return path.with_name(path.name + REASON)


def _settle(path: Path) -> None:
    """Note that what is in a file came in. Its reason goes along."""
    done = path.with_name(path.name + REQUEUED)
    if _told(path).exists():
        fs.rename(_told(path), _told(done))
    fs.rename(path, done)
    fs.sync_dir(path.parent)
