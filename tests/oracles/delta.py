"""Video DeltaNet in fp64: a dense boolean mask for the softmax, an explicit inverse per frame for the delta rule.

Source: the specification of VDN (code OpenVDN/vdn-minimax-h3; id 2609.20744 second-hand). For every frame both states are
run again from nothing over the frames that its window does not hold, and decayed to it one frame at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, extra_rows, grid_of, plain, real_keys, scores

EPS = 1e-6


def delta(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Gated window softmax through the host's output, plus the linear branch through an output of its own."""
    options = plain(case.spec)
    y = case.host.out(softmax_rows(case, options))
    outside = [t for t in range(case.grid[0]) if far_frames(t, case.grid[0], options)]
    if outside:
        y = y + affine(case.weights, "to_out_linear", linear_rows(case, options))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)


# --- which frames see which -----------------------------------------------------------------------------------------


def is_anchor(t: int, frames: int, options: dict[str, Any]) -> bool:
    return options["anchors"] == "both" and t in (0, frames - 1)


def in_window(t: int, u: int, options: dict[str, Any]) -> bool:
    """Is frame u in a chunk that lies within `radius` chunks of frame t's?"""
    return abs(t // options["chunk"] - u // options["chunk"]) <= options["radius"]


def seen(t: int, u: int, frames: int, options: dict[str, Any]) -> bool:
    """Does the softmax of frame t see frame u?"""
    return in_window(t, u, options) or is_anchor(t, frames, options) or is_anchor(u, frames, options)


def far_frames(t: int, frames: int, options: dict[str, Any]) -> list[int]:
    """What the linear branch gives frame t: the frames that its softmax does not see."""
    return [u for u in range(frames) if not seen(t, u, frames, options)]


def softmax_rows(case: Case, options: dict[str, Any]) -> Tensor:
    """(B, N, heads*D): softmax under the mask of frames, gated per token and head."""
    t, h, w = case.grid
    frame = [u for u in range(t) for _ in range(h * w)]
    allowed = torch.tensor([[seen(a, b, t, options) for b in frame] for a in frame])[None, None]
    place = grid_of(case.grid)
    q = case.host.split(case.host.raw(case.x, "q"), "q", place)
    k = case.host.split(case.host.raw(case.x, "k"), "k", place)
    v = case.host.split(case.host.raw(case.x, "v"), "v")
    if case.extra is not None:
        k, v = torch.cat([k, case.extra.k], 1), torch.cat([v, case.extra.v], 1)
        allowed = torch.cat([allowed, torch.ones(1, 1, t * h * w, case.extra.k.shape[1], dtype=torch.bool)], -1)
    real = real_keys(case)
    y = attend(scores(q, k, allowed & real), v)
    if options["gate"] == "sigmoid":
        gate = torch.sigmoid(affine(case.weights, "softmax_gate.up", case.x))
        y = y * gate.repeat_interleave(case.site.head_dim, dim=-1)
    return y


# --- the linear branch ----------------------------------------------------------------------------------------------


def linear_rows(case: Case, options: dict[str, Any]) -> Tensor:
    """(B, N, heads*D): what every token reads; zero for anchors."""
    kept = [t for t in range(case.grid[0]) if not is_anchor(t, case.grid[0], options)]
    return torch.stack([one_sample(case, options, b, kept) for b in range(case.x.shape[0])])


def one_sample(case: Case, options: dict[str, Any], b: int, kept: list[int]) -> Tensor:
    frames, h, w = case.grid
    heads, d, tokens = case.site.heads, case.site.head_dim, h * w
    weights = case.own("linear_attention.")
    x = case.x[b].reshape(frames, tokens, -1)[kept]
    real = torch.ones(frames, tokens, dtype=torch.bool)
    if case.key_valid is not None:
        real = case.key_valid[b].reshape(frames, tokens)
    real = real[kept]
    maps = {}
    for name in "qkv":
        z = case.host.raw(case.x[b : b + 1], name)[0].reshape(frames, h, w, -1)[kept]
        if name in {"none": "", "kv": "kv", "qkv": "qkv"}[options["convolve"]]:
            z = z * real.reshape(len(kept), h, w, 1)
            z = over_frames(
                over_rows(z, weights[f"short_conv.{name}_sp.weight"]), weights[f"short_conv.{name}_tm.weight"]
            )
        z = z.reshape(len(kept), tokens, heads, d)
        maps[name] = z * torch.sigmoid(z)
    k, q = unit(maps["k"]), unit(maps["q"])
    beta = torch.sigmoid(affine(weights, "beta_proj", x)) * real[..., None]
    gate = torch.sigmoid(affine(weights, "output_gate.up", affine(weights, "output_gate.down", x)))
    decay = [frame_decay(weights, x[i], real[i], heads, d) for i in range(len(kept))]
    out = case.x.new_zeros(frames, tokens, heads * d)
    for i, t in enumerate(kept):
        far = far_frames(t, frames, options)
        per_head = []
        for head in range(heads):
            state = case.x.new_zeros(d, d)
            for direction in (1, -1):
                order = [j for j in range(len(kept)) if kept[j] in far and (kept[j] - t) * direction < 0]
                if order:
                    state = state + one_side(order[::direction], i, k, maps["v"], beta, decay, head, tokens, options)
            per_head.append(normed(q[i, :, head] @ state.T, weights["norm.weight"]))
        out[t] = torch.cat(per_head, -1) * gate[i]
    return out.reshape(frames * tokens, heads * d)


def one_side(
    order: list[int],
    here: int,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: list[Tensor],
    head: int,
    tokens: int,
    options: dict[str, Any],
) -> Tensor:
    """The state [d_v, d_k] after the frames of `order`, decayed by every frame from the next one up to `here`."""
    d = k.shape[-1]
    state, eye = k.new_zeros(d, d), torch.eye(d, dtype=k.dtype)
    for j in order:
        a, c = torch.zeros_like(eye), torch.zeros_like(eye)
        for s in range(tokens):
            key, value, write = k[j, s, head], v[j, s, head], beta[j, s, head]
            a = a + write * torch.outer(key, key)
            c = c + write * torch.outer(value, key)
        old = state @ torch.diag(decay[j][head])
        if options["rule"] == "vdn":
            state = (old + c) @ torch.linalg.inv(eye + a)
        elif options["rule"] == "vdn_scaled":
            state = (old + c / tokens**0.5) @ torch.linalg.inv(eye + a / tokens)
        else:
            state = old @ (eye - a / tokens) + c / tokens**0.5
    step = 1 if order[-1] < here else -1
    for j in range(order[-1] + step, here + step, step):
        state = state @ torch.diag(decay[j][head])
    return state


def frame_decay(weights: dict[str, Tensor], x: Tensor, real: Tensor, heads: int, d: int) -> Tensor:
    """alpha of one frame, (heads, D), from the mean over its real tokens; a frame without any has the mean zero."""
    mean = x.new_zeros(x.shape[-1])
    if bool(real.any()):
        mean = x[real].mean(0)
    z = affine(weights, "alpha.up", affine(weights, "alpha.down", mean)) + weights["alpha.dt_bias"]
    z = torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)
    return torch.exp(-torch.exp(weights["alpha.A_log"])[:, None] * z.reshape(heads, d))


def over_rows(z: Tensor, kernel: Tensor) -> Tensor:
    """5 x 5 taps per frame and channel, nothing beyond the border: (F, H, W, C), kernel (C, 1, 5, 5)."""
    _, h, w, _ = z.shape
    rows = []
    for y in range(h):
        columns = []
        for x in range(w):
            total = torch.zeros_like(z[:, 0, 0])
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        total = total + z[:, y + dy, x + dx] * kernel[:, 0, dy + 2, dx + 2]
            columns.append(total)
        rows.append(torch.stack(columns, 1))
    return torch.stack(rows, 1)


def over_frames(z: Tensor, kernel: Tensor) -> Tensor:
    """5 taps over frames per channel: (F, H, W, C), kernel (C, 1, 5)."""
    out = []
    for t in range(z.shape[0]):
        total = torch.zeros_like(z[0])
        for dt in range(-2, 3):
            if 0 <= t + dt < z.shape[0]:
                total = total + z[t + dt] * kernel[:, 0, dt + 2]
        out.append(total)
    return torch.stack(out)


def unit(z: Tensor) -> Tensor:
    """Over the Euclidean norm, which counts as EPS at least."""
    return z / torch.clamp(z.square().sum(-1, keepdim=True).sqrt(), min=EPS)


def normed(z: Tensor, gain: Tensor) -> Tensor:
    return z / torch.sqrt(z.square().mean(-1, keepdim=True) + EPS) * gain
