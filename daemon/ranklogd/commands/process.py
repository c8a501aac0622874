"""Child processes by plain system calls, and the signals they and we get. For `ranklog run`, which may be PID 1.

One place waits for every child, for PID 1 also gets the orphans of all others; `subprocess` would lose its children's
exit codes to that. Signals are blocked and fetched one by one (sigtimedwait), so none can come at a bad moment, and a
child that dies before anybody waits for it is not missed. Children begin with nothing blocked, in groups of their own.
"""

import os
import signal
from collections.abc import Mapping, Sequence

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What we pass on to the job."""
ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""What ends a wait of our own."""

EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class Child:
    """One process that we started, leader of its own group."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        """None while it lives; 128 + n if signal n killed it, as shells count."""
        self.stopped_by = 0
        """The signal that stopped it (Ctrl-Z), until it goes on."""

    def signal_group(self, number: int) -> None:
        """Send a signal to its group, members that outlived it included; an empty group is no error."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def note(self, status: int) -> None:
        """Take in what waitpid said."""
        self.stopped_by = 0
        if os.WIFSTOPPED(status):
            self.stopped_by = os.WSTOPSIG(status)
        elif not os.WIFCONTINUED(status):
            code = os.waitstatus_to_exitcode(status)
            self.exit_code = code if code >= 0 else 128 - code


class Children:
    """Every child of this process, its own and those it inherits."""

    def __init__(self) -> None:
        self._own: dict[int, Child] = {}

    def spawn(self, command: Sequence[str], env: Mapping[str, str], *, output_fd: int | None = None) -> Child:
        """Start a command, found in PATH; raises OSError as exec does. Inheritable descriptors are passed on.

        With `output_fd` its stdin is empty and stdout and stderr go there; otherwise they are ours.
        """
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if output_fd is not None:
            actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
            actions += [(os.POSIX_SPAWN_DUP2, output_fd, 1), (os.POSIX_SPAWN_DUP2, output_fd, 2)]
        pid = os.posix_spawnp(
            command[0], list(command), env,
            file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=_IGNORED_BY_PYTHON,
        )  # fmt: skip
        child = self._own[pid] = Child(pid)
        return child

    def reap(self) -> None:
        """Note what became of our children, and clear away orphans that ended as ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._own.get(pid)
            if child is not None:
                child.note(status)
                if child.exit_code is not None:
                    del self._own[pid]


class Signals:
    """The signals of this process, fetched instead of handled. Enter it before any child or thread is started."""

    def __init__(self) -> None:
        # What our parent had us ignore (nohup, a shell's background job) stays ignored, by the job too.
        self._taken = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]

    def __enter__(self) -> "Signals":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # If it was ignored, exit codes would get lost.
        # SIGTTOU: or handing the terminal over and taking it back would stop us.
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, [*self._taken, signal.SIGCHLD, signal.SIGTTOU])
        return self

    def __exit__(self, *_: object) -> None:
        while self.wait(0):
            continue  # What came too late for us to act on must not kill us now.
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def wait(self, timeout_s: float) -> int:
        """Return the next signal, SIGCHLD included; 0 if none came in time."""
        found = signal.sigtimedwait([*self._taken, signal.SIGCHLD], max(0.0, timeout_s))
        return 0 if found is None else found.si_signo
