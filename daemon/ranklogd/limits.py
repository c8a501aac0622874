"""What each option of the daemon may be: types, ranges, words."""

import os
from pathlib import Path
from typing import Any

from ranklog.config import SOCKET_PATH_SIZE_MAX
from ranklog.errors import UsageError
from ranklog.start import NAME_SIZE_MAX
from ranklog.stores.base import url_scheme
from ranklogd.units import format_value

_LOG_LEVELS = ("debug", "info", "warning", "error")
_VISIBILITIES = ("", "private", "public")
_KINDS: dict[Any, tuple[type, ...]] = {float: (float, int), Path | None: (Path, type(None))}
_LIMITS: dict[str, tuple[float, float]] = {
    "socket_mode": (0o000, 0o777),
    "commit_interval_s": (0, 0.1),  # Records must be durable within 250 ms, and the sender takes up to 100 of them.
    "seal_size_bytes": (4 << 10, 1 << 30),
    "seal_age_s": (0.01, 3600),
    "disk_quota_bytes": (4 << 10, 1 << 60),
    "disk_free_min_bytes": (0, 1 << 60),
    "quota_per_uid_bytes": (0, 1 << 60),
    "reserve_size_bytes": (0, 1 << 30),
    "cache_age_s": (0, 10 * 366 * 86400),
    "cache_size_bytes": (0, 1 << 60),
    "rescan_interval_s": (0.01, 600),
    "idle_exit_s": (0, 366 * 86400),
    "stop_deadline_s": (0, 86400),
    "upload_batch_max": (0, 1000),
    "upload_deadline_s": (0.1, 3600),
    "upload_interval_min_s": (0.01, 86400),
    "upload_interval_max_s": (0.01, 86400),
    "retry_base_s": (0.001, 3600),
    "retry_max_s": (0.001, 86400),
    "writers_max": (1, 1 << 20),
    "writer_keep_s": (0, 366 * 86400),
    "node_metrics_interval_s": (0, 3600),
}


def check_value(name: str, kind: Any, value: object) -> None:
    """Raise UsageError if the field `name`, annotated as `kind`, may not have this value."""
    kinds = _KINDS.get(kind, (kind,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(f"{name} is {value!r}, which is no {kinds[0].__name__}")
    if name in _LIMITS:
        low, high = _LIMITS[name]
        assert isinstance(value, int | float)
        if not low <= value <= high:  # What is not a number is outside, too.
            limits = f"{format_value(name, low)} to {format_value(name, high)}"
            raise UsageError(f"{name} is {value:g}, outside of its limits {limits}")
    elif name == "log_level" and value not in _LOG_LEVELS:
        raise UsageError(f"log_level is {value!r}; use one of {', '.join(_LOG_LEVELS)}")
    elif name == "create_bucket" and value not in _VISIBILITIES:
        raise UsageError(f"create_bucket is {value!r}; write private or public, or leave it empty")
    elif name == "to" and value:
        url_scheme(str(value))
    elif name == "node" and len(str(value).encode("utf-8", "replace")) > NAME_SIZE_MAX:
        raise UsageError(f"node is longer than {NAME_SIZE_MAX} bytes")
    elif name == "socket" and len(os.fsencode(str(value))) > SOCKET_PATH_SIZE_MAX:
        raise UsageError(
            f"the socket's path {str(value)!r} has {len(os.fsencode(str(value)))} bytes; the kernel takes "
            f"{SOCKET_PATH_SIZE_MAX}. Choose a shorter one: --runtime-dir /tmp/ranklog-{os.geteuid()}"
        )
