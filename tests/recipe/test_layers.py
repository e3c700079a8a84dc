"""Layer keys against a plain reading of their rules, and keys written from indices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrazoo.recipe.layers import Axis, assign, spans

WAN = Axis({"": 30}, "layer", "backbone wan/t2v_1_3b")
FLUX = Axis({"double": 4, "single": 8}, "layer", "backbone flux")


def held(keys: list[str], axis: Axis = WAN) -> dict[str | None, str]:
    """Key → the layers it holds, as a key."""
    holder, problems = assign(keys, axis, "attention")
    assert not problems
    return {key: spans(i for i, one in enumerate(holder) if one == key) for key in dict.fromkeys(holder)}


def rules(keys: list[str], axis: Axis = WAN) -> list[str]:
    return [f"{p.path}: {p.rule}; {p.fix}" for p in assign(keys, axis, "attention")[1]]


def test_explicit_beats_parity_beats_all() -> None:
    assert held(["*", "odd", "0-2,27-29"]) == {"0-2,27-29": "0-2,27-29", "odd": "3-25/2", "*": "4-26/2"}
    assert held(["0-2,27-29", "odd", "*"]) == {"0-2,27-29": "0-2,27-29", "odd": "3-25/2", "*": "4-26/2"}


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        ("7", [7]),
        ("0-2", [0, 1, 2]),
        ("0-26/2", list(range(0, 27, 2))),
        ("first3", [0, 1, 2]),
        ("last3", [27, 28, 29]),
        ("odd", list(range(1, 30, 2))),
        ("even", list(range(0, 30, 2))),
        ("*", list(range(30))),
        ("1, 3 ,5-6", [1, 3, 5, 6]),
        ("0-3,2-5", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_items(key: str, layers: list[int]) -> None:
    holder, problems = assign([key], WAN, "attention")
    assert [i for i, one in enumerate(holder) if one == key] == layers
    assert not problems


def test_groups_count_from_their_own_start_and_beat_what_has_none() -> None:
    assert held(["double:*", "single:0-1", "single:last1", "*"], FLUX) == {
        "double:*": "0-3",
        "single:0-1": "4-5",
        "*": "6-10",
        "single:last1": "11",
    }
    assert held(["single:odd", "even", "*"], FLUX) == {"even": "0-10/2", "*": "1,3", "single:odd": "5-11/2"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["*", "0-2,27-30"], "attention.0-2,27-30: layer 30 does not exist: backbone wan/t2v_1_3b has layers 0-29"),
        (["0-5", "3-7"], "attention.3-7: layer 3-5 is claimed by '0-5' too"),
        (["odd", "1-29/2,odd", "odd,3"], "odd"),
        (["*", " *"], "claimed by '*' too"),
        (["frist3"], "'frist3' is not a layer key"),
        (["evn"], "did you mean 'even'?"),
        (["5-2"], "runs backwards"),
        (["0-9/0"], "stands still"),
        (["first31"], "wants 31 layers"),
        (["first0"], "wants 0 layers"),
        ([""], "'' is not a layer key"),
        (["1,,2"], "'' is not a layer key"),
        (["-1"], "is not a layer key"),
        (["single:1"], "has no group 'single'"),
        (["99999999999999999999"], "is not a layer key"),
    ],
)
def test_mistakes(keys: list[str], words: str) -> None:
    assert words in "\n".join(rules(keys))


def test_unknown_group_has_its_near_name() -> None:
    assert "did you mean 'single'?" in rules(["sinle:0"], FLUX)[0]


def test_a_conflict_settled_by_a_stronger_key_is_none() -> None:
    assert held(["odd", "single:odd", "5-11/2"], FLUX) == {None: "0-10/2", "odd": "1,3", "5-11/2": "5-11/2"}


@given(st.sets(st.integers(0, 40), min_size=1))
def test_keys_written_from_indices_are_read_back(layers: set[int]) -> None:
    holder, problems = assign([spans(layers)], Axis({"": 41}, "layer", "x"), "attention")
    assert {i for i, one in enumerate(holder) if one is not None} == layers
    assert not problems


item = st.one_of(
    st.builds(str, st.integers(0, 12)),
    st.builds(lambda a, b: f"{a}-{b}", st.integers(0, 12), st.integers(0, 12)),
    st.builds(lambda a, b, s: f"{a}-{b}/{s}", st.integers(0, 12), st.integers(0, 12), st.integers(0, 4)),
    st.builds(lambda e, n: f"{e}{n}", st.sampled_from(["first", "last"]), st.integers(0, 12)),
    st.sampled_from(["odd", "even", "*", "single:*", "double:1", "single:odd", "x", "2-", ""]),
)
keys_of = st.lists(st.lists(item, min_size=1, max_size=3).map(",".join), min_size=1, max_size=4, unique=True)


def meaning(part: str, groups: dict[str, int]) -> tuple[set[int], tuple[int, int]] | None:
    """Layers and rank of one item, read off the rules; None for a mistake."""
    name, colon, rest = part.rpartition(":")
    if colon and name not in groups:
        return None
    layers = list(range(sum(groups.values())))
    if colon:
        start = sum(size for other, size in groups.items() if list(groups).index(other) < list(groups).index(name))
        layers = layers[start : start + groups[name]]
    weak = 0 if colon else 1
    if rest == "*":
        return set(layers), (2, weak)
    if rest in ("odd", "even"):
        return set(layers[rest == "odd" :: 2]), (1, weak)
    for word in ("first", "last"):
        if rest.startswith(word) and rest[len(word) :].isdecimal():
            size = int(rest[len(word) :])
            if not 0 < size <= len(layers):
                return None
            return set(layers[:size] if word == "first" else layers[-size:]), (0, weak)
    numbers, _, step = rest.partition("/")
    first, dash, last = numbers.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or ("/" in rest and not (dash and step.isdecimal())):
        return None
    low, high, by = int(first), int(last or first), int(step or 1)
    if high < low or high >= len(layers) or by < 1:
        return None
    return set(layers[low : high + 1 : by]), (0, weak)


@given(keys_of)
def test_assignment_equals_the_rules(keys: list[str]) -> None:
    groups = {"double": 4, "single": 8}
    holder, problems = assign(keys, Axis(groups, "layer", "x"), "attention")
    read = {key: [meaning(part, groups) for part in key.split(",")] for key in keys}
    wrong = any(one is None for parts in read.values() for one in parts)
    conflict = False
    for layer in range(12):
        ranks = {
            key: min((one[1] for one in parts if one is not None and layer in one[0]), default=None)
            for key, parts in read.items()
        }
        claims = {key: rank for key, rank in ranks.items() if rank is not None}
        best = min(claims.values(), default=None)
        winners = [key for key, rank in claims.items() if rank == best]
        conflict |= len(winners) > 1
        assert holder[layer] in (winners or [None])
    assert bool(problems) == (wrong or conflict)
