"""The runs on this node as `status` shows them, derived from the writers. Owned by the server loop."""

from collections import defaultdict

from ranklog.start import Start
from ranklogd.orphan import owner_gone
from ranklogd.report import RunStatus
from ranklogd.sequence import Writers, WriterState

RUNS_SHOWN_MAX = 200


class Runs:
    """When each writer's records last moved, and what that makes of its run."""

    def __init__(self, writers: Writers) -> None:
        self._writers = writers
        self._seen: dict[bytes, tuple[int, float]] = {}

    def update(self, now_s: float) -> None:
        """Look at every writer's progress."""
        for state in self._writers:
            seq, _ = self._seen.get(state.writer, (-1, now_s))
            if state.next_seq != seq:
                self._seen[state.writer] = (state.next_seq, now_s)
        for writer in [w for w in self._seen if self._writers.get(w) is None]:
            del self._seen[writer]

    def status(self, now_s: float) -> list[RunStatus]:
        """Return one row for each run, the one with the newest record first. The daemon's own writers do not count."""
        rows = [self._row(states, now_s) for states in self._groups().values()]
        return sorted(rows, key=lambda row: row.last_s)[:RUNS_SHOWN_MAX]

    def live(self) -> dict[tuple[str, str], list[Start]]:
        """Return (project, run) -> start of its writers, for every run of which a writer may still live."""
        groups = {run: [s.start for s in states if s.start and _lives(s)] for run, states in self._groups().items()}
        return {run: starts for run, starts in groups.items() if starts}

    def _groups(self) -> dict[tuple[str, str], list[WriterState]]:
        groups: dict[tuple[str, str], list[WriterState]] = defaultdict(list)
        for state in self._writers:
            if state.start is not None and state.start.rank is not None:
                groups[state.start.project, state.start.run].append(state)
        return groups

    def _row(self, states: list[WriterState], now_s: float) -> RunStatus:
        starts = [state.start for state in states if state.start is not None]
        last_s = min(now_s - self._seen.get(state.writer, (0, now_s))[1] for state in states)
        return RunStatus(
            project=starts[0].project,
            run=starts[0].run,
            name=starts[0].name,
            ranks=len({start.rank for start in starts}),
            world_size=max(start.world_size for start in starts),
            records=sum(state.next_seq for state in states),
            state=_state(states),
            last_s=round(last_s, 1),
        )


def _state(states: list[WriterState]) -> str:
    """Return what its writers make of a run: a rank's last attempt decides, and no forked worker does."""
    if any(not state.ended_s for state in states):
        return "running"
    last: dict[bytes, WriterState] = {}
    for state in states:
        forked = state.start is not None and state.start.parent
        if not forked and (state.run_key not in last or last[state.run_key].start_ns < state.start_ns):
            last[state.run_key] = state
    return "finished" if last and all(state.finished for state in last.values()) else "ended"


def _lives(state: WriterState) -> bool:
    return not state.ended_s and state.start is not None and not owner_gone(state.start)
