"""The upload pace: one rule, seen alone and in fleets on one token."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet import LIMIT, simulate
from ranklog.stores.base import Allowance
from ranklogd.ship.pace import Pace


def test_a_lone_node_uploads_at_the_floor():
    pace = Pace(10, 1800)
    for now_s in range(0, 1000, 10):
        pace.accepted(now_s, Allowance(990, 100, 1000), 0.5)
        assert pace.interval_s == 10
        assert pace.wait_s(now_s) == 10


def test_a_refusal_halves_the_rate_and_keeps_the_node_away_until_the_window_is_over():
    pace = Pace(10, 1800)
    pace.refused(1000, 120, 0.5)
    assert pace.interval_s == 20
    assert pace.wait_s(1000) == 120 + 0.5 * 20


def test_after_a_refusal_the_rate_grows_by_equal_steps_back_to_what_was_too_much():
    pace = Pace(10, 1800)
    pace.refused(0, 0, 0)
    rates = []
    for now_s in range(12):
        pace.accepted(now_s, None, 0.5)
        rates.append(1 / pace.interval_s)
    steps = [after - before for before, after in pairwise(rates) if after < 0.1 - 1e-9]
    assert steps == pytest.approx([0.005] * len(steps))
    assert pace.interval_s == 10


def test_a_failure_that_says_nothing_about_the_limit_keeps_the_least_distance_and_shortens_no_wait():
    pace = Pace(10, 1800)
    pace.spent(0, 0.5)
    assert (pace.interval_s, pace.wait_s(0)) == (10, 10)
    pace.refused(0, 600, 0.0)
    pace.spent(1, 0.0)
    assert pace.wait_s(0) == 600
    assert pace.interval_s == 20
    pace.spent(1000, 0.5)
    assert pace.wait_s(1000) == 10


def test_a_window_that_empties_too_fast_slows_everybody_before_anybody_is_refused():
    pace = Pace(10, 1800)
    pace.accepted(0, Allowance(left=300, reset_s=200, limit=1000), 0.5)
    assert pace.interval_s > 10


@given(
    st.lists(
        st.tuples(st.sampled_from(["accepted", "refused", "spent"]), st.floats(0, 1e5), st.floats(0, 1)), max_size=50
    )
)
def test_the_interval_stays_within_its_limits_whatever_happens(events):
    pace, now_s = Pace(10, 1800), 0.0
    for event, number, dice in events:
        if event == "spent":
            pace.spent(now_s, dice)
        elif event == "accepted":
            pace.accepted(now_s, Allowance(int(number), number % 300, 1000), dice)
        else:
            pace.refused(now_s, number, dice)
        assert 10 <= pace.interval_s <= 1800
        assert pace.wait_s(now_s) >= 0
        now_s += pace.wait_s(now_s)


@pytest.mark.parametrize("nodes", [1, 16, 256])
def test_a_fleet_stays_below_the_limit_and_is_hardly_ever_refused(nodes: int):
    fleet = simulate(nodes, hours=3)
    assert fleet.calls <= LIMIT
    assert fleet.refused < 0.01 * LIMIT
    fair_s = max(10, nodes * 3 * 300 / LIMIT)
    assert fleet.lag_s(0.5) < 1.5 * fair_s


def test_without_headers_refusals_alone_keep_a_fleet_in_order():
    fleet = simulate(64, hours=3, headers=False)
    assert fleet.calls <= LIMIT
    assert fleet.refused < 0.1 * LIMIT


def test_after_an_outage_nobody_storms_and_everybody_drains():
    fleet = simulate(256, hours=5, outage_s=(3600, 3 * 3600))
    assert fleet.drained_nodes == 256
    assert fleet.refused < 0.05 * LIMIT
    assert fleet.drained_s < 1200
