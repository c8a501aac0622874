"""Run ids and names: their form, their order, and that they never need another spelling anywhere."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.layout import slug
from ranklog.names import derived_run_id, display_name, fit_name, fit_text, new_run_id
from ranklog.start import NAME_SIZE_MAX

NS = 1_700_000_000_000_000_000
BYTES = st.binary(min_size=10, max_size=10)


def test_a_new_id_has_this_form() -> None:
    assert new_run_id(NS, bytes(10)) == "r01hf7yat000000000000000000"
    assert new_run_id(NS, b"\xff" * 10) == "r01hf7yat00zzzzzzzzzzzzzzzz"


@given(st.integers(0, 1 << 63), st.integers(0, 1 << 63), BYTES, BYTES)
def test_new_ids_sort_by_time(one: int, other: int, random: bytes, more: bytes) -> None:
    early, late = sorted((one // 10**6, other // 10**6))
    if early != late:
        assert new_run_id(early * 10**6, random) < new_run_id(late * 10**6, more)


@given(st.integers(0, 1 << 63), BYTES, st.lists(st.text(), max_size=4))
def test_ids_are_their_own_directory_names(wall_ns: int, random: bytes, words: list[str]) -> None:
    for run in (new_run_id(wall_ns, random), derived_run_id(*words)):
        assert re.fullmatch(r"r[0-9a-z]{24,26}", run)
        assert slug(run) == run


def test_a_derived_id_is_the_same_in_every_version() -> None:
    assert derived_run_id("llama", "slurm", "77") == "r588d5178aa14ba0aa3c24544"


@given(st.lists(st.text()), st.lists(st.text()))
def test_other_words_give_another_id(one: list[str], other: list[str]) -> None:
    assert (derived_run_id(*one) == derived_run_id(*other)) == (one == other)


def test_words_do_not_run_into_each_other() -> None:
    assert len({derived_run_id(*words) for words in (("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c"))}) == 4


@given(st.text())
def test_a_display_name_is_two_words_and_a_number(run: str) -> None:
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d{1,3}", display_name(run))
    assert display_name(run) == display_name(run)


def test_display_names_are_spread_out() -> None:
    assert len({display_name(f"r{number}") for number in range(1000)}) > 990


@given(st.text(alphabet=st.characters(), max_size=600), st.integers(20, 300))
def test_a_fitted_text_can_be_stored_and_fits(text: str, size: int) -> None:
    fitted = fit_text(text, size)
    assert len(fitted.encode()) <= size
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", fitted)
    assert fit_text(fitted, size) == fitted


def test_two_long_texts_stay_two() -> None:
    one, other = fit_name("x" * 5000 + "1"), fit_name("x" * 5000 + "2")
    assert one != other
    assert len(one) == NAME_SIZE_MAX
    assert one.startswith("xxx")


@pytest.mark.parametrize(("text", "fitted"), [("a\nb", "a_b"), ("a\ud800b", "a_b"), ("é🚀", "é🚀"), ("", "")])
def test_what_cannot_be_stored_is_replaced(text: str, fitted: str) -> None:
    assert fit_name(text) == fitted
