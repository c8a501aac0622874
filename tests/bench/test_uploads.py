"""A process that uploads for months must not grow: a short run of the command that measures it."""

from bench.uploads import GROWTH_MAX, Sample, growth, measure


def test_two_hundred_uploads_leave_no_descriptor_thread_cache_or_log_behind() -> None:
    samples = measure(200)
    assert samples[-1].uploads == 200
    assert samples[-1].failures, "some were broken off on the way"
    for name, grown in growth(samples).items():
        if (
            name != "rss_bytes"
        ):  # Two hundred are too few to tell growth from pools that fill: that is for the full run.
            assert grown <= GROWTH_MAX[name], f"{name} grew by {grown}"
    assert max(sample.cache_bytes for sample in samples) < 64 << 10
    assert samples[-1].log_bytes == 0


def test_growth_is_judged_behind_the_warm_up_only() -> None:
    flat = [Sample(i, 0, float(i), 10 << 20 if i < 15 else 90 << 20, 9, 4, 0, 0) for i in range(100)]
    assert set(growth(flat).values()) == {0}
    leaking = [sample._replace(fds=9 + sample.uploads) for sample in flat]
    assert growth(leaking)["fds"] > GROWTH_MAX["fds"]
