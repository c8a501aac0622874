"""A filesystem that forgets: the live view is a real directory tree, what is *durable* is kept beside it.

Calls of `os` that change files are watched while it is entered. An fsync of a file takes down its bytes, an fsync of a
directory its names; nothing else is durable. `power_cut` builds the tree that a disk might hold afterwards:

    bytes     of each file on its own: the durable ones, the live ones, a prefix of them, or a mix by sectors of 512
              bytes, where a sector that never arrived reads as it was before, or as zeros
    names     each create, unlink and link since the last fsync of its directory happened or did not, each on its own
    renames   both names change or neither does, as on every filesystem with a journal. But a directory that was
              synced alone took only its own half along: synced source and lost target is a lost file
    EIO       after an fsync that failed the kernel calls the pages clean: what was dirty then never arrives, unless
              it is written again, although the next fsync succeeds and the live view shows it

So data, size and names persist apart from each other; that is more than ext4, xfs or btrfs permit, and ranklog claims
to survive it. What lies outside of `root` (a tmpfs) is not watched: whoever plays the power cut empties it.

Processes are played by *actors* in one process. An actor's calls can fail by `Fault`s and can be the last ones it ever
made: `Crash` is no Exception, and all that its cleanup code tries afterwards fails in the same way, so that a killed
process leaves what it would leave. Descriptors that it opened are closed by `bury`, and with them its locks.
"""

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

SECTOR = 512
_WATCHED = (
    "open", "close", "fsync", "fdatasync", "write", "pwrite", "pwritev", "posix_fallocate", "ftruncate",
    "rename", "link", "unlink", "mkdir", "rmdir", "eventfd", "memfd_create",
)  # fmt: skip
WRITES = frozenset({"open", "write", "pwrite", "pwritev", "posix_fallocate", "mkdir"})
"""What fails on a full disk: creating, and writing."""
SYNCS = frozenset({"fsync", "fdatasync"})


class Crash(BaseException):
    """The actor died before this call."""


@dataclass(eq=False)
class Fault:
    """An error that calls of some kinds meet on some paths."""

    calls: frozenset[str]
    where: Callable[[Path], bool]
    errno: int
    left: int = -1
    """How often yet; -1: until it is lifted."""
    met: int = 0


@dataclass(eq=False)
class _Op:
    """One name operation that is not durable yet."""

    name: str
    ino: int | None
    """What the name stands for from now on; None: nothing."""
    target: "_Op | None" = None
    """For the old name of a rename: the operation on the new one."""
    needs: "_Op | None" = None
    """For the new name of a rename: the rename by which the file came to its old one. Those keep their order."""
    renamed: bool = False
    durable: bool = False
    applied: bool = False


@dataclass
class _Actor:
    name: str
    fuse: int | None
    """Calls until it dies."""
    dead: bool = False


class SimFS:
    """The watched tree below `root`. A context manager: outside of it nothing is watched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[Fault] = []
        self.deaf: Callable[[Path], bool] = lambda _: False
        """Paths whose fsync does nothing and says it did: for negative controls."""
        self.calls = 0
        """Calls of actors so far: crash points."""
        self._real = {name: getattr(os, name) for name in _WATCHED}
        self._real_io_open = io.open
        self._actor: _Actor | None = None
        self._owned: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._ops: dict[int, list[_Op]] = {}
        self._phantom: dict[int, bytes] = {}
        self._pins: dict[int, int] = {}
        self._take_stock()

    def __enter__(self) -> Self:
        for name in _WATCHED:
            setattr(os, name, getattr(self, f"_{name}"))
        io.open = self._io_open  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        io.open = self._real_io_open
        self._forget()

    # Actors.

    @contextmanager
    def acting(self, name: str, fuse: int | None = None) -> Iterator[None]:
        """Let what is called now be the doing of an actor, who dies before its call number `fuse` (from 0)."""
        before, self._actor = self._actor, _Actor(name, fuse)
        try:
            yield
        finally:
            self._actor = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let what is called now be nobody's doing: no faults, no crash."""
        before, self._actor = self._actor, None
        try:
            yield
        finally:
            self._actor = before

    def bury(self, name: str) -> None:
        """Close every descriptor that an actor left open, as the kernel does."""
        for fd in [fd for fd, owner in self._owned.items() if owner == name]:
            del self._owned[fd]
            with suppress(OSError):
                self._real["close"](fd)

    def _call(self, call: str, path: Path | int) -> Path | None:
        """Count a call, and fail it if it is due; return its path if that is watched."""
        place = self._path_of(path)
        actor = self._actor
        if actor is not None:
            if actor.dead or actor.fuse == 0:
                actor.dead = True
                raise Crash(f"{actor.name} before {call} {place.name}")
            self.calls += 1
            if actor.fuse is not None:
                actor.fuse -= 1
            for fault in self.faults:
                if fault.left and call in fault.calls and fault.where(place):
                    fault.left -= 1
                    fault.met += 1
                    raise OSError(fault.errno, os.strerror(fault.errno), str(place))
        return place if place.is_relative_to(self.root) else None

    def _path_of(self, path: Path | int) -> Path:
        if isinstance(path, int):
            return Path(os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)"))
        return Path(os.fspath(path))

    # Calls on descriptors.

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        creates = bool(flags & os.O_CREAT)
        place = self._call("open", path) if creates or flags & os.O_TRUNC else None
        new = place is not None and creates and not os.path.lexists(place)
        fd = self._own(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        if new:
            assert place is not None
            self._note(place, self._pin_fd(fd))
        return fd

    def _eventfd(self, *args: int) -> int:
        return self._own(self._real["eventfd"](*args))

    def _memfd_create(self, *args: Any) -> int:
        return self._own(self._real["memfd_create"](*args))

    def _own(self, fd: int) -> int:
        if self._actor is not None:
            self._owned[fd] = self._actor.name
        return fd

    def _close(self, fd: int) -> None:
        self._owned.pop(fd, None)
        self._real["close"](fd)

    def _io_open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+"):
            self._call("open", file)
        return self._real_io_open(file, mode, *args, **kwargs)

    def _write(self, fd: int, data: Any) -> int:
        self._call("write", fd)
        return int(self._real["write"](fd, data))

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        self._call("pwrite", fd)
        return int(self._real["pwrite"](fd, data, offset))

    def _pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        try:
            self._call("pwritev", fd)
        except OSError:
            # A disk that becomes full in the middle of a write: part of it is there.
            part = b"".join(buffers)
            self._real["pwrite"](fd, part[: len(part) // 2], offset)
            raise
        return int(self._real["pwritev"](fd, buffers, offset))

    def _posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        self._call("posix_fallocate", fd)
        self._real["posix_fallocate"](fd, offset, size)

    def _ftruncate(self, fd: int, size: int) -> None:
        self._call("ftruncate", fd)
        self._real["ftruncate"](fd, size)

    def _fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _sync(self, call: str, fd: int) -> None:
        try:
            place = self._call(call, fd)
        except OSError:
            ino = self._pin_fd(fd)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self._phantom[ino] = self._live(ino)
            raise
        if place is None or self.deaf(place):
            return
        ino = self._pin_fd(fd)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._names[ino] = self._listing(place)
            for op in self._ops.pop(ino, []):
                op.durable = True
        else:
            self._bytes[ino] = self._arrived(ino)

    # Calls on names.

    def _rename(self, source: Any, target: Any, **_: Any) -> None:
        old, new = self._call("rename", source), Path(os.fspath(target))
        if old is None:
            self._real["rename"](source, target)
            return
        ino = self._known(old)
        self._known(new)
        self._real["rename"](source, target)
        here = [op for op in self._ops.get(self._pin(old.parent), []) if op.name == old.name and op.ino is not None]
        arrival = self._note(new, ino)
        arrival.needs = next((op for op in here[-1:] if op.ino == ino and op.renamed), None)
        arrival.renamed = True
        self._note(old, None, arrival)

    def _link(self, source: Any, target: Any, **_: Any) -> None:
        old, new = self._call("link", source), Path(os.fspath(target))
        self._real["link"](source, target)
        if old is not None:
            self._note(new, self._known(old))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:  # Nobody in the product says it so.
            self._real["unlink"](path, dir_fd=dir_fd)
            return
        place = self._call("unlink", path)
        if place is not None and os.path.lexists(place):
            self._known(place)
        self._real["unlink"](path)
        if place is not None:
            self._note(place, None)

    def _mkdir(self, path: Any, mode: int = 0o777, **_: Any) -> None:
        place = self._call("mkdir", path)
        self._real["mkdir"](path, mode)
        if place is not None:
            self._note(place, self._pin(place))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None:  # Nobody in the product says it so.
            self._real["rmdir"](path, dir_fd=dir_fd)
            return
        place = self._call("rmdir", path)
        self._real["rmdir"](path)
        if place is not None:
            self._note(place, None)

    # What is known.

    def _note(self, path: Path, ino: int | None, target: _Op | None = None) -> _Op:
        op = _Op(path.name, ino, target)
        self._ops.setdefault(self._pin(path.parent), []).append(op)
        return op

    def _known(self, path: Path) -> int | None:
        """Return what a name stands for, after noting a creation that went past us (C code, `open`)."""
        if not os.path.lexists(path):
            return None
        ino = self._pin(path)
        if self._after(self._pin(path.parent)).get(path.name) != ino:
            self._note(path, ino)
        return ino

    def _pin(self, path: Path) -> int:
        """Keep an inode from being forgotten or used again; return its number."""
        ino = os.lstat(path).st_ino
        if ino not in self._pins:
            self._pins[ino] = self._real["open"](path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return ino

    def _pin_fd(self, fd: int) -> int:
        ino = os.fstat(fd).st_ino
        if ino not in self._pins:
            self._pins[ino] = self._real["open"](f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        return ino

    def _listing(self, directory: Path) -> dict[str, int]:
        return {name: self._pin(directory / name) for name in os.listdir(directory)}

    def _live(self, ino: int) -> bytes:
        fd = self._pins[ino]
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def _arrived(self, ino: int) -> bytes:
        """Return the live bytes but for those that an fsync error took: an fsync makes these durable."""
        live, phantom, durable = self._live(ino), self._phantom.get(ino), self._bytes.get(ino, b"")
        if phantom is None:
            return live
        return b"".join(
            _sector(durable, live, at)
            if live[at : at + SECTOR] == phantom[at : at + SECTOR]
            else live[at : at + SECTOR]
            for at in range(0, len(live), SECTOR)
        )

    def _after(self, directory: int, wanted: Callable[[_Op], bool] = lambda _: True) -> dict[str, int]:
        names = dict(self._names.get(directory, {}))
        for op in self._ops.get(directory, []):
            if wanted(op):
                names.pop(op.name, None)
                if op.ino is not None:
                    names[op.name] = op.ino
        return names

    # Power.

    def durable(self, directory: Path, *, live_names: bool = False) -> dict[str, bytes]:
        """Return the files of one directory that nothing can take away any more: name -> bytes.

        With `live_names`, every name operation did reach the disk.
        """
        ino = self._pin(self.root)
        for part in directory.relative_to(self.root).parts:
            ino = self._names.get(ino, {}).get(part, -1)
        names = self._listing(directory) if live_names else self._names.get(ino, {})
        return {name: self._bytes.get(child, b"") for name, child in names.items() if not self._is_dir(child)}

    def _is_dir(self, ino: int) -> bool:
        return stat.S_ISDIR(os.fstat(self._pins[ino]).st_mode)

    def power_cut(self, rng: Random) -> None:
        """Leave in the tree what a disk might hold after the power went now. Every actor must be buried before."""
        assert not self._owned, f"somebody still holds {self._owned}"
        for room, _, _ in os.walk(self.root):
            self._reconcile(Path(room))
        # The extremes matter as much as what lies between them.
        share = rng.choice((0.0, 1.0, 0.5, rng.random()))
        ops = [op for ops in self._ops.values() for op in ops]
        for op in ops:
            op.applied = rng.random() < share
        for op in ops:
            need = op.needs
            while op.applied and need is not None:
                op.applied, need = need.durable or need.applied, None if need.durable else need.needs
        for op in ops:
            if op.target is not None and not op.target.durable:
                op.applied = op.target.applied
        style = rng.choice(("durable", "live", "each"))
        tree: dict[Path, tuple[int, int, bytes | None]] = {}
        self._build(self._pin(self.root), Path(), style, rng, tree)
        self._forget()
        self._clear(self.root)
        self._write_tree(tree)
        self._take_stock()

    def _reconcile(self, directory: Path) -> None:
        before, now = self._after(self._pin(directory)), self._listing(directory)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                self._note(directory / name, now.get(name))

    def _build(
        self, directory: int, path: Path, style: str, rng: Random, tree: dict[Path, tuple[int, int, bytes | None]]
    ) -> None:
        for name, ino in sorted(self._after(directory, lambda op: op.applied).items()):
            mode = os.fstat(self._pins[ino]).st_mode
            if stat.S_ISDIR(mode):
                tree[path / name] = (ino, mode, None)
                self._build(ino, path / name, style, rng, tree)
            else:
                tree[path / name] = (ino, mode, self._survivor(ino, style, rng))

    def _survivor(self, ino: int, style: str, rng: Random) -> bytes:
        durable, live = self._bytes.get(ino, b""), self._arrived(ino)
        if durable == live:
            return live
        kind = rng.choice(("durable", "live", "prefix", "torn")) if style == "each" else style
        if kind == "prefix":
            return live[: rng.randint(min(len(durable), len(live)), len(live))]
        if kind == "torn":
            size = rng.choice((len(live), max(len(live), len(durable))))
            sectors = [
                _sector(live if rng.random() < 0.5 else durable, bytes(size), at) for at in range(0, size, SECTOR)
            ]
            return b"".join(sectors)
        return durable if kind == "durable" else live

    def _clear(self, directory: Path) -> None:
        for entry in list(os.scandir(directory)):
            if entry.is_dir(follow_symlinks=False):
                self._clear(Path(entry.path))
                self._real["rmdir"](entry.path)
            else:
                self._real["unlink"](entry.path)

    def _write_tree(self, tree: dict[Path, tuple[int, int, bytes | None]]) -> None:
        written: dict[int, Path] = {}
        for relative, (ino, mode, data) in tree.items():
            path = self.root / relative
            if data is None:
                self._real["mkdir"](path, stat.S_IMODE(mode))
            elif ino in written:
                self._real["link"](written[ino], path)
            else:
                fd = self._real["open"](path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                self._real["write"](fd, data)
                os.fchmod(fd, stat.S_IMODE(mode))
                self._real["close"](fd)
                written[ino] = path

    def _take_stock(self) -> None:
        """What is there now is durable."""
        for room, _, _ in os.walk(self.root):
            names = self._listing(Path(room))
            self._names[self._pin(Path(room))] = names
            for ino in names.values():
                if not self._is_dir(ino):
                    self._bytes[ino] = self._live(ino)

    def _forget(self) -> None:
        for fd in self._pins.values():
            self._real["close"](fd)
        for known in (self._bytes, self._names, self._ops, self._phantom, self._pins):
            known.clear()


def _sector(data: bytes, frame: bytes, at: int) -> bytes:
    """Return the sector of `data` at an offset, zeros behind its end, as long as that of `frame` is."""
    size = min(SECTOR, len(frame) - at)
    return data[at : at + size].ljust(size, b"\0")


def below(*rooms: Path) -> Callable[[Path], bool]:
    """Return a filter for what lies in these directories."""
    return lambda path: any(path.is_relative_to(room) for room in rooms)


def full(*rooms: Path) -> Fault:
    """Return a full disk, until it is lifted."""
    return Fault(WRITES, below(*rooms), errno.ENOSPC)


def failing(calls: frozenset[str] | Sequence[str], *rooms: Path, times: int = 1) -> Fault:
    """Return input/output errors of these calls."""
    return Fault(frozenset(calls), below(*rooms), errno.EIO, times)
