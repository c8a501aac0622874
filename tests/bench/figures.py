"""Every figure by the name that `--only` takes, in the order of the table; and what is left to do when one fails."""

from collections.abc import Callable

from bench import fig_ingest, fig_log, fig_loss, fig_parquet, fig_process, fig_read
from bench.node import Options
from bench.rows import Row

FIGURES: dict[str, Callable[[Options], list[Row]]] = {
    "log-flat": fig_log.log_flat,
    "log-paced": fig_log.log_paced,
    "log-checkpoint": fig_log.log_checkpoint,
    "log-frozen-disk": fig_log.log_frozen_disk,
    "log-cpu": fig_log.log_cpu,
    "startup": fig_process.startup,
    "memory": fig_process.memory,
    "node-memory": fig_process.node_memory,
    "parquet-one": fig_parquet.parquet_one,
    "parquet-eight": fig_parquet.parquet_eight,
    "writers-256": fig_ingest.writers_256,
    "ingest": fig_ingest.ingest,
    "ack": fig_ingest.ack_latency,
    "convert": fig_parquet.convert,
    "killed-trainer": fig_loss.killed_trainer,
    "killed-daemon": fig_loss.killed_daemon,
    "disk-full": fig_loss.disk_full,
    "bytes": fig_parquet.shard_bytes,
    "series": fig_read.series,
}
