"""ranklog: every rank logs, training never waits, no crash loses a record, and the result is plain parquet.

    import ranklog

    ranklog.init(project="llama", config={"lr": 3e-4})     # on every rank; no `if rank == 0`
    ranklog.log({"loss": loss, "grad_norm": norm})
    ranklog.finish()

The rooms: `run` and `current` are what a script calls; `values` and `identity` decide what is logged and by whom;
`writer`, `journal`, `backlog`, `spool`, `sender` and `transport` carry a record to the daemon; `frame`, `start`,
`wire`, `layout` and `schema` are the formats, shared with the daemon; `stores` and `reader` are the other end.
"""

from typing import Any

from ranklog.current import alert, config, current_run, define_metric, finish, flush, init, log, log_system
from ranklog.errors import RanklogError
from ranklog.run import Config, Run
from ranklog.version import __version__

__all__ = [
    "Config",
    "RanklogError",
    "Run",
    "__version__",
    "alert",
    "config",
    "current_run",
    "define_metric",
    "finish",
    "flush",
    "init",
    "log",
    "log_system",
    "read",
]


def __getattr__(name: str) -> Any:
    # `read` needs pyarrow, which a training process must not load for nothing.
    if name == "read":
        from ranklog.reader import read

        return read
    raise AttributeError(f"module 'ranklog' has no attribute {name!r}")
