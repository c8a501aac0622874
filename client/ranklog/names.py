"""Names of runs: ids for machines, words for people. Pure.

    new id        r + 26 characters of base 32: 48 bits of milliseconds, 80 random bits. Sorts by time.
    derived id    r + 24 hex digits of a hash: what the ranks of one job come to without talking to each other
    display name  brave-river-417, from the id, so that all ranks agree on it too

Every id matches the slug grammar of `layout`, so it is its own directory name.
"""

import hashlib
import re

from ranklog.start import NAME_SIZE_MAX

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Without i, l, o and u, which are misread.
_HASH_SIZE = 10

_FIRST = (
    "amber", "ample", "autumn", "bold", "brave", "bright", "brisk", "calm", "candid", "cedar", "clear", "clever",
    "copper", "coral", "crisp", "dapper", "deep", "eager", "early", "easy", "fair", "fleet", "fond", "fresh",
    "gentle", "glad", "golden", "grand", "green", "happy", "hardy", "honest", "humble", "ivory", "jolly", "keen",
    "kind", "lively", "loyal", "lucky", "mellow", "merry", "mild", "misty", "neat", "noble", "olive", "patient",
    "plain", "polar", "proud", "quick", "quiet", "rapid", "robust", "ruby", "silent", "silver", "smooth", "steady",
    "sunny", "swift", "tidy", "vivid",
)  # fmt: skip
_SECOND = (
    "acorn", "anchor", "arrow", "badger", "beacon", "birch", "bridge", "brook", "canyon", "castle", "cloud", "comet",
    "crane", "creek", "delta", "dune", "eagle", "ember", "falcon", "fern", "field", "fjord", "forest", "garden",
    "glacier", "grove", "harbor", "hawk", "heron", "hill", "island", "lake", "lantern", "lark", "maple", "meadow",
    "mesa", "moon", "oak", "ocean", "orchard", "otter", "panda", "pebble", "pine", "planet", "pond", "prairie",
    "raven", "reef", "ridge", "river", "robin", "rock", "sail", "sparrow", "spring", "star", "stream", "summit",
    "tiger", "valley", "willow", "wren",
)  # fmt: skip


def new_run_id(wall_ns: int, random: bytes) -> str:
    """Return an id nobody else has, from the time in nanoseconds since the epoch and 10 random bytes."""
    assert len(random) == 10, len(random)
    number = (wall_ns // 1_000_000 % (1 << 48)) << 80 | int.from_bytes(random, "big")
    return "r" + "".join(_DIGITS[number >> shift & 31] for shift in range(125, -1, -5))


def derived_run_id(*words: str) -> str:
    """Return the id that everybody gets who has the same words."""
    # Each word with its length: ("a", "bc") and ("ab", "c") are different jobs.
    text = "".join(f"{len(word)}:{word}" for word in words)
    return "r" + _hash(text, 24)


def display_name(run: str) -> str:
    """Return a readable name for a run that was given none, the same for each of its ranks."""
    number = int(_hash(run, 12), 16)
    number, first = divmod(number, len(_FIRST))
    number, second = divmod(number, len(_SECOND))
    return f"{_FIRST[first]}-{_SECOND[second]}-{number % 1000}"


def fit_text(text: str, size_bytes_max: int) -> str:
    """Return `text` as storable: control characters and half characters replaced by `_`, cut to so many UTF-8 bytes.

    What was cut off is hashed into the end, so that two long texts stay two.
    """
    clean = _CONTROL.sub("_", text)
    raw = clean.encode()
    if len(raw) <= size_bytes_max:
        return clean
    return f"{raw[: size_bytes_max - _HASH_SIZE - 1].decode('utf-8', 'ignore')}~{_hash(text, _HASH_SIZE)}"


def fit_name(name: str) -> str:
    """Return the name of a project, run, node or role as it can be stored."""
    return fit_text(name, NAME_SIZE_MAX)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
