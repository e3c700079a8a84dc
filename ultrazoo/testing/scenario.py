"""One example of an attention, made runnable: module, host, random weights and inputs, and the same call for an oracle."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.contract import Attention, Call, Extra
from ..attention.standalone import Standalone, reset_parameters
from ..grid import Grid
from ..spec import AttentionSpec, Segment, Site
from .case import Case, ExtraTokens
from .reference import ReferenceHost

EXTRA_TOKENS = 3
PEAK = 3.0
"""Inputs are this many times a unit normal, so that the softmax is peaked."""


@dataclass(frozen=True)
class Example:
    """A spec at a site, as `examples()` gives it, and the name it has in test ids."""

    spec: AttentionSpec
    site: Site
    label: str

    @property
    def expanded(self) -> AttentionSpec:
        return self.spec.expand(self.site)


def examples_of(spec: type[AttentionSpec]) -> list[Example]:
    """Everything that `spec.examples()` offers, numbered."""
    return [
        Example(one, site, f"{i}-{site.grid.t}x{site.grid.h}x{site.grid.w}")
        for i, (one, site) in enumerate(spec.examples())
    ]


def seeded(name: str, *shape: int) -> Tensor:
    """Unit normal numbers, fp64, that depend on the name and the shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomise(module: nn.Module) -> None:
    """Give every parameter random values: zero-initialised gates and output layers hide whatever stands before them.

    Matrices and kernels keep the scale of their input, gains stay near 1, everything else is of size one half.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = seeded(name, *parameter.shape)
            if parameter.ndim > 1:
                values = values / max(1, parameter[0].numel()) ** 0.5
            elif "norm" in name:
                values = 1 + 0.3 * values
            else:
                values = values / 2
            parameter.copy_(values)


def randomise_norms(host: nn.Module) -> None:
    """Gains of q/k norms as pretrained weights have them; projections stay as they are, for what was copied from them."""
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * seeded(name, *parameter.shape))


def split_extra(site: Site, tokens: int) -> tuple[Segment, ...]:
    """The site's own segments, or one of text."""
    return site.extra or (Segment("text", tokens),)


class Runner(nn.Module):
    """An attention and its host as one module: what a backbone's block does with them.

    ``runner(x, timestep, …)`` on a grid given as plain ints.
    """

    def __init__(self, attention: Attention, host: nn.Module):
        super().__init__()
        self.attention = attention
        self.host = host

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int],
        timestep: Tensor | None = None,
        extra: Extra | None = None,
        key_valid: Tensor | None = None,
    ) -> Any:
        size = (grid[0], grid[1], grid[2])
        call = Call(grid=size, timestep=timestep, extra=extra, key_valid=key_valid)
        return self.attention(x, self.host, call)


class Scenario:
    """A call of one example at one grid, in one dtype, on one device.

    The fp64 `case` holds the very numbers that the module was given, rounded to its dtype.
    """

    def __init__(
        self,
        example: Example,
        dtype: torch.dtype = torch.float32,
        *,
        grid: Grid | None = None,
        batch: int = 2,
        extra: bool = False,
        key_valid: bool = False,
        peak: float = PEAK,
        device: str = "cpu",
        random_weights: bool = True,
    ):
        self.example = example
        self.site = example.site if grid is None else example.site.at(grid=grid)
        self.grid = self.site.grid
        self.dtype = dtype
        module = Standalone(example.spec, self.site)
        if random_weights:
            randomise(module.attention)
            randomise(module.host)
        else:
            reset_parameters(module)
            randomise_norms(module.host)
        runner = Runner(module.attention, module.host)
        self.runner = runner.to(device=device, dtype=dtype)
        name = f"{example.label} {tuple(self.grid)}"
        self.x = self.tensor(seeded(f"x {name}", batch, self.site.tokens, self.site.dim) * peak, device)
        self.timestep: Tensor | None = None
        if self.site.has_timestep:
            steps = 1000 * torch.sigmoid(seeded(f"t {name}", batch))
            self.timestep = steps.to(device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        self.extra = self.make_extra(name, batch, device) if extra else None
        self.key_valid = self.make_valid(name, batch).to(device) if key_valid else None

    def tensor(self, values: Tensor, device: str) -> Tensor:
        return values.to(device=device, dtype=self.dtype)

    def make_extra(self, name: str, batch: int, device: str) -> Extra:
        """Random tokens; the last of the first sample is not real."""
        tokens = self.site.extra_tokens or EXTRA_TOKENS
        shape = (batch, tokens, self.site.heads, self.site.head_dim)
        q, k, v = (self.tensor(seeded(f"extra {which} {name}", *shape) * PEAK, device) for which in "qkv")
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[0, -1] = False
        return Extra(q, k, v, mask.to(device), split_extra(self.site, tokens))

    def make_valid(self, name: str, batch: int) -> Tensor:
        """About an eighth of the tokens are not real; of two neighbours at least one is."""
        valid = seeded(f"valid {name}", batch, *self.grid) > -0.7
        t, h, w = (torch.arange(n) for n in self.grid)
        valid[:, (t[:, None, None] + h[:, None] + w) % 2 == 1] = True
        return valid.flatten(1)

    def run(self, x: Tensor | None = None, **changes: Any) -> Any:
        """The module's answer; `changes` replace timestep, extra or key_valid."""
        given = {"timestep": self.timestep, "extra": self.extra, "key_valid": self.key_valid} | changes
        return self.runner(self.x if x is None else x, self.grid, **given)

    def reference_host(self, leaves: dict[str, Tensor]) -> ReferenceHost:
        return ReferenceHost(leaves, self.site.heads, self.site.head_dim, self.site.rope)

    def case(self, requires_grad: bool = False) -> Case:
        """The same call for an oracle: fp64 on the CPU. With `requires_grad` its x and weights are leaves of autograd."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu().double().requires_grad_(requires_grad and tensor.is_floating_point())

        # the plain host's norms are bare parameters; everywhere else they are modules with a weight
        host = {
            f"{name}.weight" if name.startswith("norm_") else name: leaf(p)
            for name, p in self.runner.host.named_parameters()
        }
        extra = self.extra
        return Case(
            spec=self.example.spec,
            site=self.site,
            x=leaf(self.x),
            grid=(self.grid.t, self.grid.h, self.grid.w),
            host=self.reference_host(host),
            weights={name: leaf(p) for name, p in self.runner.attention.named_parameters()},
            timestep=None if self.timestep is None else self.timestep.detach().cpu().double(),
            extra=None
            if extra is None
            else ExtraTokens(
                *(z.detach().cpu().double() for z in (extra.q, extra.k, extra.v)),
                key_mask=None if extra.key_mask is None else extra.key_mask.cpu(),
            ),
            key_valid=None if self.key_valid is None else self.key_valid.cpu(),
        )

    def masked_extra(self, **changes: Tensor) -> Extra:
        """The extra tokens with some of their tensors replaced."""
        assert self.extra is not None
        return replace(self.extra, **changes)


def other_grids(example: Example) -> list[Grid]:
    """Grids near the example's own where it has no problems: larger and ragged, then one with T = 1 (or T = 2)."""
    t, h, w = example.site.grid
    found = []
    for wanted in ((t + 1, h + 2, w + 3), (t + 1, h + 1, w + 1), (t, h + 3, w + 1), (1 if t > 1 else 2, h + 1, w + 2)):
        grid = Grid(*wanted)
        site = example.site.at(grid=grid)
        if not example.spec.expand(site).problems(site):
            found.append(grid)
    return found[:1] + [g for g in found[1:] if g.t == (1 if t > 1 else 2)]


def pair_up(got: Any, expected: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(name, got, expected) of the grid rows and, where there are extra tokens, of the extra rows."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple), "with extra tokens the result is (y, y_extra)"
        return [("grid rows", got[0], expected[0]), ("extra rows", got[1], expected[1])]
    assert isinstance(got, Tensor), "without extra tokens the result is one tensor"
    return [("output", got, expected)]
