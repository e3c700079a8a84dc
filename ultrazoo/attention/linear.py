"""Linear attention with positive features: SANA (arXiv 2410.10629, section 2.2) and SANA-Video (arXiv 2509.24695, section 3).

``y_i = R phi(q_i) S / (phi(q_i) z + eps)`` with ``S = sum_j R phi(k_j)^T v_j`` and ``z = sum_j phi(k_j)``: O(N D^2), no
pairs. phi comes before the rotary embedding R, which stands in the numerator alone, so the weights may be negative while
the denominator stays positive; sums and quotient are fp32. With `causal_chunks` S and z run over chunks of frames, and a
query reads them up to and including its own chunk.

We depart from the released code in three places: extra keys join S and z for every query, without a place of their own;
extra queries attend densely with a softmax; a short last chunk is a chunk. SANA-Video's optional softmax branch, full or in
windows, is `softmax_branch`; a model that has softmax attention in some layers is a recipe with layer keys. The locality
that these models need comes from their mix-FFN, which the native backbones have as ``ffn: glumbconv``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Problem
from ..grid import Grid
from ..spec import AttentionSpec, BranchCost, Cost, Rope, Segment, Site, Start, Traits, option
from .contract import Attention, Call, Extra, Host, Positions, grid_positions, refuse_segments
from .grouped import attend_extra, slab_tokens
from .softmax_branch import SoftmaxBranch, SoftmaxBranchSpec

Raw = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LinearSpec(AttentionSpec):
    """Keys and values summed into one D x D state per head, which every query reads."""

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "SANA, arXiv 2410.10629; SANA-Video, arXiv 2509.24695"
    formula: ClassVar[str] = "y_i = W_o [R phi(q_i) sum_j (R phi(k_j))^T v_j] / [phi(q_i) . sum_j phi(k_j) + eps]"

    phi: Literal["relu", "elu", "softmax"] = option(
        "relu", "positive features of q and k: relu, elu + 1, or a softmax over the channels of a head"
    )
    rope: Literal["numerator", "none"] = option(
        "numerator", "the host's rotary embedding, after phi: in the numerator (SANA-Video) or nowhere (SANA)"
    )
    eps: float = option(1e-8, "added to the denominator", gt=0)
    causal_chunks: int | None = option(
        None, "frames per chunk; a chunk sees itself and those before it. null: every token sees every token", ge=1
    )
    softmax_branch: SoftmaxBranchSpec | None = option(
        None, "softmax attention with projections of its own, added times a learned number; null: none"
    )

    def problems(self, site: Site) -> list[Problem]:
        if self.softmax_branch is None:
            return []
        found = [problem.under("softmax_branch") for problem in self.softmax_branch.problems(site)]
        if self.causal_chunks is not None:
            rule = "sees frames of later chunks, and causal_chunks is given"
            found.append(Problem("softmax_branch", rule, "use causal_chunks: null, or no softmax_branch"))
        return found

    def cost(self, site: Site) -> Cost:
        tokens, more, width = site.tokens, site.extra_tokens, site.width
        # the state of grid and extra keys, and its reading
        core = 2 * site.inner * site.head_dim * (2 * tokens + more)
        pairs = more * (tokens + more)
        attention = core + 4 * pairs * site.inner
        qkv = 2 * tokens * site.dim * 3 * width
        # fp32 counts twice beside a 16-bit stream: both features before and after their rotation, v and the numerator
        wide = 8 + 4 * (self.rope == "numerator" and site.rope is not None)
        if self.phi == "elu":
            # its argument, the exponential and which side of zero, of q and k
            wide += 7
        frame = site.grid.h * site.grid.w
        cost = Cost(
            pairs=pairs,
            attention_flops=attention,
            qkv_flops=qkv,
            out_flops=2 * tokens * site.inner * site.dim,
            # queries, keys, values, the answer, and a frame's features, their rotation, values and answer in fp32
            peak_elements=4 * tokens * width + 8 * frame * site.inner,
            saved_elements=(2 + 4 * site.qk_norm) * tokens * width + wide * tokens * site.inner,
            branches=(BranchCost("linear", pairs, attention, qkv),),
        )
        if self.softmax_branch is None:
            return cost
        more = self.softmax_branch.cost(site)
        return dataclasses.replace(
            cost,
            pairs=pairs + more.pairs,
            attention_flops=attention + more.attention_flops,
            projection_flops=more.projection_flops,
            other_flops=more.other_flops,
            parameters=more.parameters,
            # beside the other answer its queries, keys and values, two of them before and after their rotation, its answer
            peak_elements=max(cost.peak_elements, tokens * site.dim + 6 * tokens * site.inner),
            saved_elements=cost.saved_elements
            + (6 + 4 * site.qk_norm) * tokens * site.inner
            + tokens * site.heads
            + tokens * site.dim,
            branches=(*cost.branches, more),
        )

    def visible(self, site: Site, queries: Sequence[int] | None = None) -> np.ndarray:
        places = np.arange(site.tokens) if queries is None else np.asarray(queries)
        chunk = self.causal_chunks or site.grid.t
        tokens = site.grid.h * site.grid.w * chunk
        return np.asarray((np.arange(site.tokens) // tokens)[None] <= (places // tokens)[:, None])[None]

    def reach(self, site: Site, tokens: np.ndarray) -> np.ndarray:
        chunk = (self.causal_chunks or site.grid.t) * site.grid.h * site.grid.w
        places = np.arange(site.tokens)
        last = np.where(tokens, places, -1).max(axis=1)
        # of an empty set nothing: -1 // chunk + 1 = 0
        return np.asarray(places[None] < ((last // chunk + 1) * chunk)[:, None])

    def traits(self) -> Traits:
        return Traits(
            start=Start("needs tuning", "SANA-Video, arXiv 2509.24695: trained from the image model SANA"),
            # a relu may leave a query and a key without a common channel
            visible="upper bound" if self.phi == "relu" else "exact",
            min_grid=(1, 1, 1) if self.softmax_branch is None else self.softmax_branch.min_grid,
            softmax=False,
            notes="with the rotary embedding in the numerator outputs are unbounded where the denominator is near zero: train "
            "in bf16 or fp32, fp16 overflows",
        )

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        rope = Rope(axes=(4, 2, 2))
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=rope, qk_norm=True)
        image = Site(dim=20, heads=3, head_dim=8, grid=Grid(1, 4, 5), has_timestep=False)
        windows = SoftmaxBranchSpec(windows=(1, 2, 3), scale=0.7)
        return [
            (cls(), site),
            (cls(softmax_branch=windows), site),
            (cls(softmax_branch=SoftmaxBranchSpec()), image.at(dim=24)),
            (cls(rope="none"), image),
            (cls(phi="elu", causal_chunks=2), site.at(grid=Grid(5, 3, 4))),
            (cls(phi="softmax", eps=1e-4), site.at(grid=Grid(2, 3, 5), qk_norm=False, extra=(Segment("text", 4),))),
        ]


def relu(z: Tensor) -> Tensor:
    return F.relu(z)


def elu(z: Tensor) -> Tensor:
    # elu(z) + 1 without the loss of digits in (e^z - 1) + 1
    return torch.where(z > 0, z + 1, z.clamp(max=0).exp())


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "elu": elu, "softmax": softmax}


class LinearAttention(Attention):
    """(B, N, C) → (B, N, C); with extra tokens also (B, M, heads*D)."""

    def __init__(self, spec: LinearSpec, site: Site):
        super().__init__(spec, site)
        self.phi = FEATURES[spec.phi]
        self.chunk = spec.causal_chunks
        self.rotary = spec.rope == "numerator"
        self.beside = None if spec.softmax_branch is None else SoftmaxBranch(spec.softmax_branch, site)

    def forward(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        found = self._linear(x, host, call)
        if self.beside is None:
            return found
        if isinstance(found, Tensor):
            return found + self.beside(x, host, call, self.traced)
        y, extra = found
        return y + self.beside(x, host, call, self.traced), extra

    def _linear(self, x: Tensor, host: Host, call: Call) -> Tensor | tuple[Tensor, Tensor]:
        if call.extra is not None:
            refuse_segments(self.spec.name, call.extra)
        raw = host.project(x, "qkv")  # three times (B, N, width)
        assert isinstance(raw, tuple)
        positions = grid_positions(call.grid, x.device)
        tracking = torch.is_grad_enabled() and any(z.requires_grad for z in raw)
        run = self._whole if tracking or self.traced or torch.compiler.is_compiling() else self._in_slabs
        with _wide_sums(x.device.type):
            y = run(raw, host, call, positions)  # (B, N, heads, D)
        if call.extra is None:
            # the projections make room for the output
            del raw
            return host.out(y.flatten(2))
        _, k, v = host.heads(None, raw[1], raw[2], positions)
        assert k is not None and v is not None
        return host.out(y.flatten(2)), attend_extra(call.extra, k, v, call.key_valid)

    def _whole(self, raw: Raw, host: Host, call: Call, positions: Positions) -> Tensor:
        """Every token at once; with chunks a state per frame, summed over the frames up to the end of the chunk."""
        # normed and not rotated: (B, N, heads, D)
        q, k, v = host.heads(*raw, None)
        assert q is not None and k is not None and v is not None
        # one group of tokens, or one per frame
        groups = (1, -1) if self.chunk is None else (call.grid[0], -1)
        features, turned = self._features(k, host, positions, call.key_valid)
        # (B, N, heads, D) → (B, G, heads, n, D)
        turned, v = (_grouped(z, groups) for z in (turned, v.to(features.dtype)))
        state = turned.transpose(-1, -2) @ v  # (B, G, heads, D, D)
        total = features.unflatten(1, groups).sum(2)  # (B, G, heads, D)
        if self.chunk is not None:
            last = _last_frames(call.grid[0], self.chunk, q.device)
            state, total = state.cumsum(1)[:, last], total.cumsum(1)[:, last]
        if call.extra is not None:
            more, sums = self._of_extra(call.extra)
            state, total = state + more[:, None], total + sums[:, None]
        features, turned = self._features(q, host, positions)
        y = self._read(_grouped(features, groups), _grouped(turned, groups), state, total)
        return y.transpose(2, 3).flatten(1, 2).to(raw[0].dtype)

    def _in_slabs(self, raw: Raw, host: Host, call: Call, positions: Positions) -> Tensor:
        """The same without gradients: some frames at a time, with one running state, so that fp32 copies stay small."""
        site, frames, tokens = self.site, call.grid[0], call.grid[1] * call.grid[2]
        out = raw[0].new_empty(*raw[0].shape[:2], site.heads, site.head_dim)
        # features, their rotation, values and answer, in fp32
        step = max(1, slab_tokens(out.device, 16 * out.shape[0] * site.inner) // tokens)
        state = total = None
        if call.extra is not None:
            state, total = self._of_extra(call.extra)
        chunk = self.chunk or frames
        for first in range(0, frames, chunk):
            end = min(first + chunk, frames)
            slabs = [(t, min(t + step, end)) for t in range(first, end, step)]
            for start, stop in slabs:
                at, place = slice(start * tokens, stop * tokens), positions._replace(t=positions.t[start:stop])
                _, k, v = host.heads(None, raw[1][:, at], raw[2][:, at], None)
                assert k is not None and v is not None
                valid = None if call.key_valid is None else call.key_valid[:, at]
                features, turned = self._features(k, host, place, valid)
                found = turned.permute(0, 2, 3, 1) @ v.to(features.dtype).transpose(1, 2)
                state = found if state is None else state + found
                total = features.sum(1) if total is None else total + features.sum(1)
            assert state is not None and total is not None
            for start, stop in slabs:
                at, place = slice(start * tokens, stop * tokens), positions._replace(t=positions.t[start:stop])
                q, _, _ = host.heads(raw[0][:, at], None, None, None)
                assert q is not None
                features, turned = self._features(q, host, place)
                out[:, at] = self._read(features.transpose(1, 2), turned.transpose(1, 2), state, total).transpose(1, 2)
        return out

    def _features(
        self, z: Tensor, host: Host, positions: Positions, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """phi(z), zero where not `valid`, and the same rotated: at least fp32, (B, n, heads, D) both."""
        features = self._positive(z, valid)
        return features, host.rotate(features, positions) if self.rotary else features

    def _positive(self, z: Tensor, valid: Tensor | None) -> Tensor:
        features = self.phi(z.to(torch.promote_types(z.dtype, torch.float32)))
        return features if valid is None else features.masked_fill(~valid[:, :, None, None], 0.0)

    def _of_extra(self, extra: Extra) -> tuple[Tensor, Tensor]:
        """State (B, heads, D, D) and sum of features (B, heads, D) of the extra keys, which have no place to turn by."""
        features = self._positive(extra.k, extra.key_mask)
        return features.permute(0, 2, 3, 1) @ extra.v.to(features.dtype).transpose(1, 2), features.sum(1)

    def _read(self, features: Tensor, turned: Tensor, state: Tensor, total: Tensor) -> Tensor:
        """Queries (…, n, D) read state (…, D, D) and sum of features (…, D) → (…, n, D)."""
        spec: Any = self.spec
        weight = (features * total.unsqueeze(-2)).sum(-1, keepdim=True)
        return turned @ state / (weight + spec.eps)  # type: ignore[no-any-return]


def _wide_sums(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: it would take sums over all tokens to 16 bits. Meta tensors know no autocast."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _grouped(z: Tensor, groups: tuple[int, int]) -> Tensor:
    """(B, N, heads, D) → (B, G, heads, n, D)."""
    return z.unflatten(1, groups).transpose(2, 3)


def _last_frames(frames: int, chunk: int, device: torch.device) -> Tensor:
    """The last frame of every frame's chunk: (T,). `frames` may be symbolic."""
    index = torch.arange(frames, device=device)
    return ((index // chunk + 1) * chunk - 1).clamp(max=frames - 1)


LinearSpec.module = LinearAttention
