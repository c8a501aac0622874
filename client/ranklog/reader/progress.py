"""How far a larger download is: a bar on a terminal, one line a minute anywhere else. All on stderr.

[########------------]  41 % · 120 of 290 MB, 1,203 of 2,941 shards
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Self, TextIO

from ranklog.reader.listing import Shard

SHOW_AFTER_S = 1.0
"""What takes no longer needs no bar."""
SHOW_INTERVAL_S = 0.5
LINE_INTERVAL_S = 60.0
BAR_CELLS = 20
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """The download of these shards; a context manager, at whose end the bar is gone."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        quiet: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._quiet = quiet
        self._clock = clock
        self._shards, self._size_bytes = len(shards), sum(shard.size_bytes for shard in shards)
        self._shards_done = self._size_bytes_done = 0
        self._shown = False
        self._next_s = clock() + (SHOW_AFTER_S if self._on_terminal else LINE_INTERVAL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def add(self, shard: Shard) -> None:
        """Count a shard that has arrived, and say so if it is time for that."""
        self._shards_done += 1
        self._size_bytes_done += shard.size_bytes
        if self._quiet or self._clock() < self._next_s:
            return
        if self._on_terminal:
            self._next_s = self._clock() + SHOW_INTERVAL_S
            width = shutil.get_terminal_size().columns - 1  # A line that wraps could not be rewritten.
            self._stream.write(f"{_CLEAR_LINE}{self._text()[:width]}")
            self._shown = True
        else:
            self._next_s = self._clock() + LINE_INTERVAL_S
            self._stream.write(f"{self._text()}\n")
        self._stream.flush()

    def _text(self) -> str:
        share = self._size_bytes_done / self._size_bytes if self._size_bytes else 1.0
        filled = int(share * BAR_CELLS)
        bar = f"[{'#' * filled}{'-' * (BAR_CELLS - filled)}] {int(share * 100):3d} %"
        sizes = f"{self._size_bytes_done / 1e6:,.1f} of {self._size_bytes / 1e6:,.1f} MB"
        return f"ranklog: {bar} · {sizes}, {self._shards_done:,} of {self._shards:,} shards fetched"
