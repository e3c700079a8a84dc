"""Far fields: what the key blocks that were not selected give.

``drop`` nothing; ``mean`` one key per block in the same softmax; ``coarse`` attention among blocks with a softmax of its
own, added through a gate. Statistics of blocks are in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import Problem, UsageError
from ...kernels import attend
from ...kernels.block_map import BlockMap
from ...ops.blocks import Blocks
from ...ops.init import Constant, marked
from ...spec import Site, Spec, option
from .orders import Place
from .scene import Scene
from .states import first_order

SCORE_BYTES = {"cpu": 1 << 22}
"""Bytes of scores against block means held at a time, per kind of device."""
SCORE_BYTES_ELSEWHERE = 1 << 29


@dataclass(frozen=True, kw_only=True)
class FarSpec(Spec):
    """What unselected key blocks give. `wants_lse`: joins the softmax of the selected keys. `learned`: owns parameters."""

    kind: ClassVar[str] = "far_field"
    wants_lse: ClassVar[bool] = False
    reads_all: ClassVar[bool] = True
    """Does every query depend on every key?"""
    takes_soft: ClassVar[bool] = True
    """Does it take weights of blocks in place of a choice?"""

    @property
    def learned(self) -> bool:
        return False

    @property
    def alone(self) -> bool:
        """Does a query that selects nothing get an answer from this, in a fresh block too?"""
        return self.wants_lse

    @property
    def may_skip(self) -> bool:
        """Can the data keep from a query some of the keys that this reads?"""
        return False

    def pairs(self, place: Place) -> int:
        """Pairs per head that go through the kernel door beside the selected ones."""
        return 0

    def flops(self, place: Place, site: Site) -> int:
        """FLOPs beside those of pairs."""
        return 0

    def parameters(self, site: Site) -> int:
        return 0

    def elements(self, site: Site) -> int:
        """Elements of tensors as large as the output that live beside the near field's."""
        return 0

    def exact_with_all(self) -> bool:
        """Does a fresh block equal full attention when every block is selected?"""
        return True

    def build(self, site: Site) -> nn.Module:
        """``module(scene, block_map, near, lse)`` → (B, heads, queries, D)."""
        raise TypeError(f"{type(self).__name__} has no module")


@dataclass(frozen=True, kw_only=True)
class DropSpec(FarSpec):
    """Nothing: softmax over the selected keys alone."""

    name: ClassVar[str] = "drop"
    reads_all: ClassVar[bool] = False

    def build(self, site: Site) -> nn.Module:
        return _Drop()


class _Drop(nn.Module):
    def forward(self, scene: Scene, block_map: BlockMap, near: Tensor, lse: Tensor | None) -> Tensor:
        return near


@dataclass(frozen=True, kw_only=True)
class MeanSpec(FarSpec):
    """The mean key and value of each unselected block, weighted by its tokens, in the same softmax.

    A pseudo-key with logit ``s q·k̄_j + log n_j`` and value v̄_j is the block with all its keys moved to their mean. Order 1
    adds ``(s g / N) q · sum_j H_j`` to the numerator, with ``H_j = sum_{r in j} (k_r - k̄_j)^T v_r`` over every selectable
    block, N their valid keys and g the far field's part of the denominator (whose own first-order term is zero).
    """

    name: ClassVar[str] = "mean"
    source: ClassVar[str] = "Sol-Attn, arXiv 2607.24027 (order 0); PISA, arXiv 2602.01077 (order 1)"
    wants_lse: ClassVar[bool] = True
    takes_soft: ClassVar[bool] = False

    order: Literal[0, 1] = option(
        0, "0: blocks as their means; 1: and how their keys vary with their values, for all at once"
    )

    def pairs(self, place: Place) -> int:
        return place.queries.tokens * place.selectable

    def flops(self, place: Place, site: Site) -> int:
        # the state of the keys, and its reading
        tokens = place.keys.starts[place.selectable] + place.queries.tokens
        return 2 * tokens * site.head_dim * site.inner if self.order else 0

    def build(self, site: Site) -> nn.Module:
        return _Mean(self)


def far_problems(far: FarSpec) -> list[Problem]:
    """What a far field leaves unsaid that a call asks for."""
    if type(far).build is not FarSpec.build:
        return []
    return [Problem("far", f"{far.name!r} has no module", "give it build(site)")]


def far_output(far: FarSpec, y: Any, near: Tensor) -> Tensor:
    """What the module of a far field gave; UsageError where it is not of the near field's shape and dtype."""
    if isinstance(y, Tensor) and (y.shape, y.dtype) == (near.shape, near.dtype):
        return y
    told = [
        f"{str(z.dtype).removeprefix('torch.')} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        for z in (y, near)
    ]
    raise UsageError(f"far field {far.name!r} gives {told[0]}; it is asked for {told[1]}")


def far_steps(scene: Scene, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks whose scores against `most` keys are of bounded size."""
    place = scene.place
    row = scene.q.shape[0] * scene.q.shape[1] * place.queries.largest * most * 4
    step = max(1, SCORE_BYTES.get(scene.q.device.type, SCORE_BYTES_ELSEWHERE) // max(1, row))
    for lo in range(0, place.queries.count, step):
        yield lo, min(lo + step, place.queries.count)


def merge(near: Tensor, lse: Tensor, far: Tensor, far_lse: Tensor, out: Tensor | None = None) -> Tensor:
    """One softmax from two over disjoint keys: (B, heads, n, D) with log-sum-exp (B, heads, n). No key at all: zeros.

    `out`: where to write it instead, where nothing learns.
    """
    # filled before: a difference of infinities has no gradient that a mask behind it would stop
    neither = (lse == float("-inf")) & (far_lse == float("-inf"))
    share = (far_lse - lse).masked_fill(neither, 0.0).sigmoid().unsqueeze(-1)
    wide, far = near.to(share.dtype), far.to(share.dtype)
    if out is not None and out.dtype == share.dtype:
        return torch.lerp(wide, far, share, out=out)
    found = torch.lerp(wide, far, share)
    return found.to(near.dtype) if out is None else out.copy_(found)


class _Mean(nn.Module):
    def __init__(self, spec: MeanSpec):
        super().__init__()
        self.spec = spec

    def forward(self, scene: Scene, block_map: BlockMap, near: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        most = scene.place.selectable
        starts = scene.place.queries.starts
        keys, counts = scene.k_means[:, :, :most], scene.counts[:, :, :most]
        values = scene.v_sums[:, :, :most] / counts.clamp(min=1)
        state = self._state(scene, counts)
        parts, learns = [], torch.is_grad_enabled()
        for lo, hi in far_steps(scene, most):
            tokens = slice(starts[lo], starts[hi])

            def far(q: Tensor, k: Tensor, v: Tensor, lo: int = lo, hi: int = hi) -> tuple[Tensor, Tensor]:
                return _against_means(q, k, v, counts, block_map, lo, hi, scene.scale)

            given = (scene.q[:, :, tokens], keys, values)
            again = learns and any(z.requires_grad for z in given)
            found, found_lse = checkpoint(far, *given, use_reentrant=False) if again else far(*given)
            if state is not None:
                # weighed as the far field's output is: by its part of the denominator
                more = scene.q[:, :, tokens].to(state.dtype) @ state
                found = found + more if learns else found.add_(more)
            some = (near[:, :, tokens], lse[:, :, tokens], found, found_lse)
            if learns:
                parts.append(merge(*some))
            else:
                merge(*some, out=near[:, :, tokens])
        return torch.cat(parts, dim=2) if learns else near

    def _state(self, scene: Scene, counts: Tensor) -> Tensor | None:
        """``(s / N) sum_j H_j``, (B, heads, D, Dv)."""
        if not self.spec.order:
            return None
        valid = counts.sum(2, keepdim=True).clamp(min=1).to(scene.k_means.dtype)
        return first_order(scene) * (scene.scale / valid)


def _against_means(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, block_map: BlockMap, lo: int, hi: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries of blocks lo..hi against the means of the blocks they did not select: output and log-sum-exp."""
    chosen = block_map.rows(lo, hi)[..., : k.shape[2]]
    weight = counts.to(k.dtype).log().transpose(-1, -2)
    # a row per query block until the last moment
    weight = weight.expand(-1, -1, hi - lo, -1).masked_fill(chosen, float("-inf"))
    bias = _repeated(weight, block_map.queries.between(lo, hi))
    out, lse = attend(q.to(k.dtype), k, v, bias=bias, scale=scale, return_lse=True)
    return out, lse


def _repeated(rows: Tensor, blocks: Blocks) -> Tensor:
    """One row per block, (B, heads, blocks, n), for every token: (B, heads, tokens, n)."""
    if blocks.uniform:
        return rows.unsqueeze(3).expand(-1, -1, -1, blocks.largest, -1).flatten(2, 3)
    sizes = torch.tensor(blocks.sizes, device=rows.device)
    return rows.repeat_interleave(sizes, dim=2, output_size=blocks.tokens)


@dataclass(frozen=True, kw_only=True)
class CoarseSpec(FarSpec):
    """Attention among block means, its output repeated for every token of a query block and added through a gate.

    The softmax is its own and runs over all selectable and always-seen blocks alike, selected or not.
    """

    name: ClassVar[str] = "coarse"
    source: ClassVar[str] = "VSA, arXiv 2505.13389"

    gate: Literal["linear", "sigmoid", "none"] = option("linear", "of x per channel; linear starts at zero")

    @property
    def learned(self) -> bool:
        return self.gate != "none"

    def problems(self, site: Site) -> list[Problem]:
        if self.learned and any(segment.rows == "pattern" for segment in site.extra):
            rule = "the gate reads grid tokens, and a segment's rows follow the pattern"
            return [Problem("gate", rule, "use rows: dense for extra tokens, or gate: none")]
        return []

    def pairs(self, place: Place) -> int:
        return place.queries.count * place.keys.count

    def flops(self, place: Place, site: Site) -> int:
        return 2 * place.grid.tokens * site.dim * site.inner if self.learned else 0

    def parameters(self, site: Site) -> int:
        return (site.dim + 1) * site.inner if self.learned else 0

    def elements(self, site: Site) -> int:
        # a row per token, its gate, and their product
        return (3 if self.learned else 1) * site.tokens * site.inner

    def exact_with_all(self) -> bool:
        return self.gate == "linear"

    @property
    def alone(self) -> bool:
        return self.gate != "linear"

    def build(self, site: Site) -> nn.Module:
        return _Coarse(self, site)


class _Coarse(nn.Module):
    def __init__(self, spec: CoarseSpec, site: Site):
        super().__init__()
        self.spec, self.heads = spec, site.heads
        if spec.learned:
            self.gate = marked(nn.Linear(site.dim, site.inner), weight=Constant(0.0), bias=Constant(0.0))

    def initial_values(self) -> dict[str, Any]:
        return {}

    def forward(self, scene: Scene, block_map: BlockMap, near: Tensor, lse: Tensor | None) -> Tensor:
        place = scene.place
        counts = scene.counts
        values = scene.v_sums / counts.clamp(min=1)
        mask = None if scene.key_valid is None else (counts > 0).transpose(-1, -2)
        found = attend(scene.q_means, scene.k_means, values, key_mask=mask, scale=scene.scale)
        assert isinstance(found, Tensor)
        found = found.to(near.dtype)
        if not self.spec.learned:
            return _per_token(near, None, found, place.queries)
        gate = self.gate(scene.x.to(self.gate.weight.dtype))
        if place.order is not None:
            gate = gate.index_select(1, torch.as_tensor(place.order, device=gate.device))
        gate = gate.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.spec.gate == "sigmoid":
            gate = gate.sigmoid()
        return _per_token(near, gate, found, place.queries)


def _per_token(near: Tensor, gate: Tensor | None, rows: Tensor, blocks: Blocks) -> Tensor:
    """``near + gate * rows``, one of `rows` (B, heads, blocks, D) for every token of a block: (B, heads, n, D)."""
    if blocks.uniform:
        split = (blocks.count, blocks.largest)
        near, rows = near.unflatten(2, split), rows.unsqueeze(3)
        gate = None if gate is None else gate.unflatten(2, split)
    else:
        rows = _repeated(rows, blocks)
    found = near + rows if gate is None else torch.addcmul(near, gate, rows).to(near.dtype)
    return found.flatten(2, 3) if blocks.uniform else found
