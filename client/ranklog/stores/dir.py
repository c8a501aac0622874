"""A directory as object store: the default, and the one for air-gapped clusters and parallel filesystems.

    <root>/<key>                      an object
    <directory of key>/.put-*.tmp     one on its way; never listed

Put is copy to a temporary name in the object's own directory, fsync, give it its name unless that is taken, fsync of
the directory and of all above it up to the root. No locks and no mmap: neither can be trusted on the filesystems
where people keep such a directory. Modes follow the umask, so that a group may read what a daemon writes.

A killed put leaves its temporary file. A later put into that directory removes it, once it is an hour older than
that put's own file: both times come from the same file server, so a wrong clock here cannot make a neighbour's
living file look old.
"""

import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ranklog import fs
from ranklog.errors import StoreError, UsageError
from ranklog.failpoint import failpoint
from ranklog.stores.base import Allowance, Download, ObjectInfo, StoreOptions, Upload, check_key

STALE_AFTER_S = 3600
"""A temporary file that was not written to for so long belongs to nobody any more."""

_CHUNK_SIZE = 1 << 20

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# What FUSE and some network filesystems answer to an fsync of a directory: there is none, and no need to wait for it.
_NO_DIR_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})


def open_url(url: str, _: StoreOptions) -> "DirStore":
    """Return the store of a path or a file:// URL; a relative path counts from here and now. Raises UsageError."""
    if not url.lower().startswith("file:"):
        try:
            return DirStore(Path(url).expanduser().absolute())
        except RuntimeError as exc:
            raise UsageError(f"store {url!r}: {exc}; write the directory's absolute path") from exc
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or parts.query or parts.fragment:
        raise UsageError(f"store URL {url!r} names no local directory; write file:///absolute/path or a plain path")
    return DirStore(Path(path))


class DirStore:
    """A Store in the directory `root`, which the first put creates. May be shared by threads, processes and nodes."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)
        self._swept: dict[Path, float] = {}
        self._settled = False

    @property
    def allowance(self) -> Allowance | None:
        """None: requests are not counted here."""
        return None

    def put(self, uploads: Sequence[Upload]) -> dict[str, StoreError | None]:
        """Store each file; one fsync of a directory serves all objects put into it."""
        if not uploads:
            return {}
        try:
            fs.make_dir(self.root, 0o777)
        except OSError as exc:
            raise self._error("cannot create the store", exc) from exc
        self._settle()
        results: dict[str, StoreError | None] = {}
        changed: dict[Path, list[str]] = {}
        for upload in uploads:
            assert upload.key not in results, f"key {upload.key!r} twice in one call"
            try:
                check_key(upload.key)
                target = self.root / upload.key
                self._put_file(upload.source, target)
                for directory in (target.parent, *target.parent.parents):
                    changed.setdefault(directory, []).append(upload.key)
                    if directory == self.root:
                        break
                results[upload.key] = None
            except OSError as exc:
                results[upload.key] = self._error(f"cannot store {upload.key}", exc)
            except StoreError as exc:
                results[upload.key] = exc
        for directory, keys in changed.items():
            try:
                fs.sync_dir(directory)
            except OSError as exc:
                if exc.errno not in _NO_DIR_SYNC:
                    results.update(dict.fromkeys(keys, self._error(f"cannot make {directory} durable", exc)))
        return results

    def _settle(self) -> None:
        """Make the root's own name durable, once: a put that was killed may have made it and not come to that."""
        if self._settled:
            return
        try:
            fs.sync_dir(self.root.parent)
        except OSError as exc:
            if exc.errno not in _NO_DIR_SYNC | _DENIED:
                raise self._error(f"cannot make {self.root} durable", exc) from exc
        self._settled = True

    def heads(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        """Look at each file; what is not a regular file is no object."""
        return {key: info for key in keys if (info := self._head(key)) is not None}

    def _head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        try:
            info = os.stat(self.root / key, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise self._error(f"cannot look at {key}", exc) from exc
        return ObjectInfo(key, info.st_size) if stat.S_ISREG(info.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Walk from the prefix's directory; links below the root are not followed, so no walk loops or leaves it."""
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        return self._walk(folder, prefix)

    def get(self, key: str, target: Path) -> None:
        """Copy the file beside `target`, whose directory must exist, and rename it there."""
        if self._head(key) is None:
            raise StoreError(f"no object {key} in {self.url}", permanent=True)
        temporary = _temporary_beside(target)
        try:
            try:
                _copy(self.root / key, temporary)
                fs.publish(temporary, target)
            finally:
                fs.unlink(temporary)
        except OSError as exc:
            raise self._error(f"cannot copy {key} to {target}", exc) from exc

    def fetch(self, downloads: Sequence[Download]) -> Iterator[str]:
        """Copy one after the other; readers read a directory in place and never ask for this."""
        missing: StoreError | None = None
        for download in downloads:
            try:
                self.get(download.key, download.target)
            except StoreError as exc:
                if not exc.permanent:
                    raise
                missing = missing or exc
            else:
                yield download.key
        if missing is not None:
            raise missing

    def delete(self, keys: Sequence[str]) -> None:
        """Unlink the files and sync their directories, which stay: a put may be on its way into one of them."""
        failed: OSError | None = None
        changed = set()
        for key in keys:
            check_key(key)
            path = self.root / key
            try:
                fs.unlink(path)
                changed.add(path.parent)
            except NotADirectoryError:
                continue
            except OSError as exc:
                failed = failed or exc
        for directory in sorted(changed):
            try:
                fs.sync_dir(directory)
            except OSError as exc:
                if exc.errno not in _NO_DIR_SYNC | {errno.ENOENT}:
                    failed = failed or exc
        if failed is not None:
            raise self._error("cannot delete every object", failed) from failed

    def _put_file(self, source: Path, target: Path) -> None:
        if os.path.lexists(target):
            self._require_same(source, target)
            return
        # The umask decides who may read the store, not the modes of the state directory it comes from.
        target.parent.mkdir(mode=0o777, parents=True, exist_ok=True)  # `put` syncs the whole chain, new or not.
        temporary = _temporary_beside(target)
        try:
            _copy(source, temporary)
            failpoint("store.sync.after")
            self._sweep(target.parent, temporary)
            fs.publish_new(temporary, target)
            failpoint("store.publish.after")
        except FileExistsError:
            self._require_same(source, target)  # Somebody else was first with this name.
        finally:
            fs.unlink(temporary)

    def _require_same(self, source: Path, target: Path) -> None:
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise StoreError(f"{target} exists and is no regular file; nothing was overwritten", permanent=True)
        if not _same_bytes(source, target):
            sizes = f"{target.stat().st_size} bytes there, {source.stat().st_size} bytes here"
            raise StoreError(f"{target} holds other bytes ({sizes}); nothing was overwritten", permanent=True)

    def _sweep(self, directory: Path, own: Path) -> None:
        """Remove what killed puts left in `directory`; looks once an hour, for a directory may hold many objects."""
        now_s = time.monotonic()
        if now_s - self._swept.get(directory, -STALE_AFTER_S) < STALE_AFTER_S:
            return
        if len(self._swept) >= 1024:  # One entry for each run we wrote to: forgetting costs one look more.
            self._swept.clear()
        self._swept[directory] = now_s
        fresh_s = own.stat().st_mtime
        with os.scandir(directory) as entries:
            found = [entry for entry in entries if entry.name.startswith(".put-") and entry.name.endswith(".tmp")]
        for entry in found:
            try:
                if entry.stat(follow_symlinks=False).st_mtime < fresh_s - STALE_AFTER_S:
                    fs.unlink(Path(entry.path))
            except OSError:
                continue  # Another user's, or gone: not ours to mend, and no reason to refuse this put.

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(self.root / folder) as entries:
                found = [(_sort_key(entry), entry) for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as exc:
            raise self._error("cannot list the objects", exc) from exc
        for name, entry in sorted(found, key=lambda pair: pair[0]):
            key = f"{folder}/{name}" if folder else name
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key[:-1], prefix)
            elif key.startswith(prefix):
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # Deleted since the directory was read.
                except OSError as exc:
                    raise self._error("cannot list the objects", exc) from exc
                if stat.S_ISREG(info.st_mode):
                    yield ObjectInfo(key, info.st_size)

    def _error(self, what: str, exc: OSError) -> StoreError:
        if exc.errno in fs.NO_SPACE:
            remedy = "free space there or raise the quota"
        elif exc.errno in _DENIED:
            remedy = f"make it writable for uid {os.geteuid()}"
        elif exc.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            remedy = "something stands where a directory or a file of the store must be: move it away"
        else:
            remedy = "check that the filesystem is mounted and healthy"
        where = f": {exc.filename}" if exc.filename else ""
        text = f"{what} in {self.url}: {exc.strerror or exc}{where}; {remedy}"
        # Whatever else is wrong with a filesystem, a person can put it right: only the name itself cannot change.
        return StoreError(text, permanent=exc.errno == errno.ENAMETOOLONG)


def _temporary_beside(target: Path) -> Path:
    return target.with_name(f".put-{secrets.token_hex(8)}.tmp")


def _sort_key(entry: os.DirEntry[str]) -> str:
    # A directory sorts as the keys below it do: "a-b" stands before "a/c".
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _copy(source: Path, temporary: Path) -> None:
    """Copy into a new file and make its bytes durable."""
    with source.open("rb") as reader:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            offset = 0
            while chunk := reader.read(_CHUNK_SIZE):
                fs.write_all(fd, chunk, offset)
                offset += len(chunk)
                failpoint("store.put.mid")
            fs.sync_data(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # Network filesystems tell here that a write failed: no `finally` may hide it.


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while chunk := left.read(_CHUNK_SIZE):
            if chunk != right.read(_CHUNK_SIZE):
                return False
    return True
