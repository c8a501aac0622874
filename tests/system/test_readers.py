"""The files as they are, in the readers people use: each sees the same rows, with its defaults, without ranklog."""

import math

import pytest

from node import Node

COLUMNS = ["run", "rank", "node", "seq", "step", "kind", "key", "value", "text"]
SCRIPT = """
import ranklog
ranklog.init(project="0001", name="Läufe/v1", id="7", config={"lr": 1e-3, "model": {"depth": 12}}, notes="ü")
for step in range(50):
    ranklog.log({"loss": 1 / (step + 1), "acc": step / 50})
ranklog.log({"nan": float("nan"), "inf": float("-inf"), "big": 2**60 + 3, "flag": True, "name": "héllo", "list": [1, 2]})
ranklog.log({"only_late": 0.9})
ranklog.log_system({"rss": 1})
ranklog.alert("look", "at this")
ranklog.finish()
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Two runs of two ranks whose names look like numbers, in several shards of different key sets."""
    with Node(tmp_path_factory.mktemp("node")) as node:
        node.start_daemon()
        for rank in ("0", "1"):
            done = node.python(SCRIPT, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
            assert done.returncode == 0, done.stderr
            node.upload()
        assert node.python(SCRIPT.replace('id="7"', 'id="0008"')).returncode == 0
        node.upload()
        yield node


def normal(rows):
    """Rows as comparable tuples: NaN equals NaN, missing is None in every reader's dialect."""

    def cell(value):
        if value is None or value is False:
            return None
        if isinstance(value, float) and math.isnan(value):
            return None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)

    return sorted((tuple(cell(row[column]) for column in COLUMNS) for row in rows), key=repr)


@pytest.fixture(scope="module")
def expected(node):
    rows = node.raw_rows("true")
    assert {row["run"] for row in rows} == {"7", "0008"}
    assert sum(row["key"] == "loss" for row in rows) == 150
    by_key = {row["key"]: row for row in rows if row["kind"] == "metrics"}
    assert by_key["big"]["text"] == str(2**60 + 3)
    assert by_key["big"]["value"] is None
    assert by_key["name"]["text"] == '"héllo"'
    assert by_key["list"]["text"] == "[1,2]"
    assert by_key["inf"]["value"] == -math.inf
    assert math.isnan(by_key["nan"]["value"])
    return normal(rows)


def files(node):
    return f"{node.url}/v1/*/*/*.parquet"


def test_duckdb(node, expected):
    import duckdb

    assert normal(duckdb.sql(f"select * from '{files(node)}'").arrow().read_all().to_pylist()) == expected


def test_pyarrow_dataset(node, expected):
    import pyarrow.dataset as ds

    assert normal(ds.dataset(f"{node.url}/v1", partitioning="hive").to_table().to_pylist()) == expected


def test_pandas(node, expected):
    pandas = pytest.importorskip("pandas", reason='pip install "ranklog[test-all]"')
    frame = pandas.read_parquet(f"{node.url}/v1").astype(object)
    assert normal(frame.where(frame.notna(), None).to_dict("records")) == expected


def test_polars(node, expected):
    polars = pytest.importorskip("polars", reason='pip install "ranklog[test-all]"')
    assert normal(polars.read_parquet(files(node)).to_dicts()) == expected


def test_daft(node, expected):
    daft = pytest.importorskip("daft", reason='pip install "ranklog[test-all]"')
    assert normal(daft.read_parquet(files(node)).to_pylist()) == expected


def test_datasets(node, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason='pip install "ranklog[test-all]"')
    rows = datasets.load_dataset("parquet", data_files=files(node), split="train", cache_dir=str(tmp_path))
    assert normal(rows.to_list()) == expected
