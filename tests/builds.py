"""Other versions of ranklog, made from this one: real copies on a path of their own, with later numbers and formats.

    LATER   the next version as far as anything can change without losing its neighbours: protocol 2 and 1, segments of
            version 2, and one more field in the segment header, its marks, the start frame, the status and every message
    MINOR   the same, but its segments are of version 1: one may go back from it
    ALONE   as LATER, and it does not speak protocol 1 any more

Every change is a line of this version's source, so that a test fails when it does not fit any more.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from node import ROOT


class Change(NamedTuple):
    """One edit of a source file."""

    path: str
    before: str
    after: str


MINOR = (
    Change("client/ranklog/version.py", '__version__ = "0.1.0"', '__version__ = "0.2.0"'),
    Change("client/ranklog/wire.py", "\nVERSION = 1\n", "\nVERSION = 2\n"),
    Change("client/ranklog/wire.py", "packb([int(kind), *fields])", 'packb([int(kind), *fields, "later", 7, None])'),
    Change("client/ranklog/start.py", '    client: str = ""\n', '    client: str = ""\n    flavour: str = "dark"\n'),
    Change("daemon/ranklogd/wal/segment.py", "    start_ns: int = 0\n", "    start_ns: int = 0\n    colour: int = 7\n"),
    Change("daemon/ranklogd/wal/segment.py", '"salt": header.salt,', '"salt": header.salt, "later": {"a": [1]},'),
    Change("daemon/ranklogd/report.py", "    shipper_restarts: int = 0\n", '    shipper_restarts: int = 0\n    mood: str = "fine"\n'),
    Change("daemon/ranklogd/config.py", '    log_level: str = "info"\n', '    later_option: int = 7\n    """What it does."""\n    log_level: str = "info"\n'),
)  # fmt: skip
LATER = (*MINOR, Change("daemon/ranklogd/wal/segment.py", "\nVERSION = 1\n", "\nVERSION = 2\n"))
ALONE = (*LATER, Change("client/ranklog/wire.py", "\nVERSION_MIN = 1\n", "\nVERSION_MIN = 2\n"))


def install(root: Path, changes: Iterable[Change] = ()) -> dict[str, str]:
    """Put this version with `changes` to `root`, in place of what is there; return the environment that finds it."""
    for package in ("client", "daemon"):
        shutil.rmtree(root / package, ignore_errors=True)
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for change in changes:
        path = root / change.path
        source = path.read_text(encoding="utf-8")
        assert source.count(change.before) == 1, f"{change.before!r} stands {source.count(change.before)} times in {path}"
        path.write_text(source.replace(change.before, change.after), encoding="utf-8")
    paths = [root / "client", root / "daemon", ROOT / "tests"]
    # Two versions may take turns in one place, faster than the clock that compiled files are told apart by.
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
