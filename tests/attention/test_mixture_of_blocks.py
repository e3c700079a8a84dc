"""VMoBA: its partitions and published figures, what the rules take, how many pairs that is, sizes and options it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from tests.attention.raw import block_of, given, noise, softmax
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.mixture_of_blocks import MixtureOfBlocksSpec
from ultrazoo.attention.parts import routed, scene
from ultrazoo.attention.parts.routed import RoutedSpec
from ultrazoo.attention.parts.scene import Scene
from ultrazoo.errors import SiteError
from ultrazoo.grid import Grid
from ultrazoo.spec import Site
from ultrazoo.testing import assert_close, error_ratio

EXACT = 1e-12
SMALL = {"frames": 1, "column": (2, 2), "box": (1, 2, 4)}


def site(*grid: int, **more: Any) -> Site:
    return Site(dim=8, heads=1, head_dim=8, grid=Grid(*grid), **more)


def composition(spec: MixtureOfBlocksSpec, at: Site) -> BlockSparseSpec:
    expanded = spec.expand(at)
    assert isinstance(expanded, BlockSparseSpec)
    return expanded


def chosen(spec: RoutedSpec, q: Tensor, k: Tensor, blocks: int) -> Tensor:
    """Bool (B, heads, N, blocks) for q and k (B, heads, N, D) in one row of equal blocks."""
    tokens = q.shape[2]
    order = composition(MixtureOfBlocksSpec(partition=(0, 0, 1), box=(1, 1, tokens // blocks)), site(1, 1, tokens))
    scene = Scene(order.place(site(1, 1, tokens)), q, k, k, q.new_zeros(q.shape[0], tokens, 1))
    found: Tensor = spec.build(site(1, 1, tokens))(scene)(0, tokens)
    return found


# --- partitions and figures ---------------------------------------------------------------------------------------------


def counts(spec: MixtureOfBlocksSpec, *grid: int) -> list[int]:
    """Key blocks of the first three layers."""
    return [composition(spec, site(*grid, layer=i)).place(site(*grid)).keys.count for i in range(3)]


def test_blocks_of_the_published_settings() -> None:
    """7, 40 and 60 blocks of 320 x 512 and 84 frames (the paper's FLOPs); 2, 3 x 4 and 4 x 6 x 4 at 768 x 1280 and 77."""
    assert counts(MixtureOfBlocksSpec(frames=3, column=(4, 4), box=(7, 4, 8)), 21, 20, 32) == [7, 40, 60]
    assert counts(MixtureOfBlocksSpec(), 20, 48, 80) == [10, 320, 800]


def test_the_published_flops() -> None:
    """2.92 times fewer at 93 x 576 x 1024, 18 % of the blocks visited, the whole of Wan 1.3B with 300 tokens of text.

    The paper counts scores once, as ranking per query needs them.
    """
    at = Site(dim=1536, heads=12, head_dim=128, grid=Grid(24, 36, 64), layers=30)
    spec = MixtureOfBlocksSpec(frames=3, column=(4, 4), box=(6, 4, 8), scope="query")
    n, d, text, ffn = at.tokens, at.dim, 300, 8960
    rest = 2 * n * d * d * 6 + 4 * text * d * d + 4 * n * d * text + 4 * n * d * ffn
    ours = 0
    for layer in range(3):
        cost = spec.cost(at.at(layer=layer))
        ours += rest + cost.attention_flops + cost.other_flops
    ratio = 3 * (rest + 4 * n * n * d) / ours
    assert abs(ratio / 2.92 - 1) < 0.02, ratio


def test_the_partition_follows_the_layer() -> None:
    spec = MixtureOfBlocksSpec()
    assert [spec.dimensions(i) for i in range(6)] == [1, 2, 3, 1, 2, 3]
    assert [MixtureOfBlocksSpec(first=2).dimensions(i) for i in range(5)] == [2, 3, 1, 2, 3]
    assert [MixtureOfBlocksSpec(partition=(2, 0, 1)).dimensions(i) for i in range(5)] == [1, 1, 3, 1, 1]
    place = composition(MixtureOfBlocksSpec(column=(2, 3)), site(4, 3, 5, layer=1)).place(site(4, 3, 5))
    # columns hold all frames; those at the far borders are smaller
    assert place.keys.sizes.tolist() == [24, 16, 12, 8]
    assert place.order is not None
    assert sorted(place.order[:24] // 15) == sorted(list(range(4)) * 6)
    assert place.queries.count == 60


# --- what is taken ------------------------------------------------------------------------------------------------------


def by_hand(scores: list[list[float]]) -> tuple[Tensor, Tensor]:
    """q and k with these scores: query i of 4 blocks of one token asks key j with ``scores[i][j]``."""
    table = torch.tensor(scores, dtype=torch.float64)
    size = table.shape[0]
    return table[None, None], torch.eye(size, dtype=torch.float64)[None, None]


TABLE = [[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 2.0, 2.0], [0.0, 10.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # row 0: weights 1/3, 1, 2/3, 0 of 2 in all, own 1/6; row 1: 0, 0, 1, 1; row 2: all alike; row 3: 0, 1, .1, .2
        (0.1, [{0, 1}, {1, 2}, {0, 1, 2, 3}, {3, 1}]),
        (0.7, [{0, 1, 2}, {1, 2, 3}, {0, 1, 2, 3}, {3, 1}]),
        (0.95, [{0, 1, 2}, {1, 2, 3}, {0, 1, 2, 3}, {3, 1, 2}]),
    ],
)
def test_mass_per_query_by_hand(p: float, expected: list[set[int]]) -> None:
    found = chosen(RoutedSpec(scope="query", p=p), *by_hand(TABLE), 4)[0, 0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in found] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # weights are a tenth of the scores, 3.5 in all, own ones .5: .375 more is the 10; 1.25 takes one of 4, 4, and what ties; 1.95 the 3
        ({"p": 0.25}, [{0}, {1}, {2}, {3, 1}]),
        ({"p": 0.5}, [{0}, {1, 2, 3}, {2}, {3, 1}]),
        ({"p": 0.7}, [{0, 1}, {1, 2, 3}, {2}, {3, 1}]),
        ({"count": 1}, [{0}, {1}, {2}, {3}]),
        # eight pairs: four own ones, 10, 4, 4, 3
        ({"count": 2}, [{0, 1}, {1, 2, 3}, {2}, {3, 1}]),
    ],
)
def test_a_head_ranks_all_its_pairs_by_hand(options: dict[str, Any], expected: list[set[int]]) -> None:
    found = chosen(RoutedSpec(scope="head", **options), *by_hand(TABLE), 4)[0, 0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in found] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{"p": 0.25}, {"p": 0.8}, {"count": 3}])
def test_a_head_takes_what_a_sort_of_all_takes(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pairs, whether scores are made at once or two rows at a time; batch and heads do not mix."""
    q, k = (3 * noise(i, 2, 3, 60, 4).to(dtype) for i in range(2))
    at_once = chosen(RoutedSpec(**options), q, k, 10)
    for steps in (routed.STEP, scene.SCORES):
        monkeypatch.setitem(steps, "cpu", 2 * 2 * 3 * 10)
    assert torch.equal(chosen(RoutedSpec(**options), q, k, 10), at_once)
    scores = q @ k.unflatten(2, (10, 6)).mean(3).transpose(-1, -2)
    own = torch.eye(10, dtype=torch.bool).repeat_interleave(6, 0)
    for b in range(2):
        for h in range(3):
            values = scores[b, h].double()
            weights = (values - values.min()) / (values.max() - values.min())
            order = values.masked_fill(own, float("-inf")).flatten().argsort(descending=True)[: 60 * 9]
            if "count" in options:
                number = options["count"] * 60 - 60
            else:
                need = options["p"] * weights.sum() - weights[own].sum()
                number = max(1, int((weights.flatten()[order].cumsum(0) < need).sum()) + 1)
            expected = own.flatten().clone()
            expected[order[:number]] = True
            assert torch.equal(at_once[b, h].flatten(), expected)


def test_only_a_head_gives_queries_what_they_are_worth() -> None:
    q, k = noise(3, 1, 2, 64, 8), noise(4, 1, 2, 64, 8)
    q[:, :, :16] *= 20
    of_queries = chosen(RoutedSpec(scope="query", count=3), q, k, 8).sum(-1)
    of_head = chosen(RoutedSpec(scope="head", count=3), q, k, 8).sum(-1)
    assert (of_queries == 3).all()
    assert (of_head.sum(-1) == 3 * 64).all()
    assert (of_head[..., :16].double().mean() > 1.3 * of_head[..., 16:].double().mean()).all()


def test_equal_scores() -> None:
    """A query takes the first blocks beside its own, by number; a head takes all that tie; by mass all are kept."""
    q, k = torch.ones(1, 1, 12, 4).double(), torch.ones(1, 1, 12, 4).double()
    found = chosen(RoutedSpec(scope="query", count=2), q, k, 4)[0, 0]
    assert set(found[0].nonzero()[:, 0].tolist()) == {0, 1}
    assert set(found[11].nonzero()[:, 0].tolist()) == {0, 3}
    assert chosen(RoutedSpec(scope="head", count=2), q, k, 4).all()
    for scope in ("query", "head"):
        assert chosen(RoutedSpec(scope=scope), q, k, 4).all()


# --- exact settings and pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["query", "head"])
@pytest.mark.parametrize("more", [{"p": 1.0}, {"top": (99, 99, 99)}])
def test_all_blocks_are_full_attention(scope: Any, more: dict[str, Any]) -> None:
    q, k, v = (noise(i, 2, 3 * 5 * 4, 2, 8, scale=2.0) for i in range(3))
    spec = MixtureOfBlocksSpec(**SMALL, scope=scope, **more)
    assert_close("y", given(spec, q, k, v, grid=(3, 5, 4)), softmax(q, k, v), EXACT)
    part = given(MixtureOfBlocksSpec(**SMALL, scope=scope, top=(1, 1, 1)), q, k, v, grid=(3, 5, 4))
    assert error_ratio(part, softmax(q, k, v)) > 0.1


def test_own_blocks_alone_are_attention_in_each_frame() -> None:
    q, k, v = (noise(i, 1, 3 * 4 * 4, 2, 8, scale=2.0) for i in range(3))
    found = given(MixtureOfBlocksSpec(**SMALL, top=(1, 1, 1)), q, k, v, grid=(3, 4, 4))
    frames = [softmax(*(z[:, lo : lo + 16] for z in (q, k, v))) for lo in (0, 16, 32)]
    assert_close("y", found, torch.cat(frames, dim=1), EXACT)


def test_one_image_has_one_block_of_frames() -> None:
    q, k, v = (noise(i, 1, 20, 2, 8, scale=2.0) for i in range(3))
    for scope in ("query", "head"):
        assert_close("y", given(MixtureOfBlocksSpec(scope=scope), q, k, v, grid=(1, 4, 5)), softmax(q, k, v), EXACT)


@pytest.mark.parametrize("scope", ["query", "head"])
@pytest.mark.parametrize("top", [None, (2, 2, 2)])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pairs_that_reach_the_kernel(scope: Any, top: Any, layer: int) -> None:
    """Between fewest and most; by number and with equal blocks the expected number itself."""
    from ultrazoo.kernels import record

    grid = (4, 4, 8)
    spec = MixtureOfBlocksSpec(**SMALL, scope=scope, top=top, partition=tuple(int(layer == i) for i in range(3)))
    q, k, v = (noise(i, 1, 128, 2, 8, scale=2.0) for i in range(3))
    module = block_of(spec, 2, 8, 128, grid)
    with record() as ran:
        given(spec, q, k, v, module, grid)
    pairs = sum(run.pairs for run in ran) / 2
    cost = spec.cost(Site(dim=16, heads=2, head_dim=8, grid=Grid(*grid)))
    assert cost.pairs_min is not None
    assert cost.pairs_max is not None
    assert cost.pairs_min <= pairs <= cost.pairs_max
    if top is not None:
        size = {0: 32, 1: 16, 2: 8}[layer]
        assert pairs == cost.pairs == 128 * 2 * size


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"frames": 0}, "frames"),
        ({"column": [3]}, "column"),
        ({"column": [0, 4]}, "column"),
        ({"box": [4, 6]}, "box"),
        ({"partition": [0, 0, 0]}, "partition"),
        ({"partition": [1, 1]}, "partition"),
        ({"p": 0.0}, "p"),
        ({"p": 0.3, "top": [1, 1, 1]}, "p"),
        ({"p": 1.5}, "p"),
        ({"top": [3, 0, 15]}, "top"),
        ({"top": [3, 20]}, "top"),
        ({"scope": "block"}, "scope"),
        ({"kernel": "none_such"}, "kernel"),
    ],
)
def test_bad_options_name_their_path(options: dict[str, object], path: str) -> None:
    with pytest.raises(SiteError) as caught:
        ultrazoo.create_attention("mixture_of_blocks", dim=16, heads=2, **options)
    assert path in str(caught.value)


def test_it_goes_by_its_other_names() -> None:
    assert {"VMoBA", "MoBA"} <= set(next(r for r in ultrazoo.builtin.TABLE if r.name == "mixture_of_blocks").aliases)
    x = torch.randn(1, 24, 16)
    for name in ("VMoBA", "MoBA"):
        block = ultrazoo.create_attention(name, dim=16, heads=2, frames=1)
        assert block(x, (2, 3, 4)).shape == x.shape
