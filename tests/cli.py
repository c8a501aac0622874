"""Runs `ranklog` as users do: a process of its own, with nothing of this machine's home or configuration."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(home: Path) -> dict[str, str]:
    """The environment of a user whose home, runtime directory, journals and spools are below `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANKLOG_", "XDG_"))}
    return kept | {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), str(ROOT / "daemon")]),
        "COLUMNS": "80",
        "PYTHONIOENCODING": "utf-8",
        "RANKLOG_RUNTIME_DIR": str(home / "runtime"),
        "RANKLOG_STATE_DIR": str(home / "state"),
        "RANKLOG_JOURNAL_DIR": str(home / "journal"),
        "RANKLOG_SPOOL_DIR": str(home / "spool"),
    }


def ranklog(
    *arguments: str,
    home: Path,
    env: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    stdin: str | None = None,
    timeout_s: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run `ranklog` with these arguments; `without` names packages that this process must not find."""
    command = [sys.executable, "-m", "ranklog.cli", *arguments]
    if without:
        hide = f"import sys; sys.modules.update(dict.fromkeys({list(without)!r})); from ranklog.cli import main"
        command = [sys.executable, "-c", f"{hide}; sys.exit(main({list(arguments)!r}))"]
    return subprocess.run(
        command,
        env=environment(home) | dict(env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
