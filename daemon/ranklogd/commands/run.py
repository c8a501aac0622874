"""`ranklog run -- CMD`: a daemon beside the job, and everything brought in before it ends. Works as PID 1.

    join or start a daemon ─▶ job, in its own process group ─▶ signals forwarded, daemon kept alive, orphans reaped
    ─▶ job ends ─▶ its dead ranks adopted, everything uploaded, within --drain ─▶ daemon stopped by its last user

Exit code: the job's; 128 + n if signal n killed it, 127 if it was not found, 126 if it cannot be executed, 125 if no
daemon could be started. A drain that fails changes nothing of that: it prints where the records are. The first signal
during the drain ends it.
"""

import argparse
import json
import shlex
import signal
import sys
import time

from ranklog.cli import EXIT_USAGE
from ranklog.config import Settings, environment
from ranklog.errors import RanklogError, UsageError
from ranklog.names import new_run_id
from ranklogd.commands.drain import Drained, Progress, drain, snapshot
from ranklogd.commands.launcher import CalledOff, CannotStart, Launcher
from ranklogd.commands.process import (
    ENDING,
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    FORWARDED,
    Child,
    Children,
    Signals,
)
from ranklogd.commands.terminal import Foreground
from ranklogd.setup import LOCK_WAIT_S
from ranklogd.units import parse_duration

EXIT_NO_START = 125
TEND_INTERVAL_S = 1.0
_PLACES = ("to", "state_dir", "runtime_dir")
