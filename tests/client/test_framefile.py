"""Files of frames: their names, and how they come into view and go."""

import fcntl
import os
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog import fs
from ranklog.framefile import FileName, create, create_anonymous, format_name, parse_name
from ranklog.start import Start, encode_start

NAME = FileName("0123456789abcdef" * 2, 7, "journal")
START = encode_start(Start(writer=NAME.writer, project="p", run="r"))


@given(st.from_regex(re.compile(r"[0-9a-f]{32}"), fullmatch=True), st.integers(0, 2**32 - 1), st.sampled_from(["journal", "spool"]))
def test_a_name_says_what_it_was_made_from(writer: str, number: int, kind: str):
    assert parse_name(format_name(FileName(writer, number, kind))) == (writer, number, kind)


def test_the_name_is_this_one():
    assert format_name(NAME) == "0123456789abcdef0123456789abcdef.00000007.journal"


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "x", f".{format_name(NAME)}", f"{format_name(NAME)}.tmp", format_name(NAME).upper(), f"{NAME.writer}.7.journal",
        f"{NAME.writer}.00000007.wal", f"{NAME.writer}.00000007.spool\n", "0123.00000007.spool",
    ],
)  # fmt: skip
def test_other_names_are_not_ours(name: str):
    assert parse_name(name) is None


def locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return not fs.try_lock(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o777])
def test_a_file_comes_into_view_locked_reserved_and_with_its_start_frame_whatever_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        file = create(tmp_path, NAME, START, 8192)
    finally:
        os.umask(before)
    assert file.path == tmp_path / format_name(NAME)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640
    assert file.path.read_bytes() == START + bytes(8192 - len(START))
    assert file.path.stat().st_blocks * 512 >= 8192, "the room is there, not only promised"
    assert (file.head_end, file.size) == (len(START), 8192)
    assert locked(file.path)
    assert not os.get_inheritable(file.fd)
    file.close()
    assert not locked(file.path), "closed: it asks for adoption"


def test_a_spool_file_begins_without_reserved_room(tmp_path: Path):
    file = create(tmp_path, NAME._replace(kind="spool"), START, 0)
    assert file.path is not None
    assert file.path.read_bytes() == START
    assert file.size == file.head_end == len(START)
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    for directory, error in ((tmp_path / "missing", FileNotFoundError), (Path("/proc/self"), OSError)):
        with pytest.raises(error):
            create(directory, NAME, START, 8192)
    with pytest.raises(OSError, match=r"No space|too large"):
        create(tmp_path, NAME, START, 1 << 60)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_twice_does_not_close_what_somebody_else_opened_meanwhile(tmp_path: Path):
    file = create(tmp_path, NAME, START, 0)
    file.close()
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == file.fd, "the descriptor is used again"
    file.close()
    file.remove()
    assert fcntl.fcntl(other, fcntl.F_GETFD) >= 0
    os.close(other)


def test_a_file_that_cannot_be_unlinked_is_closed_all_the_same(tmp_path: Path):
    file = create(tmp_path, NAME, START, 0)
    assert file.path is not None
    file.path.unlink()
    file.path.mkdir()
    file.remove()
    assert file.closed


def test_a_file_in_memory_has_no_name(tmp_path: Path):
    file = create_anonymous(START, 8192)
    assert os.pread(file.fd, 8192, 0) == START + bytes(8192 - len(START))
    assert file.path is None
    file.remove()
    assert file.closed
