"""Puts a daemon together, in the order that matters, and takes it apart again.

    directories checked ─▶ lock ─▶ WAL recovered, new segment ─▶ old ones sealed ─▶ socket bound ─▶ shipper ─▶ READY

Nothing is touched before the lock is held, and nobody can connect before the WAL can take what they send.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ranklog import fs, places
from ranklog.identity import boot_id
from ranklog.layout import Lsn
from ranklogd.adopt import Adopter
from ranklogd.config import Config
from ranklogd.disk import Disk
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


@dataclass
class Parts:
    """Everything a running daemon consists of."""

    config: Config
    state: StateDir
    store_id: str
    lock_fd: int
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
        os.close(self.lock_fd)


def prepare(config: Config) -> StateDir:
    """Check and create the directories; raises UsageError or OSError in words a person can act on."""
    state = StateDir(config.state_dir)
    for path, what in ((config.state_dir, "the state directory"), (config.runtime_dir, "the runtime directory")):
        if what == "the state directory":
            places.require_local(path, what, allow=config.allow_network_fs)
        places.ensure_private_dir(path)
    for room in state.rooms:
        fs.make_dir(room)
    return state


def assemble(
    config: Config, state: StateDir, notify: Notifier, *, lock_wait_s: float, stopped: Callable[[float], bool]
) -> Parts:
    """Start a daemon up to the point where clients can connect; raises Busy, OSError, FormatError."""
    lock_fd = take_lock(state.lock, wait_s=lock_wait_s, stopped=stopped)
    found = recover(state, int(time.time()))
    for note in found.notes:
        log.warning("wal_recovered %s", note)
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
    own = [places.spool_dirs(settings)[0], *places.journal_dirs(settings)[:1]]
    for directory in own:
        places.ensure_private_dir(directory)
    offer = Offer(str(own[0]), str(own[-1]), str(_write_cookie(config)))
    ingest = Ingest(wal, writers, offer, writers_max=config.writers_max, full_reason=lambda: disk.reason)
    directories = places.adoption_dirs(settings)
    adopter = Adopter(ingest, directories)
    adopter.scan()
    socket = DaemonSocket(config.socket, config.socket_mode, _group(config))
    watch = Watch(directories)
    socket.watch(watch.fd)
    shipper = ShipperProcess(config.to_json())
    return Parts(config, state, found.store_id, lock_fd, ingest, adopter, disk, socket, shipper, watch, notify)


def _group(config: Config) -> int | None:
    import grp

    return grp.getgrnam(config.socket_group).gr_gid if config.socket_group else None


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
