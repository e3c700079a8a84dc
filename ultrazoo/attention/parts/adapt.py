"""How a branch's queries, keys and values come from the host's: shared, shared plus LoRA, or its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ...errors import Problem
from ...ops.init import Constant, Copy, Uniform, marked
from ...spec import Options, Site, option
from ..contract import Host

NAMES = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class AdaptSpec(Options):
    """A row of the table `ADAPT`."""

    def parameters(self, site: Site) -> int:
        return 0

    def host_matmuls(self) -> tuple[str, ...]:
        """Which of the host's projections the branch computes."""
        return NAMES

    def flops(self, site: Site, queries: int, keys: int) -> int:
        """FLOPs per forward beside the host's projections, for so many query and key tokens."""
        return 0

    def build(self, site: Site) -> nn.Module | None:
        """The module: ``module(x, z, which)`` adapts the raw projection z (B, n, width) of x. None: nothing to do."""
        return None


@dataclass(frozen=True, kw_only=True)
class SharedSpec(AdaptSpec):
    """The host's projections as they are."""

    name: ClassVar[str] = "shared"


@dataclass(frozen=True, kw_only=True)
class LoraSpec(AdaptSpec):
    """The host's projections plus a low-rank term of the branch: ``W x + B (A x)``, scale 1 (Hu et al., arXiv
    2106.09685). ``key_from: query`` takes the keys' base from the query projection, as the released UltraGen does."""

    name: ClassVar[str] = "lora"

    rank: int = option(64, "rank of the low-rank term", ge=1)
    bias: bool = option(False, "both matrices with biases")
    init: Literal["zero", "random"] = option("zero", "the second matrix starts at zero, or as torch starts it")
    key_from: Literal["key", "query"] = option("key", "which of the host's projections the keys start from")

    def problems(self, site: Site) -> list[Problem]:
        limit = min(site.dim, site.width)
        if self.rank > limit:
            return [
                Problem("rank", f"rank {self.rank} exceeds the matrix ({site.dim} x {site.width})", f"use ≤ {limit}")
            ]
        return []

    def parameters(self, site: Site) -> int:
        one = self.rank * (site.dim + site.width) + (self.rank + site.width if self.bias else 0)
        return 3 * one

    def host_matmuls(self) -> tuple[str, ...]:
        return NAMES if self.key_from == "key" else ("q", "v")

    def flops(self, site: Site, queries: int, keys: int) -> int:
        return 2 * self.rank * (site.dim + site.width) * (queries + 2 * keys)

    def build(self, site: Site) -> nn.Module:
        return nn.ModuleDict({name: _Lora(self, site) for name in NAMES})


@dataclass(frozen=True, kw_only=True)
class OwnSpec(AdaptSpec):
    """Projections of the branch's own, which start as copies of the host's."""

    name: ClassVar[str] = "own"

    bias: bool = option(True, "with biases (copied where the host has them)")

    def parameters(self, site: Site) -> int:
        return 3 * site.width * (site.dim + (1 if self.bias else 0))

    def host_matmuls(self) -> tuple[str, ...]:
        return ()

    def flops(self, site: Site, queries: int, keys: int) -> int:
        return 2 * site.dim * site.width * (queries + 2 * keys)

    def build(self, site: Site) -> nn.Module:
        projections = {}
        for name in NAMES:
            linear = nn.Linear(site.dim, site.width, bias=self.bias)
            starts: dict[str, Any] = {"weight": Copy(f"{name}.weight")}
            if self.bias:
                starts["bias"] = Copy(f"{name}.bias")
            projections[name] = marked(linear, **starts)
        return nn.ModuleDict(projections)


ADAPT: Mapping[str, type[AdaptSpec]] = {"shared": SharedSpec, "lora": LoraSpec, "own": OwnSpec}


class _Lora(nn.Module):
    """``B (A x)``: (…, C) → (…, width)."""

    def __init__(self, spec: LoraSpec, site: Site):
        super().__init__()
        self.lora_A = nn.Linear(site.dim, spec.rank, bias=spec.bias)
        self.lora_B = nn.Linear(spec.rank, site.width, bias=spec.bias)
        if spec.init == "zero":
            starts: dict[str, Any] = {"weight": Constant(0.0)}
            if spec.bias:
                starts["bias"] = Constant(0.0)
            marked(self.lora_B, **starts)
        else:
            bound = site.dim**-0.5
            marked(self.lora_B, weight=Uniform(spec.rank**-0.5), **({"bias": Uniform(bound)} if spec.bias else {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x))  # type: ignore[no-any-return]


def base_projections(spec: AdaptSpec, host: Host, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The host's raw q, k, v (B, n, width) of x (B, n, C) that `spec` starts from."""
    if isinstance(spec, LoraSpec) and spec.key_from == "query":
        q, v = host.project(x, "q"), host.project(x, "v")
        assert isinstance(q, Tensor) and isinstance(v, Tensor)
        return q, q, v
    q, k, v = host.project(x, "qkv")
    return q, k, v


def adapted(
    module: nn.Module | None, base: tuple[Tensor, Tensor, Tensor], x: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw q (B, n, width) of x (B, n, C) and raw k, v (B, m, width) of `keys` (B, m, C), adapted from `base`."""
    if module is None:
        return base
    assert isinstance(module, nn.ModuleDict)
    q, k, v = base
    # a term of its own is fresh memory: the host's projection is added into it
    return module["q"](x).add_(q), module["k"](keys).add_(k), module["v"](keys).add_(v)


def own_projections(module: nn.Module | None, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The branch's own raw q of x and k, v of `keys`."""
    assert isinstance(module, nn.ModuleDict)
    return module["q"](x), module["k"](keys), module["v"](keys)
