"""Attentions meet hosts they were not written for: one fused projection, norms per head, halves rotated, no rope at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.branched import branched
from tests.oracles.by_head import by_head
from ultrazoo import registry
from ultrazoo.attention.contract import Positions
from ultrazoo.spec import Site
from ultrazoo.testing import ReferenceHost, assert_close, dense, grid_of
from ultrazoo.testing.scenario import Example, Scenario, examples_of, seeded

EXACT = 1e-10
ORACLES = {"full": dense, "branched": branched, "by_head": by_head}


class FusedHost(nn.Module):
    """q, k and v from one matmul, RMS norms per head, its own plain rotation; its modules have names of their own."""

    def __init__(self, site: Site, plain: nn.Module):
        super().__init__()
        self.site = site
        self.to_qkv = nn.Linear(site.dim, 3 * site.width).double()
        self.to_out = nn.Linear(site.width, site.dim).double()
        self.gains = nn.Parameter(1 + 0.3 * seeded("gains", 2, site.head_dim))
        with torch.no_grad():
            for name in ("weight", "bias"):
                parts = [getattr(getattr(plain, which), name) for which in "qkv"]
                getattr(self.to_qkv, name).copy_(torch.cat(parts))
                getattr(self.to_out, name).copy_(getattr(plain.o, name))  # type: ignore[union-attr]

    def project(self, x: Tensor, which: str) -> Any:
        if which == "qkv":
            return self.to_qkv(x).chunk(3, dim=-1)
        i, width = "qkv".index(which), self.site.width
        rows = slice(i * width, (i + 1) * width)
        return nn.functional.linear(x, self.to_qkv.weight[rows], self.to_qkv.bias[rows])

    def heads(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        positions: Positions | None,
        key_positions: Positions | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        found = []
        for i, (z, at) in enumerate(((q, positions), (k, key_positions or positions))):
            if z is not None:
                z = z.unflatten(-1, (-1, self.site.head_dim))
                z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6) * self.gains[i]
                z = z if at is None else self.rotate(z, at)
            found.append(z)
        return found[0], found[1], None if v is None else v.unflatten(-1, (-1, self.site.head_dim))

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        if self.site.rope is None:
            return z
        places = torch.cartesian_prod(positions.t, positions.h, positions.w).reshape(-1, 3)
        return self.reference().rotate(z, places)

    def reference(self) -> ReferenceHost:
        """The same host for an oracle."""
        weights: dict[str, Tensor] = {"norm_q.weight": self.gains[0], "norm_k.weight": self.gains[1]}
        for i, which in enumerate("qkv"):
            weights |= {
                f"{which}.weight": self.to_qkv.weight.chunk(3)[i],
                f"{which}.bias": self.to_qkv.bias.chunk(3)[i],
            }
        weights |= {"o.weight": self.to_out.weight, "o.bias": self.to_out.bias}
        return ReferenceHost(weights, self.site.heads, self.site.head_dim, self.site.rope)

    def out(self, y: Tensor) -> Tensor:
        return self.to_out(y)  # type: ignore[no-any-return]


def assert_equals_oracle(example: Example, oracle: Any) -> None:
    scenario = Scenario(example, torch.float64)
    host = FusedHost(scenario.site, scenario.runner.host)
    scenario.runner.host = host
    with torch.no_grad():
        expected = oracle(replace(scenario.case(), host=host.reference()))
        assert_close(example.label, scenario.run(), expected, EXACT)


EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{example.label}")
    for name in ORACLES
    for example in examples_of(registry.find("attention", name))
]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_a_fused_host_with_norms_per_head(name: str, example: Example) -> None:
    assert_equals_oracle(example, ORACLES[name])


@pytest.mark.parametrize(("name", "example"), [e for e in EXAMPLES if e.values[1].site.rope is not None])
def test_rotated_halves(name: str, example: Example) -> None:
    rope = example.site.rope
    assert rope is not None
    site = example.site.at(rope=replace(rope, pairing="halves", base=100.0))
    scenario = Scenario(replace(example, site=site), torch.float64)
    with torch.no_grad():
        assert_close(example.label, scenario.run(), ORACLES[name](scenario.case()), EXACT)


def test_the_fused_host_is_the_plain_one_seen_otherwise() -> None:
    """Its raw projections are the plain host's; its rotation is not the identity."""
    scenario = Scenario(examples_of(registry.find("attention", "full"))[0], torch.float64)
    plain, fused = scenario.runner.host, None
    fused = FusedHost(scenario.site, plain)
    for which in "qkv":
        assert_close(which, fused.project(scenario.x, which), plain.project(scenario.x, which), EXACT)  # type: ignore[operator]
    z = seeded("z", 1, scenario.site.tokens, 3, scenario.site.head_dim)
    turned = fused.reference().rotate(z, grid_of(scenario.grid))
    assert float((turned - z).abs().max()) > 0.1
