"""Cuts of an axis, and the two forms of cutting a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrazoo.attention.grouped import aligned
from ultrazoo.ops import partition, runs
from ultrazoo.ops.partition import AxisRule
from ultrazoo.ops.runs import AxisCut

lengths = st.integers(1, 23)


@st.composite
def cuts(draw: st.DrawFn, length: int | None = None) -> AxisCut:
    """Any cut of an axis that a layout can make."""
    length = draw(lengths) if length is None else length
    kind = draw(st.sampled_from(["whole", "balanced", "exact", "strided", "rolled"]))
    number = draw(st.integers(1, length))
    if kind == "whole":
        return runs.whole(length)
    if kind == "balanced":
        return runs.balanced(length, number)
    if kind == "exact":
        return runs.exact(length, number)
    if kind == "strided":
        return runs.strided(length, number)
    amount = draw(st.one_of(st.none(), st.integers(1, number)))
    cut = runs.exact(length, number) if amount else runs.balanced(length, number)
    return runs.rolled(cut, amount)


@given(cuts())
def test_a_cut_holds_every_token_once(cut: AxisCut) -> None:
    assert sum(cut.sizes()) == cut.length
    order = cut.order() or list(range(cut.length))
    assert sorted(order) == list(range(cut.length))
    counts = [cut.window_of().count(j) for j in range(cut.windows)]
    assert counts == list(cut.sizes())


@given(lengths, st.integers(1, 9))
def test_balanced_windows_differ_by_one_and_longer_come_first(length: int, count: int) -> None:
    count = min(count, length)
    sizes = list(runs.balanced(length, count).sizes())
    assert len(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [(12, 4, [2, 4, 4, 2]), (14, 4, [2, 4, 4, 4]), (13, 7, [3, 7, 3]), (9, 7, [3, 6]), (5, 7, [5])],
)
def test_swins_shifted_windows_are_runs(length: int, size: int, expected: list[int]) -> None:
    cut = runs.exact(length, size) if size < length else runs.whole(length)
    assert list(runs.rolled(cut, size // 2).sizes()) == expected


def test_windows_by_count_move_their_borders_to_the_middle() -> None:
    assert list(runs.balanced(7, 2).sizes()) == [4, 3]
    # windows [0, 4) and [4, 7): borders at 2 and 5
    assert list(runs.rolled(runs.balanced(7, 2), None).sizes()) == [2, 3, 2]


def test_interleaved_windows_of_one_token_are_contiguous_ones() -> None:
    assert runs.strided(5, 5) == runs.exact(5, 1).canonical()
    assert runs.strided(6, 2).order() == [0, 2, 4, 1, 3, 5]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_cutting_and_joining_is_the_identity(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 7)) for _ in range(3)]
    axes = tuple(data.draw(cuts(size)) for size in sizes)
    z = torch.randn(2, *sizes, 2, 3)
    pieces = partition.windows(z, axes)
    assert torch.equal(partition.unwindows(pieces, axes, 2), z)
    # with gradients the pieces are joined another way
    leaves = [piece.detach().requires_grad_() for piece in pieces]
    assert torch.equal(partition.unwindows(leaves, axes, 2), z)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_windows_hold_the_tokens_that_window_of_says(data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 6)) for _ in range(3)]
    axes = tuple(data.draw(cuts(size)) for size in sizes)
    labels = [torch.tensor(cut.window_of()) for cut in axes]
    label = (labels[0][:, None, None] * 100 + labels[1][:, None]) * 100 + labels[2]
    seen = []
    for piece in partition.token_windows(label[None], axes):
        assert (piece == piece[:, :1]).all()
        seen += piece[:, 0].tolist()
    assert len(seen) == len(set(seen)) == axes[0].windows * axes[1].windows * axes[2].windows


RULES = [
    AxisRule("whole"),
    AxisRule("counts", 2),
    AxisRule("counts", 3),
    AxisRule("size", 3),
    AxisRule("size", 4, shift=1),
    AxisRule("size", 4, shift=2),
    AxisRule("strided", 2),
    AxisRule("strided", 3),
    AxisRule("halves", 2),
]


def eager_cut(rule: AxisRule, length: int) -> AxisCut:
    """The cut that an index rule stands for."""
    if rule.kind == "whole":
        return runs.whole(length)
    if rule.kind == "counts":
        return runs.balanced(length, rule.number)
    if rule.kind == "strided":
        return runs.strided(length, rule.number)
    if rule.kind == "halves":
        return runs.rolled(runs.balanced(length, rule.number), None)
    cut = runs.exact(length, rule.number)
    return runs.rolled(cut, rule.shift) if rule.shift else cut


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", range(5, 14))
def test_index_form_makes_the_same_windows(rule: AxisRule, length: int) -> None:
    index = partition.axis_index(rule, length, torch.device("cpu"))
    cut = eager_cut(rule, length)
    groups: dict[int, list[int]] = {}
    for token, window in enumerate(cut.window_of()):
        groups.setdefault(window, []).append(token)
    if index.gather is None:
        assert cut.whole
        return
    assert None not in (index.valid, index.window, index.slot)
    found = [row[ok].tolist() for row, ok in zip(index.gather, index.valid, strict=True)]
    assert sorted(filter(None, found)) == sorted(groups.values())
    assert torch.equal(index.gather[index.window, index.slot], torch.arange(length))
    assert index.valid[index.window, index.slot].all()


@pytest.mark.parametrize("rules", list(itertools.islice(itertools.permutations(RULES, 3), 0, None, 37)), ids=str)
def test_gathering_and_scattering_is_the_identity(rules: tuple[AxisRule, ...]) -> None:
    grid = (5, 7, 9)
    z = torch.randn(2, *grid, 2, 3)
    axes = partition.indices(rules, grid, z.device)
    assert torch.equal(partition.scattered(partition.gathered_heads(z, axes), axes, grid, 2), z)


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 6))
def test_aligned_runs_pair_windows_of_two_grids(queries: int, keys: int, count: int) -> None:
    count = min(count, queries, keys)
    a, b = aligned(runs.balanced(queries, count), runs.balanced(keys, count))
    assert [n for n, _ in a.runs] == [n for n, _ in b.runs]
    assert list(a.sizes()) == list(runs.balanced(queries, count).sizes())
    assert list(b.sizes()) == list(runs.balanced(keys, count).sizes())
