"""The oracle itself: it must see every lie, or nothing that relies on it proves anything."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from node import Node
from oracle import May, check, judge, witness
from witness import Account, record

RECORDS = 20


def rows_of(name: str, count: int = RECORDS, writer: str = "ab" * 16) -> list[dict[str, Any]]:
    """Return what the shards of one flawless trainer hold."""
    rows = [row(writer, 0, "start", "", None, "{}")]
    for n in range(count):
        for key, (value, text) in cells(record(name, n)).items():
            rows.append(row(writer, n + 1, "metrics", key, value, text))
    return rows


def row(writer: str, seq: int, kind: str, key: str, value: float | None, text: str | None) -> dict[str, Any]:
    return {"project": "faults", "writer": writer, "seq": seq, "lsn": 100 + seq, "kind": kind, "key": key, "value": value, "text": text}


def cells(metrics: dict[str, Any], prefix: str = "") -> dict[str, tuple[float | None, str | None]]:
    found: dict[str, tuple[float | None, str | None]] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            found |= cells(value, f"{prefix}{key}/")
        elif isinstance(value, float | bool) or (isinstance(value, int) and abs(value) <= 1 << 53):
            found[prefix + key] = (float(value), None)
        else:
            found[prefix + key] = (None, json.dumps(value))
    return found


def gap(first: int, last: int, writer: str = "ab" * 16) -> dict[str, Any]:
    return row(writer, first, "gap", "", None, json.dumps({"first": first, "last": last, "reason": "r"}))


WHOLE = {"t": Account(RECORDS, 10, 0.0, 0)}


def without(*seqs: int) -> list[dict[str, Any]]:
    return [row for row in rows_of("t") if row["seq"] not in seqs]


def test_a_flawless_store_passes():
    verdict = judge(rows_of("t"), WHOLE)
    assert (verdict.delivered, verdict.missing, verdict.in_gaps) == (RECORDS, {}, 0)


@dataclass
class Lie:
    rows: list[dict[str, Any]]
    says: str
    may: May = May.LOSE_NOTHING


def changed(key: str, **columns: Any) -> list[dict[str, Any]]:
    return [row | columns if row["key"] == key and row["seq"] == 1 else row for row in rows_of("t")]


LIES = {
    "a lost record": Lie(without(5), "I6"),
    "a lost tail": Lie(without(RECORDS), "I1"),
    "a lost tail, where gaps may be": Lie(without(RECORDS), "I6", May.LOSE_COUNTED),
    "a durable record lost in a power cut": Lie(without(*range(8, RECORDS + 1)), "I1", May.LOSE_UNACKNOWLEDGED),
    "a hole after a power cut": Lie(without(15), "I6", May.LOSE_UNACKNOWLEDGED),
    "a doubled row": Lie([*rows_of("t"), rows_of("t")[7]], "I2"),
    "a record under two seqs": Lie([*rows_of("t"), *[row | {"seq": 21, "lsn": 121} for row in rows_of("t") if row["seq"] == 3]], "I2"),
    "two records changed places": Lie([row | {"seq": {4: 5, 5: 4}.get(row["seq"], row["seq"])} | {"lsn": 0} for row in rows_of("t")], "I3"),
    "an lsn that goes back": Lie([row | {"lsn": 300 - row["seq"]} for row in rows_of("t")], "I3"),
    "a flipped bit of a double": Lie(changed("bits", value=0.123), "I7"),
    "a zero with the other sign": Lie(changed("odd", value=-0.0), "I7"),
    "a number as text": Lie(changed("odd", value=None, text="0.0"), "I7"),
    "another text": Lie(changed("note", text='"né"'), "I7"),
    "a missing key": Lie([row for row in rows_of("t") if (row["seq"], row["key"]) != (1, "none")], "I7"),
    "a record that nobody logged": Lie(rows_of("t", RECORDS + 2), "I7"),
    "a trainer that never was": Lie([*rows_of("t"), *rows_of("u", 1, "cd" * 16)], "I7"),
    "a gap beside the records it claims": Lie([*rows_of("t"), gap(RECORDS - 2, RECORDS + 5)], "I", May.LOSE_COUNTED),
    "a gap too small": Lie([*without(5, 6, 7), gap(5, 6)], "I6", May.LOSE_COUNTED),
    "a gap where nothing may be lost": Lie([*without(5), gap(5, 5)], "I1"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LIES))
def test_a_lie_is_seen(name: str):
    lie = LIES[name]
    with pytest.raises(AssertionError, match=lie.says):
        judge(lie.rows, WHOLE, lie.may)


def test_a_call_that_raised_is_seen():
    with pytest.raises(AssertionError, match="I4"):
        judge(rows_of("t"), {"t": WHOLE["t"]._replace(raised=1)})


def test_what_a_case_may_cost_is_allowed():
    assert judge(without(*range(15, RECORDS + 1)), WHOLE, May.LOSE_UNACKNOWLEDGED).missing == {"t": 6}
    assert judge([*without(5, 6), gap(5, 6)], WHOLE, May.LOSE_COUNTED).in_gaps == 2


def test_a_real_node_passes_and_one_that_lost_a_shard_does_not(tmp_path: Path):
    with Node(tmp_path) as node:
        node.start_daemon()
        for name in ("a", "b"):
            done = node.run(witness(name, node, "--count", "300", "--flush-every", "100"))
            assert done.returncode == 0, done.stderr
        verdict = check(node)
        assert verdict.delivered >= 600
        shards = sorted(node.data.rglob("*.parquet"), key=lambda path: path.stat().st_size)
        shards[-1].unlink()
        with pytest.raises(AssertionError, match=r"I1|I6"):
            check(node)
