"""What a soak measures all along: memory of the daemon's processes, bytes on disk and in tmpfs; and their picture."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from node import Node


class Sample(NamedTuple):
    """One look at the node."""

    at_s: float
    ingest_bytes: int
    shipper_bytes: int
    state_bytes: int
    spool_bytes: int
    journal_bytes: int
    store_bytes: int


class Gauge:
    """Takes a sample now and then."""

    def __init__(self, node: Node) -> None:
        self.samples: list[Sample] = []
        self._node = node
        self._began_s = time.monotonic()

    def look(self, daemon_pid: int) -> None:
        """Take a sample, once a second at most."""
        at_s = time.monotonic() - self._began_s
        if self.samples and at_s - self.samples[-1].at_s < 1:
            return
        node = self._node
        shippers = _children_of(daemon_pid)
        self.samples.append(
            Sample(
                at_s,
                rss(daemon_pid),
                sum(map(rss, shippers)),
                size(node.state),
                size(node.spool),
                size(node.journal),
                size(node.data),
            )
        )

    def plot(self, path: Path, title: str) -> None:
        """Draw memory and disk over time into a PNG."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        minutes = [sample.at_s / 60 for sample in self.samples]
        figure, (memory, disk) = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
        figure.suptitle(title)
        memory.set_ylabel("RSS [MiB]")
        disk.set_ylabel("bytes [MiB]")
        disk.set_xlabel("minutes")
        for axes, fields in (
            (memory, ("ingest_bytes", "shipper_bytes")),
            (disk, ("state_bytes", "spool_bytes", "journal_bytes", "store_bytes")),
        ):
            for field in fields:
                values = [getattr(sample, field) / (1 << 20) for sample in self.samples]
                axes.plot(minutes, values, label=field.removesuffix("_bytes"), linewidth=0.9)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def rss(pid: int) -> int:
    """Return a process's resident bytes; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def size(directory: Path) -> int:
    """Return the bytes that the files below a directory take up, as far as they stay long enough to be counted."""
    total = 0
    for room, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(room, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total
