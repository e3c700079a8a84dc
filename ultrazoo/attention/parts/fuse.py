"""Fusions: how the outputs of branches become one, per token, before the output projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import Problem, UsageError, listed, near
from ...ops.embed import sinusoid
from ...ops.init import Constant, Values, marked
from ...spec import Site, Tree, option
from ..contract import Call
from .base import FuseSpec
from .compressors import Unlifted

SINUSOID = 256
Per = Literal["channel", "head", "scalar"]


def _name_problems(names: list[str], branches: tuple[str, ...], path: str) -> list[Problem]:
    found = []
    for name in names:
        if name not in branches:
            found.append(
                Problem(path, f"no branch is called {name!r}; branches are {listed(branches)}", near(name, branches))
            )
    return found


def gate_width(per: Per, site: Site) -> int:
    """Gates per branch: one per channel, head or in all."""
    return {"channel": site.inner, "head": site.heads, "scalar": 1}[per]


def spread_gate(gate: Tensor, per: Per, site: Site) -> Tensor:
    """(…, width) gates → broadcastable to (…, heads*D)."""
    return gate.repeat_interleave(site.head_dim, dim=-1) if per == "head" else gate


@dataclass(frozen=True, kw_only=True)
class WeightsSpec(FuseSpec):
    """A weighted sum, fixed or learned; without weights the mean."""

    name: ClassVar[str] = "weights"

    weights: Mapping[str, float] | None = option(None, "weight per branch; null: the mean")
    learned: bool = option(False, "the weights are parameters that start so")

    def branch_problems(self, branches: tuple[str, ...], site: Site) -> list[Problem]:
        if self.weights is None:
            return []
        found = _name_problems(list(self.weights), branches, "weights")
        missing = [name for name in branches if name not in self.weights]
        if missing:
            found.append(Problem("weights", f"no weight for {listed(missing)}", "give every branch one (0 is allowed)"))
        return found

    def shares(self, branches: tuple[str, ...]) -> Mapping[str, float]:
        return self.weights if self.weights is not None else {name: 1 / len(branches) for name in branches}

    def parameters(self, branches: tuple[str, ...], site: Site) -> int:
        return len(branches) if self.learned else 0

    def build(self, branches: tuple[str, ...], site: Site) -> nn.Module:
        return _Weights(self, branches)


class _Weights(nn.Module):
    def __init__(self, spec: WeightsSpec, branches: tuple[str, ...]):
        super().__init__()
        self.start = tuple(float(spec.shares(branches)[name]) for name in branches)
        self.learned = spec.learned
        if spec.learned:
            self.weight = nn.Parameter(torch.empty(len(branches)))

    def initial_values(self) -> dict[str, Any]:
        return {"weight": Values(self.start)} if self.learned else {}

    def forward(self, outputs: dict[str, Tensor], x: Tensor, call: Call, lse: dict[str, Tensor]) -> Tensor:
        parts = list(outputs.values())
        if len(parts) == 1 and not self.learned and self.start == (1.0,):
            return parts[0]
        weights = self.weight.unbind() if self.learned else self.start
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total = torch.add(total, part, alpha=weight) if isinstance(weight, float) else total + part * weight
        return total


def pairs_of(order: Tree) -> list[tuple[Tree, Tree]]:
    """The pairs of a nested order, outermost first (pre-order)."""
    if isinstance(order, str):
        return []
    first, second = order
    return [(first, second), *pairs_of(first), *pairs_of(second)]


def leaves_of(order: Tree) -> list[str]:
    """The names in a nested order, left to right."""
    return [order] if isinstance(order, str) else [leaf for part in order for leaf in leaves_of(part)]


def _shape_problems(order: Tree) -> list[Problem]:
    if isinstance(order, str):
        return []
    if len(order) != 2:
        rule = f"a gate weighs two against each other, got {len(order)} parts: {_written(order)}"
        return [Problem("order", rule, "nest the list: [a, [b, c]]")]
    return [problem for part in order for problem in _shape_problems(part)]


def _written(order: Tree) -> str:
    return order if isinstance(order, str) else "[" + ", ".join(_written(part) for part in order) + "]"


@dataclass(frozen=True, kw_only=True)
class TimeGateSpec(FuseSpec):
    """Gates from the diffusion time. ``order: [p, q]`` means ``g·p + (1-g)·q`` and nests;
    ``g = sigmoid(MLP(sinusoid_256(t)))`` with two hidden layers (UltraGen, section 4.3)."""

    name: ClassVar[str] = "time_gate"
    source: ClassVar[str] = "UltraGen, arXiv 2510.18775, section 4.3"
    minimal: ClassVar[Mapping[str, Any]] = {"order": ["overview", "local"]}
    needs_timestep: ClassVar[bool] = True
    takes_unlifted: ClassVar[bool] = True

    order: Tree = option(doc="nested pairs of branch names")
    per: Literal["channel", "head", "scalar"] = option("channel", "one gate per channel, head or in all")
    hidden: int | None = option(None, "width of the hidden layers; null: heads * head_dim", ge=1)
    init: Mapping[str, float] | None = option(
        None, "share of each branch in a fresh block; null: each gate starts at a half", gt=0, lt=1
    )

    def branch_problems(self, branches: tuple[str, ...], site: Site) -> list[Problem]:
        found = _shape_problems(self.order)
        if found:
            return found
        leaves = leaves_of(self.order)
        found = _name_problems(leaves, branches, "order")
        twice = sorted({name for name in leaves if leaves.count(name) > 1})
        missing = [name for name in branches if name not in leaves]
        if twice:
            found.append(Problem("order", f"{listed(twice)} stands in it more than once"))
        if missing:
            found.append(Problem("order", f"{listed(missing)} is missing", "every branch stands in it once"))
        if isinstance(self.order, str):
            found.append(Problem("order", "a gate needs two branches", "use fuse: weights for one"))
        if not site.has_timestep:
            found.append(
                Problem("", "this backbone gives its attention no timestep", "use fuse: token_gate or weights")
            )
        if self.init is not None:
            found += _name_problems(list(self.init), branches, "init")
            without = [name for name in branches if name not in self.init]
            if without:
                found.append(Problem("init", f"no share for {listed(without)}", "give every branch one"))
        return found

    def _width(self, site: Site) -> int:
        return self.hidden or site.inner

    def parameters(self, branches: tuple[str, ...], site: Site) -> int:
        hidden, out = self._width(site), gate_width(self.per, site)
        one = (SINUSOID + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * out
        return one * len(pairs_of(self.order))

    def flops(self, branches: tuple[str, ...], site: Site) -> int:
        hidden, out = self._width(site), gate_width(self.per, site)
        return 2 * (SINUSOID * hidden + hidden * hidden + hidden * out) * len(pairs_of(self.order))

    def build(self, branches: tuple[str, ...], site: Site) -> nn.Module:
        return _TimeGate(self, site)

    def starts(self) -> list[float]:
        """Value of each gate in a fresh block, in the order of `pairs_of`."""
        if self.init is None:
            return [0.5] * len(pairs_of(self.order))
        share = {name: float(weight) for name, weight in self.init.items()}
        gates = []
        for first, second in pairs_of(self.order):
            a, b = (sum(share[leaf] for leaf in leaves_of(part)) for part in (first, second))
            gates.append(a / (a + b))
        return gates


class _TimeGate(nn.Module):
    def __init__(self, spec: TimeGateSpec, site: Site):
        super().__init__()
        self.order, self.per, self.site = spec.order, spec.per, site
        hidden, out = spec._width(site), gate_width(spec.per, site)
        gates = []
        for start in spec.starts():
            last = marked(nn.Linear(hidden, out), weight=Constant(0.0), bias=Constant(math.log(start / (1 - start))))
            gates.append(
                nn.Sequential(nn.Linear(SINUSOID, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
            )
        self.gates = nn.ModuleList(gates)

    def forward(self, outputs: dict[str, Tensor | Unlifted], x: Tensor, call: Call, lse: dict[str, Tensor]) -> Tensor:
        if call.timestep is None:
            # the contract asks for it before, but not where a compiler follows
            raise UsageError("fuse time_gate needs the timestep of every call: give timestep (B,) on the 0..1000 scale")
        embedded = sinusoid(call.timestep, SINUSOID, self.gates[0][0].weight.dtype)  # type: ignore[index]
        # (B, 1 | T | N, gates) → broadcastable over (B, T, H, W, heads*D)
        gates = []
        for mlp in self.gates:
            gate = spread_gate(torch.sigmoid(mlp(embedded)), self.per, self.site)
            gates.append(over_grid(gate, call.grid))
        found = self._merge(self.order, outputs, iter(gates))
        return found.whole() if isinstance(found, Unlifted) else found

    def _merge(self, order: Tree, outputs: dict[str, Tensor | Unlifted], gates: Any) -> Tensor | Unlifted:
        if isinstance(order, str):
            return outputs[order]
        gate = next(gates)
        first = self._merge(order[0], outputs, gates)
        second = self._merge(order[1], outputs, gates)
        if isinstance(second, Unlifted):
            # the one that has all its tokens takes the other in
            first, second = second, first
            gate = 1 - gate.to(torch.promote_types(gate.dtype, torch.float32))
        if isinstance(second, Unlifted):
            second = second.whole()
        gate = gate.to(second.dtype)
        learns = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if learns or sum(second is one for one in outputs.values()) > 1:
            first = first.whole() if isinstance(first, Unlifted) else first
            return torch.lerp(second, first, gate)
        # nobody else wants this branch's output: its memory is the answer's
        if isinstance(first, Tensor):
            return second.lerp_(first, gate)
        gate = gate.expand(*second.shape[:2], -1, -1, -1)
        for sample, frame, tokens in first.frames():
            second[sample, frame].lerp_(tokens.to(second.dtype), gate[sample, frame])
        return second


def over_grid(value: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, c), (B, T, c) or (B, N, c) → broadcastable to (B, T, H, W, c)."""
    if value.dim() == 2:
        return value[:, None, None, None]
    if value.shape[1] == grid[0]:
        return value[:, :, None, None]
    return value.unflatten(1, grid)


@dataclass(frozen=True, kw_only=True)
class TokenGateSpec(FuseSpec):
    """Gates from each token: one linear layer of x. ``softmax`` makes the branches' gates add up to 1, ``sigmoid`` keeps
    each between 0 and 1, ``none`` leaves them free (VSA)."""

    name: ClassVar[str] = "token_gate"
    source: ClassVar[str] = "NSA, arXiv 2502.11089; VSA, arXiv 2505.13389"

    per: Literal["channel", "head", "scalar"] = option("head", "one gate per channel, head or in all")
    act: Literal["softmax", "sigmoid", "none"] = option("softmax", "what bounds the gates")
    init: Mapping[str, float] | None = option(
        None, "gate of each branch in a fresh block; null: equal shares", ge=0, le=1
    )

    def branch_problems(self, branches: tuple[str, ...], site: Site) -> list[Problem]:
        if self.init is None:
            return []
        found = _name_problems(list(self.init), branches, "init")
        without = [name for name in branches if name not in self.init]
        if without:
            found.append(Problem("init", f"no gate for {listed(without)}", "give every branch one"))
        if self.act != "none" and not found:
            edge = [name for name, gate in self.init.items() if gate <= 0 or (self.act == "sigmoid" and gate >= 1)]
            if edge:
                rule = f"{self.act} never reaches the gate asked for {listed(edge)}"
                found.append(Problem("init", rule, "use values between 0 and 1, or act: none"))
        return found

    def parameters(self, branches: tuple[str, ...], site: Site) -> int:
        return (site.dim + 1) * gate_width(self.per, site) * len(branches)

    def flops(self, branches: tuple[str, ...], site: Site) -> int:
        return 2 * site.tokens * site.dim * gate_width(self.per, site) * len(branches)

    def starts(self, branches: tuple[str, ...]) -> tuple[float, ...]:
        """Bias of each branch's gates in a fresh block."""
        shares = [1 / len(branches) if self.init is None else float(self.init[name]) for name in branches]
        if self.act == "none":
            return tuple(shares)
        if self.act == "softmax":
            return tuple(math.log(share) for share in shares)
        return tuple(math.log(share / (1 - share)) if share < 1 else 20.0 for share in shares)

    def build(self, branches: tuple[str, ...], site: Site) -> nn.Module:
        return _TokenGate(self, branches, site)


class _TokenGate(nn.Module):
    def __init__(self, spec: TokenGateSpec, branches: tuple[str, ...], site: Site):
        super().__init__()
        self.per, self.act, self.site, self.count = spec.per, spec.act, site, len(branches)
        linear = nn.Linear(site.dim, gate_width(spec.per, site) * len(branches))
        self.gate = marked(linear, weight=Constant(0.0), bias=Values(spec.starts(branches)))

    def forward(self, outputs: dict[str, Tensor], x: Tensor, call: Call, lse: dict[str, Tensor]) -> Tensor:
        gates = self.gate(x).unflatten(-1, (self.count, -1))
        if self.act == "softmax":
            gates = gates.softmax(dim=-2)
        elif self.act == "sigmoid":
            gates = gates.sigmoid()
        gates = spread_gate(gates, self.per, self.site).unbind(-2)
        total = None
        for gate, part in zip(gates, outputs.values(), strict=True):
            total = gate * part if total is None else total + gate * part
        assert total is not None
        return total


@dataclass(frozen=True, kw_only=True)
class LseSpec(FuseSpec):
    """One softmax over the keys of all branches together, by their log-sum-exps. A key that two branches share counts
    twice."""

    name: ClassVar[str] = "lse"
    wants_lse: ClassVar[bool] = True

    def build(self, branches: tuple[str, ...], site: Site) -> nn.Module:
        return _Lse(site)


class _Lse(nn.Module):
    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def forward(self, outputs: dict[str, Tensor], x: Tensor, call: Call, lse: dict[str, Tensor]) -> Tensor:
        # lse (B, T, H, W, heads, 1)
        joint = torch.stack(list(lse.values())).logsumexp(dim=0)
        total = None
        for name, part in outputs.items():
            weight = (lse[name] - joint).exp().to(part.dtype)
            term = part.unflatten(-1, (self.site.heads, self.site.head_dim)) * weight
            total = term if total is None else total + term
        assert total is not None
        return total.flatten(-2)
