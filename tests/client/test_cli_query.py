import csv
import io
import json
import math

import pytest

from cli import ranklog
from shards import STORE_B, records, start, write_shard, writer

A = writer("a")


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    rows = start(A, name="otter") + records(A, [{"loss": 1 / (seq + 1), "note": "it's\x1b[31m"} for seq in range(100)])
    write_shard(root, rows)
    write_shard(root, rows[50:], store_id=STORE_B)
    return str(root)


def query(tmp_path, store, *arguments, **options):
    return ranklog("query", *arguments, "--to", store, home=tmp_path, **options)


def test_a_table_is_printed_with_its_row_count(tmp_path, store):
    done = query(tmp_path, store, "SELECT key, count(*) AS n, min(value) AS low FROM metrics GROUP BY key ORDER BY key")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "key     n   low\nloss  100  0.01\nnote  100\n(2 rows)\n"


def test_a_long_table_is_cut_with_a_note(tmp_path, store):
    done = query(tmp_path, store, "SELECT step FROM metrics WHERE key = 'loss' ORDER BY step", "--rows", "3")
    assert done.stdout == "step\n   0\n   1\n   2\n(100 rows; the first 3 shown (all: --rows 0, or --format csv))\n"
    everything = query(tmp_path, store, "SELECT step FROM metrics WHERE key = 'loss'", "--rows", "0")
    assert len(everything.stdout.splitlines()) == 102


@pytest.mark.parametrize(
    "statement", ["FROM records", "FROM metrics", "SELECT repeat('x', 500) AS long, repeat('漢', 500) AS wide"]
)
def test_a_table_fits_eighty_columns(tmp_path, store, statement):
    done = query(tmp_path, store, statement)
    table = done.stdout.splitlines()[:-1]
    assert done.returncode == 0
    assert all(len(line) + sum(character > "ᄀ" and character != "…" for character in line) <= 80 for line in table)


def test_what_had_no_room_is_named(tmp_path, store):
    note = query(tmp_path, store, "FROM records").stdout.splitlines()[-1]
    assert "no room for " in note
    assert "recv_ts, kind, key, value, text (wider terminal, --format csv, or fewer columns)" in note


def test_values_cannot_send_commands_to_the_terminal(tmp_path, store):
    done = query(tmp_path, store, "SELECT chr(27) || '[2J' AS x")
    assert done.stdout == "x\n\\x1b[2J\n(1 row)\n"


def test_csv_holds_all_rows_exactly(tmp_path, store):
    done = query(
        tmp_path, store, "SELECT step, value, ts, text FROM metrics WHERE key = 'loss' ORDER BY step", "--format", "csv"
    )
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert rows[0] == ["step", "value", "ts", "text"]
    assert [float(value) for _, value, _, _ in rows[1:]] == [1 / (seq + 1) for seq in range(100)]
    assert rows[1][2:] == ["2026-11-22 12:00:01.000000", ""]


@pytest.mark.parametrize("flag", [["--json"], ["--format", "json"]])
def test_json_is_valid_whatever_the_values(tmp_path, store, flag):
    statement = "SELECT 'nan'::DOUBLE a, '-inf'::DOUBLE b, NULL c, 1 d, 2 d, [1.5, 'inf'::DOUBLE] e, true f"
    done = query(tmp_path, store, statement, *flag)
    assert json.loads(done.stdout) == [
        {"a": "NaN", "b": "-Infinity", "c": None, "d": 1, "d#2": 2, "e": [1.5, "Infinity"], "f": True}
    ]
    assert query(tmp_path, store, "FROM metrics WHERE false", *flag).stdout == "[]\n"


def test_json_of_many_rows_is_one_document(tmp_path, store):
    done = query(tmp_path, store, "SELECT range AS n FROM range(25000)", "--json")
    assert [row["n"] for row in json.loads(done.stdout)] == list(range(25000))


def test_times_in_json_are_utc(tmp_path, store):
    done = query(tmp_path, store, "SELECT ts FROM records WHERE kind = 'start'", "--json", env={"TZ": "Asia/Tokyo"})
    assert json.loads(done.stdout) == [{"ts": "2026-11-22T12:00:00Z"}]


def test_nan_and_infinity_in_every_format(tmp_path):
    store = tmp_path / "store"
    write_shard(store, records(A, [{"x": math.nan}, {"x": math.inf}, {"x": -math.inf}]))
    statement = "SELECT value FROM metrics ORDER BY step"
    assert query(tmp_path, str(store), statement).stdout == "value\n  nan\n  inf\n -inf\n(3 rows)\n"
    assert query(tmp_path, str(store), statement, "--format", "csv").stdout == "value\nnan\ninf\n-inf\n"
    assert json.loads(query(tmp_path, str(store), statement, "--json").stdout) == [
        {"value": "NaN"}, {"value": "Infinity"}, {"value": "-Infinity"},
    ]  # fmt: skip


def test_the_statement_may_come_from_stdin(tmp_path, store):
    done = query(tmp_path, store, "-", stdin="SELECT 40 + 2 AS answer;\n")
    assert done.stdout == "answer\n    42\n(1 row)\n"


def test_project_and_run_narrow_what_is_read(tmp_path, store):
    count = ["SELECT count(*) AS n FROM records", "--format", "csv"]
    assert query(tmp_path, store, *count, "--run", "otter").stdout == "n\n201\n"
    assert query(tmp_path, store, *count, "--project", "other").stdout == "n\n0\n"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("SELEKT 1", "syntax error"),
        ("SELECT * FROM nothing", "Table with name nothing does not exist"),
        ("SELECT loss FROM metrics", 'Referenced column "loss" not found'),
    ],
)
def test_a_statement_that_makes_no_sense_is_wrong_usage_in_one_line(tmp_path, store, statement, says):
    done = query(tmp_path, store, statement)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ranklog: query: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert "LINE 1" not in done.stderr


@pytest.mark.parametrize(
    "statement",
    ["SELECT key::INT AS k FROM metrics", "SELECT if(range = 90000, 'x' || range, '1')::INT FROM range(99999)"],
)
def test_a_statement_that_fails_on_the_data_is_an_error_in_one_line(tmp_path, store, statement):
    done = query(tmp_path, store, statement, "--format", "csv")
    assert done.returncode == 1
    assert "Could not convert string" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_statement_without_a_result_prints_none(tmp_path, store):
    done = query(tmp_path, store, "CREATE TABLE mine AS SELECT 1 AS a; DROP TABLE mine")
    assert done.returncode == 0
    assert done.stderr == ""


def test_an_empty_store_has_empty_views(tmp_path):
    done = query(tmp_path, str(tmp_path / "nothing"), "SELECT count(*) AS n, max(value) AS v FROM metrics", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [{"n": 0, "v": None}])
