import io
from collections import namedtuple

from ranklog.reader.progress import Progress

Fake = namedtuple("Fake", "size_bytes")
SHARDS = [Fake(1_000_000)] * 8


class Screen(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, *, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def tell(*, terminal, step_s, quiet=False):
    now_s = [100.0]
    screen = Screen(terminal=terminal)
    with Progress(SHARDS, quiet=quiet, stream=screen, clock=lambda: now_s[0]) as progress:
        for shard in SHARDS:
            now_s[0] += step_s
            progress.add(shard)
    return screen.getvalue()


def test_a_terminal_sees_a_bar_that_goes_away_at_the_end():
    lines = tell(terminal=True, step_s=0.5).split("\r\x1b[K")
    assert lines[1] == "ranklog: [#####---------------]  25 % · 2.0 of 8.0 MB, 2 of 8 shards fetched"
    assert lines[-2].startswith("ranklog: [####################] 100 %")
    assert lines[-1] == ""


def test_what_is_over_at_once_shows_nothing():
    assert tell(terminal=True, step_s=0.1) == ""
    assert tell(terminal=False, step_s=1.0) == ""


def test_a_log_file_gets_a_line_a_minute():
    lines = tell(terminal=False, step_s=30.0).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("ranklog: [") for line in lines)


def test_quiet_is_silent():
    assert tell(terminal=True, step_s=5.0, quiet=True) == tell(terminal=False, step_s=90.0, quiet=True) == ""
