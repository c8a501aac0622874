"""`ranklog demo`: four ranks log a small training; one of them and the daemon are killed; nothing is lost.

    <dir>/v1/…             the store: the parquet files, as in every other store
    <dir>/.node/           what a node has besides: the daemon's state, journals, spools, the ranks' own counts
    <dir>/.node/run/       socket and log; in a temporary directory where the socket's path would be too long

Everything goes through `ranklog run`, with every place named, so that no other daemon is touched. `demo_job` is the
job, `demo_rank` the training script, `proof` compares.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ranklog import fs
from ranklog.autostart import LOG_NAME
from ranklog.cli import EXIT_ERROR, EXIT_OK, EXIT_PENDING
from ranklog.cli.output import Look, human_size, lay_out, print_json
from ranklog.config import SOCKET_NAME, SOCKET_PATH_SIZE_MAX, environment
from ranklog.errors import RanklogError, UsageError
from ranklog.names import display_name, new_run_id
from ranklog.reader.listing import Shard, list_shards
from ranklog.reader.pending import waiting_writers
from ranklog.stores import open_store
from ranklogd.commands.demo_rank import proof_path, read_proof
from ranklogd.commands.plot import plot
from ranklogd.report import backlog
from ranklogd.statedir import StateDir

if TYPE_CHECKING:
    from ranklogd.commands.proof import Attempt, Rows

STEPS = 500
RANKS_MAX = 64
DRAIN = "60s"
PLOT_POINTS = 50
_OTHERS = ("RANKLOG_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_")
_OTHER = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"})
"""What the demo must not take over from a job or a configuration that it may be tried in."""
_HEADER = ("RANK", "ATTEMPT", "END", "LOGGED", "IN PARQUET", "LOST", "DOUBLED")
_COUNTS = ("logged", "in_parquet", "lost", "doubled")
_LOOKS = (Look.NUMBER, Look.NUMBER, Look.TEXT, Look.NUMBER, Look.NUMBER, Look.NUMBER, Look.NUMBER)


class _Places(NamedTuple):
    store: Path
    node: Path
    runtime: Path
    proof: Path
    temporary: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ranklog demo`."""
    parser.add_argument("--dir", default="./ranklog-data", metavar="DIR", help="where to log to (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="number of ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its proof; return 0, 1 if anything is lost or doubled, 4 if not all was brought in."""
    if not 1 <= args.ranks <= RANKS_MAX or args.steps < 20:
        raise UsageError(f"ranklog demo: --ranks {args.ranks} must be from 1 to {RANKS_MAX}, --steps at least 20")
    from ranklogd.commands.proof import Rows  # Loads pyarrow: not for --help.

    began_s = time.monotonic()
    run_id = new_run_id(time.time_ns(), os.urandom(10))
    places = _prepare(Path(args.dir).absolute(), run_id)
    # What a program reads is on stdout; then the story goes to stderr.
    story = sys.stderr if args.json else sys.stdout
    story.write(f"ranklog demo: run {display_name(run_id)}, logged to {args.dir}\n\n")
    story.flush()
    try:
        code = _run_job(places, run_id, args, story.fileno())
        if code:
            raise RanklogError(f"the demo's job ended with code {code}; see {places.runtime / LOG_NAME}")
    finally:
        if places.temporary is not None:
            fs.remove_tree(places.temporary)
    waiting = waiting_writers([places.node / "journal", places.node / "spool"])
    if waiting or any(backlog(StateDir(places.node / "state"))):
        sys.stderr.write("ranklog demo: not everything was brought in, so nothing can be proved. Try again\n")
        return EXIT_PENDING
    shards = list_shards(open_store(str(places.store)), run=run_id)
    rows = Rows(places.store / shard.key for shard in shards)
    attempts = _judge(rows, places.proof, args.ranks)
    sound = bool(attempts) and not any(attempt.lost or attempt.doubled for attempt in attempts)
    if sound:
        fs.remove_tree(places.proof)
    took_s = time.monotonic() - began_s
    if args.json:
        facts = {"run": run_id, "to": str(places.store), "shards": [shard.key for shard in shards], "rows": rows.count}
        print_json({**facts, "ok": sound, "took_s": round(took_s, 2), "attempts": [asdict(a) for a in attempts]})
    else:
        _print_proof(attempts, sound=sound)
        _print_loss(rows)
        _print_next(args.dir, run_id, shards, took_s)
    return EXIT_OK if sound else EXIT_ERROR


def _prepare(store: Path, run_id: str) -> _Places:
    node = store / ".node"
    runtime, temporary = node / "run", None
    if len(os.fsencode(runtime / SOCKET_NAME)) > SOCKET_PATH_SIZE_MAX:
        runtime = temporary = Path(tempfile.mkdtemp(prefix="ranklog-demo-"))
    proof = node / "proof" / run_id
    for path in (store, node, proof):
        fs.make_dir(path)
    return _Places(store, node, runtime, proof, temporary)


def _run_job(places: _Places, run_id: str, args: argparse.Namespace, output_fd: int) -> int:
    env = {name: value for name, value in environment().items() if not name.startswith(_OTHERS) and name not in _OTHER}
    env |= {
        "RANKLOG_RUN_ID": run_id,
        "RANKLOG_JOURNAL_DIR": str(places.node / "journal"),
        "RANKLOG_SPOOL_DIR": str(places.node / "spool"),
        "RANKLOG_QUIET": "1",
        "PYTHONSAFEPATH": "1",  # Whatever lies in the directory where the demo is tried.
    }
    where = ["--to", str(places.store), "--state-dir", str(places.node / "state"), "--runtime-dir", str(places.runtime)]
    job = ["-m", "ranklogd.commands.demo_job", str(places.proof), str(args.ranks), str(args.steps)]
    command = [sys.executable, "-m", "ranklog.cli", "run", "--drain", DRAIN, *where, "--", sys.executable, *job]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output_fd)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached it, too.
        raise


def _judge(rows: "Rows", proof: Path, ranks: int) -> "list[Attempt]":
    attempts = []
    for rank in range(ranks):
        count = 0
        while proof_path(proof, rank, count).exists():
            count += 1
        for attempt in range(count):
            first, logged = read_proof(proof_path(proof, rank, attempt))
            attempts.append(rows.judge(rank, attempt, first, logged, killed=attempt < count - 1))
    return attempts


def _print_proof(attempts: "list[Attempt]", *, sound: bool) -> None:
    table = []
    for a in attempts:
        end = "kill -9" if a.killed else "finished"
        table.append([str(a.rank), str(a.attempt), end, *(f"{getattr(a, name):,}" for name in _COUNTS)])
    table.append(["all", "", "", *(f"{sum(getattr(a, name) for a in attempts):,}" for name in _COUNTS)])
    print()
    print("\n".join(lay_out(_HEADER, table, _LOOKS, None).lines))
    extra = sum(a.unreturned for a in attempts)
    if extra:
        print(f"and {extra} whose log() had not returned yet when its rank was killed")
    print("\nNothing lost, nothing doubled.\n" if sound else "\nRecords are lost or doubled: a bug, please report it\n")


def _print_loss(rows: "Rows") -> None:
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    width = min(79, shutil.get_terminal_size().columns - 1)
    print("loss, mean of the ranks, by step")
    print("\n".join(plot(thinned(rows.loss(), PLOT_POINTS), width=width, height=9, ascii_only=not unicode)))


def thinned(points: list[tuple[float, float]], count_max: int) -> list[tuple[float, float]]:
    """Return the means of at most so many equal stretches, so that a curve shows through its noise."""
    stretch = -(-len(points) // count_max) or 1
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _print_next(directory: str, run_id: str, shards: list[Shard], took_s: float) -> None:
    to = shlex.quote(directory)
    size = human_size(sum(shard.size_bytes for shard in shards))
    by_rank = "SELECT rank, count(*), min(value) FROM metrics WHERE key = 'loss' GROUP BY 1"
    print(f"\n{len(shards)} parquet files, {size}, in {directory}; {took_s:.0f} s\n\nTry next:")
    print(f"  ranklog ls --to {to}")
    print(f'  ranklog query --to {to} \\\n  "{by_rank}"')
    print(f"  ranklog tail --to {to} --key loss {display_name(run_id)}")
    print("  ranklog run -- torchrun --nproc-per-node 4 train.py")
