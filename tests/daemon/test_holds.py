"""Who waits, and for how long: one rule without a clock of its own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import StoreError
from ranklogd.ship.holds import ASKED_SPREAD, PROBE_S, RETRY_AFTER_MAX_S, Holds

AWAY = StoreError("503", permanent=False)
LOCKED = StoreError("401", permanent=False, held=True)


def asked(wait_s: float, *, held: bool = False) -> StoreError:
    return StoreError("429", permanent=False, held=held, retry_after_s=wait_s)


class Dice:
    """Falls as told."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value


def holds_of(dice: float = 1.0, max_s: float = 300.0) -> Holds:
    return Holds(base_s=1.0, max_s=max_s, dice=Dice(dice))


def waits(holds: Holds, error: StoreError, times: int) -> list[float]:
    """Fail again and again, each time when the last wait is over."""
    now_s, found = 0.0, []
    for _ in range(times):
        holds.hold_store(error, now_s)
        found.append(holds.store_wait_s(now_s))
        now_s += found[-1]
    return found


def test_what_passes_by_itself_is_tried_after_spans_that_double_up_to_a_limit_and_never_given_up():
    assert waits(holds_of(), AWAY, 2000)[:11] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert waits(holds_of(), AWAY, 2000)[-1] == 300


def test_of_each_span_a_random_part_is_taken_from_nothing_to_all_so_that_nodes_part_company():
    assert waits(holds_of(0.0), AWAY, 12) == [0.0] * 12
    assert waits(holds_of(0.5), AWAY, 3) == [0.5, 1, 2]


def test_what_a_person_must_mend_is_probed_slowly_and_no_slower_with_time():
    assert waits(holds_of(0.0), LOCKED, 50) == [PROBE_S / 2] * 50
    assert waits(holds_of(1.0), LOCKED, 50) == [PROBE_S] * 50
    assert sum(waits(holds_of(0.5), LOCKED, 10)) / 10 >= 30, "two probes a minute at most, whatever the dice"


def test_a_lower_limit_on_waits_holds_for_probes_too():
    assert waits(holds_of(max_s=2.0), LOCKED, 3) == [2, 2, 2]


@pytest.mark.parametrize(("says_s", "waits_s"), [(30, 30), (899, 899), (900, 900), (86_400, 900), (math.inf, 900)])
def test_a_store_that_asks_for_time_gets_it_up_to_a_quarter_of_an_hour(says_s: float, waits_s: float):
    assert waits(holds_of(0.0), asked(says_s), 1) == [waits_s]
    assert waits(holds_of(1.0), asked(says_s), 1) == pytest.approx([waits_s * (1 + ASKED_SPREAD)])
    assert waits(holds_of(0.0), asked(says_s, held=True), 1) == [max(waits_s, PROBE_S / 2)]


def test_a_store_that_asks_for_less_than_the_backoff_does_not_shorten_it():
    assert waits(holds_of(), asked(3), 6)[-1] == pytest.approx(32)
    assert waits(holds_of(0.0), asked(0), 3) == [0, 0, 0]


def test_a_run_that_fails_alone_waits_alone():
    holds = holds_of()
    holds.hold_folder("a", AWAY, 0.0)
    assert (holds.is_held("a", 0.9), holds.is_held("b", 0.0), holds.is_held("a", 1.0)) == (True, False, False)
    assert holds.store_wait_s(0.0) == 0
    assert holds.next_s(0.25) == 0.75
    holds.hold_folder("a", AWAY, 1.0)
    assert holds.next_s(1.0) == 2, "its own failures count, nobody else's"
    holds.hold_folder("b", AWAY, 1.0)
    assert holds.next_s(1.0) == 1


def test_a_call_that_fails_as_a_whole_holds_up_everything():
    holds = holds_of()
    holds.hold_folder("a", AWAY, 0.0)
    for now_s in (0.0, 1.0, 3.0):
        holds.hold_store(AWAY, now_s)
    assert holds.store_wait_s(3.0) == 4
    assert holds.next_s(3.0) == 4, "no run goes before the store"


@pytest.mark.parametrize("way", ["the run itself", "the store"])
def test_one_success_after_a_failure_frees_everybody_and_begins_to_count_anew(way: str):
    holds = holds_of()
    for now_s in range(8):
        holds.hold_folder("a", AWAY, now_s)
        holds.hold_folder("b", LOCKED, now_s)
        if way == "the store":
            holds.hold_store(AWAY, now_s)
    assert holds.came_through({"c" if way == "the store" else "a"})
    assert not holds
    assert (holds.next_s(8), holds.is_held("b", 8)) == (0, False)
    holds.hold_folder("a", AWAY, 8)
    assert holds.next_s(8) == 1


def test_the_success_of_a_run_that_never_failed_says_nothing_about_one_that_did():
    holds = holds_of()
    holds.hold_folder("a", LOCKED, 0.0)
    assert not holds.came_through({"b"})
    assert not holds.came_through(set())
    assert holds.is_held("a", 59.0)


def test_a_run_in_which_nothing_waits_is_forgotten_and_the_store_with_the_last_of_them():
    holds = holds_of()
    holds.hold_folder("a", AWAY, 0.0)
    holds.hold_store(AWAY, 0.0)
    holds.keep({"b"})
    assert not holds.is_held("a", 0.0)
    assert holds.store_wait_s(0.0) == 1
    holds.keep(set())
    assert not holds


def test_a_hurry_skips_every_wait_but_the_one_that_the_store_asked_for():
    holds = holds_of(0.0)
    for folder, error in (("a", AWAY), ("b", LOCKED), ("c", asked(600)), ("d", asked(5))):
        holds.hold_folder(folder, error, 0.0)
    holds.hurry(10.0)
    assert [folder for folder in "abcd" if holds.is_held(folder, 10.0)] == ["c"]
    assert holds.next_s(10.0) == 590
    for error, left_s in ((AWAY, 0), (LOCKED, 0), (asked(600), 590), (asked(5), 0)):
        holds = holds_of(0.0)
        holds.hold_store(error, 0.0)
        holds.hurry(10.0)
        assert holds.store_wait_s(10.0) == left_s


def test_of_a_wait_that_is_longer_than_what_was_asked_for_a_hurry_leaves_only_that():
    holds = holds_of(1.0)
    for now_s in range(10):
        holds.hold_store(asked(20), now_s)
    assert holds.store_wait_s(9) == 300
    holds.hurry(9)
    assert holds.store_wait_s(9) == pytest.approx(22)


ERRORS = st.one_of(
    st.just(AWAY),
    st.just(LOCKED),
    st.builds(asked, st.floats(0, 1e9), held=st.booleans()),
)
EVENTS = st.tuples(
    st.sampled_from(["store", "a", "b", "through a", "through b", "hurry", "keep a", "time"]),
    ERRORS,
    st.floats(0, 1000),
)


@given(events=st.lists(EVENTS, max_size=60), dice=st.floats(0, 1))
def test_whatever_happens_every_wait_ends_and_none_is_longer_than_its_limit(events, dice: float):
    holds, now_s, must_wait_until_s = holds_of(dice), 0.0, 0.0
    for event, error, number in events:
        if event == "store":
            holds.hold_store(error, now_s)
            must_wait_until_s = now_s + min(error.retry_after_s or 0.0, RETRY_AFTER_MAX_S)
        elif event in ("a", "b"):
            holds.hold_folder(event, error, now_s)
        elif event.startswith("through"):
            if holds.came_through({event[-1]}):
                must_wait_until_s = 0.0
                assert not holds
        elif event == "hurry":
            holds.hurry(now_s)
        elif event == "keep a":
            holds.keep({"a"})
        else:
            now_s += number
        assert 0 <= holds.store_wait_s(now_s) <= RETRY_AFTER_MAX_S * (1 + ASKED_SPREAD) + 1e-6
        assert 0 <= holds.next_s(now_s) <= RETRY_AFTER_MAX_S * (1 + ASKED_SPREAD) + 1e-6
        assert holds.store_wait_s(now_s) >= must_wait_until_s - now_s - 1e-6 * now_s, "what was asked for is kept"
        later_s = now_s + RETRY_AFTER_MAX_S * (1 + ASKED_SPREAD) + 1e-6
        assert not any(holds.is_held(folder, later_s) for folder in "ab")
        assert holds.store_wait_s(later_s) == 0
