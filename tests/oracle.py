"""The oracle: what must hold after any fault. It knows the ledgers (`witness`) and the parquet, and nothing between.

    I1  every record that a flush called durable is delivered; every record for which log() returned is, too,
        unless the case is about losing memory (a power cut) or bytes (rot, a full disk)
    I2  exactly once: no two rows of one (writer, seq, key)
    I3  per-writer order: seqs follow the order of the calls, lsns follow the seqs
    I4  log() never raised
    I5  memory and disk stay within bounds (`check_bounds`)
    I6  each seq of a writer has a row or lies in a gap row, never both; what is missing lies in gaps
    I7  nothing was made up, and every value is equal under the typing rule, doubles bit for bit
    I8  when the fault is over the backlog goes to nothing without a human, and a fresh record gets through

The typing rule is written down here a second time, from the design, and not imported from the product.
"""

import json
import os
import struct
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from node import Node, wait_for
from witness import Account, read_ledgers, record

INGEST_RSS_MAX = 250 << 20
NOBODY = "0" * 32
"""The writer of gap rows for lsns of which not even the writer could be told."""
SHIPPER_RSS_MAX = 600 << 20


class May(Enum):
    """What a fault may cost."""

    LOSE_NOTHING = "nothing for which log() had returned"
    LOSE_UNACKNOWLEDGED = "what no flush() had called durable: a power cut took the node's memory"
    LOSE_COUNTED = "what lies in gap rows: there was no room, or its bytes were destroyed"


@dataclass
class Verdict:
    """What was found, for a test to see that its fault really happened."""

    delivered: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    """Trainer -> records for which log() returned and that are not there."""
    in_gaps: int = 0
    """Seqs that lie in gap rows of writers."""
    lost_lsns: int = 0
    """Lsns that lie in gap rows of which not even the writer is known."""
    writers: int = 0


Cell = tuple[bytes | None, Any]
"""(the double's bits or None, the JSON text's value or None)"""


def expected_cells(metrics: dict[str, Any], prefix: str = "") -> dict[str, Cell]:
    """Return the cell of every key of a record: DESIGN section 4, typing."""
    cells: dict[str, Cell] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            cells |= expected_cells(value, f"{prefix}{key}/")
        elif isinstance(value, float | bool) or (isinstance(value, int) and abs(value) <= 1 << 53):
            cells[prefix + key] = (struct.pack("<d", value), None)
        else:
            cells[prefix + key] = (None, json.loads(json.dumps(value)))
    return cells


def found_cell(value: float | None, text: str | None) -> Cell:
    """Return the cell that a row of a shard holds."""
    return (None if value is None else struct.pack("<d", value), None if text is None else json.loads(text))


def judge(
    rows: Iterable[dict[str, Any]],
    accounts: dict[str, Account],
    may: May = May.LOSE_NOTHING,
    *,
    project: str = "faults",
) -> Verdict:
    """Compare the rows of all shards with the ledgers; fails with a sentence. `rows` hold the columns of a shard."""
    verdict = Verdict()
    records: dict[tuple[str, int], dict[str, Cell]] = defaultdict(dict)
    lsns: dict[tuple[str, int], int] = {}
    gaps: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        identity = (row["writer"], row["seq"])
        if row["project"] not in (project, "_lost"):
            continue  # A neighbour in the test, whose losses are its own.
        if row["kind"] == "gap":
            gap = json.loads(row["text"])
            if row["project"] == "_lost" and row["writer"] == NOBODY:
                verdict.lost_lsns += gap["last"] - gap["first"] + 1
                continue
            gaps[row["writer"]].append((gap["first"], gap["last"]))
        cells = records[identity]
        assert row["key"] not in cells, f"I2 doubled: {row}"
        cells[row["key"]] = found_cell(row["value"], row["text"]) if row["kind"] == "metrics" else (None, row["kind"])
        assert lsns.setdefault(identity, row["lsn"]) == row["lsn"], f"I3 one record under two lsns: {row}"
    verdict.writers = len({writer for writer, _ in records})
    verdict.in_gaps = sum(last - first + 1 for spans in gaps.values() for first, last in spans)
    _check_order(lsns, gaps)
    delivered = _check_values(records, accounts)
    verdict.delivered = sum(map(len, delivered.values()))
    for name, account in accounts.items():
        assert not account.raised, f"I4 log() of {name} raised {account.raised} times"
        missing = set(range(account.returned)) - delivered[name]
        if missing:
            verdict.missing[name] = len(missing)
        if may == May.LOSE_NOTHING:
            assert not missing, (
                f"I1 {name}: log() returned for {len(missing)} records that are missing: {_short(missing)}"
            )
        if may == May.LOSE_UNACKNOWLEDGED:
            durable = {n for n in missing if n < account.durable}
            assert not durable, f"I1 {name}: {len(durable)} durable records are missing: {_short(durable)}"
    if may != May.LOSE_UNACKNOWLEDGED:
        lost = sum(verdict.missing.values())
        counted = verdict.in_gaps + verdict.lost_lsns
        assert lost <= counted, f"I6 {lost} records are missing, and {counted} lie in gaps: {verdict.missing}"
    if may == May.LOSE_NOTHING:
        assert not gaps, f"I6 nothing may be lost, and there are gaps: {dict(gaps)}"
    return verdict


def _short(numbers: set[int]) -> str:
    first = sorted(numbers)[:5]
    return f"{first}…{max(numbers)}" if len(numbers) > 5 else str(first)


def _check_order(lsns: dict[tuple[str, int], int], gaps: dict[str, list[tuple[int, int]]]) -> None:
    by_writer: dict[str, list[int]] = defaultdict(list)
    for writer, seq in sorted(lsns):
        by_writer[writer].append(seq)
    for writer, seqs in by_writer.items():
        covered = dict(sorted(gaps.get(writer, [])))
        due = seqs[0]
        for seq in seqs:
            assert seq == due, f"I6 writer {writer}: seq {seq} where {due} is due; gaps {gaps.get(writer)}"
            due = covered.get(seq, seq) + 1
        order = [lsns[writer, seq] for seq in seqs]
        assert order == sorted(order), f"I3 writer {writer}: lsns do not follow the seqs"


def _check_values(records: dict[tuple[str, int], dict[str, Cell]], accounts: dict[str, Account]) -> dict[str, set[int]]:
    delivered: dict[str, set[int]] = defaultdict(set)
    last: dict[tuple[str, str], int] = defaultdict(lambda: -1)  # Threads share a writer, each under a name of its own.
    for writer, seq in sorted(records):
        cells = records[writer, seq]
        if "by" not in cells:
            continue
        name, n = cells["by"][1], round(struct.unpack("<d", cells["n"][0] or bytes(8))[0])
        assert name in accounts, f"I7 nobody logged {cells}"
        assert n <= accounts[name].returned, f"I7 {name} never came to record {n}: {accounts[name]}"
        assert n not in delivered[name], f"I2 record {n} of {name} was delivered twice"
        assert n > last[writer, name], f"I3 writer {writer}: record {n} of {name} behind {last[writer, name]}"
        expected = expected_cells(record(name, n))
        assert cells == expected, f"I7 record {n} of {name}: {_difference(cells, expected)}"
        delivered[name].add(n)
        last[writer, name] = n
    return delivered


def _difference(found: dict[str, Cell], expected: dict[str, Cell]) -> str:
    keys = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
    return ", ".join(f"{key}: {found.get(key)} instead of {expected.get(key)}" for key in sorted(keys))


def ledgers_of(node: Node) -> Path:
    """Return where the witnesses of this node keep their ledgers: beside its tmpfs, for a power cut must not take them."""
    return node.path / "ledgers"


def witness(name: str, node: Node, *flags: str) -> list[str]:
    """Return the command of a trainer that leaves proof."""
    return [sys.executable, "-m", "witness", name, str(ledgers_of(node)), *flags]


def check(node: Node, may: May = May.LOSE_NOTHING, *, timeout_s: float = 60.0) -> Verdict:
    """Everything, for a node whose daemon runs and whose faults are over: drain, judge, and a fresh record (I1–I8)."""
    node.upload(timeout_s)
    assert node.leftovers() == [], f"I8 files that nobody adopted: {node.leftovers()}"
    verdict = judge(node.raw_rows("true"), read_ledgers(ledgers_of(node)), may)
    check_bounds(node)
    check_fresh(node)
    return verdict


def check_fresh(node: Node) -> None:
    """I8: a record logged now is in the parquet soon, without anybody's help."""
    name = f"fresh-{uuid.uuid4().hex[:8]}"
    done = node.run(witness(name, node, "--count", "1", "--flush-every", "1", "--run", name))
    assert done.returncode == 0, f"I8 {done.stderr}"
    assert read_ledgers(ledgers_of(node))[name].durable == 1, "I8 a fresh record was not acknowledged"
    node.upload()
    assert node.raw_rows(f"run = '{name}' and key = 'n'"), "I8 a fresh record did not get through"


def check_bounds(node: Node) -> None:
    """I5: the daemon's two processes are within their bounds, and nothing waits on disk."""
    shipper = wait_for(lambda: node.status()["shipper"].get("pid"), "the shipper has reported")
    for pid, bound in ((node.ping(), INGEST_RSS_MAX), (shipper, SHIPPER_RSS_MAX)):
        assert peak_rss(pid) < bound, f"I5 process {pid} used {peak_rss(pid) >> 20} MiB, {bound >> 20} are allowed"
    outbox = node.state / "outbox"
    wait_for(lambda: not files_below(outbox), "I8 the outbox is empty")


def files_below(directory: Path) -> list[Path]:
    """Return the files in a directory that somebody else may be emptying, sorted."""
    return sorted(Path(room, name) for room, _, names in os.walk(directory) for name in names)


def peak_rss(pid: int) -> int:
    """Return the most memory that a process has used, in bytes; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
