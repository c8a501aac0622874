"""What the shipper gets of the daemon's environment, and how: secrets through its stdin, the rest as it is.

What a process was born with stands in /proc/PID/environ as long as it lives, for every tool that collects such things.
A token given to the daemon as HF_TOKEN therefore goes through the pipe, beside the configuration and not in it, and is
put into the shipper's environment only inside the process, where the Hub's and obstore's libraries look for it.
"""

import json
import re
import resource
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY", re.IGNORECASE)
_FIELD = "environment"  # Beside the config's fields; a shipper of an earlier version passes it over.
CHATTY_LOGGERS = ("httpx2", "httpcore2")
"""They log each request, and at `debug` the headers of each answer: there the content store's tokens stand."""


def shipper_environment(env: Mapping[str, str], xet_cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return (what the shipper is born with, what it is told through its stdin). Pure.

    hf_xet and huggingface_hub read theirs when they are imported, or when the first session is made.
    """
    hidden = {name: value for name, value in env.items() if _SECRET.search(name)}
    seen = {name: value for name, value in env.items() if name not in hidden}
    seen.setdefault("HF_XET_LOG_DEST", "/dev/null")  # Else a file for each process that nothing ever rotates.
    seen.setdefault("MALLOC_ARENA_MAX", "2")  # Else the arenas of hf_xet's threads keep 40 MB more, and grow.
    return seen | {
        "HF_XET_CACHE": str(xet_cache),  # Ours alone: it is wiped at each start, which no user's cache may be.
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }, hidden


def pack(config_json: str, hidden: Mapping[str, str]) -> str:
    """Return the line that goes to the shipper's stdin."""
    return json.dumps(json.loads(config_json) | {_FIELD: dict(hidden)})


def unpack(line: str, env: MutableMapping[str, str]) -> None:
    """Put the secrets of that line into an environment; a line that is no config has none."""
    try:
        told: Any = json.loads(line)
    except ValueError:
        return  # The config's own reader says what is wrong with it.
    hidden = told.get(_FIELD) if isinstance(told, dict) else None
    if isinstance(hidden, dict):
        env.update({str(name): str(value) for name, value in hidden.items()})


def forbid_core_file() -> None:
    """Have a crash of this process leave no core file: its memory holds tokens.

    The limit is 1 and not 0, because the kernel heeds no 0 where cores go through a pipe, but it does heed 1.
    """
    limit = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % (1 << 63))  # -1 stands for no limit.
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
