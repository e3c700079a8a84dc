"""Cross-shaped windows: against by_head and against CSWin's own window images, published costs, ragged stripes, wrong options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ultrazoo.attention.branched import BranchedSpec, BranchSpec
from ultrazoo.attention.by_head import ByHeadSpec
from ultrazoo.attention.cross_shaped import CrossShapedSpec, split_heads
from ultrazoo.attention.full import FullSpec
from ultrazoo.attention.parts.layouts import WindowsSpec
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.ops.stripes import conv_in_stripes
from ultrazoo.options import parse_part
from ultrazoo.spec import AttentionSpec, Rope, Site
from ultrazoo.testing import assert_close, error_ratio
from ultrazoo.testing.scenario import Example, Scenario

EXACT = 1e-10
SITE = Site(dim=16, heads=4, head_dim=8, grid=Grid(2, 6, 8), rope=Rope(axes=(4, 2, 2)))
IMAGE = SITE.at(grid=Grid(1, 6, 6), rope=None)


def scenario(spec: AttentionSpec, site: Site = SITE, **options: object) -> Scenario:
    return Scenario(Example(spec, site, "cross"), torch.float64, **options)  # type: ignore[arg-type]


def as_heads(site: Site, width: int, frames: int = 0) -> ByHeadSpec:
    """The same stripes as two groups of heads."""
    first, _ = split_heads(site.heads)

    def stripes(h: int, w: int) -> BranchedSpec:
        return BranchedSpec(branches={"stripes": BranchSpec(layout=WindowsSpec(size=(frames, h, w)))})

    groups = {f"0-{first - 1}": stripes(width, 0), f"{first}-{site.heads - 1}": stripes(0, width)}
    return ByHeadSpec(groups=groups)


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
@pytest.mark.parametrize(("width", "frames"), [(2, 0), (4, 1), (5, 2)])
def test_without_the_convolution_it_is_two_groups_of_heads(width: int, frames: int, heads: int) -> None:
    site = SITE.at(heads=heads, grid=Grid(3, 6, 7))
    one = scenario(CrossShapedSpec(width=width, frames=frames, lepe=False), site, extra=True, key_valid=True)
    two = scenario(as_heads(site, width, frames), site, extra=True, key_valid=True)
    with torch.no_grad():
        (got, got_extra), (expected, expected_extra) = one.run(), two.run(one.x)
    # what an invalid token itself gets is nobody's promise
    assert_close("grid", got[one.key_valid], expected[one.key_valid], EXACT)
    assert_close("extra", got_extra, expected_extra, EXACT)
    ours, theirs = one.example.spec.cost(site), two.example.spec.cost(site)
    assert (ours.pairs, ours.attention_flops) == (theirs.pairs, theirs.attention_flops)
    assert (ours.qkv_flops, ours.out_flops, ours.parameters) == (theirs.qkv_flops, theirs.out_flops, 0)


def as_published(one: Scenario, width: int) -> Tensor:
    """CSWin where stripes divide: each stripe a small image, attention and a padded convolution inside it."""
    (_, h, w), batch = one.site.grid, one.x.shape[0]
    host, lepe = one.runner.host, one.runner.attention.lepe
    maps = [z.transpose(1, 2).reshape(batch, -1, h, w) for z in host.project(one.x, "qkv")]
    half = maps[0].shape[1] // 2
    parts = []
    for index, (rows, columns) in enumerate(((width, w), (h, width))):
        channels = slice(index * half, (index + 1) * half)

        def images(z: Tensor, r: int = rows, c: int = columns, s: slice = channels) -> Tensor:
            z = z[:, s].unflatten(3, (-1, c)).unflatten(2, (-1, r))
            return z.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

        q, k, v = (images(z) for z in maps)
        local = F.conv2d(v, lepe.weight[channels], lepe.bias[channels], padding=1, groups=half)
        q, k, v, local = (z.flatten(2).unflatten(1, (-1, one.site.head_dim)).transpose(2, 3) for z in (q, k, v, local))
        y = F.scaled_dot_product_attention(q, k, v) + local
        y = y.transpose(2, 3).flatten(1, 2).unflatten(-1, (rows, columns))
        y = y.unflatten(0, (batch, h // rows, w // columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        parts.append(y)
    return host.out(torch.cat(parts, dim=1).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_equals_the_published_windows_where_they_divide(width: int) -> None:
    one = scenario(CrossShapedSpec(width=width), IMAGE)
    with torch.no_grad():
        expected = as_published(one, width)
        assert_close(f"width {width}", one.run(), expected, EXACT)
        if width < 6:
            assert error_ratio(scenario(CrossShapedSpec(width=6), IMAGE).run(one.x), expected) > 0.01


@pytest.mark.parametrize(("stage", "width", "side", "heads"), [(1, 1, 56, 2), (2, 2, 28, 4), (3, 7, 14, 8)])
def test_published_costs(stage: int, width: int, side: int, heads: int) -> None:
    """Stages of CSWin-T at 224 pixels: every query has width * side keys in either half; stage 4 is one stripe."""
    site = Site(dim=32 * heads, heads=heads, head_dim=32, grid=Grid(1, side, side))
    cost = CrossShapedSpec(width=width).cost(site)
    assert cost.pairs == site.tokens * width * side
    assert cost.attention_flops == 4 * site.tokens * width * side * site.dim
    assert cost.parameters == 10 * site.dim
    assert cost.other_flops == 2 * 9 * site.tokens * site.dim
    last = site.at(grid=Grid(1, 7, 7))
    assert CrossShapedSpec().cost(last).pairs == FullSpec().cost(last).pairs == 49**2


def test_rows_and_columns_of_different_length_are_averaged_over_heads() -> None:
    """(1, 2, 10), width 1: 10 keys in a row, 2 in a column; of three heads two have rows."""
    site = SITE.at(heads=3, grid=Grid(1, 2, 10))
    cost = CrossShapedSpec(width=1).cost(site)
    assert [row.pairs for row in cost.branches] == [20 * 10, 20 * 2]
    assert cost.pairs == round((2 * 200 + 40) / 3)
    assert cost.attention_flops == 4 * 8 * (2 * 200 + 40)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_convolution_sees_zeros_beyond_each_stripe(rows: int, width: int) -> None:
    """Equal to each stripe convolved as an image of its own, the last one as short as it is."""
    g = torch.Generator().manual_seed(rows * 10 + width)
    image = torch.randn(2, 3, rows, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(3, 1, 3, 3, generator=g, dtype=torch.float64)
    bias = torch.randn(3, generator=g, dtype=torch.float64)
    alone = [F.conv2d(one, weight, bias, padding=1, groups=3) for one in image.split(width, dim=2)]
    assert_close("stripes", conv_in_stripes(image, weight, bias, width), torch.cat(alone, dim=2), EXACT)


def test_every_token_reaches_every_other_in_two_layers() -> None:
    seen = CrossShapedSpec(width=1).visible(IMAGE)
    once = seen.any(axis=0)
    assert not once.all()
    assert (once.astype(int) @ once.astype(int) > 0).all()
    assert (seen[0] != seen[3]).any()


def test_a_zero_convolution_changes_nothing() -> None:
    zero = scenario(CrossShapedSpec(width=2, start="zero"), random_weights=False)
    without = scenario(CrossShapedSpec(width=2, lepe=False), random_weights=False)
    random = scenario(CrossShapedSpec(width=2), random_weights=False)
    with torch.no_grad():
        expected = without.run()
        assert_close("zero", zero.run(without.x), expected, EXACT)
        assert error_ratio(random.run(without.x), expected) > 0.01


@pytest.mark.parametrize("width", [8, 100])
def test_one_stripe_is_full_attention(width: int) -> None:
    one = scenario(CrossShapedSpec(width=width, start="zero"), random_weights=False)
    full = scenario(FullSpec(), random_weights=False)
    with torch.no_grad():
        assert_close(f"width {width}", one.run(full.x), full.run(), EXACT)


def test_one_head_alone_is_refused() -> None:
    spec, site = CrossShapedSpec(), SITE.at(heads=1)
    found = spec.problems(site)
    assert len(found) == 1
    assert "a head each, got 1" in found[0].rule
    with pytest.raises(SiteError, match="branched with windows"):
        spec.build(site)
    assert CrossShapedSpec(lepe=False, start="zero").problems(SITE)[0].path == "start"
    assert CrossShapedSpec(kernel="nobodys").problems(SITE)[0].path == "kernel"


@pytest.mark.parametrize(
    ("options", "path"),
    [({"width": 0}, "width"), ({"width": [7, 7]}, "width"), ({"frames": -1}, "frames"), ({"lepe": "zero"}, "lepe")],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, object], path: str) -> None:
    spec, problems = parse_part("attention", {"name": "cross_shaped", **options})
    assert spec is None
    assert problems[0].path == path


def test_every_small_size_runs() -> None:
    for grid in [(1, 1, 1), (1, 1, 9), (2, 8, 1), (3, 2, 2)]:
        with torch.no_grad():
            y = scenario(CrossShapedSpec(width=3, frames=2), SITE.at(grid=Grid(*grid))).run()
        assert bool(torch.isfinite(y).all()), grid
