"""Which shards may hold a record that another shard holds too. Pure.

Within one store_id a record has one lsn, so shards with disjoint lsn ranges share nothing: most runs are settled by
names alone. Between store_ids only the records tell: a writer whose daemon was replaced sends what was not
acknowledged again, and the second daemon stores it under its own lsns. There the seq ranges in the footers decide. A
query then pays for deduplication only on the shards named here, and a filter on clean ones reaches the file.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ranklog.layout import ShardKey

Writers = Mapping[str, tuple[int, int]]
"""What a footer says of a shard's writers: id -> (first seq, last seq)."""


class _Claim(NamedTuple):
    """One writer's seqs in one shard."""

    first: int
    last: int
    shard: int


def settled_by_names(names: Sequence[ShardKey]) -> bool:
    """Return True if the names of one run's shards prove that no record is in two of them."""
    if len({name.store_id for name in names}) > 1:
        return False
    ordered = sorted(names, key=lambda name: name.first_lsn)
    return all(left.last_lsn < right.first_lsn for left, right in pairwise(ordered))


def may_repeat(names: Sequence[ShardKey], writers: Sequence[Writers | None]) -> set[int]:
    """Return the indexes of one run's shards that may share a record with another one of them.

    `writers` are those of the footers, None where a footer says nothing: such a shard may share with every other.
    """
    suspects: set[int] = set()
    claims: dict[str, list[_Claim]] = defaultdict(list)
    unknown = [index for index, ranges in enumerate(writers) if ranges is None]
    for index, ranges in enumerate(writers):
        for writer, (first, last) in (ranges or {}).items():
            claims[writer].append(_Claim(first, last, index))
        for other in unknown:
            if other != index and not _apart(names[index], names[other]):
                suspects |= {index, other}
    for claimed in claims.values():
        reaching: list[_Claim] = []
        for claim in sorted(claimed):
            reaching = [earlier for earlier in reaching if earlier.last >= claim.first]
            for earlier in reaching:
                if not _apart(names[earlier.shard], names[claim.shard]):
                    suspects |= {earlier.shard, claim.shard}
            reaching.append(claim)
    return suspects


def _apart(one: ShardKey, other: ShardKey) -> bool:
    """Tell whether the names alone prove that two shards share no record."""
    return one.store_id == other.store_id and (one.last_lsn < other.first_lsn or other.last_lsn < one.first_lsn)
