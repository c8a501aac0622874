"""Wakes the server loop when a file appears in, or is closed in, a directory. An optimisation: a rescan is the truth.

Only creation, moves and the closing of a written file are watched: the kernel closes a killed writer's files, and a
watch on modification would cost an event for every `log()` of every rank. Imports watchdog.
"""

import os
from pathlib import Path

from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer


class Watch(FileSystemEventHandler):
    """Directories to watch; `fd` becomes readable when something happened in one."""

    def __init__(self, directories: list[Path]) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._observer = Observer()
        self._observer.daemon = True
        self._seen: set[Path] = set()
        self._observer.start()  # Before the directories: what cannot be watched then fails for itself alone.
        self.follow(directories)

    def follow(self, directories: list[Path]) -> None:
        """Watch those of these directories that exist by now and are not watched yet."""
        for directory in directories:
            if directory in self._seen or not directory.is_dir():
                continue
            self._seen.add(directory)
            try:
                self._observer.schedule(
                    self, str(directory), event_filter=[FileCreatedEvent, FileMovedEvent, FileClosedEvent]
                )
            except OSError:
                continue  # Out of inotify watches, or not readable: the rescan does the work.

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Wake the loop (watchdog's thread)."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Make `fd` unreadable again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Stop watching."""
        self._observer.stop()
        self._observer.join(1)
