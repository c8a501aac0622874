"""Questions of tools, to a real daemon and to none."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Peer, Rig, wait_for
from ranklog import control
from ranklog.errors import NoDaemon
from ranklog.version import __version__
from ranklog.wire import Type, Wait


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


def test_ping_says_who_answers(rig: Rig):
    daemon = rig.start_daemon()
    pong = control.ping(rig.settings)
    assert (pong.pid, pong.version) == (daemon.pid, __version__)
    assert pong.socket.is_socket()
    assert 0 < pong.took_s < 2


def test_status_is_a_snapshot(rig: Rig):
    daemon = rig.start_daemon()
    snapshot = control.status(rig.settings)
    assert snapshot["pid"] == daemon.pid
    assert snapshot["watermarks"] == {"uploaded": 0, "sealed": 0, "durable": 0, "received": 0}


def test_flush_waits_for_the_stage_that_is_asked_for(rig: Rig):
    rig.start_daemon()
    rig.client("import ranklog\nranklog.init(project='p')\nfor i in range(100): ranklog.log({'i': i})\nranklog.finish()")
    for wait in (Wait.DURABLE, Wait.SEALED, Wait.UPLOADED):
        assert control.flush(rig.settings, wait, 20).done
        marks = control.status(rig.settings)["watermarks"]
        assert marks[wait.name.lower()] == marks["received"] == 102


def test_a_flush_that_is_not_done_in_time_says_how_much_is_missing(rig: Rig):
    rig.start_daemon("--to", "/proc/nowhere")
    rig.client("import ranklog\nranklog.init(project='p')\nfor i in range(100): ranklog.log({'i': i})\nranklog.finish()")
    began = time.monotonic()
    flushed = control.flush(rig.settings, Wait.UPLOADED, 0.5)
    assert (flushed.done, flushed.pending) == (False, 102)
    assert time.monotonic() - began < 3


def test_sync_brings_in_what_offline_writers_left(rig: Rig):
    rig.client("import ranklog\nranklog.init(project='p', mode='offline')\nranklog.log({'i': 1})\nranklog.finish()")
    rig.start_daemon()
    assert control.sync(rig.settings, 20).done
    assert rig.orphans() == []
    assert control.sync(rig.settings, 20).done, "with nothing to do, too"


def test_without_a_daemon_every_question_says_so_at_once_and_names_the_remedy(rig: Rig):
    rig.kill(rig.start_daemon())
    for question in (
        lambda: control.ping(rig.settings),
        lambda: control.status(rig.settings),
        lambda: control.flush(rig.settings, Wait.DURABLE, 10),
        lambda: control.sync(rig.settings, 10),
    ):
        began = time.monotonic()
        with pytest.raises(NoDaemon, match=r"Start one with `ranklogd`, or run the job with `ranklog run -- CMD`"):
            question()
        assert time.monotonic() - began < 1


def test_a_frozen_daemon_is_given_up_after_the_time_that_was_given(rig: Rig):
    daemon = rig.start_daemon()
    daemon.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(NoDaemon, match=r"nobody answers on \S+ within 0.3 s"):
        control.ping(rig.settings, 0.3)
    assert time.monotonic() - began < 1.5
    daemon.send_signal(signal.SIGCONT)
    assert control.ping(rig.settings, 10).pid == daemon.pid


def test_an_answer_to_another_question_is_not_taken_for_ours(tmp_path: Path):
    with Rig(tmp_path) as rig, Peer(tmp_path / "s") as peer:
        rig.env["RANKLOG_SOCKET"] = str(tmp_path / "s")

        def answer() -> None:
            heard = peer.next_of(Type.PING)
            peer.say(Type.FLUSHED, heard.fields[0], True, 0)
            peer.say_raw(b"\xc1")
            peer.say(Type.PONG, heard.fields[0], "9.9", 42)

        thread = threading.Thread(target=answer)
        thread.start()
        assert control.ping(rig.settings, 5).version == "9.9"
        thread.join(5)


def test_waiting_for_the_upload_never_raises(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    for name, value in rig.env.items():
        if name.startswith("RANKLOG_"):
            monkeypatch.setenv(name, value)
    assert not control.wait_uploaded(0.2)
    rig.start_daemon()
    assert control.wait_uploaded(10)


def test_asking_leaves_no_descriptor_open(rig: Rig):
    rig.start_daemon()
    control.ping(rig.settings)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        control.ping(rig.settings)
    wait_for(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before, "libzmq's threads have ended")
