"""The terminal's foreground, lent to the job: it can read the keyboard, and Ctrl-C and Ctrl-Z go to it, as in a shell.

Without this, a job in a process group of its own would be stopped as soon as it reads from the terminal. Where stdin
is no terminal, or somebody else has the foreground, nothing happens here.
"""

import os
import signal

from ranklogd.commands.process import Child


class Foreground:
    """Who has the keyboard. SIGTTOU must be blocked (`Signals`)."""

    def __init__(self) -> None:
        self._lent = False

    def lend(self, job: Child) -> None:
        """Give the foreground to the job's group, if it is ours, and wake what reading it too early has stopped."""
        try:
            if not os.isatty(0) or os.tcgetpgrp(0) != os.getpgrp():
                return
            os.tcsetpgrp(0, job.pid)
        except OSError:
            return  # The job is gone, or the terminal.
        self._lent = True
        job.signal_group(signal.SIGCONT)

    def take_back(self) -> None:
        """Take the foreground again."""
        if self._lent:
            self._lent = False
            try:
                os.tcsetpgrp(0, os.getpgrp())
            except OSError:
                return

    def follow_stop(self, job: Child) -> None:
        """The job was stopped from the keyboard: stop too, so that the shell takes over; go on together."""
        number, job.stopped_by = job.stopped_by, 0
        if not self._lent:
            return
        if number in (signal.SIGTSTP, signal.SIGSTOP):
            self.take_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.lend(job)
        job.signal_group(signal.SIGCONT)
