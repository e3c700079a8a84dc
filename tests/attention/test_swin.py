"""Shifted windows: against roll-and-mask as published, the table's index, clipped axes, hosts that rotate, wrong options."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.attention import grouped
from ultrazoo.attention.branched import BranchedSpec
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.swin import SwinAttention, SwinSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=2, head_dim=8, grid=Grid(4, 6, 8), layer=1, layers=2)
ROPE = Rope(axes=(4, 2, 2))


def scenario(spec: AttentionSpec, site: Site = SITE, **options: object) -> Scenario:
    return Scenario(Example(spec, site, "swin"), torch.float64, **options)  # type: ignore[arg-type]


def published_index(window: tuple[int, int, int]) -> Tensor:
    """(n, n) rows of the table, as Video Swin numbers them."""
    axes = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    offset = axes[:, :, None] - axes[:, None, :] + torch.tensor(window)[:, None, None] - 1
    t, h, w = (2 * size - 1 for size in window)
    assert t * h * w > int(offset.max())
    return offset[0] * h * w + offset[1] * w + offset[2]


def regions(length: int, window: int, shift: int) -> Tensor:
    """The label of every place of a rolled axis: what came round the end may not meet what it lies beside."""
    label = torch.zeros(length, dtype=torch.long)
    if shift:
        label[length - window : length - shift], label[length - shift :] = 1, 2
    return label


def rolled_windows(z: Tensor, window: tuple[int, int, int], shift: tuple[int, int, int]) -> Tensor:
    """(B, T, H, W, ...) → (B, windows, n, ...) after rolling back by the shift."""
    z = torch.roll(z, [-s for s in shift], dims=(1, 2, 3))
    for axis, size in enumerate(window):
        z = z.unflatten(1 + 2 * axis, (-1, size))
    return z.transpose(2, 3).transpose(4, 5).transpose(3, 4).flatten(4, 6).flatten(1, 3)


def as_published(case: Scenario, window: tuple[int, int, int]) -> Tensor:
    """Roll, partition, mask what wrapped round, roll back: windows of this size at a grid that they divide."""
    grid, given = tuple(case.grid), case.case()
    shift = tuple((w // 2 if case.site.layer % 2 and w < n else 0) for w, n in zip(window, grid, strict=True))
    host = given.host
    q, k, v = (host.split(host.raw(given.x, which), which).unflatten(1, grid) for which in "qkv")
    q, k, v = (rolled_windows(z, window, shift).permute(0, 1, 3, 2, 4) for z in (q, k, v))  # type: ignore[arg-type]

    label = torch.zeros(1, *grid, dtype=torch.long)
    for axis in range(3):
        shape = [1, 1, 1, 1]
        shape[axis + 1] = -1
        label = label * 3 + regions(grid[axis], window[axis], shift[axis]).reshape(shape)
    label = rolled_windows(torch.roll(label, list(shift), dims=(1, 2, 3)), window, shift)  # type: ignore[arg-type]
    masked = label[..., :, None] != label[..., None, :]

    bias = given.weights["bias_table"][published_index(window)].permute(2, 0, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    y = scores.masked_fill(masked[:, :, None], float("-inf")).softmax(-1) @ v  # (B, windows, heads, n, D)

    place = rolled_windows(torch.arange(case.site.tokens).reshape(1, *grid), window, shift).flatten()  # type: ignore[arg-type]
    flat = y.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    return host.out(torch.zeros_like(flat).index_copy(1, place, flat))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("window", [(2, 3, 4), (4, 3, 2), (2, 6, 4), (1, 2, 8)], ids=str)
def test_equals_rolling_and_masking_where_windows_divide(window: tuple[int, int, int], layer: int) -> None:
    one = scenario(SwinSpec(window=window), SITE.at(layer=layer))
    with torch.no_grad():
        got, expected = one.run(), as_published(one, window)
        assert_close(f"{window}, layer {layer}", got, expected, EXACT)
        other = as_published(scenario(SwinSpec(window=window), SITE.at(layer=1 - layer)), window)
    if any(1 < w < n for w, n in zip(window, SITE.grid, strict=True)):
        assert error_ratio(other, expected) > 0.01, "layers of both parities look the same"


def test_images_take_the_same_table_as_swin() -> None:
    """T = 1: the 13 x 13 rows in the middle are Swin's table; the others play no part."""
    image = SITE.at(grid=Grid(1, 14, 14))
    one = scenario(SwinSpec(), image, batch=1)
    flat = scenario(SwinSpec(window=7), image, batch=1)
    assert isinstance(one.runner.attention, SwinAttention)
    assert one.runner.attention.bias_table.shape == (15 * 13 * 13, 2)
    assert flat.runner.attention.bias_table.shape == (13 * 13, 2)
    with torch.no_grad():
        flat.runner.attention.bias_table.copy_(one.runner.attention.bias_table[7 * 169 : 8 * 169])
        assert_close("8 x 7 x 7 on an image", one.run(), flat.run(one.x), EXACT)


def test_windows_over_all_frames_use_the_inflated_table() -> None:
    """(H, W) alone: the 2-D table for every pair of frames, as Video Swin fills its table from an image model's."""
    flat = scenario(SwinSpec(window=(3, 4)))
    full = scenario(SwinSpec(window=(4, 3, 4)))
    with torch.no_grad():
        full.runner.attention.bias_table.copy_(flat.runner.attention.bias_table.repeat(7, 1))
        assert_close("inflated", full.run(flat.x), flat.run(), EXACT)


@pytest.mark.parametrize("window", [(4, 6, 8), (9, 6, 20), (100, 100, 100)], ids=str)
def test_a_window_as_large_as_the_grid_is_full_attention_and_is_not_shifted(window: tuple[int, int, int]) -> None:
    one = scenario(SwinSpec(window=window, start="zero"), random_weights=False)
    full = scenario(FullSpec(), random_weights=False)
    with torch.no_grad():
        assert_close("zero table, one window", one.run(), full.run(one.x), EXACT)


def test_a_clipped_axis_is_whole_and_the_others_still_move() -> None:
    cuts = SwinSpec(window=(4, 4, 4)).windows().branches["windows"].place(SITE.at(grid=Grid(3, 4, 10))).q_cuts
    assert [list(cut.sizes()) for cut in cuts] == [[3], [4], [2, 4, 4]]


@pytest.mark.parametrize(("length", "sizes"), [(21, [3, 7, 7, 4]), (20, [3, 7, 7, 3]), (22, [3, 7, 7, 5]), (8, [3, 5])])
def test_shifted_runs_at_sizes_that_do_not_divide(length: int, sizes: list[int]) -> None:
    place = SwinSpec().windows().branches["windows"].place(SITE.at(grid=Grid(1, length, 7)))
    assert list(place.q_cuts[1].sizes()) == sizes


def test_a_host_that_rotates_keeps_its_positions_instead_of_the_table() -> None:
    site = SITE.at(rope=ROPE)
    plain = SwinSpec(window=(2, 3, 4)).expand(site)
    assert isinstance(plain, BranchedSpec)
    assert plain.cost(site).parameters == 0
    for spec in (SwinSpec(window=(2, 3, 4), bias=True), SwinSpec(window=(2, 3, 4))):
        at = site if spec.bias is True else SITE
        assert spec.expand(at) is spec
        assert spec.cost(at).parameters == 3 * 5 * 7 * 2
    assert isinstance(SwinSpec(window=(2, 3, 4), bias=False).expand(SITE), BranchedSpec)


def test_a_zero_table_keeps_the_scores_of_the_windows_alone() -> None:
    with_table = scenario(SwinSpec(window=(2, 3, 4), start="zero"), random_weights=False)
    without = scenario(SwinSpec(window=(2, 3, 4), bias=False), random_weights=False)
    normal = scenario(SwinSpec(window=(2, 3, 4)), random_weights=False)
    with torch.no_grad():
        expected = without.run()
        assert_close("zero", with_table.run(without.x), expected, EXACT)
        assert error_ratio(normal.run(without.x), expected) > 1e-4
    assert 0.015 < float(normal.runner.attention.bias_table.detach().std()) < 0.025


def test_gradients_of_the_table_do_not_need_gradients_of_anything_else() -> None:
    """A frozen host and an input without gradient: the table learns all the same."""
    found = []
    for frozen in (False, True):
        one = scenario(SwinSpec(window=(2, 3, 4)))
        one.runner.host.requires_grad_(not frozen)
        one.run().square().sum().backward()
        grad = one.runner.attention.bias_table.grad
        assert grad is not None
        found.append(grad)
    assert_close("gradient of the table", found[1], found[0], EXACT)


def test_slab_by_slab_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = scenario(SwinSpec(window=(2, 2, 3)), SITE.at(grid=Grid(5, 7, 8)), extra=True, key_valid=True)
    expected = [y.detach() for y in one.run()]
    monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", 2 * 16 * 8 * 12)
    with torch.no_grad():
        got = one.run()
    for name, a, b in zip(("grid", "extra"), got, expected, strict=True):
        assert_close(name, a, b, EXACT)


def test_video_swin_s_first_stage_costs_what_its_windows_say() -> None:
    """Grid (16, 56, 56), 3 heads, window (8, 7, 7): 392 keys per query on even layers, fewer at the ends of odd ones."""
    site = Site(dim=96, heads=3, head_dim=32, grid=Grid(16, 56, 56), layers=2)
    even, odd = (SwinSpec().cost(site.at(layer=layer)).pairs for layer in (0, 1))
    assert even == site.tokens * 8 * 7 * 7
    assert odd == (4**2 + 8**2 + 4**2) * (3**2 + 7 * 7**2 + 4**2) ** 2
    assert SwinSpec().cost(site).parameters == 15 * 13 * 13 * 3
    # 1088p divides by none of the three: padded windows would be 0.23 % of all pairs, the exact ones are fewer
    hd = SwinSpec(bias=False).cost(site.at(grid=Grid(21, 68, 120)))
    assert hd.pairs == (2 * 8**2 + 5**2) * (9 * 7**2 + 5**2) * (17 * 7**2 + 1)
    assert hd.pairs < 0.0023 * 171_360**2


def test_every_pair_of_a_window_has_its_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of a full window is the table at the published index, per head."""
    one = scenario(SwinSpec(window=(2, 3, 4)))
    table = one.runner.attention.bias_table
    with torch.no_grad():
        table.copy_(torch.arange(105.0)[:, None] + torch.tensor([0.0, 1000.0]))
    biases, attend = [], grouped.attend

    def watched(*args: Any, **options: Any) -> Any:
        biases.append(options["bias"])
        return attend(*args, **options)

    monkeypatch.setattr(grouped, "attend", watched)
    one.run()
    full = next(bias for bias in biases if bias.shape[-1] == 24)
    for head in range(2):
        assert torch.equal(full[0, head].long(), published_index((2, 3, 4)) + 1000 * head)


@pytest.mark.parametrize(
    ("options", "path", "said"),
    [
        ({"window": 0}, "window", "at least 1"),
        ({"window": [0, 7, 7]}, "window", "at least 1"),
        ({"window": -7}, "window", "at least 1"),
        ({"window": "7x7"}, "window", "expected"),
        ({"bias": "yes"}, "bias", "true or false"),
        ({"start": "ones"}, "start", "normal"),
        ({"windows": 7}, "windows", "did you mean 'window'"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str, said: str) -> None:
    spec, problems = parse_part("attention", {"name": "swin", **options})
    assert spec is None
    assert problems[0].path == path
    assert said in str(problems[0])


@pytest.mark.parametrize(
    ("spec", "site", "path"),
    [
        (SwinSpec(window=(1, 2, 3, 4)), SITE, "window"),
        (SwinSpec(window=()), SITE, "window"),
        (SwinSpec(bias=False, start="zero"), SITE, "start"),
        (SwinSpec(start="zero"), SITE.at(rope=ROPE), "start"),
        (SwinSpec(kernel="nobodys"), SITE, "kernel"),
        (SwinSpec(kernel="xformers"), SITE, "kernel"),
    ],
    ids=["four numbers", "none", "no table", "no table with rope", "unknown kernel", "kernel without bias"],
)
def test_wrong_combinations_are_problems(spec: SwinSpec, site: Site, path: str) -> None:
    assert [problem.path for problem in spec.problems(site)] == [path]
    assert spec.expand(site) is spec
    with pytest.raises(SiteError):
        spec.build(site)


def test_every_small_size_runs() -> None:
    """No size is too small, windows larger than everything included."""
    spec = SwinSpec(window=(2, 2, 3))
    for grid in itertools.product((1, 2, 3), (1, 2, 5), (1, 3, 4)):
        for layer in (0, 1):
            site = replace(SITE, grid=Grid(*grid), layer=layer)
            with torch.no_grad():
                y = scenario(spec, site).run()
            assert bool(torch.isfinite(y).all()), grid
