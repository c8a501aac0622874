"""Matrix row 50: versions that meet. Trainers, daemons and files of this version and of the next one, in every order.

The next version is a patched copy of this one that really runs (`builds`). What holds: neighbours talk; who cannot talk
spools, and is delivered after the upgrade; state of the version before is taken over; state of a later version is
refused in words, and not touched; what a later version added to a format is kept, never lost.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import oracle
import shards
from builds import ALONE, LATER, MINOR, install
from cli import ranklog
from harness import Rig, Sending, shard_rows
from node import Node, wait_for
from ranklog import control
from ranklog.journal import Journal
from ranklog.layout import parse_key
from ranklog.start import Start, encode_start

Env = dict[str, str]
NOW: Env = {}
"""This version, as it stands in the checkout."""
UPGRADE = "upgrade ranklog"


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Env:
    return install(tmp_path_factory.mktemp("later"), LATER)


@pytest.fixture(scope="module")
def minor(tmp_path_factory: pytest.TempPathFactory) -> Env:
    return install(tmp_path_factory.mktemp("minor"), MINOR)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Env:
    return install(tmp_path_factory.mktemp("alone"), ALONE)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as node:
        node.env |= {"RANKLOG_SEAL_AGE_S": "0.5", "RANKLOG_RESCAN_INTERVAL_S": "0.3", "RANKLOG_RETRY_BASE_S": "0.1", "RANKLOG_RETRY_MAX_S": "0.3"}
        yield node


def version_of(node: Node) -> str:
    return control.ping(node.settings, 5.0).version


def stop(daemon: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    daemon.send_signal(how)
    daemon.wait(60)


def trainer(node: Node, name: str, env: Env, *flags: str) -> "subprocess.Popen[str]":
    command = oracle.witness(name, node, "--run", name, *flags)
    return subprocess.Popen(command, env=node.env | env, cwd=node.path, stderr=subprocess.PIPE, text=True)


def ended(job: "subprocess.Popen[str]") -> str:
    """Wait for a trainer's end, and return what it said."""
    _, told = job.communicate(timeout=60)
    assert job.returncode == 0, told
    return told


def let_end(node: Node, *jobs: "subprocess.Popen[str]") -> None:
    (node.path / "enough").touch()
    for job in jobs:
        ended(job)
    (node.path / "enough").unlink()


def returned(node: Node, name: str) -> int:
    account = oracle.read_ledgers(oracle.ledgers_of(node)).get(name)
    return account.returned if account else 0


def logs_on(node: Node, *names: str, count: int = 100) -> None:
    """Wait until each of these trainers has logged `count` records more."""
    before = {name: returned(node, name) for name in names}
    wait_for(lambda: all(returned(node, name) >= before[name] + count for name in names), f"{names} log on", 60)


def test_a_patched_copy_really_is_another_version(node: Node, later: Env) -> None:
    source = "import ranklog, ranklog.wire as w, ranklogd.wal.segment as s; print(ranklog.__version__, w.VERSION_MIN, w.VERSION, s.VERSION)"
    assert node.python(source, **later).stdout.split() == ["0.2.0", "1", "2", "2"]
    assert node.python(source).stdout.split() == ["0.1.0", "1", "1", "1"]


@pytest.mark.parametrize("newer", ["client", "daemon"])
def test_neighbouring_versions_of_client_and_daemon_talk(node: Node, later: Env, newer: str) -> None:
    node.start_daemon(**later if newer == "daemon" else NOW)
    assert version_of(node) == ("0.2.0" if newer == "daemon" else "0.1.0")
    ended(trainer(node, "a", later if newer == "client" else NOW, "--count", "300", "--flush-every", "100"))
    assert oracle.read_ledgers(oracle.ledgers_of(node))["a"].durable == 300, "every flush was answered"
    assert oracle.check(node).delivered == 300
    assert node.status()["refused"] == {}
    for command in ("ping", "status", "doctor"):
        done = ranklog(command, home=node.path, env=node.env)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert version_of(node) in done.stdout


def test_a_client_that_the_daemon_does_not_understand_spools_until_the_upgrade(node: Node, later: Env, alone: Env) -> None:
    old = node.start_daemon()
    stays = trainer(node, "stays", alone, "--pause", "0.002")
    gone = trainer(node, "gone", alone, "--count", "300", "--pause", "0.002")
    told = ended(gone)
    assert "client speaks protocol 2..2, this daemon 1..1: upgrade the older of the two" in told
    assert node.status()["refused"]["version"] >= 2
    refused = wait_for(lambda: node.status()["adoption_refused"], "the daemon leaves the files alone")
    assert all(UPGRADE in why and "need protocol 2" in why for why in refused.values()), refused
    assert any("ranklog doctor" in line or "left alone" in line for line in ranklog("status", home=node.path, env=node.env).stdout.splitlines())
    logs_on(node, "stays")
    assert not node.data.exists() or node.raw_rows("key = 'by'") == []
    stop(old)
    node.start_daemon(**later)
    wait_for(lambda: node.status()["watermarks"]["durable"] > 300, "the one that stays is attached again, the other adopted", 60)
    let_end(node, stays)
    oracle.check(node)


def snapshot_of(root: Path) -> dict[str, str]:
    """Every file of a state directory, but for the lock and the reserve, with its digest."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in ("lock", "reserve")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_state_of_a_later_version_is_refused_in_words_and_not_touched(node: Node, later: Env) -> None:
    node.env |= {"RANKLOG_SEAL_AGE_S": "3600"}
    daemon = node.start_daemon(**later)
    ended(trainer(node, "before", later, "--count", "200", "--flush-every", "50"))
    stop(daemon, signal.SIGKILL)
    wait_for(lambda: not (node.state / "shipper.json.tmp").exists(), "nothing is being written")
    before = snapshot_of(node.state)
    assert [name for name in before if name.endswith(".open")]
    old = node.run([sys.executable, "-m", "ranklogd"])
    assert old.returncode == 1, "75 is for a lock, 78 for the configuration: this is neither"
    assert "segment has format version 2; this version reads 1: upgrade ranklog" in old.stderr
    assert "Traceback" not in old.stderr
    assert snapshot_of(node.state) == before
    doctor = ranklog("doctor", home=node.path, env=node.env)
    assert doctor.returncode == 1
    assert "a later ranklog wrote" in doctor.stdout
    ended(trainer(node, "meanwhile", NOW, "--count", "200"))
    node.start_daemon(**later)
    assert oracle.check(node).delivered == 400


def test_a_backlog_of_the_version_before_is_taken_over(node: Node, later: Env) -> None:
    node.env |= {"RANKLOG_SEAL_SIZE_BYTES": "16K", "RANKLOG_TO": str(node.path / "in the way")}
    (node.path / "in the way").write_text("no directory: nothing can be uploaded")
    daemon = node.start_daemon()
    jobs = [trainer(node, name, NOW, "--count", "300", "--flush-every", "50", *flags) for name, flags in (("a", ()), ("b", ("--no-finish",)))]
    for job in jobs:
        ended(job)
    wait_for(lambda: list((node.state / "outbox").glob("*.wal")), "shards wait in the outbox")
    stop(daemon, signal.SIGKILL)
    ended(trainer(node, "c", NOW, "--count", "100"))
    assert list((node.state / "wal").glob("*.open"))
    assert node.leftovers()
    node.env["RANKLOG_TO"] = node.url
    node.start_daemon(**later)
    assert oracle.check(node).delivered == 700


def shipper_pid(node: Node) -> int:
    """Wait until the shipper has loaded all that it needs, and so may be replaced on disk."""
    return int(wait_for(lambda: node.status()["shipper"].get("pid"), "the shipper has reported"))


def kill_shipper(node: Node) -> None:
    before = shipper_pid(node)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: node.status()["shipper"].get("pid") not in (0, before), "another shipper has reported", 60)


def test_an_upgrade_in_place_under_a_running_daemon_loses_nothing(node: Node) -> None:
    place = node.path / "site-packages"
    env = install(place)
    node.start_daemon(**env)
    job = trainer(node, "a", NOW, "--pause", "0.002")
    logs_on(node, "a")
    install(place, LATER)
    kill_shipper(node)  # The next one is of the version that is installed now.
    logs_on(node, "a", count=300)
    let_end(node, job)
    oracle.check(node)
    assert node.status()["shipper_restarts"] >= 1


def test_segments_of_a_later_version_wait_for_the_upgrade_and_are_no_evidence(node: Node) -> None:
    place = node.path / "site-packages"
    env = install(place, LATER)
    node.start_daemon(**env)
    ended(trainer(node, "a", NOW, "--count", "100", "--flush-every", "50"))
    shipper_pid(node)
    install(place)  # Back to this version, while the daemon of the later one runs.
    kill_shipper(node)
    ended(trainer(node, "b", NOW, "--count", "100", "--flush-every", "50"))
    # An older one goes through all tries that a bad segment has.
    wait_for(lambda: UPGRADE in node.status()["shipper"]["last_error"], "the shipper says why it waits")
    held = wait_for(lambda: sorted((node.state / "wal").glob("*.tries")), "it has been tried")[0]
    tried: set[int] = set()
    wait_for(lambda: tried.add(held.stat().st_mtime_ns) or len(tried) > 4, "it is tried again and again")
    assert list((node.state / "quarantine").iterdir()) == []
    assert UPGRADE in ranklog("status", home=node.path, env=node.env).stdout
    install(place, LATER)
    kill_shipper(node)
    assert oracle.check(node).delivered == 200


def rolling(node: Node, builds: list[tuple[Env, signal.Signals]], clients: list[Env], count: int) -> None:
    """Let each daemon take the place of the one before, under trainers of these versions."""
    jobs = {f"t{n}": trainer(node, f"t{n}", env, "--pause", "0.003", "--flush-every", "200") for n, env in enumerate(clients)}
    daemon: subprocess.Popen[bytes] | None = None
    for build, how in builds:
        if daemon is not None:
            stop(daemon, how)
        daemon = node.start_daemon(**build)
        assert version_of(node) == ("0.2.0" if build else "0.1.0")
        logs_on(node, *jobs, count=count)
    let_end(node, *jobs.values())
    oracle.check(node)


def test_a_rolling_upgrade_under_load_and_back_loses_nothing(node: Node, minor: Env, later: Env) -> None:
    node.env |= {"RANKLOG_STOP_DEADLINE_S": "1"}
    kill, term = signal.SIGKILL, signal.SIGTERM
    rolling(node, [(NOW, term), (minor, term), (NOW, kill), (later, kill)], [NOW, later], 100)


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ten_rolling_upgrades_and_back_lose_nothing(node: Node, minor: Env, later: Env, how: signal.Signals) -> None:
    node.env |= {"RANKLOG_STOP_DEADLINE_S": "1"}
    builds = [(NOW, how), (minor, how)] * 5 + [(later, how)] * 2
    rolling(node, builds, [NOW, later, NOW, minor], 200)


LATER_KIND = 9
WRITER = Sending.WRITER


def check_later_kind(rig: Rig) -> None:
    """Records 1, 2 and 4 are rows; record 3, which this version cannot read, is a gap row, and its bytes are kept."""
    assert control.flush(rig.settings, control.Wait.UPLOADED, 30).done
    rows = [row for row in shard_rows(rig.data) if row["writer"] == WRITER]
    assert {row["seq"]: row["value"] for row in rows if row["kind"] == "metrics"} == {1: 1.0, 2: 2.0, 4: 4.0}
    [gap] = [row for row in rows if row["kind"] == "gap"]
    assert (gap["seq"], json.loads(gap["text"])["last"]) == (3, 3)
    [excerpt] = (rig.state / "quarantine").glob("*.excerpt")
    assert b"a thing of tomorrow" in excerpt.read_bytes()
    assert rig.status()["shipper"]["quarantined_records"] == 1


def log_later_kind(sending: Sending) -> None:
    sending.log(1, 2)
    assert sending.journal.append(LATER_KIND, None, {"bins": "a thing of tomorrow"})
    sending.log(4)


def test_a_kind_of_record_that_only_a_later_version_knows_is_kept_and_told_of(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.env |= {"RANKLOG_SEAL_AGE_S": "0.2"}
        rig.start_daemon()
        (tmp_path / "client").mkdir()
        sending = Sending(tmp_path / "client", lambda: rig.settings.runtime_dir / "ranklog.sock")
        log_later_kind(sending)
        assert sending.sender.wait(5, 20)
        assert sending.sender.stop(10)
        check_later_kind(rig)


def test_such_a_record_in_the_files_of_a_dead_writer_is_kept_as_well(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.env |= {"RANKLOG_SEAL_AGE_S": "0.2"}
        (tmp_path / "client").mkdir()
        sending = Sending(tmp_path / "client", None)
        log_later_kind(sending)
        assert sending.sender.stop(10)
        rig.spool.mkdir()
        for path in (tmp_path / "client" / "spool").iterdir():
            path.rename(rig.spool / path.name)
        rig.start_daemon()
        rig.adopted()
        check_later_kind(rig)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"protocol": 2}, f"its frames need protocol 2, this daemon speaks 1..1: {UPGRADE}. The records are safe in it"),
        ({"rank": "third"}, "start frame: field 'rank' is a str"),
    ],
)
def test_a_journal_of_a_later_version_is_left_alone_with_every_byte(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with Rig(tmp_path) as rig:
        start = encode_start(Start(writer=WRITER, project="p", run="r", **fields))
        journal = Journal(WRITER, start, [rig.journal], file_size=64 << 10, size_max=1 << 20, wake=lambda: None)
        assert journal.append(1, None, {"n": 1})
        for file in journal.files():
            file.close()
        [path] = rig.journal.iterdir()
        before = path.read_bytes()
        rig.start_daemon()
        refused = wait_for(lambda: rig.status()["adoption_refused"], "the file is refused")
        assert refused == {str(path): reason}
        assert path.read_bytes() == before


def write_later_shard(root: Path, monkeypatch: pytest.MonkeyPatch, *, drop: str = "") -> None:
    monkeypatch.setattr(shards, "FORMAT", "2")
    path = shards.write_shard(root, shards.start(shards.writer("a")) + shards.records(shards.writer("a"), [{"x": 1.0}]))
    if drop:
        table = pq.read_table(path, partitioning=None).drop_columns([drop])
        _replace(path, table, root)


def _replace(path: Path, table: pa.Table, root: Path) -> None:
    """Put other content in the place of a shard, under the name that its bytes ask for."""
    metadata = pq.read_metadata(path).metadata
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, store_schema=False) as file:
        file.write_table(table)
        file.add_key_value_metadata({key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"ranklog.")})
    data = sink.getvalue().to_pybytes()
    key = parse_key(str(path.relative_to(root)))
    assert key is not None
    path.with_name(path.name.replace(key.sha256, hashlib.sha256(data).hexdigest()[:12])).write_bytes(data)
    path.unlink()


def test_readers_say_that_a_shard_is_of_a_later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_later_shard(tmp_path / "store", monkeypatch, drop="value")
    for command in (["ls", str(tmp_path / "store")], ["query", "select * from metrics", "--to", str(tmp_path / "store")]):
        done = ranklog(*command, home=tmp_path)
        assert (done.returncode, done.stdout) == (1, ""), command
        assert "has shard format 2; this ranklog reads 1: upgrade ranklog" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_column_that_a_later_version_appended_bothers_no_reader(tmp_path: Path) -> None:
    root = tmp_path / "store"
    path = shards.write_shard(root, shards.start(shards.writer("a")) + shards.records(shards.writer("a"), [{"x": 1.0}]))
    table = pq.read_table(path, partitioning=None)
    _replace(path, table.append_column("mood", pa.array(["fine"] * len(table))), root)
    shards.write_shard(root, shards.records(shards.writer("b"), [{"x": 2.0}]), store_id=shards.STORE_B)
    done = ranklog("query", "select value from metrics order by value", "--to", str(root), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.0" in done.stdout
    assert "2.0" in done.stdout
