from hypothesis import given
from hypothesis import strategies as st

from ranklogd.retry import backoff_s

UNIT = st.floats(min_value=0, max_value=1)


def test_the_span_doubles_from_the_base_up_to_the_limit():
    spans = [backoff_s(n, base_s=1, max_s=300, dice=1.0) for n in range(1, 12)]
    assert spans == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_the_dice_choose_within_the_whole_span():
    assert backoff_s(4, base_s=1, max_s=300, dice=0.0) == 0
    assert backoff_s(4, base_s=1, max_s=300, dice=0.5) == 4


@given(failures=st.integers(min_value=1, max_value=10**9), dice=UNIT)
def test_after_any_number_of_failures_the_wait_is_bounded_and_there_is_a_next_try(failures, dice):
    assert 0 <= backoff_s(failures, base_s=0.5, max_s=300, dice=dice) <= 300


@given(failures=st.integers(min_value=1, max_value=200), dice=UNIT)
def test_one_more_failure_never_shortens_the_span(failures, dice):
    now, later = (backoff_s(n, base_s=0.5, max_s=300, dice=dice) for n in (failures, failures + 1))
    assert now <= later
