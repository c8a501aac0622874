"""Object keys: names in and out, and which shards a reader must read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.layout import Lsn, ShardKey, format_key, parse_key, project_prefix, run_prefix, slug, visible

KEY = ShardKey("llama", "r01", "node-7", "0123456789abcdef", Lsn(1), Lsn(0x1F), "a" * 12)
PATH = (
    "v1/project_id=llama/run_id=r01/node-7.0123456789abcdef.0000000000000001-000000000000001f.aaaaaaaaaaaa.parquet"
)
GRAMMAR = re.compile(r"[a-z][a-z0-9-]{0,63}")
HOSTILE = [
    "", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "0001", "-", "--", "-a", "A", "ä", "ß",
    "日本語", "🚀", "🚀🚀", "x" * 4096, "X" * 4096, "ß" * 4096, "%2e%2e", "a=b", "con", "nul", "\ud800", "İ", "ﬁ", "a ",
    " a", "a.", "a_b", "a-b", "null", "true", "1e5", "project_id=x", "…", "a\u202eb", "x" * 64, "x" * 65,
]  # fmt: skip
NAMES = st.text(max_size=80) | st.from_regex(r"[a-z][a-z0-9-]{0,70}", fullmatch=True) | st.sampled_from(HOSTILE)


def test_a_key_has_this_form_both_ways() -> None:
    assert format_key(KEY) == PATH
    assert parse_key(PATH) == KEY


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_becomes_a_safe_one(name: str) -> None:
    assert GRAMMAR.fullmatch(slug(name))
    assert run_prefix(name, name) == f"v1/project_id={slug(name)}/run_id={slug(name)}/"
    assert run_prefix(name, "r").startswith(project_prefix(name))


def test_hostile_names_stay_apart() -> None:
    assert len({slug(name) for name in HOSTILE}) == len(HOSTILE)


@given(NAMES, NAMES)
def test_a_slug_is_safe_and_two_names_never_share_one(one: str, other: str) -> None:
    assert GRAMMAR.fullmatch(slug(one))
    assert (slug(one) == slug(other)) == (one == other)


@given(NAMES)
def test_nobody_can_name_a_project_into_the_directory_of_another(victim: str) -> None:
    taken = slug(victim)
    if taken != victim:
        assert slug(taken) != taken


def test_plain_names_are_their_own_slugs_and_others_stay_readable() -> None:
    for name in ("llama", "run-7", "r01m81sdcfnm2twcs0mpaweaahj", "x" * 64, "brave-river-417"):
        assert slug(name) == name
    assert re.fullmatch(r"my-project-v1-[0-9a-f]{10}", slug("My Project (v1)"))
    assert re.fullmatch(r"x-0001-[0-9a-f]{10}", slug("0001"))
    assert re.fullmatch(r"x-[0-9a-f]{10}", slug("日本語"))


def test_a_slug_stays_what_it_is_in_every_version() -> None:
    assert slug("My Project") == "my-project-51e38ecc92"
    assert slug("") == "x-e3b0c44298"


@given(
    st.builds(
        lambda project, run, node, store, lsns, sha: ShardKey(
            slug(project), slug(run), slug(node), f"{store:016x}", Lsn(min(lsns)), Lsn(max(lsns)), f"{sha:012x}"
        ),
        NAMES, NAMES, NAMES, st.integers(0, (1 << 64) - 1),
        st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), st.integers(0, (1 << 48) - 1),
    )
)  # fmt: skip
def test_format_and_parse_are_inverses(key: ShardKey) -> None:
    path = format_key(key)
    assert parse_key(path) == key
    assert path.startswith("v1/")
    assert ".." not in path


@pytest.mark.parametrize(
    "path",
    [
        "", "v1", PATH[:-1], PATH + "x", PATH + "\n", "/" + PATH, PATH.upper(), PATH.replace("v1/", "v2/"),
        PATH.replace("llama", "../x"), PATH.replace("llama", "Llama"), PATH.replace("llama", "0001"),
        PATH.replace("llama", ""),
        PATH.replace("aaaaaaaaaaaa", "aaaaaaaaaaa"), PATH.replace("aaaaaaaaaaaa", "gggggggggggg"),
        PATH.replace("0000000000000001-000000000000001f", "000000000000001f-0000000000000001"),
        PATH.replace("run_id=", "run="), "v1/project_id=llama/run_id=r01/_run.json", PATH.replace("000001f", "00001f"),
        PATH.replace("0123456789abcdef", "٠123456789abcdef"), PATH + ".tmp", PATH.replace("node-7", ".node-7"),
    ],
)  # fmt: skip
def test_a_path_of_another_grammar_is_skipped(path: str) -> None:
    assert parse_key(path) is None


def test_names_sort_by_age() -> None:
    keys = [KEY._replace(first_lsn=Lsn(first), last_lsn=Lsn(first + 9)) for first in (1, 16, 256, 1 << 40, 1 << 63)]
    assert sorted(map(format_key, keys)) == [format_key(key) for key in keys]


def shard(first: int, last: int, *, run: str = "r", store: str = "0" * 16, sha: str = "0" * 12) -> ShardKey:
    return ShardKey("p", run, "n", store, Lsn(first), Lsn(last), sha)


def test_a_merged_shard_replaces_its_parts() -> None:
    parts = [shard(1, 3), shard(4, 6), shard(7, 9)]
    assert visible(parts) == parts
    assert visible([*parts, shard(1, 6)]) == [shard(1, 6), shard(7, 9)]
    assert visible([*parts, shard(1, 6), shard(1, 9)]) == [shard(1, 9)]


def test_two_shards_of_one_range_are_both_read() -> None:
    twins = [shard(1, 3, sha="a" * 12), shard(1, 3, sha="b" * 12)]
    assert visible(twins) == twins
    assert visible([*twins, shard(1, 4)]) == [shard(1, 4)]


def test_a_shard_hides_none_of_another_run_or_daemon() -> None:
    keys = [shard(1, 9), shard(2, 3, run="s"), shard(2, 3, store="1" * 16)]
    assert sorted(visible(keys)) == sorted(keys)


def test_overlapping_shards_are_both_read() -> None:
    assert visible([shard(1, 5), shard(4, 9)]) == [shard(1, 5), shard(4, 9)]


_SHARDS = st.builds(
    lambda one, other, run, sha: shard(min(one, other), max(one, other), run=run, sha=sha),
    st.integers(1, 12), st.integers(1, 12), st.sampled_from("rs"), st.sampled_from(["a" * 12, "b" * 12]),
)  # fmt: skip


@given(st.lists(_SHARDS, max_size=14, unique=True))
def test_visible_is_the_containment_rule_and_nothing_else(keys: list[ShardKey]) -> None:
    def hidden(key: ShardKey) -> bool:
        return any(
            other[:4] == key[:4]
            and other.first_lsn <= key.first_lsn
            and key.last_lsn <= other.last_lsn
            and other[4:6] != key[4:6]
            for other in keys
        )

    found = visible(keys)
    assert sorted(found) == sorted(key for key in keys if not hidden(key))
    assert found == sorted(found, key=lambda key: (key[:4], key.first_lsn, -key.last_lsn, key.sha256))


@given(st.lists(_SHARDS, max_size=14, unique=True))
def test_what_is_hidden_is_covered_by_what_is_read(keys: list[ShardKey]) -> None:
    def lsns(shards: list[ShardKey]) -> set[tuple[str, int]]:
        return {(key.run_id, lsn) for key in shards for lsn in range(key.first_lsn, key.last_lsn + 1)}

    assert lsns(visible(keys)) == lsns(keys)
