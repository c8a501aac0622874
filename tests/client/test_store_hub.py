"""What an answer of the Hub means: statuses, waits and limits, as rules without a network."""

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.errors import StoreError
from ranklog.stores.base import Allowance
from ranklog.stores.hub import Deadline, read_allowance, refusal, retry_after_s

NOW_S = 1_800_000_000.0
MISSING = {"X-Error-Code": "RepoNotFound"}


def kind(error: StoreError) -> str:
    return "permanent" if error.permanent else "held" if error.held else "transient"


@pytest.mark.parametrize(
    ("statuses", "about_files", "otherwise"),
    [
        ([408, 425, 429, 500, 502, 503, 504, 520, 529, 599], "transient", "transient"),
        ([301, 302, 303, 307, 308], "held", "held"),
        ([401, 402, 403, 404, 405, 406, 407, 409, 410, 411, 415, 418, 423, 426, 431, 451, 499], "held", "held"),
        ([400, 413, 414, 422], "permanent", "held"),
    ],
)
def test_every_status_is_of_one_class_and_only_a_request_about_files_may_be_refused_for_good(
    statuses, about_files, otherwise
):
    for status in statuses:
        assert kind(refusal(status, {}, b"", "POST x", NOW_S, files=True)) == about_files, status
        assert kind(refusal(status, {}, b"", "GET x", NOW_S)) == otherwise, status


@pytest.mark.parametrize(
    ("status", "headers", "remedy"),
    [
        (401, {}, "hf auth login"), (402, {}, "storage"), (403, {}, "write access"), (404, MISSING, "no such bucket"),
        (404, {}, "proxy"), (307, {"Location": "https://x/new"}, "https://x/new"), (429, {}, "rate limit"),
    ],
)  # fmt: skip
def test_what_a_person_can_mend_is_told_with_its_remedy(status, headers, remedy):
    error = refusal(status, headers, b'{"error":"said"}', "GET x", NOW_S)
    assert str(error).startswith(f"GET x answered {status}: said")
    assert remedy in str(error)
    assert (error.status, error.code) == (status, headers.get("X-Error-Code", ""))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff", b'{"error":{"a":1}}', b"[" * 100_000, b'{"error":"' + b"x" * 9999 + b'"}'])  # fmt: skip
def test_whatever_stands_in_the_body_of_a_refusal_it_becomes_a_short_text(body):
    assert len(str(refusal(500, {}, body, "GET x", NOW_S))) < 300


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"Retry-After": "60"}, 60.0),
        ({"Retry-After": " 86400 "}, 86400.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": formatdate(NOW_S + 90, usegmt=True)}, 90.0),
        ({"Retry-After": formatdate(NOW_S - 90, usegmt=True)}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": "٣"}, None),
        ({"Retry-After": ""}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"api";t=55'}, None),
        ({"RateLimit": '"api";r=0'}, None),
        ({"RateLimit": "nonsense"}, None),
        ({"Retry-After": "soon", "RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"Retry-After": "7", "RateLimit": '"api";r=0;t=55'}, 7.0),
    ],
)
def test_a_wait_that_is_asked_for_is_read_in_every_form_and_nonsense_is_none(headers, wait_s):
    assert retry_after_s(headers, NOW_S) == wait_s
    assert refusal(503, headers, b"", "GET x", NOW_S).retry_after_s == wait_s
    assert refusal(429, headers, b"", "GET x", NOW_S).retry_after_s == (wait_s or 0.0), "a 429 always slows down"


def test_the_rate_limit_is_read_from_its_two_headers():
    both = {"RateLimit": '"api";r=987;t=55', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'}
    assert read_allowance(both) == Allowance(987, 55.0, 1000, 300.0)
    assert read_allowance({"RateLimit": '"api"; r=0; t=9'}) == Allowance(0, 9.0)
    assert read_allowance({"RateLimit-Policy": '"api";q=1000;w=300'}) is None
    assert read_allowance(both | {"RateLimit-Policy": '"api";q=7;w=0'}) == Allowance(987, 55.0, 7), (
        "no window of nothing"
    )
    assert read_allowance({}) is None


HEADER = (
    st.text(max_size=30) | st.from_regex(r'"api"(;[rtqw]=\d{0,30}){0,4}', fullmatch=True) | st.from_regex(r"\d{1,400}")
)


@given(retry=HEADER, limit=HEADER, policy=HEADER)
def test_no_header_whatever_makes_an_answer_unreadable(retry, limit, policy):
    headers = {"Retry-After": retry, "RateLimit": limit, "RateLimit-Policy": policy}
    wait_s = refusal(429, headers, b"", "GET x", NOW_S).retry_after_s
    assert wait_s is not None
    assert wait_s >= 0
    allowance = read_allowance(headers)
    assert allowance is None or (allowance.left >= 0 and allowance.window_s > 0)


def test_a_deadline_counts_down_over_many_requests_and_is_transient_when_it_is_over():
    now_s = 100.0
    deadline = Deadline(30, clock=lambda: now_s)
    now_s = 129.0
    assert deadline.left_s() == 1.0
    now_s = 130.0
    with pytest.raises(StoreError, match=r"30 s \(upload_deadline\)") as late:
        deadline.left_s()
    assert kind(late.value) == "transient"
    assert Deadline(5).left_s() <= 5 <= Deadline(5.0, clock=time.monotonic).left_s() + 1
