"""Calls that do not fit: masks that are not bool, shapes, dtypes, segments and grids, each told before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ultrazoo
from ultrazoo.attention.contract import Call, Extra
from ultrazoo.attention.standalone import PlainHost, reset_parameters
from ultrazoo.errors import UsageError
from ultrazoo.grid import Grid
from ultrazoo.spec import Segment, Site

GRID = (2, 3, 5)
TOKENS = 30


def more(count: int = 4, batch: int = 2, heads: int = 2, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, count, heads, head_dim) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_masks_are_bool(dtype: torch.dtype) -> None:
    """0 and 1 as numbers would be added to scores, or taken for True everywhere."""
    with pytest.raises(
        UsageError, match=r"key_mask of extra tokens is a bool tensor \(B, M\) = \(2, 4\).*mask.bool\(\)"
    ):
        Extra(*more(), key_mask=torch.ones(2, 4, dtype=dtype))
    with pytest.raises(UsageError, match=r"key_valid is a bool tensor \(B, N\)"):
        Call(grid=GRID, key_valid=torch.ones(2, TOKENS, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda q, k, v: Extra(q[0], k[0], v[0]),
            r"\(B, M, heads, D\), normed, rotated and split; got q float32 \(4, 2, 8\)",
        ),
        (lambda q, k, v: Extra(q, k, v[:, 1:]), r"one shape"),
        (lambda q, k, v: Extra(q, k[:, :, :1], v[:, :, :1]), r"one shape"),
        (lambda q, k, v: Extra(q, k.half(), v), r"one dtype; got q float32 .*k float16"),
        (
            lambda q, k, v: Extra(q, k, v, torch.ones(2, 3, dtype=torch.bool)),
            r"\(B, M\) = \(2, 4\), got \(2, 3\).*padded to M",
        ),
        (
            lambda q, k, v: Extra(q, k, v, segments=(Segment("text", 3),)),
            r"all 4 extra tokens .*add up to 3 \(text 3\)",
        ),
        (
            lambda q, k, v: Extra(q, k, v, segments=(Segment("text", 3), Segment("audio", 2))),
            r"add up to 5 \(text 3 \+ audio 2\)",
        ),
    ],
    ids=["dimensions", "tokens", "heads", "dtypes", "mask", "fewer", "more"],
)
def test_extra_tokens_belong_together(make: Callable[..., Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(*more())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "sparse"}, "rows is dense or pattern, got 'sparse'"),
        ({"keys": "never"}, "keys is always or compete, got 'never'"),
        ({"length": -1}, "0 or more, got -1"),
        ({"length": 2.0}, "0 or more, got 2.0"),
        ({"length": True}, "0 or more, got True"),
    ],
)
def test_segments_have_known_policies_and_lengths(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"segment 'text': .*{words}"):
        Segment(**{"kind": "text", "length": 4, **options})
    assert Segment("text", 0).length == 0


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 0), (2, 3, -5), (2.0, 3, 5), (1, 2, 3, 4), (True, 3, 5)], ids=str)
def test_a_call_s_grid_is_three_positive_integers(grid: Any) -> None:
    with pytest.raises(UsageError, match=r"three positive integers"):
        Call(grid=grid)


@pytest.mark.parametrize(
    "step",
    ["x", 3, (-1, 4), (4, 4), (7, 4), (0.5, 4), (0, 4.0), (True, 4), (1,), (0, 1, 2), torch.tensor([0, 4])],
    ids=str,
)
def test_a_call_s_step_is_an_index_below_a_count(step: Any) -> None:
    with pytest.raises(UsageError, match=r"a step is \(index, count\), two integers with 0 <= index < count, got "):
        Call(grid=GRID, step=step)
    assert Call(grid=GRID, step=(3, 4)).step == (3, 4)


def with_extra(**sizes: int) -> dict[str, Any]:
    return {"extra": Extra(*more(**sizes))}


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        ((2, 29, 16), {}, r"N = 30 for grid \(2, 3, 5\), got \(2, 29, 16\)"),
        ((2, TOKENS, 15), {}, r"C = 16, got"),
        ((TOKENS, 16), {}, r"N = 30 .*got \(30, 16\)"),
        ((0, TOKENS, 16), {}, r"no samples .*at least 1"),
        ((2, TOKENS, 16), {"key_valid": torch.ones(2, 29, dtype=torch.bool)}, r"\(B, N\) = \(2, 30\), got \(2, 29\)"),
        ((2, TOKENS, 16), {"key_valid": torch.ones(1, TOKENS, dtype=torch.bool)}, r"got \(1, 30\)"),
        ((2, TOKENS, 16), {"timestep": torch.ones(3)}, r"timestep is .*B = 2, T = 2, N = 30; got \(3,\)"),
        ((2, TOKENS, 16), {"timestep": torch.ones(2, 7)}, r"got \(2, 7\)"),
        ((2, TOKENS, 16), {"timestep": torch.tensor(3.0)}, r"\(B,\), \(B, T\) or \(B, N\).*got float32 \(\)"),
        ((2, TOKENS, 16), with_extra(batch=3), r"\(B, M, heads, D\) = \(2, 4, 2, 8\), got \(3, 4, 2, 8\)"),
        ((2, TOKENS, 16), with_extra(heads=4), r"got \(2, 4, 4, 8\)"),
        ((2, TOKENS, 16), with_extra(head_dim=16), r"got \(2, 4, 2, 16\)"),
    ],
)
@pytest.mark.parametrize("name", ["full", "video_sparse"])
def test_hidden_states_fit_the_call(name: str, x: tuple[int, ...], options: dict[str, Any], words: str) -> None:
    """At the attention itself, as a backbone calls it, and through the module with its own host."""
    module = ultrazoo.create_attention(name, dim=16, heads=2, qk_norm=True)
    with pytest.raises(UsageError, match=words):
        module(torch.randn(x), GRID, **options)
    with pytest.raises(UsageError, match=words):
        module.attention(torch.randn(x), module.host, Call(grid=GRID, **options))


@pytest.mark.parametrize("name", ["full", "branched", "video_sparse", "neighborhood", "linear"])
def test_extra_tokens_have_the_grid_s_dtype(name: str) -> None:
    needed = {"branched": {"branches": {"a": {}}}, "neighborhood": {"kernel_size": 3}}
    module = ultrazoo.create_attention(name, dim=16, heads=2, **needed.get(name, {}))
    extra = Extra(*(z.double() for z in more()))
    with pytest.raises(UsageError, match=r"float64.*float32.*one dtype"):
        module(torch.randn(2, TOKENS, 16), GRID, extra=extra)


def test_hidden_states_have_the_module_s_dtype_and_hold_numbers() -> None:
    module = ultrazoo.create_attention("full", dim=16, heads=2)
    with pytest.raises(UsageError, match=r"float64.*parameters are float32.*autocast"):
        module(torch.randn(2, TOKENS, 16).double(), GRID)
    with pytest.raises(UsageError, match="floating point numbers"):
        module(torch.ones(2, TOKENS, 16, dtype=torch.int64), GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, TOKENS, 16), GRID).isfinite().all()


def test_a_call_that_fits_is_left_alone() -> None:
    site = Site(dim=16, heads=2, head_dim=8, grid=Grid(*GRID))
    host = PlainHost(site)
    reset_parameters(host)
    attention = ultrazoo.create_attention("full", dim=16, heads=2).attention
    valid, mask = torch.rand(2, TOKENS) > 0.3, torch.tensor([[True] * 4, [True, True, False, False]])
    extra = Extra(*more(), mask, (Segment("text", 3), Segment("audio", 1)))
    for timestep in (torch.ones(2), torch.ones(1), torch.ones(2, 2), torch.ones(2, TOKENS)):
        y, rows = attention(torch.randn(2, TOKENS, 16), host, Call(GRID, timestep, extra, valid))
        assert y.shape == (2, TOKENS, 16)
        assert rows.shape == (2, 4, 16)
        assert y.isfinite().all()
        assert rows.isfinite().all()


def test_a_design_says_what_it_needs_and_cannot_take() -> None:
    gated = ultrazoo.create_attention("ultragen", dim=16, heads=2, windows=2, rank=2)
    x = torch.randn(2, 2 * 4 * 4, 16)
    with pytest.raises(UsageError, match="'branched' needs the timestep of every call"):
        gated(x, (2, 4, 4))
    with pytest.raises(UsageError, match="needs the timestep of every call"):
        torch.compile(gated, backend="eager")(x, (2, 4, 4))
    resized = ultrazoo.create_attention(
        "ultragen", dim=16, heads=2, windows=2, rank=2, variant="released", layer=5, layers=30
    )
    with pytest.raises(UsageError, match=r"takes no padded grid tokens \(key_valid\): ragged: resize"):
        resized(x, (2, 4, 4), timestep=torch.ones(2), key_valid=torch.ones(2, 32, dtype=torch.bool))
