"""What users log, good and bad: what becomes of each value, and that nothing ever comes back at them."""

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import types
from typing import Any, NoReturn

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranklog.foreign import ARRAY_SIZE_MAX
from ranklog.frame import JSON_EXT
from ranklog.values import (
    DEPTH_MAX,
    KEY_SIZE_MAX,
    KEYS_MAX,
    check_keys,
    clean_key,
    flatten_config,
    normalise,
    normalise_step,
)

Pair = collections.namedtuple("Pair", "x y")


class Colour(enum.Enum):
    RED = "red"
    SHAPE = (2, 3)


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


class Loud(float):
    def __float__(self) -> float:
        return 99.0

    def __repr__(self) -> str:
        return "loud"


class LoudInt(int):
    def __int__(self) -> int:
        return 99


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "other"


def function() -> None:
    """A function to log."""


def kept(metrics: Any) -> dict[str, Any]:
    """Return what is logged, JSON decoded; no warning may come."""
    warnings: list[str] = []
    found = normalise(metrics, warn=warnings.append)
    assert warnings == []
    return {key: decoded(value) for key, value in found.items()}


def decoded(value: Any) -> Any:
    if not isinstance(value, msgpack.ExtType):
        return value
    assert value.code == JSON_EXT
    return ("json", json.loads(value.data))


def warned(metrics: Any) -> tuple[dict[str, Any], list[str]]:
    warnings: list[str] = []
    return normalise(metrics, warn=warnings.append), warnings


@pytest.mark.parametrize(
    "value",
    [0.5, -0.0, 1e300, math.inf, -math.inf, True, False, None, 0, -(1 << 63), (1 << 64) - 1, "", "ß🚀", "a\nb\0"]
)
def test_plain_values_stay_what_they_are(value: Any) -> None:
    found = kept({"k": value})["k"]
    assert (type(found), repr(found)) == (type(value), repr(value))


def test_nan_stays_nan() -> None:
    assert math.isnan(kept({"k": math.nan})["k"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 << 64, ("json", 1 << 64)), (-(1 << 63) - 1, ("json", -(1 << 63) - 1)), (10**100, ("json", 10**100)),
        (decimal.Decimal("0.25"), 0.25), (fractions.Fraction(1, 4), 0.25), (Loud(2.5), 2.5), (Text("t"), "t"),
        (Colour.RED, "red"), (Colour.SHAPE, ("json", [2, 3])), (Level.HIGH, 3),
        (datetime.date(2026, 11, 22), "2026-11-22"), (datetime.time(1, 2), "01:02:00"),
        (datetime.datetime(2026, 11, 22, 1, 2, 3, tzinfo=datetime.UTC), "2026-11-22T01:02:03+00:00"),
        (datetime.timedelta(minutes=1, milliseconds=500), 60.5),
        (pathlib.Path("/data/x"), "/data/x"), (b"\x00\xff", "AP8="), (bytearray(b"ab"), "YWI="),
        (memoryview(b"ab"), "YWI="),
        (1 + 2j, "(1+2j)"), (Ellipsis, "Ellipsis"), (range(3), "range(0, 3)"),
        (math.sqrt, "math.sqrt"), (dict, "builtins.dict"), (Colour, f"{__name__}.Colour"),
        (function, f"{__name__}.function"),
        ([], ("json", [])), ([1, 2.5, "x", None, True], ("json", [1, 2.5, "x", None, True])),
        ((1, (2, 3)), ("json", [1, [2, 3]])),
        ({3, 1, 2}, ("json", [1, 2, 3])), (frozenset({"b", "a"}), ("json", ["a", "b"])), ({}, ("json", {})),
        ([math.nan, math.inf, -math.inf], ("json", ["NaN", "Infinity", "-Infinity"])),
        ([{"a": {1: b"x"}}], ("json", [{"a": {"1": "eA=="}}])),
        ([Colour.RED, pathlib.Path("p")], ("json", ["red", "p"])),
        ([1 << 70], ("json", [1 << 70])), (array.array("d", [0.5, 1.5]), ("json", [0.5, 1.5])),
        ("\ud800x", "?x"), (["\ud800x"], ("json", ["?x"])),
    ],
)  # fmt: skip
def test_other_values_become_what_a_reader_expects(value: Any, expected: Any) -> None:
    found = kept({"k": value})["k"]
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.float16(2), 2.0), (np.longdouble(0.5), 0.5),
        (np.int8(-3), -3),
        (np.uint64((1 << 64) - 1), (1 << 64) - 1), (np.bool_(True), True), (np.str_("s"), "s"), (np.array(0.5), 0.5),
        (np.array([[0.5]]), 0.5), (np.array([1, 2]), ("json", [1, 2])), (np.zeros((2, 0)), ("json", [[], []])),
        (np.array([math.nan, 1]), ("json", ["NaN", 1.0])),
        (np.datetime64("2026-11-22T01:02:03"), "2026-11-22T01:02:03"),
        (np.timedelta64(1500, "ms"), 1.5), (np.array(["a", "b"]), ("json", ["a", "b"])), (np.complex64(1j), "1j"),
        ([np.float32(0.5), np.array([1, 2])], ("json", [0.5, [1, 2]])), (np.array([None], dtype=object), None),
    ],
)  # fmt: skip
def test_numpy_values_become_numbers_and_lists(value: Any, expected: Any) -> None:
    found = kept({"k": value})["k"]
    assert (type(found), found) == (type(expected), expected)


def test_torch_values_become_numbers_and_lists() -> None:
    torch = pytest.importorskip("torch", reason='needs torch: pip install "ranklog[test-all]"')
    weight = torch.tensor(0.5, requires_grad=True)
    assert kept({
        "a": weight, "b": weight * 2, "c": torch.tensor([3]), "d": torch.tensor([1, 2]), "e": torch.tensor(True),
        "f": torch.tensor(0.5, dtype=torch.bfloat16), "g": torch.nn.Parameter(torch.tensor(2.0)),
        "h": torch.Size([2, 3]),
        "i": torch.float32, "j": torch.empty(0), "k": torch.tensor([0.25, 1.0], requires_grad=True),
    }) == {
        "a": 0.5, "b": 1.0, "c": 3, "d": ("json", [1, 2]), "e": True, "f": 0.5, "g": 2.0, "h": ("json", [2, 3]),
        "i": "torch.float32", "j": ("json", []), "k": ("json", [0.25, 1.0]),
    }  # fmt: skip
    found, warnings = warned({"meta": torch.empty((), device="meta"), "ok": 1.0})
    assert (found, len(warnings)) == ({"ok": 1.0}, 1)


def test_nested_dicts_are_flattened() -> None:
    metrics = {"train": {"loss": 0.5, "acc": {"top1": 1, "top5": np.float32(0.5)}}, "lr": 0.1, "empty": {}}
    assert kept(metrics) == {
        "train/loss": 0.5, "train/acc/top1": 1, "train/acc/top5": 0.5, "lr": 0.1, "empty": ("json", {}),
    }  # fmt: skip


def test_things_with_named_parts_are_flattened_too() -> None:
    metrics = {"o": Optim(), "p": Pair(1, 2.0), "n": types.SimpleNamespace(a=1), "m": types.MappingProxyType({"b": 2})}
    assert kept(metrics) == {
        "o/lr": 0.1, "o/betas": ("json", [0.9, 0.99]), "p/x": 1, "p/y": 2.0, "n/a": 1, "m/b": 2,
    }  # fmt: skip


class Config:
    def to_dict(self) -> dict[str, Any]:
        return {"layers": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (argparse.Namespace(lr=0.1, deep={"a": 1}), {"lr": 0.1, "deep/a": 1}),
        (Optim(), {"lr": 0.1, "betas": ("json", [0.9, 0.99])}),
        (Config(), {"layers": 2}), ({"a": 1}, {"a": 1}), (collections.OrderedDict(a=1), {"a": 1}), ({}, {}),
    ],
)  # fmt: skip
def test_a_config_may_be_any_thing_with_named_parts(config: Any, expected: dict[str, Any]) -> None:
    warnings: list[str] = []
    found = flatten_config(config, warn=warnings.append)
    assert ({key: decoded(value) for key, value in found.items()}, warnings) == (expected, [])


@pytest.mark.parametrize("metrics", [None, 1, 0.5, "loss", [("a", 1)], object(), b"x", int])
def test_what_is_no_dict_is_told_and_nothing_is_logged(metrics: Any) -> None:
    found, warnings = warned(metrics)
    assert (found, len(warnings)) == ({}, 1)
    assert "is not a dict" in warnings[0]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("loss", "loss"), ("train/loss", "train/loss"), ("", "_"), (1, "1"), (None, "None"), ((1, 2), "(1, 2)"),
        (0.5, "0.5"),
        (b"raw", "raw"), ("a\nb\0", "a_b_"), ("\ud800", "_"), ("ß 🚀", "ß 🚀"), (Text("t"), "t"),
        ("k" * 256, "k" * 256),
    ],
)  # fmt: skip
def test_keys_become_text_that_can_be_stored(key: Any, expected: str) -> None:
    assert list(kept({key: 1.0})) == [expected]


def test_long_keys_are_cut_and_stay_apart() -> None:
    found = list(kept({"k" * 5000: 1.0, "k" * 5001: 2.0, "ß" * 200: 3.0, "a" * 200: {"b" * 200: 4.0}}))
    assert len(set(found)) == 4
    assert all(len(key.encode()) <= KEY_SIZE_MAX for key in found)
    assert found == list(kept({"k" * 5000: 1.0, "k" * 5001: 2.0, "ß" * 200: 3.0, "a" * 200: {"b" * 200: 4.0}}))


def test_keys_that_are_equal_after_flattening_are_numbered_with_one_warning() -> None:
    found, warnings = warned({"a/b": 1.0, "a": {"b": 2.0}, "a\n": {"x": 1}, "a\t": {"x": 2}, "1": 1, 1: 2})
    assert found == {"a/b": 1.0, "a/b#2": 2.0, "a_/x": 1, "a_/x#2": 2, "1": 1, "1#2": 2}
    assert len(warnings) == 3
    assert "'a/b' came more than once" in warnings[0]
    found, warnings = warned({"a#2": 0.0, "a\n": 1.0, "a\t": 2.0, "a\r": 3.0, "a_#2": 4.0})
    assert found == {"a#2": 0.0, "a_": 1.0, "a_#2": 2.0, "a_#3": 3.0, "a_#2#2": 4.0}


@pytest.mark.timeout(30)
def test_many_equal_keys_do_not_take_for_ever() -> None:
    class Same:
        def __str__(self) -> str:
            return "same"

    found, warnings = warned({Same(): float(number) for number in range(60_000)})
    assert len(found) == 60_000
    assert found["same#60000"] == 59_999.0
    assert set(warnings) == {warnings[0]}


class Evil:
    """Raises whatever one does with it."""

    def _raise(self, *_: object) -> NoReturn:
        raise RuntimeError("evil")

    __repr__ = __str__ = __float__ = __int__ = __index__ = __iter__ = __len__ = __bool__ = __hash__ = __eq__ = _raise  # type: ignore[assignment]
    __getattr__ = __format__ = __fspath__ = _raise  # type: ignore[assignment]


class EvilArray:
    shape = property(Evil._raise)
    item = tolist = Evil._raise


class EvilMapping(collections.UserDict[Any, Any]):
    def items(self) -> NoReturn:
        raise KeyError("evil")


class EvilKey:
    def __str__(self) -> str:
        raise ValueError("evil")


class NotWhatItSays:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("evil")


class BadText:
    def __repr__(self) -> Any:
        return 7


class Endless(collections.UserDict[Any, Any]):
    def __init__(self) -> None:
        super().__init__()

    def items(self) -> Any:
        return ((str(number), 1.0) for number in range(1 << 60))


EVIL: dict[str, Any] = {
    "object": Evil(), "array": EvilArray(), "mapping": EvilMapping(), "class": NotWhatItSays(), "text": BadText(),
    "key": {EvilKey(): 1}, "in a list": [Evil()], "in a list in a dict": {1: [Evil()]},
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)  # By name: pytest looks at its parameters, and these bite.
def test_a_value_that_cannot_be_had_costs_its_key_one_warning_and_the_record_nothing(name: str) -> None:
    value = EVIL[name]
    found, warnings = warned({"before": 1.0, "bad": value, "after": "x"})
    assert found == {"before": 1.0, "after": "x"}
    assert len(warnings) == 1
    assert "bad" in warnings[0]
    assert warned({"before": 1.0, "bad": value})[1] == warnings


def test_a_bad_value_inside_a_dict_leaves_its_neighbours() -> None:
    found, warnings = warned({"d": {"good": 1, "bad": Evil(), "deep": {"bad": BadText(), "good": 2}}})
    assert found == {"d/good": 1, "d/deep/good": 2}
    assert [text.split("'")[1] for text in warnings] == ["d/bad", "d/deep/bad"]


def test_a_key_that_has_no_text_costs_itself_only() -> None:
    found, warnings = warned({EvilKey(): 1.0, "good": 2.0})
    assert (found, len(warnings)) == ({"good": 2.0}, 1)


def test_what_contains_itself_is_left_out() -> None:
    endless: list[Any] = []
    endless.append(endless)
    loop: dict[str, Any] = {"x": 1.0}
    loop["self"] = loop
    found, warnings = warned({"list": endless, "dict": loop, "good": 1.0})
    assert found["good"] == 1.0
    assert found["dict/x"] == 1.0
    assert "list" not in found
    assert all("nested deeper" in text for text in warnings)


def test_nesting_is_followed_to_its_limit() -> None:
    value: Any = 1.0
    for _ in range(DEPTH_MAX - 1):
        value = {"d": value}
    assert list(kept(value).values()) == [1.0]
    deep: Any = 1.0
    for _ in range(100_000):
        deep = [deep]
    found, warnings = warned({"deep": deep, "good": 1.0})
    assert (found, len(warnings)) == ({"good": 1.0}, 1)


def test_a_structure_that_multiplies_itself_ends() -> None:
    bomb: Any = [1]
    tree: Any = {"x": Evil()}
    for _ in range(DEPTH_MAX - 3):
        bomb, tree = [bomb, bomb], {"a": tree, "b": tree}
    for value in (bomb, tree):
        found, warnings = warned({"good": 1.0, "bomb": value})
        assert found["good"] == 1.0
        assert warnings


def test_ten_thousand_keys_are_kept_and_a_million_are_not() -> None:
    assert len(kept({f"k{number}": 0.5 for number in range(10_000)})) == 10_000
    assert len(kept({"n": {f"k{number}": number for number in range(10_000)}})) == 10_000
    for metrics in ({f"k{number}": 0.5 for number in range(KEYS_MAX + 1)}, Endless(), {"a": Endless(), "b": Endless()}):
        found, warnings = warned(metrics)
        assert len(found) == KEYS_MAX
        assert len(warnings) == 1


def test_a_large_array_is_left_out_with_advice() -> None:
    assert len(kept({"a": np.zeros(ARRAY_SIZE_MAX)})["a"][1]) == ARRAY_SIZE_MAX
    found, warnings = warned({"a": np.zeros(ARRAY_SIZE_MAX + 1), "b": bytes(2 << 20), "good": 1})
    assert found == {"good": 1}
    assert "log a summary" in warnings[0]
    assert len(warnings) == 2


def test_check_keys_tells_which_records_need_no_second_look() -> None:
    assert check_keys(("loss", "a/b", "ß", "k" * KEY_SIZE_MAX))
    assert check_keys(())
    for key in ("", "a\n", "\ud800", "k" * (KEY_SIZE_MAX + 1), "ß" * 129, 1, None, Text("t"), b"x", Evil):
        assert not check_keys(("loss", key))
    assert not check_keys(tuple(map(str, range(KEYS_MAX + 1))))


@given(st.text(alphabet=st.characters(), max_size=300))
def test_a_clean_key_stays_clean(key: str) -> None:
    assert check_keys((clean_key(key),))
    assert check_keys((key,)) == (clean_key(key) == key)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0), (-5, -5), ((1 << 63) - 1, (1 << 63) - 1), (np.int64(7), 7), (np.uint8(7), 7), (3.0, 3),
        (np.float32(3), 3),
        (Level.HIGH, 3), (LoudInt(2), 2), (decimal.Decimal(4), 4), (np.array([5]), 5), (None, None),
        (fractions.Fraction(6, 2), 3),
    ],
)  # fmt: skip
def test_a_step_is_a_whole_number(step: Any, expected: int | None) -> None:
    warnings: list[str] = []
    found = normalise_step(step, warn=warnings.append)
    assert (type(found), found, warnings) == (type(expected), expected, [])


@pytest.mark.parametrize(
    "step",
    [
        1.5, math.nan, math.inf, "3", b"3", True, np.bool_(True), 1 << 63, -(1 << 63) - 1, [], {}, object(),
        EvilArray(), 1j,
        np.array([1, 2]), 1e300,
    ],
    ids=lambda step: type(step).__name__,
)  # fmt: skip
def test_a_step_that_is_none_is_told_and_counted_on(step: Any) -> None:
    warnings: list[str] = []
    assert normalise_step(step, warn=warnings.append) is None
    assert len(warnings) == 1


_ATOMS = (  # Without the object that bites whoever asks for its class: hypothesis does.
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters()) | st.binary()
    | st.decimals() | st.fractions() | st.dates() | st.datetimes() | st.timedeltas() | st.complex_numbers()
    | st.sampled_from(sorted(EVIL.keys() - {"class"})).map(lambda name: EVIL[name])
    | st.sampled_from([object(), Colour.SHAPE, Level.HIGH, Loud(1), Text("x"), np.float32(1), np.array([1, 2]), len])
)  # fmt: skip
_KEYS = st.text(alphabet=st.characters()) | st.integers() | st.none() | st.booleans() | st.binary() | st.just(EvilKey())
_JUNK = st.recursive(
    _ATOMS,
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(_KEYS, inner, max_size=4)
    | st.builds(Pair, inner, inner)
    | st.builds(Optim, inner, inner)
    | st.builds(lambda value: types.SimpleNamespace(a=value), inner),
    max_leaves=12,
)


@settings(max_examples=300)
@given(_JUNK | st.dictionaries(_KEYS, _JUNK))
def test_nothing_that_is_logged_makes_it_raise_and_all_that_is_left_can_be_packed(metrics: Any) -> None:
    warnings: list[str] = []
    found = normalise(metrics, warn=warnings.append)
    packed = msgpack.packb(found)
    assert check_keys(tuple(found)) or any("#" in key for key in found)
    again = msgpack.unpackb(packed)
    assert list(again) == list(found)
    for value in again.values():
        if isinstance(value, msgpack.ExtType):
            json.loads(value.data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    second: list[str] = []
    assert list(normalise(metrics, warn=second.append)) == list(found)
    assert second == warnings


@given(_ATOMS | _JUNK)
def test_no_step_makes_it_raise(step: Any) -> None:
    warnings: list[str] = []
    found = normalise_step(step, warn=warnings.append)
    assert (found is None) == (bool(warnings) or step is None)
