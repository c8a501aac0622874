"""What the kernel says of a process: CPU time and memory. Standard library only, for measured processes use it too."""

import time
from pathlib import Path


def cpu_s(pid: int) -> float:
    """Return the CPU time of another process, all threads, to the nanosecond: the kernel's per-process clock."""
    return time.clock_gettime((~pid << 3) | 2)


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """Return rss, pss and uss of a process; raises OSError when it is gone."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split(":")
        sizes[name] = int(amount.split()[0]) * 1024
    return {"rss": sizes["Rss"], "pss": sizes["Pss"], "uss": sizes["Private_Clean"] + sizes["Private_Dirty"]}
