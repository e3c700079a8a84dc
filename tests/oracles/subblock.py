"""SubBlock: a block pair's score is the log of the summed exponentials of its runs' mean scores; the best are attended."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, plain, scores

from .blockwise import Block, Laid, answer, by_token, counts, highest, laid_out, means


def pieces(block: Block, length: int) -> list[Block]:
    """Runs of `length` tokens; the last may be shorter."""
    return [block[i : i + length] for i in range(0, len(block), length)]


def block_scores(laid: Laid, block: int, parts: list[int]) -> Tensor:
    """``log sum_{a, c} exp(s · qbar_ia · kbar_jc)`` over runs that hold a token: (B, heads, query blocks, key blocks)."""
    s = laid.q.shape[-1] ** -0.5
    rows = []
    for query_block in laid.query_blocks:
        asked = pieces(query_block, block // parts[0])
        qc, any_q = means(laid.q, asked, laid.asked), counts(laid.asked, asked) > 0
        row = []
        for key_block in laid.key_blocks:
            cut = pieces(key_block, block // parts[1])
            kc, any_k = means(laid.k, cut, laid.real), counts(laid.real, cut) > 0
            dots = s * torch.einsum("bhad,bhcd->bhac", qc, kc)
            dots = dots.masked_fill(~(any_q[..., None] & any_k[:, :, None]), float("-inf"))
            row.append(dots.flatten(2).logsumexp(-1))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=2)


def kept_blocks(sparsity: float, blocks: int, multiple: int) -> int:
    """ceil((1 - sparsity) · blocks), up to a multiple, at most all; a share that is whole but for rounding is whole."""
    wanted = (1 - sparsity) * blocks
    count = round(wanted) if abs(wanted - round(wanted)) < 1e-9 else math.ceil(wanted)
    return max(1, min(blocks, math.ceil(count / multiple) * multiple))


def subblock(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    options = plain(case.spec)
    laid = laid_out(case, options["block"], options["block"], policies=("videos", options["extra_keys"]))
    found = block_scores(laid, options["block"], options["runs"])
    usable = counts(laid.real, laid.key_blocks) > 0
    chosen = highest(found, lambda blocks: kept_blocks(options["sparsity"], blocks, options["multiple"]), usable)
    logits = scores(laid.q, laid.k, by_token(chosen, laid, 1.0) > 0)
    return answer(case, laid, attend(logits, laid.v))
