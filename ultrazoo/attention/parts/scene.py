"""What selectors and far fields look at: queries, keys and values in block order, and statistics of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError
from ...kernels.block_map import misfit
from ...ops.blocks import Blocks, block_counts, block_means, block_sums, block_valid, padded
from .orders import Place

Rows = Callable[[int, int], Tensor]
"""``rows(lo, hi)``: bool (B | 1, heads | 1, hi - lo, selectable key blocks) of query blocks lo..hi."""

SCORES = {"cpu": 1 << 21}
"""Scores of pairs of blocks, or of their runs, held at a time, per kind of device."""
SCORES_ELSEWHERE = 1 << 27


def in_steps(rows: Rows, like: Tensor, scores: int) -> Rows:
    """The same rows, made so few at a time that their scores are of bounded size: `scores` of a row for each sample and head
    of `like` (B, heads, …)."""
    most = SCORES.get(like.device.type, SCORES_ELSEWHERE)
    step = max(1, most // (like.shape[0] * like.shape[1] * scores))

    def made(lo: int, hi: int) -> Tensor:
        if hi - lo <= step:
            return rows(lo, hi)
        return torch.cat([rows(at, min(at + step, hi)) for at in range(lo, hi, step)], dim=2)

    return made


def checked(name: str, rows: Rows, scene: Scene) -> Rows:
    """The same rows; UsageError where they are no map of the scene's blocks, which names the selector that made them."""
    if not callable(rows):
        raise UsageError(f"selector {name!r}: its module gives a function of lo and hi, got {type(rows).__name__}")
    batch, heads = scene.q.shape[:2]
    selectable = scene.place.selectable

    def made(lo: int, hi: int) -> Tensor:
        found = rows(lo, hi)
        if problem := misfit(found, batch, heads, hi - lo, selectable):
            raise UsageError(f"selector {name!r}: query blocks {lo} to {hi - 1}: {problem}")
        return found

    return made


@dataclass
class Scene:
    """One call: q (B, heads, queries, D) and k, v (B, heads, keys, D), normed, rotated, in block order; x (B, N, C).

    `key_valid` (B, keys) and `query_valid` (B, queries) are False where a token is not real: what stands there decides
    nothing. `layer` and `layers` say where the block stands, `step` is
    (index, count) or None, `state` what may be kept between calls. `keep` replaces the kept share of a selector that has
    one: a number, or one per head. Statistics carry gradients if the scene was made `with_grad`, whoever asks first.
    `scored_by(scene, lo, hi)` gives the scores of a pooled selector, (B, heads, hi - lo, selectable blocks), once it was called.
    Nothing that a scene holds holds the scene: q, k and v go when the call ends, not when the collector of cycles runs.
    """

    place: Place
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    key_valid: Tensor | None = None
    layer: int = 0
    layers: int = 1
    step: tuple[int, int] | None = None
    branch: str | None = None
    state: dict[Any, Any] | None = None
    keep: float | tuple[float, ...] | None = None
    query_valid: Tensor | None = None
    scored_by: Callable[[Scene, int, int], Tensor] | None = None
    with_grad: bool = field(default_factory=torch.is_grad_enabled)
    _made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made at the first call under this name."""
        if name not in self._made:
            # maps are made without gradients, and far fields want those of the same statistics
            with torch.set_grad_enabled(self.with_grad):
                self._made[name] = make()
        return self._made[name]

    @property
    def q_means(self) -> Tensor:
        """(B, heads, query blocks, D), fp32 or wider."""
        return self.once("q", lambda: block_means(self.q, self.place.queries, self.query_valid))

    @property
    def k_means(self) -> Tensor:
        """(B, heads, key blocks, D) over valid keys, fp32 or wider."""
        return self.once("k", lambda: block_means(self.k, self.place.keys, self.key_valid))

    @property
    def v_sums(self) -> Tensor:
        """(B, heads, key blocks, D) over valid keys, fp32 or wider."""
        return self.once("v", lambda: block_sums(self.v, self.place.keys, self.key_valid))

    @property
    def counts(self) -> Tensor:
        """Valid keys per key block, (B | 1, 1, key blocks, 1)."""
        return self.once("n", lambda: block_counts(self.place.keys, self.k.device, self.key_valid))

    @property
    def keeps(self) -> tuple[float | None, ...]:
        """`keep` for all heads, or of each."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    def with_keep(self, keep: float | tuple[float, ...] | None) -> Scene:
        """The same scene for a selector that keeps another share; statistics are shared."""
        other = Scene(**{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "_made"})
        other.keep, other._made = keep, self._made
        return other

    def runs(self, which: str, parts: int) -> tuple[Tensor, Tensor]:
        """Means of `parts` runs of every block of ``"q"`` or ``"k"``: (B, heads, blocks, parts, D), fp32 or wider, and which
        hold a token, bool (B | 1, 1, blocks, parts). Runs are as long as in a block that no border cuts."""
        of_queries, place = which == "q", self.place
        blocks, valid = (place.queries, self.query_valid) if of_queries else (place.keys, self.key_valid)
        z = self.q if of_queries else self.k
        if parts == 1:
            means = self.q_means if of_queries else self.k_means
            some = torch.ones(1, 1, blocks.count, 1, dtype=torch.bool, device=z.device)
            if valid is not None:
                some = block_counts(blocks, z.device, valid) > 0 if of_queries else self.counts > 0
            return means.unsqueeze(3), some
        first = place.grid_queries if of_queries else place.grid_keys
        found = []
        for lo, hi, whole in ((0, first, place.whole[0 if of_queries else 1]), (first, blocks.count, place.whole[2])):
            if lo < hi:
                tokens = slice(blocks.starts[lo], blocks.starts[hi])
                some_valid = None if valid is None else valid[:, tokens]
                found.append(run_means(z[:, :, tokens], blocks.between(lo, hi), -(-whole // parts), parts, some_valid))
        means, counts = (torch.cat(made, dim=2) for made in zip(*found, strict=True))
        return means, counts > 0


def run_means(z: Tensor, blocks: Blocks, run: int, parts: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of the first `parts` runs of `run` tokens of every block, and how many tokens are in them: (B, heads, N, D) →
    (B, heads, blocks, parts, D) and (B | 1, 1, blocks, parts). A block has no more tokens than that."""
    # longer runs than the longest block, and runs after its end, have nothing to add
    run = min(run, blocks.largest)
    used = -(-blocks.largest // run)
    slots = block_valid(blocks, z.device)
    real = torch.ones(blocks.count, blocks.largest, dtype=torch.bool, device=z.device) if slots is None else slots
    real = real[None, None]
    if valid is not None:
        real = real & padded(valid[:, None, :], blocks)
    wide = padded(z.to(torch.promote_types(z.dtype, torch.float32)), blocks) * real[..., None]
    lack = run * used - blocks.largest
    sums = torch.nn.functional.pad(wide, (0, 0, 0, lack)).unflatten(3, (used, run)).sum(4)
    counts = torch.nn.functional.pad(real, (0, lack)).unflatten(3, (used, run)).sum(4)
    means = sums / counts.clamp(min=1)[..., None]
    return torch.nn.functional.pad(means, (0, 0, 0, parts - used)), torch.nn.functional.pad(counts, (0, parts - used))


def ordered_tokens(z: Tensor, place: Place, dim: int = 1) -> Tensor:
    """The grid's tokens along `dim`, in block order."""
    if place.order is None:
        return z
    return z.index_select(dim, torch.as_tensor(place.order, device=z.device))


def ordered(z: Tensor, place: Place) -> Tensor:
    """(B, N, heads, D) → (B, heads, N, D) in block order, contiguous."""
    if place.order is None:
        return z.transpose(1, 2).contiguous()
    return ordered_tokens(z.transpose(1, 2), place, 2)


def restored(y: Tensor, place: Place) -> Tensor:
    """(B, heads, N, D) in block order → (B, N, heads, D) in the grid's."""
    if place.order is None:
        return y.transpose(1, 2)
    back = np.empty_like(place.order)
    back[place.order] = np.arange(len(back))
    return y.transpose(1, 2).index_select(1, torch.as_tensor(back, device=y.device))
