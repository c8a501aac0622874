import math
from datetime import UTC, date, datetime, timedelta, timezone

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.cli.output import (
    Look,
    arrow_rows,
    cell,
    csv_column,
    display_width,
    human_size,
    iso_utc,
    json_value,
    lay_out,
    number,
    printable,
    utc,
)

TEXT, TIME, NUMBER = Look.TEXT, Look.TIME, Look.NUMBER


def test_columns_are_aligned_numbers_to_the_right():
    table = lay_out(["key", "value"], [["loss", "1.5"], ["accuracy", "22"]], [TEXT, NUMBER], None)
    assert table.lines == [
        "key       value",
        "loss        1.5",
        "accuracy     22",
    ]
    assert table.hidden == []


def test_long_texts_are_cut_before_times_and_numbers_never():
    row = ["a" * 40, "2026-11-22 12:00:00.000", "-123.456789"]
    assert lay_out(["k", "t", "v"], [row], [TEXT, TIME, NUMBER], 50).lines[1] == (
        "aaaaaaaaaaa…  2026-11-22 12:00:00.000  -123.456789"
    )
    assert lay_out(["k", "t", "v"], [row], [TEXT, TIME, NUMBER], 42).lines[1] == (
        "aaaaaaaaa…  2026-11-22 12:00…  -123.456789"
    )


def test_columns_without_room_are_left_out_and_named():
    table = lay_out(["first", "second", "third"], [["x" * 20, "y" * 20, "1"]], [TEXT, TEXT, NUMBER], 22)
    assert table.lines == ["first       second", "xxxxxxxxx…  yyyyyyyyy…"]
    assert table.hidden == ["third"]


def test_the_first_column_is_always_there():
    table = lay_out(["number", "b"], [["1234567890", "b"]], [NUMBER, TEXT], 5)
    assert table.hidden == ["b"]
    assert table.lines == ["numb…", "1234…"]


@given(
    header=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    cells=st.lists(st.text(max_size=60), min_size=6, max_size=6),
    looks=st.lists(st.sampled_from(Look), min_size=6, max_size=6),
    width=st.integers(2, 120),
)
def test_no_line_is_wider_than_the_terminal(header, cells, looks, width):
    count = len(header)
    table = lay_out(header, [cells[:count]], looks[:count], width)
    assert all(display_width(line) <= width for line in table.lines)
    assert table.hidden == header[count - len(table.hidden) :]


def test_names_cannot_move_the_cursor_or_hide_text():
    assert printable("a\x1b[2Jb\r\nc\u202e\u2028\x7f\ud800") == "a\\x1b[2Jb\\r\\nc\\u202e\\u2028\\x7f\\ud800"
    assert printable("loss/größe 🙂 漢字") == "loss/größe 🙂 漢字"
    assert lay_out(["k"], [["\x1b[31m"]], [TEXT], None).lines[1] == "\\x1b[31m"


def test_wide_characters_take_two_cells():
    assert (display_width("abc"), display_width("漢字"), display_width("🙂"), display_width("e\u0301")) == (3, 4, 2, 1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"), (3.0, "3.0"), (1 / 3, "0.333333333"), (-1234567.891011, "-1234567.89"), (1e300, "1e+300"),
        (math.nan, "nan"), (-math.inf, "-inf"), (1234567890.0, "1234567890.0"),
    ],
)  # fmt: skip
def test_numbers_are_exact_while_short(value, shown):
    assert number(value) == shown


def test_cells_of_every_kind():
    assert cell(None) == ""
    assert cell(True) == "True"
    assert cell(12) == "12"
    assert cell(datetime(2026, 1, 2, 3, 4, 5, 678900)) == "2026-01-02 03:04:05.678"
    assert cell({"a": [1.0, math.nan]}) == '{"a": [1.0, "NaN"]}'


def test_json_values_are_valid_json_whatever_came_out():
    assert json_value([math.nan, math.inf, -math.inf, 1.5, None, True]) == [
        "NaN",
        "Infinity",
        "-Infinity",
        1.5,
        None,
        True,
    ]
    assert json_value({1: b"\x00\xff", "t": datetime(2026, 1, 2), "d": date(2026, 1, 2)}) == {
        "1": "00ff", "t": "2026-01-02T00:00:00Z", "d": "2026-01-02",
    }  # fmt: skip
    assert json_value(timedelta(seconds=90)) == 90.0


def test_times_are_utc():
    assert iso_utc(datetime(2026, 1, 2, 3, 0, tzinfo=timezone(timedelta(hours=2)))) == "2026-01-02T01:00:00Z"
    assert utc(1_700_000_000_123_456) == datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_530_000, "1.53 MB"), (999_900_000, "1 GB"), (5e15, "5e+03 TB")],
)
def test_sizes_have_three_digits(size, text):
    assert human_size(size) == text


def test_arrow_rows_may_repeat_names_and_need_no_time_zone_database():
    moment = datetime(2026, 1, 2, 3, 4, 5, 6)
    batch = pa.record_batch(
        [pa.array([1]), pa.array([2]), pa.array([moment], pa.timestamp("ns", "Mars/Olympus"))], names=["a", "a", "t"]
    )
    assert list(arrow_rows(batch)) == [(1, 2, moment)]


def test_csv_columns_keep_numbers_exact_and_nested_values_as_json():
    assert csv_column(pa.array([0.1, None, math.inf])) == [0.1, None, math.inf]
    assert csv_column(pa.array([True, None, False])) == ["true", None, "false"]
    assert csv_column(pa.array([[1, None], None])) == ["[1, null]", None]
    assert csv_column(pa.array([datetime(2026, 1, 2, 3, 4, 5)], pa.timestamp("us", "UTC"))) == [
        "2026-01-02 03:04:05.000000"
    ]
    assert csv_column(pa.array([b"\x00\xff"])) == ["00ff"]
