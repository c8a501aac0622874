"""How far an upload is: what a row of snapshots says, on a terminal and elsewhere. Pure, with a clock of its own."""

import io

import pytest

from ranklog.cli.progress import BAR_CELLS, LINE_INTERVAL_S, SHOW_AFTER_S, SHOW_INTERVAL_S, Meter, Progress


def snapshot(
    received: int, uploaded: int, *, shards: int = 0, size_bytes: int = 0, error: str = "", full: str = ""
) -> dict:
    shipper = {
        "backlog_shards": shards,
        "backlog_bytes": size_bytes,
        "last_error": error,
        "last_error_class": "transient",
        "next_try_s": 23.4,
    }
    return {"watermarks": {"received": received, "uploaded": uploaded}, "shipper": shipper, "full": full}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    class Clock:
        now_s = 0.0

        def __call__(self) -> float:
            return self.now_s

    return Clock()


def test_a_bar_counts_from_where_the_wait_began_and_tells_rate_and_time_to_go():
    meter = Meter()
    assert meter.describe(snapshot(11_000, 1000, shards=3, size_bytes=4_200_000), 0) == (
        f"[{'-' * BAR_CELLS}]   0 % · 10,000 records, 3 shards, 4.2 MB left"
    )
    assert meter.describe(snapshot(11_000, 6000, shards=1, size_bytes=900), 10) == (
        f"[{'#' * 10}{'-' * 10}]  50 % · 5,000 records, 1 shard, 900 B left · 500 records/s · 10 s to go"
    )


def test_the_rate_is_that_of_the_last_minute():
    meter = Meter()
    for second in range(0, 600, 10):
        meter.describe(snapshot(100_000, second * 10), second)
    for second in range(600, 720, 10):
        text = meter.describe(snapshot(100_000, 6000 + (second - 600) * 100), second)
    assert "100 records/s" in text
    assert " to go" in text


def test_records_that_come_in_meanwhile_are_part_of_the_whole():
    meter = Meter()
    meter.describe(snapshot(100, 0), 0)
    assert " 25 % · 150 records left" in meter.describe(snapshot(200, 50), 1)
    assert "1 record left" in meter.describe(snapshot(200, 199), 2)


def test_trouble_takes_the_place_of_the_rate_with_its_reason_and_the_next_try():
    meter = Meter()
    assert meter.describe(snapshot(100, 40, shards=1, error="POST … answered 429"), 0) == (
        "60 records, 1 shard wait, next try in 23 s: POST … answered 429"
    )
    assert meter.describe(snapshot(100, 40, full="the disk is full"), 1) == "60 records wait: the disk is full"
    assert meter.describe(snapshot(100, 100), 2) == "taking in what dead writers left"
    assert meter.describe({}, 3) == "no daemon answers"


def test_another_daemon_with_smaller_numbers_begins_anew():
    meter = Meter()
    meter.describe(snapshot(1000, 900), 0)
    assert "  0 % · 50 records left" in meter.describe(snapshot(60, 10), 1)


def test_on_a_terminal_one_line_is_rewritten_and_taken_away_and_short_waits_show_nothing(clock):
    screen = Terminal()
    progress = Progress(quiet=False, stream=screen, clock=clock)
    progress.show(snapshot(100, 10))
    assert screen.getvalue() == ""
    clock.now_s = SHOW_AFTER_S
    progress.show(snapshot(100, 30))
    assert screen.getvalue().startswith("\r\x1b[Kranklog: [")
    assert not progress.due()
    clock.now_s += SHOW_INTERVAL_S
    assert progress.due()
    progress.show(snapshot(100, 60))
    progress.clear()
    assert screen.getvalue().endswith("\r\x1b[K")
    assert "\n" not in screen.getvalue()
    before = screen.getvalue()
    progress.clear()
    assert screen.getvalue() == before


def test_elsewhere_it_is_one_line_a_minute(clock):
    log = io.StringIO()
    progress = Progress(quiet=False, stream=log, clock=clock)
    for second in range(600):
        clock.now_s = float(second)
        if progress.due():
            progress.show(snapshot(1000, second))
    lines = log.getvalue().splitlines()
    assert len(lines) == 600 // LINE_INTERVAL_S - 1
    assert lines[0] == f"ranklog: [#{'-' * (BAR_CELLS - 1)}]   6 % · 940 records left · 1 records/s · 15 m 40 s to go"
    assert "\x1b" not in log.getvalue()


def test_a_reason_with_control_characters_cannot_move_the_cursor(clock):
    screen = Terminal()
    progress = Progress(quiet=False, stream=screen, clock=clock)
    clock.now_s = 5
    progress.show(snapshot(10, 0, error="bad\x1b[2Jnews\n"))
    assert "\x1b[2J" not in screen.getvalue()
    assert "\n" not in screen.getvalue()


def test_quiet_is_quiet(clock):
    progress = Progress(quiet=True, stream=Terminal(), clock=clock)
    clock.now_s = 1e6
    assert not progress.due()
