"""Puts a daemon together, in the order that matters, and takes it apart again.

    directories checked ─▶ locks ─▶ WAL recovered, new segment ─▶ old ones sealed ─▶ socket bound ─▶ shipper ─▶ READY

Nothing is touched before the locks are held, and nobody can connect before the WAL can take what they send.
"""

import contextlib
import grp
import logging
import os
import resource
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranklog import fs, places
from ranklog.config import Settings
from ranklog.errors import UsageError
from ranklog.failpoint import failpoint
from ranklog.identity import boot_id
from ranklog.layout import Lsn
from ranklogd.adopt import Adopter
from ranklogd.config import Config
from ranklogd.disk import Disk, Shares
from ranklogd.ingest import Ingest, Offer
from ranklogd.lock import take_lock
from ranklogd.notify import Notifier
from ranklogd.sequence import Writers
from ranklogd.socket import DaemonSocket
from ranklogd.statedir import StateDir
from ranklogd.supervise import ShipperProcess
from ranklogd.wal.log import Wal, WalIdentity
from ranklogd.wal.recover import recover, seal_leftovers
from ranklogd.watch import Watch

log = logging.getLogger("ranklogd")

LOCK_WAIT_S = 30.0
OPEN_FILES_MAX = 65536
"""A connection needs a descriptor, and so does each file of a dead writer while it is replayed."""


@dataclass
class Parts:
    """Everything a running daemon consists of."""

    config: Config
    state: StateDir
    store_id: str
    lock_fds: tuple[int, ...]
    ingest: Ingest
    adopter: Adopter
    disk: Disk
    socket: DaemonSocket
    shipper: ShipperProcess
    watch: Watch
    notify: Notifier

    def close(self) -> None:
        """Let go of everything; the lock last."""
        self.socket.close()
        self.shipper.kill()
        self.watch.close()
        self.ingest.wal.close()
        fs.unlink(_cookie(self.config))
        for fd in self.lock_fds:
            os.close(fd)


def prepare(config: Config) -> StateDir:
    """Check and create the directories; raises UsageError or OSError in words a person can act on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_MAX:
        most = OPEN_FILES_MAX if hard < 0 else min(hard, OPEN_FILES_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    state = StateDir(config.state_dir)
    places.require_local(state.root, allow=config.allow_network_fs)
    for path in (state.root, config.runtime_dir):
        places.ensure_private_dir(path)
    for room in state.rooms:
        fs.make_dir(room)
        places.ensure_private_dir(room)  # While the state directory was open to others, they may have put one there.
    for path in (state.root, state.root.parent):
        with contextlib.suppress(PermissionError):  # A start that was killed may have made a room and not synced it.
            fs.sync_dir(path)
    return state


def assemble(
    config: Config,
    state: StateDir,
    notify: Notifier,
    *,
    lock_wait_s: float,
    stopped: Callable[[float], bool],
    bring_in: Sequence[Path] = (),
) -> Parts:
    """Start a daemon up to the point where clients can connect; raises Busy, OSError, FormatError.

    With `bring_in`, directories that may be copies, only these are looked into for dead writers.
    """
    socket_lock = config.socket.with_name(f"{config.socket.name}.lock")
    lock_fds = (
        take_lock(state.lock, state.root, "--state-dir", wait_s=lock_wait_s, stopped=stopped),
        take_lock(socket_lock, config.socket, "--runtime-dir or --socket", wait_s=lock_wait_s, stopped=stopped),
    )
    fs.unlink(state.reserve)  # On a disk full of our own records, the new segment needs it: `disk` takes it again.
    failpoint("reserve.unlink.after")
    found = recover(state, int(time.time()))
    for note in found.notes:
        log.warning("wal_recovered %s", note)
    if bring_in:
        # The state directory may be a copy, and its twin may live and give the same lsns to other records.
        found.store_id = secrets.token_hex(8)
    writers = Writers(found.marks.values())
    wal = Wal(state.wal, WalIdentity(config.node, found.store_id, boot_id()), Lsn(found.next_lsn), writers.marks)
    seal_leftovers(state, found, wal.first_lsn)
    disk = Disk(
        state,
        quota_bytes=config.disk_quota_bytes,
        free_min_bytes=config.disk_free_min_bytes,
        reserve_bytes=config.reserve_size_bytes,
    )
    disk.look()
    settings = config.settings()
    offer = Offer(*_own_places(settings), str(_write_cookie(config)))
    ingest = Ingest(
        wal,
        writers,
        offer,
        writers_max=config.writers_max,
        disk_full=lambda: disk.reason,
        shares=Shares(config.quota_per_uid_bytes),
    )
    find = (lambda: list(bring_in)) if bring_in else (lambda: places.adoption_dirs(settings))
    adopter = Adopter(ingest, find, state.quarantine, any_owner=bool(bring_in))
    adopter.scan()
    socket = DaemonSocket(config.socket, config.socket_mode, _group(config))
    watch = Watch(adopter.directories)
    socket.watch(watch.fd)
    shipper = ShipperProcess(config.to_json())
    return Parts(config, state, found.store_id, lock_fds, ingest, adopter, disk, socket, shipper, watch, notify)


def _own_places(settings: Settings) -> tuple[str, str]:
    """Return (spool, journal) directories to offer to clients, made ready; empty where none can be."""
    spools, journals = places.spool_dirs(settings)[:1], places.journal_dirs(settings)[:1]
    ready = [
        [str(path) for path in places.usable_dirs(dirs, what, settings, log.warning)]
        for dirs, what in ((spools, "spool"), (journals, "journal"))
    ]
    return next(iter(ready[0]), ""), next(iter(ready[1]), "")


def _group(config: Config) -> int | None:
    """Return the socket's group; raises UsageError for one that this node does not know."""
    name = config.socket_group
    try:
        return None if not name else int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as exc:
        raise UsageError(f"socket_group {name!r} is no group of this node; see: getent group") from exc


def _cookie(config: Config) -> Path:
    return Path(f"{config.socket}.cookie")


def _write_cookie(config: Config) -> Path:
    """Leave a file by which a client sees whether it shares this daemon's view of the filesystem."""
    path = _cookie(config)
    fs.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.write(fd, secrets.token_hex(16).encode())
    os.close(fd)
    return path
