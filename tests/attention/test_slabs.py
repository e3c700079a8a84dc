"""Windows handled some at a time give what they give all at once."""

from __future__ import annotations

import itertools

import pytest
import torch

from ultrazoo import registry
from ultrazoo.attention import grouped
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.kernels import record
from ultrazoo.ops import partition, runs
from ultrazoo.spec import AttentionSpec, Site
from ultrazoo.testing import error_ratio

EXAMPLES = [
    pytest.param(spec, site, id=f"{name}-{i}")
    for name in ("full", "by_head", "branched", "ultragen")
    for i, (spec, site) in enumerate(registry.find("attention", name).examples())
]


@pytest.mark.parametrize(("spec", "site"), EXAMPLES)
@pytest.mark.parametrize("width", ["plain", "extra"])
def test_slabs_change_nothing(spec: AttentionSpec, site: Site, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Standalone(spec, site)
    reset_parameters(module)
    x = torch.randn(2, site.tokens, site.dim)
    time = torch.tensor([3.0, 800.0]) if site.has_timestep else None
    extra = valid = None
    if width == "extra":
        extra = Extra(*(torch.randn(2, 3, site.heads, site.head_dim) for _ in range(3)))
        if spec.traits().key_valid:
            valid = torch.rand(2, site.tokens) > 0.2
    with torch.no_grad():
        whole = module(x, site.grid, time, extra, valid)
        monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", 1)
        pieces = module(x, site.grid, time, extra, valid)
    with torch.enable_grad():
        learning = module(x.requires_grad_(), site.grid, time, extra, valid)
    whole, pieces, learning = (y if isinstance(y, tuple) else (y,) for y in (whole, pieces, learning))
    for one, two, three in zip(whole, pieces, learning, strict=True):
        assert error_ratio(two, one) < 1e-6
        assert error_ratio(three, one) < 1e-6


def test_one_window_at_a_time_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, site = registry.find("attention", "ultragen").examples()[0]
    module = Standalone(spec, site)
    reset_parameters(module)
    monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", 1)
    with torch.no_grad(), record() as calls:
        module(torch.randn(1, site.tokens, site.dim), site.grid, torch.tensor([3.0]))
    # odd layer: 3 x 3 local windows, 2 x 2 regional ones, one global
    assert [call.q[0] for call in calls] == [1] * 14


@pytest.mark.parametrize("tokens", [1, 5, 30, 64, 1000])
def test_slabs_keep_windows_and_their_order(tokens: int) -> None:
    cuts = (runs.balanced(4, 2), runs.balanced(9, 4), runs.exact(11, 4))
    keys = (runs.balanced(4, 2), runs.balanced(5, 4), runs.exact(11, 4))
    pairs = [grouped.aligned(a, b) for a, b in zip(cuts, keys, strict=True)]
    cuts, keys = (tuple(pair[i] for pair in pairs) for i in range(2))
    split, split_keys = partition.slabs(cuts, keys, tokens)
    for before, after in zip((*cuts, *keys), (*split, *split_keys), strict=True):
        assert list(after.sizes()) == list(before.sizes())
    for q, k in zip(split, split_keys, strict=True):
        assert [count for count, _ in q.runs] == [count for count, _ in k.runs]
    largest = max(t.count * t.size * h.count * h.size * w.count * w.size for t, h, w in partition.rectangles(split))
    one = max(a * b * c for a, b, c in itertools.product(*(cut.sizes() for cut in cuts)))
    assert largest <= max(tokens, one)
