"""When to seal."""

from hypothesis import given
from hypothesis import strategies as st

from ranklogd.seal import SealPolicy

POLICY = SealPolicy(size_bytes_max=1000, age_s_max=10.0)


@given(size=st.integers(0, 2000), age=st.floats(0, 20), now=st.floats(0, 1e9))
def test_a_segment_is_sealed_by_size_or_by_age(size: int, age: float, now: float) -> None:
    first_s = now - age
    due = POLICY.due(size_bytes=size, first_entry_s=first_s, now_s=now)
    assert due == (size >= 1000 or now - first_s >= 10.0)


@given(size=st.integers(0, 1 << 40))
def test_a_segment_without_entries_never_is(size: int) -> None:
    assert not POLICY.due(size_bytes=size, first_entry_s=None, now_s=1e9)
