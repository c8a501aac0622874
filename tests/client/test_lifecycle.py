"""Hooks around forks and exits, as far as they can be seen without dying; the rest is in tests/system."""

import os
import threading

from ranklog.lifecycle import Lifecycle


class Told:
    """Something that hears of forks and exits."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def at_exit(self) -> None:
        self.log.append(f"{self.name} exits")

    def after_fork(self) -> None:
        self.log.append(f"{self.name} forked")


def status_of_child(child: "Told", lifecycle: Lifecycle) -> str:
    """Fork, and return what the child was told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, ",".join(child.log).encode())
        os._exit(0)
    os.close(writing)
    told = os.read(reading, 1000).decode()
    os.close(reading)
    assert os.waitpid(pid, 0)[1] == 0
    return told


def test_every_live_run_hears_of_a_fork_in_the_child_and_none_in_the_parent():
    lifecycle, log = Lifecycle(), []
    lifecycle.watch_forks()
    one, two = Told(log, "one"), Told(log, "two")
    lifecycle.add(one)
    lifecycle.add(two)
    assert status_of_child(one, lifecycle) == "one forked,two forked"
    assert log == []
    lifecycle.remove(one)
    lifecycle.remove(one)
    assert status_of_child(one, lifecycle) == "two forked"
    lifecycle.remove(two)
    assert status_of_child(one, lifecycle) == ""


def test_hooks_are_set_once_however_often_they_are_asked_for():
    lifecycle, log = Lifecycle(), []
    for _ in range(3):
        lifecycle.watch_forks()
    lifecycle.add(Told(log, "one"))
    assert status_of_child(Told(log, ""), lifecycle) == "one forked"


def test_runs_that_are_still_live_hear_of_the_exit_once_each():
    lifecycle, log = Lifecycle(), []
    one, two = Told(log, "one"), Told(log, "two")
    lifecycle.add(one)
    lifecycle.add(two)
    lifecycle.remove(one)
    lifecycle._at_exit()
    assert log == ["two exits"]
    lifecycle.remove(two)


def test_a_fork_waits_for_an_import_of_ours_and_gives_the_lock_back_on_both_sides():
    lifecycle = Lifecycle()
    lifecycle.watch_forks()
    importing, order = threading.Event(), []

    def sender() -> None:
        with lifecycle.importing:
            importing.set()
            waited.wait(5)
            order.append("imported")

    waited = threading.Event()
    thread = threading.Thread(target=sender)
    thread.start()
    assert importing.wait(5)
    threading.Timer(0.1, waited.set).start()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if lifecycle.importing.acquire(timeout=1) else 1)
    order.append("forked")
    assert os.waitpid(pid, 0)[1] == 0, "free in the child"
    assert order == ["imported", "forked"]
    assert lifecycle.importing.acquire(timeout=1), "free in the parent"
    lifecycle.importing.release()
    thread.join(5)
