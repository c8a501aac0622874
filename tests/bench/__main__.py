"""Measure what ranklog promises to cost: `python -m tests.bench`, from the root of the project.

Every figure runs on a private node in temporary directories: processes, journals and disks of its own. Floors are
measured in the same run, so ratios can be compared between machines and digits cannot. A missed budget is a result,
not an error: the exit code is 0 if all was measured or skipped for what the machine lacks, 1 if not, 2 for usage.
"""

import argparse
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / part) for part in ("client", "daemon", "tests")]

from bench.figures import FIGURES  # noqa: E402
from bench.node import Options  # noqa: E402
from bench.rows import Row, Skipped, as_json, as_table  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about two minutes: smaller sizes, fewer repetitions")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help="measure only these; see --list")
    parser.add_argument("--list", action="store_true", help="print the names and what they measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")
    parser.add_argument(
        "--dir", type=Path, default=Options.directory, help="on the disk to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint-bytes",
        type=float,
        default=Options.checkpoint_bytes,
        help="size of the checkpoint written beside the trainer (default: 1e10)",
    )
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name, figure in FIGURES.items():
            sys.stdout.write(f"{name:16} {(figure.__doc__ or '').partition(chr(10))[0]}\n")
        return 0
    signal.signal(signal.SIGTERM, _exit)  # So that nothing stays mounted, frozen or running.
    options = Options(arguments.quick, arguments.dir.absolute(), int(arguments.checkpoint_bytes))
    groups, failed = measure(arguments.only or list(FIGURES), options)
    sys.stdout.write(as_table(groups) + "\n")
    if arguments.json:
        arguments.json.write_text(as_json(groups, machine(options)) + "\n")
    return 1 if failed else 0


def measure(names: Sequence[str], options: Options) -> tuple[dict[str, Sequence[Row] | str], bool]:
    """Measure these figures; return the rows of each, or why there are none, and whether any failed."""
    groups: dict[str, Sequence[Row] | str] = {}
    failed = False
    for name in names:
        began_s = time.monotonic()
        sys.stderr.write(f"{name} … ")
        sys.stderr.flush()
        try:
            groups[name] = FIGURES[name](options)
        except Skipped as exc:
            groups[name] = str(exc)
        except Exception as exc:  # noqa: BLE001 - one figure that breaks must not take the others with it
            traceback.print_exc(chain=False)
            groups[name], failed = f"failed: {type(exc).__name__}: {exc}", True
        sys.stderr.write(f"{time.monotonic() - began_s:.0f} s\n")
    return groups, failed


def machine(options: Options) -> dict[str, Any]:
    """Return what the digits depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m": os.getloadavg()[0],
        "quick": options.quick,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
