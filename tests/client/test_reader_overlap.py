from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from ranklog.layout import Lsn, ShardKey
from ranklog.reader.overlap import may_repeat, settled_by_names


def name(store: str, first: int, last: int) -> ShardKey:
    return ShardKey("proj", "run", "node", store * 16, Lsn(first), Lsn(last), "0" * 12)


def test_one_daemons_shards_with_disjoint_lsns_are_settled_by_their_names():
    assert settled_by_names([name("a", 6, 9), name("a", 1, 5)])
    assert settled_by_names([])


def test_an_lsn_in_two_names_or_a_second_daemon_leaves_it_open():
    assert not settled_by_names([name("a", 1, 5), name("a", 5, 9)])
    assert not settled_by_names([name("a", 1, 5), name("b", 6, 9)])
    assert not settled_by_names([name("a", 1, 5), name("a", 1, 5)])


def test_two_daemons_with_writers_of_their_own_share_nothing():
    names = [name("a", 1, 9), name("b", 1, 9)]
    assert may_repeat(names, [{"w": (0, 8)}, {"v": (0, 8)}]) == set()


def test_a_writer_that_changed_daemons_is_suspect_only_where_its_seqs_meet():
    names = [name("a", 1, 9), name("a", 10, 19), name("b", 1, 9), name("b", 10, 19)]
    ranges = [{"w": (0, 8)}, {"w": (9, 18)}, {"w": (15, 23)}, {"w": (24, 33)}]
    assert may_repeat(names, ranges) == {1, 2}


def test_a_wide_range_is_compared_with_all_that_follow():
    names = [name("a", 1, 99), name("b", 1, 9), name("c", 1, 9), name("d", 1, 9)]
    assert may_repeat(names, [{"w": (0, 90)}, {"w": (1, 2)}, {"w": (3, 4)}, {"w": (91, 92)}]) == {0, 1, 2}


def test_a_silent_footer_may_share_with_every_other_daemons_shard():
    names = [name("a", 1, 9), name("a", 10, 19), name("b", 1, 9)]
    assert may_repeat(names, [{"w": (0, 8)}, {"w": (9, 18)}, None]) == {0, 1, 2}
    assert may_repeat(names[:2], [{"w": (0, 8)}, None]) == set()


contents = st.frozensets(st.tuples(st.sampled_from("uvw"), st.integers(0, 12)), min_size=1, max_size=6)
shard = st.tuples(st.sampled_from("ab"), st.integers(1, 12), st.integers(0, 5), contents, st.booleans())


@given(st.lists(shard, max_size=6))
def test_every_pair_that_shares_a_record_is_suspect_unless_one_daemon_gave_it_two_lsns(drawn):
    names, ranges = [], []
    for store, first, length, held, silent in drawn:
        names.append(name(store, first, first + length))
        seqs = {w: [seq for other, seq in held if other == w] for w, _ in held}
        ranges.append(None if silent else {w: (min(found), max(found)) for w, found in seqs.items()})
    suspects = may_repeat(names, ranges)
    for (i, one), (j, other) in combinations(enumerate(drawn), 2):
        disjoint = one[1] + one[2] < other[1] or other[1] + other[2] < one[1]
        if one[3] & other[3] and not (one[0] == other[0] and disjoint):
            assert {i, j} <= suspects
            assert not settled_by_names(names)
    if settled_by_names(names):
        assert suspects == set()
