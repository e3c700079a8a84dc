"""Linear attention as a far field: a D x D state per head over all keys, or one per query block over unselected keys.

``O_l = phi(q) H / (phi(q) z + eps)`` with ``H = sum phi(k_j)^T v_j`` and ``z = sum phi(k_j)``. The state of a query block's
unselected keys is the sum of their blocks' states by a 0/1 matrix, in fp32 and without the cancellation of a total less
the selected ones. States live for some query blocks and some key blocks at a time, a small part of what q, k and v take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.checkpoint import checkpoint

from ...errors import Problem
from ...kernels.block_map import BlockMap
from ...ops.blocks import Blocks, padded, unpadded
from ...ops.init import Constant, marked
from ...spec import Site, option
from .far import FarSpec
from .orders import Place
from .rules import kept, largest, per_sample, real_blocks
from .scene import Scene
from .soft import SoftMap
from .states import head_steps, in_blocks, state_steps

ROWS = 64
"""Fewest query blocks whose states are held at a time; the states of key blocks are made once for each such group."""
GROUPS = 16
"""Most such groups."""
CHOSEN = 1 << 24
"""Block pairs chosen at a time, over batch and heads."""
READ_BYTES = {"cpu": 1 << 21}
"""Bytes of queries that read states at a time without gradients, per kind of device."""
READ_BYTES_ELSEWHERE = 1 << 28


def query_groups(blocks: int) -> list[tuple[int, int]]:
    """Ranges of query blocks whose states are held together."""
    rows = max(ROWS, -(-blocks // GROUPS))
    return [(lo, min(lo + rows, blocks)) for lo in range(0, blocks, rows)]


def elu(z: Tensor) -> Tensor:
    # elu(z) + 1 without the loss of digits in (e^z - 1) + 1
    return torch.where(z > 0, z + 1, z.clamp(max=0).exp())


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


ALPHA = 0.9
"""The softmax's weight at the start where nobody gives one."""
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "elu": elu, "relu": relu}


@dataclass(frozen=True, kw_only=True)
class LinearFarSpec(FarSpec):
    """Linear attention beside the softmax, each with its own normaliser.

    `join`: ``proj`` adds a D x D map of it, with bias, shared by heads and zero at the start (SLA); ``alpha`` weighs the
    two by a sigmoid per head, ``alpha O_s + (1 - alpha) O_l`` (SLA2). Where a query has no key left, O_l is zero.
    """

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "SLA, arXiv 2509.24006; SLA2, arXiv 2602.12675"

    keys: Literal["all", "complement"] = option("all", "every key, or those of blocks that were not selected")
    phi: Literal["softmax", "elu", "relu"] = option(
        "softmax", "positive features: over a head's channels, elu + 1, relu"
    )
    join: Literal["proj", "alpha"] = option("proj", "a learned map that starts at zero, or a convex weight per head")
    alpha: float = option(ALPHA, "where join is alpha: the softmax's weight at the start", gt=0, lt=1)
    centre: bool = option(False, "subtract the mean of all selectable keys before phi")
    skip: float = option(0.0, "complement: share of key blocks of the lowest scores that are left out", ge=0, lt=1)
    eps: float = option(1e-5, "added to the denominator", ge=0)

    @property
    def learned(self) -> bool:
        return True

    @property
    def may_skip(self) -> bool:
        """Left out, or without a channel of positive features in common."""
        return self.skip > 0 or self.phi == "relu"

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.skip and self.keys == "all":
            found.append(Problem("skip", "keys: all sums every key", "use keys: complement, or leave skip out"))
        if self.join == "proj" and self.alpha != ALPHA:
            found.append(Problem("alpha", "join: proj has no weight", "use join: alpha, or leave alpha out"))
        return found

    def flops(self, place: Place, site: Site) -> int:
        core = 2 * site.head_dim * site.inner
        total = core * place.queries.tokens
        if self.keys == "complement":
            groups = len(query_groups(place.queries.count))
            total += core * groups * place.keys.starts[place.selectable]
            total += (core + 2 * site.inner) * place.queries.count * place.selectable
        else:
            total += core * place.keys.tokens
        if self.skip:
            total += 2 * place.queries.count * place.selectable * site.inner
        return total + (core * place.queries.tokens if self.join == "proj" else 0)

    def parameters(self, site: Site) -> int:
        return site.head_dim * (site.head_dim + 1) if self.join == "proj" else site.heads

    def elements(self, site: Site) -> int:
        # features of queries and keys
        return 2 * site.tokens * site.inner

    def exact_with_all(self) -> bool:
        return self.join == "proj"

    @property
    def alone(self) -> bool:
        return self.join == "alpha"

    def build(self, site: Site) -> nn.Module:
        return _Linear(self, site)


class _Linear(nn.Module):
    def __init__(self, spec: LinearFarSpec, site: Site):
        super().__init__()
        self.spec = spec
        self.phi = FEATURES[spec.phi]
        if spec.join == "proj":
            zero = Constant(0.0)
            self.proj = marked(nn.Linear(site.head_dim, site.head_dim), weight=zero, bias=zero)
        else:
            self.alpha = nn.Parameter(torch.empty(site.heads))

    def initial_values(self) -> dict[str, Any]:
        share = torch.tensor(self.spec.alpha, dtype=torch.float64)
        return {} if self.spec.join == "proj" else {"alpha": Constant(float(share.logit()))}

    def forward(self, scene: Scene, block_map: BlockMap | SoftMap, near: Tensor, lse: Tensor | None) -> Tensor:
        centre = self._centre(scene) if self.spec.centre else None
        total = None
        if self.spec.keys == "all":
            total = self._state(scene, scene.k, scene.v, centre, 0, scene.place.keys.count)
        blocks = scene.place.queries
        if not torch.is_grad_enabled():
            for lo, hi in query_groups(blocks.count):
                if total is not None:
                    self._fill(near, scene, total, lo, hi, slice(None))
                    continue
                left = self._weights(scene, block_map, lo, hi)
                for some in head_steps(scene):
                    states = self._left(scene, scene.k, scene.v, centre, left, some)
                    self._fill(near, scene, states, lo, hi, some)
            return near
        parts = []
        for lo, hi in query_groups(blocks.count):
            tokens = slice(blocks.starts[lo], blocks.starts[hi])

            def far(q: Tensor, k: Tensor, v: Tensor, lo: int = lo, hi: int = hi) -> Tensor:
                states = total
                if states is None:
                    left = self._weights(scene, block_map, lo, hi)
                    states = self._left(scene, k, v, centre, left, slice(None))
                return self._read(q, blocks.between(lo, hi), *states)

            found = checkpoint(far, scene.q[:, :, tokens], scene.k, scene.v, use_reentrant=False)
            parts.append(self._join(near[:, :, tokens], found).to(near.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _fill(self, near: Tensor, scene: Scene, states: tuple[Tensor, Tensor], lo: int, hi: int, heads: slice) -> None:
        """The sum for query blocks lo..hi of some heads in the place of `near`, in pieces that stay in a cache."""
        blocks, mine = scene.place.queries, near[:, heads]
        row = mine.shape[0] * mine.shape[1] * mine.shape[3] * 4
        most = READ_BYTES.get(near.device.type, READ_BYTES_ELSEWHERE)
        step = max(1, most // (row * blocks.largest))
        for start in range(lo, hi, step):
            end = min(start + step, hi)
            tokens = slice(blocks.starts[start], blocks.starts[end])
            some = [z if self.spec.keys == "all" else z[:, :, start - lo : end - lo] for z in states]
            found = self._read(scene.q[:, heads, tokens], blocks.between(start, end), *some)
            into = mine[:, :, tokens]
            into.copy_(self._join(into, found, heads))

    def _join(self, near: Tensor, far: Tensor, heads: slice = slice(None)) -> Tensor:
        """fp32 or wider, whatever the parameters are in."""
        if self.spec.join == "proj":
            return near + (far @ self.proj.weight.to(far.dtype).T + self.proj.bias.to(far.dtype))
        alpha = self.alpha[heads].to(far.dtype).sigmoid()[:, None, None]
        return torch.lerp(far, near.to(far.dtype), alpha)

    def _centre(self, scene: Scene) -> Tensor:
        """The mean of all valid selectable keys, (B, heads, 1, D)."""
        most = scene.place.selectable
        counts = scene.counts[:, :, :most]
        return (scene.k_means[:, :, :most] * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)

    def _features(self, scene: Scene, k: Tensor, centre: Tensor | None, lo: int, hi: int) -> Tensor:
        """phi of keys of blocks lo..hi, zeros where there is none: (B, heads, blocks, largest, D), fp32 or wider."""
        blocks = scene.place.keys
        tokens = slice(blocks.starts[lo], blocks.starts[hi])
        keys = k[:, :, tokens].to(torch.promote_types(k.dtype, torch.float32))
        features = self.phi(keys if centre is None else keys - centre)
        valid = None if scene.key_valid is None else scene.key_valid[:, tokens]
        some = blocks.between(lo, hi)
        return in_blocks(features, some, 0, some.count, valid)

    def _state(
        self, scene: Scene, k: Tensor, v: Tensor, centre: Tensor | None, first: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Sums of phi(k)^T v and of phi(k) over key blocks: (B, heads, D, Dv) and (B, heads, D, 1)."""
        batch, heads, _, dim = k.shape
        state = weight = None
        for lo, hi in state_steps(scene.place.keys, end, batch * heads, dim, k.device):
            features = self._features(scene, k, centre, lo, hi).flatten(2, 3)
            values = in_blocks(v, scene.place.keys, lo, hi).flatten(2, 3)
            state = _plus(state, features.transpose(-1, -2) @ values)
            weight = _plus(weight, features.sum(2).unsqueeze(-1))
        assert state is not None and weight is not None
        return state, weight

    def _left(
        self, scene: Scene, k: Tensor, v: Tensor, centre: Tensor | None, left: Tensor, heads: slice
    ) -> tuple[Tensor, Tensor]:
        """States of `left` of every key block, (B, heads, rows, blocks), for some heads: (B, some, rows, D, Dv) and
        (B, some, rows, D, 1)."""
        k, v, left = k[:, heads], v[:, heads], left[:, heads]
        centre = None if centre is None else centre[:, heads]
        batch, count, _, dim = k.shape
        state = weight = None
        for first, end in state_steps(scene.place.keys, scene.place.selectable, batch * count, dim, k.device):
            features = self._features(scene, k, centre, first, end)
            values = in_blocks(v, scene.place.keys, first, end)
            share = left[..., first:end]
            states = (features.transpose(-1, -2) @ values).flatten(3)
            state = _plus(state, share @ states)
            weight = _plus(weight, share @ features.sum(3))
        assert state is not None and weight is not None
        return state.unflatten(-1, (dim, -1)), weight.unsqueeze(-1)

    def _weights(self, scene: Scene, block_map: BlockMap | SoftMap, lo: int, hi: int) -> Tensor:
        """How much of every selectable key block is left to query blocks lo..hi: (B, heads, hi - lo, blocks), fp32 or wider."""
        wide = torch.promote_types(scene.k.dtype, torch.float32)
        step = max(1, CHOSEN // (scene.k.shape[0] * scene.k.shape[1] * scene.place.selectable))
        pieces = [self._some_weights(scene, block_map, at, min(at + step, hi)) for at in range(lo, hi, step)]
        return torch.cat(pieces, dim=2).to(wide)

    def _some_weights(self, scene: Scene, block_map: BlockMap | SoftMap, lo: int, hi: int) -> Tensor:
        most = scene.place.selectable
        if isinstance(block_map, SoftMap):
            return block_map.unselected(lo, hi)[..., :most]
        chosen = block_map.rows(lo, hi)[..., :most].expand(scene.k.shape[0], scene.k.shape[1], -1, -1)
        if not self.spec.skip:
            return ~chosen
        assert scene.scored_by is not None
        with torch.no_grad():
            scores = scene.scored_by(scene, lo, hi)
        left = [[blocks - kept(self.spec.skip, blocks, least=0, down=True)] for blocks, _ in real_blocks(scene)]
        return largest(scores, per_sample(left, scores)) & ~chosen

    def _read(self, q: Tensor, blocks: Blocks, state: Tensor, weight: Tensor) -> Tensor:
        """Queries (B, heads, n, D) of `blocks` read a state (…, D, Dv) and a sum of features (…, D, 1), which are one for all
        keys or one per query block: (B, heads, n, Dv)."""
        by_block = self.spec.keys == "complement"
        features = self.phi((padded(q, blocks) if by_block else q).to(state.dtype))
        # a CPU is slow at products with a single column
        total = (features * weight.transpose(-1, -2)).sum(-1, keepdim=True)
        total = torch.where(total > 0, total + self.spec.eps, torch.ones_like(total))
        found: Tensor = features @ state
        found = found / total if torch.is_grad_enabled() else found.div_(total)
        return unpadded(found, blocks) if by_block else found


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
