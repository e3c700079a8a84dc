"""Which keys a design visits, seen at the kernel door, and the softmax mass that full attention gives them.

``recall_i = sum over visited j of softmax(q_i k_j / sqrt(D))_j`` for sampled queries i. Rows of q and k that reach a kernel are
told by their bits: a permutation, a window or a gather keeps them. Keys that are none of the captured ones (means of many
keys, say) are counted as summaries and add nothing to the recall.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Inputs
from ..ops.seeds import generator_for

SCORE_BYTES = 1 << 27
"""Bytes of scores held at a time."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sampled(tokens: int, most: int, seed: int = 0) -> Tensor:
    """At most `most` of `tokens` queries, ascending, drawn without replacement; all where they are that few."""
    if tokens <= most:
        return torch.arange(tokens)
    return torch.randperm(tokens, generator=generator_for(seed, "probe.queries"))[:most].sort().values


def row_hash(z: Tensor) -> Tensor:
    """(…, n, D) → (…, n) int64 by which equal rows are known."""
    bits = z.contiguous().view(_BITS[z.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(z.shape[-1])
    odd = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator) * 2 + 1
    # integers wrap around, which is what a hash wants
    return (bits * odd.to(z.device)).sum(-1)


class Table:
    """Row numbers by hash; `add` rows (n, D) under numbers (n,)."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._sorted: tuple[Tensor, Tensor] | None = None

    def add(self, rows: Tensor, numbers: Tensor) -> None:
        self._keys.append(row_hash(rows).flatten())
        self._numbers.append(numbers.to(rows.device).flatten())
        self._sorted = None

    def find(self, rows: Tensor) -> Tensor:
        """(…, n, D) → (…, n): the number of every row, -1 where it is none of them."""
        if self._sorted is None:
            keys, order = torch.cat(self._keys).sort(stable=True)
            self._sorted = keys, torch.cat(self._numbers)[order]
        keys, numbers = self._sorted
        wanted = row_hash(rows)
        at = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
        return torch.where(keys[at] == wanted, numbers[at], -1)


@dataclass(frozen=True)
class Recall:
    """`values` (B, heads, sampled) of softmax mass visited, None where it cannot be known: `why` says so.

    `summaries`: whether kernels saw keys that are none of the captured ones.
    """

    values: Tensor | None
    why: str = ""
    summaries: bool = False


class Visits:
    """A watch for the kernel door. q, k (B, N | N + M, heads, D) are the captured ones, extra keys behind the grid's.

    Number of a row: ``(b * heads + head) * length + token``.
    """

    def __init__(self, q: Tensor, k: Tensor, queries: Tensor):
        self.shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        self.queries = queries.to(q.device)
        batch, heads, tokens, length = self.shape
        self.q_rows, self.k_rows = Table(), Table()
        self.learn("q", q)
        self.learn("k", k)
        slot = torch.full((tokens,), -1, dtype=torch.long, device=q.device)
        slot[self.queries] = torch.arange(len(queries), device=q.device)
        self.slot = slot
        self.seen = torch.zeros(batch * heads, len(queries), length, dtype=torch.bool, device=q.device)
        self.found = torch.zeros(batch * heads, len(queries), dtype=torch.bool, device=q.device)
        self.summaries = False
        self.lossy = ""
        self.known_keys = False

    def learn(self, which: str, z: Tensor) -> None:
        """Rows that stand for the captured ones of the same places (turned to other positions): z (B, n, heads, D)."""
        batch, heads, tokens, length = self.shape
        stride = tokens if which == "q" else length
        group = torch.arange(batch * heads).view(batch, heads, 1) * stride
        numbers = group + torch.arange(z.shape[1])
        (self.q_rows if which == "q" else self.k_rows).add(z.transpose(1, 2), numbers)

    def __call__(self, kernel: str, inputs: Inputs) -> None:
        """One call through the door."""
        tokens, length = self.shape[2:]
        rows = self.q_rows.find(inputs.q)
        slots = torch.where(rows >= 0, self.slot[rows.clamp(min=0) % tokens], -1)
        keys = self.k_rows.find(inputs.k)
        self.summaries |= bool((keys < 0).any())
        if not bool((slots >= 0).any()):
            return
        self.known_keys |= bool((keys >= 0).any())
        if inputs.threshold is not None:
            self.lossy = f"kernel {kernel!r} leaves keys out by itself and does not say which"
        for b, h in (slots >= 0).any(-1).nonzero().tolist():
            at = (slots[b, h] >= 0).nonzero()[:, 0]
            group = rows[b, h, at] // tokens
            columns = (keys[b, h] >= 0).nonzero()[:, 0]
            allowed = self._allowed(inputs, b, h, at)
            token = keys[b, h, columns] % length
            # a key of another head or sample would be a mistake of the design; it is not counted
            same = (keys[b, h, columns] // length)[None] == group[:, None]
            take = same if allowed is None else same & allowed[:, columns]
            place = slots[b, h, at]
            self.found[group, place] = True
            r, c = take.nonzero(as_tuple=True)
            self.seen[group[r], place[r], token[c]] = True

    @staticmethod
    def _allowed(inputs: Inputs, b: int, h: int, at: Tensor) -> Tensor | None:
        """Which keys the rows `at` of one sample and head see: bool (rows, keys); None for all."""
        allowed: Tensor | None = None
        shape = (*inputs.q.shape[:3], inputs.k.shape[2])
        if inputs.key_mask is not None:
            allowed = inputs.key_mask.expand(*shape[:2], 1, shape[3])[b, h].expand(len(at), -1)
        if inputs.bias is not None:
            finite = inputs.bias.expand(shape)[b, h, at] > float("-inf")
            allowed = finite if allowed is None else allowed & finite
        if inputs.block_map is not None:
            blocks = _block_rows(inputs, b, h, at)
            allowed = blocks if allowed is None else allowed & blocks
        return allowed


def _block_rows(inputs: Inputs, b: int, h: int, at: Tensor) -> Tensor:
    held = inputs.block_map
    starts = torch.as_tensor(held.queries.starts, device=at.device)
    block = torch.searchsorted(starts, at, right=True) - 1
    sizes = torch.as_tensor(held.keys.sizes, device=at.device)
    out = torch.zeros(len(at), inputs.k.shape[2], dtype=torch.bool, device=at.device)
    for lo, hi in held.chunks():
        inside = ((block >= lo) & (block < hi)).nonzero()[:, 0]
        if not inside.numel():
            continue
        chosen = held.rows(lo, hi)
        rows = chosen[min(b, chosen.shape[0] - 1), min(h, chosen.shape[1] - 1)][block[inside] - lo]
        out[inside] = rows.repeat_interleave(sizes, dim=1)
    return out


def recall(visits: Visits, q: Tensor, k: Tensor, valid: Tensor | None) -> Recall:
    """Softmax mass of the visited keys for every sampled query; q (B, N, heads, D), k (B, N + M, heads, D), valid
    (B, N + M): which keys are real."""
    if not bool(visits.found.any()):
        why = "no query of the capture reaches a kernel as it is: it has no softmax over keys, or changes its queries before"
        return Recall(None, why, visits.summaries)
    if not visits.known_keys:
        return Recall(None, "every key that a kernel sees stands for several (compression)", True)
    if visits.lossy:
        return Recall(None, visits.lossy, visits.summaries)
    if not bool(visits.found.all()):
        return Recall(None, "some queries reach a kernel changed, so their keys are not known", visits.summaries)
    batch, heads, _, length = visits.shape
    count = len(visits.queries)
    out = torch.empty(batch, heads, count)
    step = max(1, SCORE_BYTES // (4 * length))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, :, h].float().T
            for lo in range(0, count, step):
                rows = q[b, visits.queries[lo : lo + step], h].float()
                scores = rows @ keys * q.shape[-1] ** -0.5
                if valid is not None:
                    scores = scores.masked_fill(~valid[b], float("-inf"))
                seen = visits.seen[b * heads + h, lo : lo + step]
                out[b, h, lo : lo + step] = (scores.softmax(-1) * seen).sum(-1).cpu()
    return Recall(out, "", visits.summaries)
