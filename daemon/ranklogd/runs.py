"""The runs on this node as `status` shows them, derived from the writers. Owned by the server loop."""

from collections import defaultdict

from ranklogd.report import RunStatus
from ranklogd.sequence import Writers, WriterState

RUNS_SHOWN_MAX = 200


class Runs:
    """When each writer's records last moved, and what that makes of its run."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[int, float]] = {}
        self._writers: Writers = Writers()

    def update(self, writers: Writers, now_s: float) -> None:
        """Look at every writer's progress."""
        self._writers = writers
        for state in writers:
            seq, _ = self._seen.get(state.writer, (-1, now_s))
            if state.next_seq != seq:
                self._seen[state.writer] = (state.next_seq, now_s)
        for writer in [w for w in self._seen if writers.get(w) is None]:
            del self._seen[writer]

    def status(self, now_s: float) -> list[RunStatus]:
        """Return one row for each run, the one with the newest record first."""
        groups: dict[tuple[str, str], list[WriterState]] = defaultdict(list)
        for state in self._writers:
            if state.start is not None:
                groups[state.start.project, state.start.run].append(state)
        rows = [self._row(states, now_s) for states in groups.values()]
        return sorted(rows, key=lambda row: row.last_s)[:RUNS_SHOWN_MAX]

    def _row(self, states: list[WriterState], now_s: float) -> RunStatus:
        starts = [state.start for state in states if state.start is not None]
        last_s = min(now_s - self._seen.get(state.writer, (0, now_s))[1] for state in states)
        alive = any(not state.ended_s for state in states)
        finished = all(state.finished for state in states)
        return RunStatus(
            project=starts[0].project,
            run=starts[0].run,
            name=starts[0].name,
            ranks=len({start.rank for start in starts if start.rank is not None}),
            world_size=max(start.world_size for start in starts),
            records=sum(max(0, state.next_seq) for state in states),
            state="running" if alive else "finished" if finished else "ended",
            last_s=round(last_s, 1),
        )
