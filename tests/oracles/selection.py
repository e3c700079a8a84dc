"""Which key blocks each query block keeps, one row after another: scores of block means, rules, forced blocks.

Sources: VSA (arXiv 2505.13389) for pooled scores, SubBlock for runs and their log-sum-exp, PISA (2602.01077) for what is added to them, SLA2 (2602.12675) for projections, SpargeAttention2 (2602.13515) for the union of
top-k and top-p, Sol-Attn (2607.24027) for mean + tau * standard deviation. Nothing here has gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Layout

Options = Mapping[str, Any]
NOTHING = float("-inf")


@dataclass
class Looked:
    """What a selector looks at: q, k, v (B, n, heads, D) of all tokens, grid then extra, and which are real (B, n).

    `weights` are the selector's own parameters. `step` is the sampler's index, None where nobody said it.
    """

    layout: Layout
    grid: tuple[int, int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    weights: Mapping[str, Tensor]
    step: int | None = None

    def below(self, prefix: str) -> Looked:
        """The same for a selector inside this one."""
        own = {k[len(prefix) :]: v for k, v in self.weights.items() if k.startswith(prefix)}
        return Looked(self.layout, self.grid, self.q, self.k, self.v, self.real, own, self.step)


def mean_of(z: Tensor, tokens: Sequence[int], real: Tensor) -> Tensor | None:
    """Mean of z (n, D) over the real ones of `tokens`; None where there is none."""
    kept = [token for token in tokens if bool(real[token])]
    return z[kept].sum(0) / len(kept) if kept else None


def means(z: Tensor, blocks: Sequence[Block], real: Tensor) -> list[Tensor | None]:
    return [mean_of(z, block, real) for block in blocks]


def runs_of(block: Block, size: int, parts: int) -> list[Block]:
    """A block as `parts` runs of equal length, counted in a whole block; what a shorter block lacks is missing at its end."""
    length = math.ceil(size / parts)
    return [block[i * length : (i + 1) * length] for i in range(parts) if block[i * length : (i + 1) * length]]


def choose(selector: Options, seen: Looked, keep: Sequence[float] | None = None) -> Tensor:
    """Bool (B, heads, query blocks, selectable key blocks). `keep`: another kept share for each head."""
    name = selector["name"]
    batch, _, heads, _ = seen.q.shape
    shape = (batch, heads, len(seen.layout.queries), seen.layout.selectable)
    if name == "all":
        return torch.ones(shape, dtype=torch.bool)
    if name == "band":
        return band(selector["width"], seen.layout).expand(shape)
    if name == "sink":
        return sink(range(selector["frames"] * seen.grid[1] * seen.grid[2]), seen).expand(shape)
    if name == "tokens":
        return sink(range(selector["start"], selector["start"] + selector["count"]), seen).expand(shape)
    if name == "frames":
        return frames(selector, seen).expand(shape)
    if name == "union":
        found = torch.zeros(shape, dtype=torch.bool)
        for i, part in enumerate(selector["of"]):
            found = found | choose(part, seen.below(f"of.{i}."), keep)
        return found
    if name == "cached":
        return choose(selector["of"], seen.below("of."), keep)
    if name == "budget":
        return budget(selector, seen, shape)
    assert name == "pooled"
    return pooled(selector, seen, keep)


def budget(selector: Options, seen: Looked, shape: tuple[int, ...]) -> Tensor:
    """The inner selector with another share: per head, or that of the step, which everything else yields to."""
    keep = selector["heads"]
    if selector["steps"] is not None:
        if seen.step is None:
            return torch.ones(shape, dtype=torch.bool)
        for key, share in selector["steps"].items():
            for part in key.split(","):
                first, _, last = part.partition("-")
                if int(first) <= seen.step <= int(last or first):
                    keep = [share] * shape[1]
    if keep is not None and all(share == 1.0 for share in keep):
        return torch.ones(shape, dtype=torch.bool)
    return choose(selector["of"], seen.below("of."), keep)


def band(width: int, layout: Layout) -> Tensor:
    """Key blocks with a token of a query block that is at most `width` away."""
    found = torch.zeros(len(layout.queries), layout.selectable, dtype=torch.bool)
    for i in range(layout.grid_queries):
        near = {token for other in layout.queries[max(0, i - width) : i + width + 1] for token in other}
        for j, key in enumerate(layout.keys[: layout.grid_keys]):
            found[i, j] = bool(near & set(key))
    return found


def frames(options: Options, seen: Looked) -> Tensor:
    """Blocks with a pair of tokens that see each other: frames of near chunks, or one of them an anchor."""
    layout, per_frame, last = seen.layout, seen.grid[1] * seen.grid[2], seen.grid[0] - 1

    def sees(query: int, key: int) -> bool:
        a, b = query // per_frame, key // per_frame
        anchored = options["anchors"] == "both" and not {a, b}.isdisjoint({0, last})
        return bool(anchored or abs(a // options["chunk"] - b // options["chunk"]) <= options["radius"])

    found = torch.zeros(len(layout.queries), layout.selectable, dtype=torch.bool)
    for i in range(layout.grid_queries):
        for j in range(layout.grid_keys):
            found[i, j] = any(sees(query, key) for query in layout.queries[i] for key in layout.keys[j])
    return found


def sink(held: range, seen: Looked) -> Tensor:
    """Key blocks of the grid with a token of a range."""
    layout = seen.layout
    columns = [j < layout.grid_keys and any(n in held for n in layout.keys[j]) for j in range(layout.selectable)]
    return torch.tensor(columns).expand(len(layout.queries), -1)


# --- scores of block means --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What a rule knows of one query block: the score of every selectable key block, minus infinity where a block holds
    no real key, and, for moments, the scaled mean query and the key blocks' means (None where a block is empty)."""

    scores: list[float]
    query: Tensor | None
    keys: list[Tensor | None]


def pooled(selector: Options, seen: Looked, keep: Sequence[float] | None) -> Tensor:
    layout = seen.layout
    batch, _, heads, channels = seen.q.shape
    found = torch.zeros(batch, heads, len(layout.queries), layout.selectable, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            share = None if keep is None else keep[h]
            for i, row in enumerate(rows(selector, seen, b, h, 1 / math.sqrt(channels))):
                for j in rule(selector["rule"], row, share, layout.grid_keys):
                    found[b, h, i, j] = True
    return found


def rows(selector: Options, seen: Looked, b: int, h: int, scale: float) -> list[Row]:
    layout, real = seen.layout, seen.real[b]
    q, k, v = (z[b, :, h].detach() for z in (seen.q, seen.k, seen.v))
    key_blocks = layout.keys[: layout.selectable]
    if selector["centre"]:
        middle = mean_of(k, [token for block in key_blocks for token in block], real)
        k = k if middle is None else k - middle

    def project(z: Tensor | None, which: str) -> Tensor | None:
        return z if z is None or not selector["project"] else seen.weights[f"{which}.weight"].detach() @ z

    def run_means(z: Tensor, blocks: Sequence[Block], first: int, size: int, parts: int, which: str) -> list[Any]:
        """The projected means of the runs of each block; of `first` blocks of the grid a whole one has `size` tokens."""
        sizes = [size if i < first else layout.extra_size for i in range(len(blocks))]
        cuts = [runs_of(block, n, parts) for block, n in zip(blocks, sizes, strict=True)]
        return [[project(mean_of(z, run, real), which) for run in cut] for cut in cuts]

    parts_q, parts_k = selector["runs"]
    whole = [project(mean, "key") for mean in means(k, key_blocks, real)]
    key_runs = run_means(k, key_blocks, layout.grid_keys, layout.key_size, parts_k, "key")
    query_runs = run_means(q, layout.queries, layout.grid_queries, layout.query_size, parts_q, "query")
    bias = [key_bias(selector["key_bias"], k, v, block, real) for block in key_blocks]
    found = []
    for block, asked in zip(layout.queries, query_runs, strict=True):
        scores = []
        whole_mass = [mass_of(a, key_runs, scale) if selector["normalise"] == "row" else 0.0 for a in asked]
        for j, runs in enumerate(key_runs):
            terms = [
                scale * (a @ c) - mass
                for a, mass in zip(asked, whole_mass, strict=True)
                for c in runs
                if a is not None and c is not None
            ]
            scores.append(float(torch.logsumexp(torch.stack(terms), 0)) + bias[j] if terms else NOTHING)
        query = project(mean_of(q, block, real), "query")
        found.append(Row(scores, None if query is None else scale * query, whole))
    return found


def mass_of(asked: Tensor | None, key_runs: Sequence[Sequence[Tensor | None]], scale: float) -> float:
    """Logarithm of the softmax denominator of one query run over the runs of all key blocks."""
    if asked is None:
        return 0.0
    return math.log(sum(math.exp(float(scale * (asked @ c))) for runs in key_runs for c in runs if c is not None))


def key_bias(name: str, k: Tensor, v: Tensor, block: Block, real: Tensor) -> float:
    """Logarithm of the trace of the covariance of a block's real keys, or of the norm of how they vary with the values."""
    kept = [token for token in block if bool(real[token])]
    if name == "none" or not kept:
        return 0.0
    centred = k[kept] - k[kept].mean(0)
    if name == "log_norm":
        return math.log(float((centred.T @ v[kept]).square().sum().sqrt()) + 1e-5)
    assert name == "log_variance"
    return math.log(max(float(centred.square().sum(-1).mean()), 1e-12))


# --- rules --------------------------------------------------------------------------------------------------------


def best_first(scores: Sequence[float]) -> list[int]:
    """Blocks by falling score, those that come first before their equals."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def share_of(share: float, blocks: int, rounding: str = "up") -> int:
    """A share of the blocks, rounded; 0.1 of 30 is 3 both ways."""
    exact = Fraction(str(share)) * blocks
    return math.floor(exact) if rounding == "down" else math.ceil(exact)


def rule(options: Options, row: Row, keep: float | None, grid_blocks: int) -> list[int]:
    """The blocks that one row keeps; the first `grid_blocks` of them are the grid's."""
    name = options["name"]
    if keep == 1.0:
        return list(range(len(row.scores)))
    # what is not real competes for nothing, and is no part of what a share is of
    grid_blocks = sum(score != NOTHING for score in row.scores[:grid_blocks])
    blocks = sum(score != NOTHING for score in row.scores)
    if name == "topk":
        if options["competing"] == "added":
            visits = top_k_count(options, grid_blocks, keep) + blocks - grid_blocks
        else:
            visits = top_k_count(options, blocks, keep)
        return best_first(row.scores)[:visits]
    if name == "mean_std":
        return above(options, row)
    if name == "topp":
        mass = top_p(row.scores, options["p"] if keep is None else keep)
        return sorted(set(mass) | set(best_first(row.scores)[: share_of(options["floor"], blocks)]))
    assert name == "topk_or_topp"
    mass = top_p(row.scores, options["p"])
    share = options["share"] if keep is None else keep
    return sorted(set(mass) | set(best_first(row.scores)[: share_of(share, blocks)]))


def top_k_count(options: Options, blocks: int, keep: float | None) -> int:
    """The number or the share, up to a multiple, then at least `least`, at most all."""
    assert options["soft"] is None
    if keep is None and options["count"] is not None:
        count = options["count"]
    else:
        count = share_of(options["share"] if keep is None else keep, blocks, options["rounding"])
    count = math.ceil(count / options["multiple"]) * options["multiple"]
    return min(blocks, max(count, options["least"]))


def top_p(scores: Sequence[float], p: float) -> list[int]:
    """The fewest blocks whose softmax mass reaches p; all of them for p = 1, since every block has some."""
    if p >= 1.0:
        return list(range(len(scores)))
    largest = max(scores)
    if largest == NOTHING:
        return []
    weights = [math.exp(s - largest) for s in scores]
    found: list[int] = []
    for j in best_first(scores):
        found.append(j)
        if sum(weights[i] for i in found) >= p * sum(weights):
            break
    return found


def above(options: Options, row: Row) -> list[int]:
    """Blocks whose score exceeds mean + tau * standard deviation over the blocks that hold a real key."""
    if options["tau"] is None:
        return list(range(len(row.scores)))
    there = [j for j, score in enumerate(row.scores) if score != NOTHING]
    if not there:
        return []
    middle = sum(row.scores[j] for j in there) / len(there)
    if options["moments"] == "exact":
        variance = sum((row.scores[j] - middle) ** 2 for j in there) / len(there)
    else:
        if row.query is None:
            return []
        keys = torch.stack([z for z in row.keys if z is not None])
        variance = float((row.query.square() * (keys - keys.mean(0)).square().mean(0)).sum())
    # 1e-6 in units of log2, squared
    deviation = math.sqrt(max(variance, 0.0) + 1e-6 * math.log(2) ** 2)
    return [j for j in there if row.scores[j] > middle + options["tau"] * deviation]
