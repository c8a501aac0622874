"""`ranklog doctor`: each finding made real, and the command that mends it beside it."""

import json
import os
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import s3
from cli import environment, ranklog
from harness import Peer, small_tmpfs
from hub.server import Hub
from node import Node, wait_for
from ranklog import wire
from ranklog.places import filesystem_type
from ranklog.wire import Type
from ranklogd.commands import doctor
from ranklogd.doctor import disks
from ranklogd.doctor.finding import Finding, Level, ok
from ranklogd.doctor.site import Site, known_variables, visit
from segments import SegmentBuilder, make_state

OFFLINE = 'import ranklog\nranklog.init(project="p", id="r", mode="offline")\nranklog.log({"x": 1.0})\nranklog.finish()'


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose socket has a path that the kernel can take."""
    with tempfile.TemporaryDirectory(prefix="rl-") as runtime:
        (tmp_path / "runtime").symlink_to(runtime)
        (tmp_path / "environment").write_text(runtime)
        yield tmp_path


def examined(home: Path, *flags: str, code: int | None = None, **env: str) -> list[Finding]:
    """Run `ranklog doctor --json` and return its findings."""
    place = {"RANKLOG_RUNTIME_DIR": (home / "environment").read_text()} if (home / "environment").exists() else {}
    done = ranklog("doctor", "--json", *flags, home=home, env=place | env)
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    found = [Finding(item["check"], Level(item["level"]), item["text"], item["fix"]) for item in answer["findings"]]
    problems = sum(finding.level is Level.PROBLEM for finding in found)
    assert answer["problems"] == problems
    assert done.returncode == (1 if problems else 0)
    assert code is None or done.returncode == code, found
    assert all(finding.fix for finding in found if finding.level in (Level.PROBLEM, Level.WARNING))
    return found


def the(found: list[Finding], check: str, level: Level, words: str) -> Finding:
    """Return the one finding of that check and level with these words in it."""
    [match] = [
        finding for finding in found if (finding.check, finding.level) == (check, level) and words in finding.text
    ]
    return match


def files_below(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_mode) for path in root.rglob("*")
    }


def test_a_healthy_node_has_no_problem_and_nothing_is_changed(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        daemon = node.start_daemon("--seal-age", "1h")
        before = files_below(node.state) | files_below(node.journal)
        done = ranklog("doctor", home=tmp_path, env=node.env)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert f"ok       socket       ranklogd 0.1.0 (pid {daemon.pid}) answers on " in done.stdout
        assert done.stdout.splitlines()[-1].startswith("no problem, ")
        after = files_below(node.state) | files_below(node.journal)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert {Path(path).name for path in changed} <= {"shipper.json", ".shipper.json.tmp", "state"}, (
            "the shipper's own report"
        )
        found = examined(tmp_path, code=0, **node.env)
        for check in ("config", "socket", "versions", "clock", "store", "waiting"):
            assert {finding.level for finding in found if finding.check == check} == {Level.OK}, found


def test_without_a_daemon_it_is_a_warning_and_nothing_is_made(home: Path) -> None:
    before = files_below(home)
    found = examined(home, code=0)
    assert the(found, "socket", Level.WARNING, "no daemon: there is no socket at").fix.startswith("ranklogd")
    assert (
        "it is made by the first daemon" in the(found, "state", Level.OK, "state").text
        or filesystem_type(home) == "tmpfs"
    )
    assert files_below(home) == before


def test_a_socket_that_a_dead_daemon_left(home: Path) -> None:
    path = home / "runtime" / "ranklog.sock"
    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(Path((home / "environment").read_text()) / "ranklog.sock"))
    assert path.is_socket()
    assert the(examined(home, code=0), "socket", Level.WARNING, "is left from a daemon that is gone").fix == "ranklogd"
    path.unlink()
    path.write_text("")
    assert the(examined(home, code=1), "socket", Level.PROBLEM, "is in the way of the socket").fix.startswith("rm ")


def test_a_daemon_that_is_stopped_and_one_that_answers_elsewhere(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        daemon = node.start_daemon()
        elsewhere = examined(tmp_path, code=1, **node.env | {"RANKLOG_SOCKET": str(tmp_path / "x.sock")})
        assert f"(pid {daemon.pid}) owns {node.state}" in the(elsewhere, "state", Level.PROBLEM, "owns").text
        daemon.send_signal(signal.SIGSTOP)
        found = examined(tmp_path, code=1, **node.env)
        finding = the(found, "socket", Level.PROBLEM, "is stopped (SIGSTOP)")
        assert finding.fix == f"kill -CONT {daemon.pid}"
        assert not [finding for finding in found if "owns" in finding.text], "told once"


AS_NOBODY = """
import os, sys, zmq, importlib.metadata, ranklog.transport, ranklogd.commands.doctor, encodings.idna, socket
from ranklog.cli import main
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.exit(main(["doctor", "--json", "--socket", sys.argv[1]]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_user_who_may_not_connect_is_told_which_group_to_join(home: Path) -> None:
    runtime = Path((home / "environment").read_text())
    runtime.chmod(0o755)
    with sockets.socket(sockets.AF_UNIX) as server:
        server.bind(str(runtime / "d.sock"))
        server.listen()
        for mode, fix in ((0o660, "sudo usermod -aG daemon nobody"), (0o600, "ranklogd --socket-mode 0660")):
            os.chown(runtime / "d.sock", 0, 1)
            (runtime / "d.sock").chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, str(runtime / "d.sock")],
                env=environment(home),
                capture_output=True,
                text=True,
                check=False,
            )
            found = [
                Finding(f["check"], Level(f["level"]), f["text"], f["fix"]) for f in json.loads(done.stdout)["findings"]
            ]
            finding = the(
                found,
                "socket",
                Level.PROBLEM,
                f"user nobody may not connect to {runtime}/d.sock (mode {mode:04o}, root:daemon)",
            )
            assert finding.fix.startswith(fix)


@contextmanager
def impostor(path: Path, version: str, report: bytes) -> Iterator[None]:
    """A daemon of another version: it answers a ping and a status request as told."""
    enough = threading.Event()

    def answer() -> None:
        with Peer(path) as peer:
            while not enough.is_set():
                heard = peer.hear(0.1)
                if heard is not None and heard.kind == Type.PING:
                    peer.say(Type.PONG, heard.fields[0], version, os.getpid())
                elif heard is not None and heard.kind == Type.STATUS:
                    peer.say(Type.REPORT, heard.fields[0], body=report)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


@pytest.mark.parametrize(
    ("protocol", "level", "words"),
    [
        (
            [wire.VERSION + 1, wire.VERSION + 2],
            Level.PROBLEM,
            "it speaks protocol 2..3, this client 1..1. Records are spooled only",
        ),
        ([wire.VERSION, wire.VERSION + 1], Level.NOTE, "both speak protocol 1"),
        (None, Level.WARNING, "which protocols it speaks it does not say"),
    ],
)
def test_a_daemon_of_another_version(home: Path, protocol: list[int] | None, level: Level, words: str) -> None:
    report = {"state_dir": str(home / "theirs"), "refused": {"version": 3}} | (
        {"protocol": protocol} if protocol else {}
    )
    path = Path((home / "environment").read_text()) / "ranklog.sock"
    with impostor(path, "9.9.9", json.dumps(report).encode()):
        found = examined(home)
    the(found, "versions", level, "the daemon is version 9.9.9, this client 0.1.0")
    the(found, "versions", level, words)
    the(found, "versions", Level.WARNING, "refused 3 greetings")
    the(found, "socket", Level.OK, "ranklogd 9.9.9")


@pytest.mark.parametrize(
    "report", [b"", b"{", b"[]", b"3", b'{"shipper": null, "refused": null, "used_bytes": "?"}', b'{"state_dir": null}']
)
def test_a_status_that_makes_no_sense_ends_no_check(home: Path, report: bytes) -> None:
    path = Path((home / "environment").read_text()) / "ranklog.sock"
    with impostor(path, "0.1.0", report):
        found = examined(home)
    assert {finding.check for finding in found} >= {
        "socket",
        "versions",
        "limits",
        "clock",
        "state",
        "room",
        "journal",
        "spool",
        "store",
    }
    assert not [finding for finding in found if "itself failed" in finding.text], found


def test_variables_that_mean_nothing_and_values_that_cannot_be(home: Path) -> None:
    found = examined(
        home, code=1, RANKLOG_STATEDIR="/x", RANKLOG_MODE="onlin", RANKLOG_SEAL_AGE_S="soon", RANKLOG_TO="ftp://x"
    )
    typo = the(
        found,
        "environment",
        Level.WARNING,
        "RANKLOG_STATEDIR means nothing to ranklog; did you mean RANKLOG_STATE_DIR?",
    )
    assert typo.fix == 'export RANKLOG_STATE_DIR="$RANKLOG_STATEDIR"; unset RANKLOG_STATEDIR'
    assert the(found, "environment", Level.PROBLEM, "'onlin' is not a mode").fix == "unset RANKLOG_MODE"
    assert the(found, "environment", Level.PROBLEM, "RANKLOG_SEAL_AGE_S='soon'").fix == "unset RANKLOG_SEAL_AGE_S"
    the(found, "store", Level.PROBLEM, "scheme 'ftp' is not known")
    the(found, "journal", Level.OK if filesystem_type(home) == "tmpfs" else Level.WARNING, str(home / "journal"))


def test_every_variable_that_the_client_reads_is_known() -> None:
    known = known_variables()
    assert known >= {
        "RANKLOG_TO",
        "RANKLOG_SOCKET",
        "RANKLOG_AUTOSTART",
        "RANKLOG_SEAL_AGE_S",
        "RANKLOG_CONFIG",
        "RANKLOG_RUN_ID_HINT",
    }
    assert not [name for name in known if not name.startswith("RANKLOG_")]


def test_a_config_file_with_a_typo(home: Path) -> None:
    file = home / "ranklogd.toml"
    file.write_text('seal_aeg_s = "10s"\n')
    text = the(examined(home, "--config", str(file), code=1), "config", Level.PROBLEM, str(file)).text
    assert "did you mean 'seal_age_s'?" in text
    file.write_text('seal_age_s = "10s"\n')
    the(examined(home, "--config", str(file), code=0), "config", Level.OK, f"{file} is sound")
    the(examined(home, code=1, RANKLOG_CONFIG=str(home / "none.toml")), "config", Level.PROBLEM, "does not exist")


def test_a_state_directory_that_others_may_write_to_or_that_is_somebody_elses(home: Path) -> None:
    state = home / "state"
    state.mkdir(mode=0o700)
    state.chmod(0o777)
    assert (
        the(examined(home, code=0), "state", Level.WARNING, "can be written to by others (mode 0777)").fix
        == f"chmod 0700 {state}"
    )
    state.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(state, 65534, 65534)
        the(examined(home, code=1), "state", Level.PROBLEM, f"{state} belongs to user 65534")
        os.chown(state, 0, 0)
    state.rmdir()
    state.write_text("")
    the(examined(home, code=1), "state", Level.PROBLEM, "is no directory")


def test_a_segment_of_a_later_version(home: Path) -> None:
    state = make_state(home / "state")
    builder = SegmentBuilder()
    builder.data[:9] = b"RANKWAL2\0"
    (state.wal / "0000000000000001.open").write_bytes(builder.data)
    assert (
        the(examined(home, code=1), "state", Level.PROBLEM, "a later ranklog wrote").fix
        == "pip install --upgrade ranklog"
    )


def site_of(home: Path, **env: str) -> Site:
    return visit(environment(home) | env, None, None)


def test_a_network_filesystem(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_of(home)
    monkeypatch.setattr(disks, "filesystem_type", lambda path: "nfs4")
    [finding] = disks.check_state(site)
    assert (finding.level, "(nfs4)" in finding.text) == (Level.PROBLEM, True)
    assert "RANKLOG_STATE_DIR=" in finding.fix
    allowed = replace(site, config=replace(site.config, allow_network_fs=True))
    assert [finding.level for finding in disks.check_state(allowed)] == [Level.OK]


def test_a_full_tmpfs(home: Path) -> None:
    with small_tmpfs(home / "small") as small:
        (small / "fill").write_bytes(bytes(900 << 10))
        found = examined(
            home,
            code=1,
            RANKLOG_STATE_DIR=str(small / "state"),
            RANKLOG_JOURNAL_DIR=str(small),
            RANKLOG_SPOOL_DIR=str(small),
        )
        the(found, "state", Level.WARNING, "is gone after a reboot")
        assert the(found, "room", Level.PROBLEM, "no records are taken (disk_free_min_bytes)").fix.startswith("du ")
        the(found, "journal", Level.WARNING, "one writer takes up to 33.6 MB")
        the(found, "spool", Level.WARNING, "on tmpfs")
        the(found, "spool", Level.WARNING, "one writer may spool 1.07 GB")


def test_a_quota_that_is_used_up(home: Path) -> None:
    state = make_state(home / "state")
    (state.outbox / "shard").write_bytes(bytes(9000))
    the(examined(home, code=0, RANKLOG_DISK_QUOTA_BYTES="10K"), "room", Level.WARNING, "wait for their upload")
    the(examined(home, code=1, RANKLOG_DISK_QUOTA_BYTES="8K"), "room", Level.PROBLEM, "wait for their upload")


def test_journals_that_are_not_in_memory_and_directories_that_cannot_be_used(home: Path) -> None:
    if filesystem_type(home) != "tmpfs":
        finding = the(
            examined(home, code=0), "journal", Level.WARNING, "not on a tmpfs: log() waits whenever that disk does"
        )
        assert finding.fix.startswith("export RANKLOG_JOURNAL_DIR=/dev/shm/")
    (home / "journal").write_text("in the way")
    (home / "spool").write_text("in the way")
    found = examined(home, code=1)
    for what in ("journal", "spool"):
        assert "is not a directory" in the(found, what, Level.WARNING, "not used").text
        the(found, what, Level.PROBLEM, f"no directory for {what}s")


def test_too_few_descriptors(home: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 256; exec {sys.executable} -m ranklog.cli doctor"],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "warning  limits       a daemon started from here may open 256 files" in done.stdout


def test_a_clock_that_was_moved(tmp_path: Path) -> None:
    with Node(tmp_path) as node:
        node.start_daemon()
        cookie = Path(f"{node.settings.runtime_dir}/ranklog.sock.cookie")
        hour_ago_s = time.time() - 3600
        os.utime(cookie, (hour_ago_s, hour_ago_s))
        the(examined(tmp_path, **node.env), "clock", Level.WARNING, "the clock was moved by +3,")
    tomorrow_s = time.time() + 86400
    os.utime(node.state / "wal", (tomorrow_s, tomorrow_s))
    the(examined(tmp_path, **node.env), "clock", Level.WARNING, "it was set back")


def test_what_waits_and_what_was_put_aside(home: Path) -> None:
    state = make_state(home / "state")
    (state.quarantine / "x.wal").write_bytes(b"?")
    (state.quarantine / "x.wal.reason").write_text("why")
    (state.deadletter / "v1").mkdir()
    (state.deadletter / "v1" / "a.parquet").write_bytes(b"?")
    assert (
        subprocess.run(
            [sys.executable, "-c", OFFLINE], env=environment(home), capture_output=True, check=False
        ).returncode
        == 0
    )
    (home / "journal" / f"{'ab' * 16}.00000000.journal").symlink_to("/etc/hostname")
    found = examined(home, code=0)
    assert (
        the(found, "waiting", Level.WARNING, "1 writer left records here that no daemon has taken").fix
        == "ranklog sync"
    )
    the(found, "waiting", Level.WARNING, "left alone: ")
    by_fix = {finding.fix for finding in found if finding.check == "evidence"}
    assert by_fix == {"ranklog fsck status", "ranklog requeue"}


def test_a_store_that_cannot_be_written_to(home: Path) -> None:
    (home / "store").write_text("a file")
    the(examined(home, code=1, RANKLOG_TO=str(home / "store" / "x")), "store", Level.PROBLEM, "is no directory")
    with Node(home) as node:
        node.start_daemon(RANKLOG_TO=str(home / "store"), RANKLOG_SEAL_AGE_S="0.1", RANKLOG_RETRY_MAX_S="1")
        assert node.python(OFFLINE.replace('mode="offline"', "tags=[]")).returncode == 0
        wait_for(lambda: node.status()["shipper"].get("last_error"), "an upload has failed")
        assert the(examined(home, code=1, **node.env), "store", Level.PROBLEM, "upload: ").fix == "ranklog status"


def test_a_token_is_asked_for_where_the_store_wants_one_and_is_never_shown(home: Path) -> None:
    assert not [finding for finding in examined(home) if finding.check == "token"]
    bucket = bucket_environment(home, "http://127.0.0.1:9")
    assert the(examined(home, code=1, **bucket), "token", Level.PROBLEM, "no token").fix == "hf auth login"
    token = home / "hf" / "token"
    token.parent.mkdir()
    token.write_text("hf_verysecret")
    token.chmod(0o644)
    assert (
        the(examined(home, code=1, **bucket), "token", Level.PROBLEM, "can be read by others").fix
        == f"chmod 0600 {token}"
    )
    token.chmod(0o600)
    found = examined(home, **bucket | {"HF_TOKEN": "hf_verysecret"})
    the(found, "token", Level.OK, "only its owner may read it")
    the(found, "token", Level.NOTE, "HF_TOKEN is set")
    assert the(found, "store", Level.WARNING, "Records wait on this node").fix.startswith("ranklog doctor")
    assert "verysecret" not in str(found)


def bucket_environment(home: Path, endpoint: str) -> dict[str, str]:
    """Where the Hub is, and a home of its library in which nobody is logged in."""
    return {
        "RANKLOG_TO": "hf://buckets/user/logs", "HF_ENDPOINT": endpoint, "HF_TOKEN": "", "HF_TOKEN_PATH": "",
        "HF_HOME": str(home / "hf"), "HF_XET_CACHE": str(home / "xet"),
    }  # fmt: skip


def test_a_bucket_is_asked_for_with_the_token_and_each_refusal_has_its_command(home: Path) -> None:
    with Hub(home / "hub") as hub:
        token = home / "token"
        token.write_text(hub.token())
        token.chmod(0o600)
        env = bucket_environment(home, hub.url) | {"RANKLOG_TOKEN_FILE": str(token)}
        missing = the(examined(home, code=1, **env), "store", Level.PROBLEM, "no such bucket")
        assert missing.fix.startswith("hf buckets create user/logs --private")
        the(examined(home, code=0, **env, RANKLOG_CREATE_BUCKET="private"), "store", Level.NOTE, "is not there yet")
        assert hub.buckets.get("user/logs") is None, "a doctor makes nothing"
        hub.buckets.create("user/logs", private=True)
        the(examined(home, code=0, **env), "store", Level.OK, "hf://buckets/user/logs answers")
        token.write_text("hf_wrong")
        assert the(examined(home, code=1, **env), "store", Level.PROBLEM, "401").fix == "hf auth login"
        token.unlink()
        assert the(examined(home, code=1, **env), "token", Level.PROBLEM, "is not there").fix.startswith(
            "install -m 0600"
        )


def test_an_s3_bucket_is_asked_for_too(home: Path) -> None:
    bucket = s3.new_bucket()
    env = s3.environment()
    the(examined(home, code=0, **env, RANKLOG_TO=f"s3://{bucket}/logs"), "store", Level.OK, "answers")
    the(examined(home, code=1, **env, RANKLOG_TO="s3://no-such-bucket"), "store", Level.PROBLEM, "no such bucket")
    done = ranklog("doctor", "--json", home=home, env=env | {"RANKLOG_TO": f"s3://{bucket}"}, without=["obstore"])
    assert 'pip install \\"ranklog[s3]\\"' in done.stdout


def test_it_works_without_the_packages_of_the_daemon(home: Path) -> None:
    absent = ("pyarrow", "numpy", "msgspec", "watchdog", "huggingface_hub", "psutil", "duckdb")
    done = ranklog("doctor", home=home, without=absent)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'fix: pip install "ranklog[daemon]"' in done.stdout
    assert 'fix: pip install "ranklog[read]"' in done.stdout


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_check_that_fails_and_one_that_hangs_end_no_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(site: Site) -> Iterator[Finding]:
        yield ok("fails", "so far")
        raise ZeroDivisionError

    never = threading.Event()
    checks = {
        "fails": fails,
        "hangs": lambda site: iter([ok("hangs", str(never.wait(60)))]),
        "last": lambda site: [ok("last", "done")],
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    found = doctor.examine(replace(site_of(home), found=()), timeout_s=1)
    never.set()
    assert [(finding.check, finding.level) for finding in found] == [
        ("fails", Level.OK), ("fails", Level.PROBLEM), ("hangs", Level.PROBLEM), ("last", Level.OK),
    ]  # fmt: skip
    assert "no answer within 1 s" in found[2].text


def test_the_mode_of_a_probe_is_no_business_of_a_doctor(home: Path) -> None:
    state = make_state(home / "state")
    state.lock.touch(mode=0o600)
    before = files_below(home)
    examined(home)
    assert files_below(home) == before
    assert stat.S_IMODE(state.lock.stat().st_mode) == 0o600
