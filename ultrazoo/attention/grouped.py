"""Softmax attention inside the windows of a token grid, with extra keys and invalid tokens: the core of every layout.

q, k, v are (B, T, H, W, heads, D); queries and keys may live on different grids (compressed keys) as long as both are cut
into the same number of windows per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attend
from ..ops import partition
from ..ops.partition import AxisRule, Cuts, Rectangle
from ..ops.runs import AxisCut
from .checks import same_dtype
from .contract import Extra

Bias = Callable[[tuple[int, int, int]], Tensor]
"""What is added to the scores inside a window of (t, h, w) tokens, of queries and keys alike: (1, heads, n, n)."""


def aligned(queries: AxisCut, keys: AxisCut) -> tuple[AxisCut, AxisCut]:
    """The same cuts with runs split so that run i of one goes with run i of the other."""
    if queries.runs == keys.runs:
        return queries, keys
    runs: list[tuple[int, int, int]] = []
    for q, k in zip(queries.sizes(), keys.sizes(), strict=True):
        if runs and runs[-1][1:] == (q, k):
            runs[-1] = (runs[-1][0] + 1, q, k)
        else:
            runs.append((1, q, k))
    return (
        AxisCut(tuple((count, q) for count, q, _ in runs), queries.stride),
        AxisCut(tuple((count, k) for count, _, k in runs), keys.stride),
    )


def attend_cuts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cuts: Cuts,
    k_cuts: Cuts,
    *,
    extra: Extra | None = None,
    key_valid: Tensor | None = None,
    bias: Bias | None = None,
    lse: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention inside windows, in the rectangle form.

    key_valid (B, *key grid) is False where a key is not real; `bias` is asked for each size of window. Returns
    (B, T, H, W, heads, D) and, with `lse`, the log-sum-exp (B, T, H, W, heads, 1).
    """
    batch = q.shape[0]
    pairs = [aligned(a, b) for a, b in zip(q_cuts, k_cuts, strict=True)]
    q_cuts = (pairs[0][0], pairs[1][0], pairs[2][0])
    k_cuts = (pairs[0][1], pairs[1][1], pairs[2][1])
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _attend_slabs(q, k, v, q_cuts, k_cuts, extra, key_valid, bias, lse, kernel)
    blocks = partition.rectangles(k_cuts)
    masks: list[Tensor | None] = [None] * len(blocks)
    if key_valid is not None:
        masks = list(partition.token_windows(key_valid, k_cuts))
    laid_out = [partition.windows(z, cuts) for z, cuts in ((q, q_cuts), (k, k_cuts), (v, k_cuts))]
    biases = [_bias_of(bias, block) for block in blocks]
    found = [_attend(*one, extra, lse, kernel) for one in zip(*laid_out, masks, biases, strict=True)]
    y = partition.unwindows([out for out, _ in found], q_cuts, batch)
    if not lse:
        return y, None
    return y, partition.unwindows([one.unsqueeze(-1) for _, one in found if one is not None], q_cuts, batch)


def _bias_of(bias: Bias | None, block: Rectangle) -> Tensor | None:
    return None if bias is None else bias((block[0].size, block[1].size, block[2].size))


SLAB_BYTES = {"cpu": 1 << 23}
"""Most bytes of queries handled at a time without gradients, per kind of device; on a CPU small enough that the memory
allocator hands the same pages out again."""
SLAB_BYTES_ELSEWHERE = 1 << 30


def slab_tokens(device: torch.device, token_bytes: int) -> int:
    """How many tokens of so many bytes to handle at a time without gradients."""
    return SLAB_BYTES.get(device.type, SLAB_BYTES_ELSEWHERE) // token_bytes


def _attend_slabs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cuts: Cuts,
    k_cuts: Cuts,
    extra: Extra | None,
    key_valid: Tensor | None,
    bias: Bias | None,
    lse: bool,
    kernel: str,
) -> tuple[Tensor, Tensor | None]:
    """The same without gradients: some windows at a time, so that copies stay small, each written to its place."""
    token_bytes = q.shape[0] * q.shape[4] * q.shape[5] * q.element_size()
    q_cuts, k_cuts = partition.slabs(q_cuts, k_cuts, slab_tokens(q.device, token_bytes))
    blocks = list(zip(partition.rectangles(q_cuts), partition.rectangles(k_cuts), strict=True))
    masks = [None] * len(blocks) if key_valid is None else partition.token_windows(key_valid, k_cuts)
    q, k, v = partition.reordered(q, q_cuts), partition.reordered(k, k_cuts), partition.reordered(v, k_cuts)
    one_window = len(blocks) == 1 and all(span.count == 1 for span in blocks[0][0])
    y = None if one_window else q.new_empty(*q.shape[:5], v.shape[5])
    norms = q.new_empty(*q.shape[:5], 1, dtype=torch.promote_types(q.dtype, torch.float32)) if lse else None
    for (at, keys), mask in zip(blocks, masks, strict=True):
        laid_out = (partition.rectangle_windows(z, place) for z, place in ((q, at), (k, keys), (v, keys)))
        out, found = _attend(*laid_out, mask, _bias_of(bias, keys), extra, lse, kernel)
        if y is None or one_window:
            # its output is the answer as it stands
            y = out.transpose(1, 2).unflatten(1, q.shape[1:4])
        else:
            partition.put_rectangle(y, out, at)
        if norms is not None and found is not None:
            partition.put_rectangle(norms, found.unsqueeze(-1), at)
    assert y is not None
    y = partition.reordered(y, q_cuts, inverse=True)
    return y, None if norms is None else partition.reordered(norms, q_cuts, inverse=True)


def attend_rules(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rules: Sequence[AxisRule],
    k_rules: Sequence[AxisRule],
    *,
    same_grid: bool = True,
    extra: Extra | None = None,
    key_valid: Tensor | None = None,
    bias: Bias | None = None,
    lse: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The same in the index form: sizes may be symbolic, so the caller says whether q and k are on the same grid."""
    batch, q_grid, k_grid = q.shape[0], q.shape[1:4], k.shape[1:4]
    q_axes = partition.indices(q_rules, q_grid, q.device)
    k_axes = q_axes if same_grid else partition.indices(k_rules, k_grid, k.device)
    mask = partition.gathered_mask(k_axes, k_grid, batch, k.device)
    if key_valid is not None:
        valid = partition.gathered_heads(key_valid[..., None, None], k_axes)[:, 0, :, 0]
        mask = valid if mask is None else mask & valid
    qw, kw, vw = (partition.gathered_heads(z, axes) for z, axes in ((q, q_axes), (k, k_axes), (v, k_axes)))
    added = None
    if bias is not None:
        slots = [n if a.gather is None else a.gather.shape[1] for a, n in zip(k_axes, k_grid, strict=True)]
        added = bias((slots[0], slots[1], slots[2]))
    out, found = _attend(qw, kw, vw, mask, added, extra, lse, kernel)
    y = partition.scattered(out, q_axes, q_grid, batch)
    if found is None:
        return y, None
    return y, partition.scattered(found.unsqueeze(-1), q_axes, q_grid, batch)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    extra: Extra | None,
    lse: bool,
    kernel: str,
) -> tuple[Tensor, Tensor | None]:
    """One batch of equal windows: q, k, v (B*groups, heads, tokens, D), mask (B*groups, keys), bias as in `Bias`."""
    if extra is not None:
        same_dtype(extra, k)
        groups = k.shape[0] // extra.k.shape[0]
        more_k, more_v = (z.transpose(1, 2).repeat_interleave(groups, dim=0) for z in (extra.k, extra.v))
        if mask is not None or extra.key_mask is not None:
            own = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask
            more = (
                torch.ones(k.shape[0], more_k.shape[2], dtype=torch.bool, device=k.device)
                if extra.key_mask is None
                else extra.key_mask.repeat_interleave(groups, dim=0)
            )
            mask = torch.cat([own, more], dim=1)
        k, v = torch.cat([k, more_k], dim=2), torch.cat([v, more_v], dim=2)
        if bias is not None:
            bias = F.pad(bias, (0, more_k.shape[2]))
    key_mask = None if mask is None else mask[:, None, None]
    if lse:
        out, found = attend(q, k, v, key_mask=key_mask, bias=bias, return_lse=True, kernel=kernel)
        return out, found
    out = attend(q, k, v, key_mask=key_mask, bias=bias, kernel=kernel)
    assert isinstance(out, Tensor)
    return out, None


def attend_extra(extra: Extra, k: Tensor, v: Tensor, key_valid: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Extra queries see every grid key (B, N, heads, D) and every extra key: → (B, M, heads*D)."""
    mask = None if key_valid is None else key_valid.flatten(1)
    out, _ = _attend(extra.q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, None, extra, False, kernel)
    return out.transpose(1, 2).flatten(2)
