"""VMoBA in fp64, one query at a time: its own block and the best of the others, by mass or number, per query or per head."""

from __future__ import annotations

import torch
from torch import Tensor

from ultrazoo.testing import Case, attend, plain, scores

from .blockwise import Laid, answer, counts, laid_out, means
from .grouped_tokens import tile_groups

EXTRA_BLOCK = 128


def tile_of(case: Case, options: dict[str, object]) -> tuple[list[int], int]:
    """Tokens (T, H, W) per block of this layer, and which of the three partitions it is."""
    turns = [kind for kind, count in enumerate(options["partition"]) for _ in range(count)]  # type: ignore[arg-type]
    kind = turns[(case.site.layer - options["first"]) % len(turns)]  # type: ignore[operator]
    t, h, w = case.grid
    tiles = ([options["frames"], h, w], [t, *options["column"]], list(options["box"]))  # type: ignore[misc,call-overload]
    return tiles[kind], kind


def cut(case: Case, tile: list[int]) -> Laid:
    """Queries one by one; key blocks are tiles of the grid, then runs of extra tokens that compete."""
    laid = laid_out(case, 1, EXTRA_BLOCK)
    tokens = case.x.shape[1]
    laid.key_blocks[:] = tile_groups(case.grid, tile) + [block for block in laid.key_blocks if block[0] >= tokens]
    return laid


def own_block(laid: Laid, query: int, tokens: int) -> int | None:
    """The block of keys that the query stands in itself; extra tokens that all see are in none."""
    key = query if query < tokens else tokens + laid.pattern[query - tokens]
    for j, block in enumerate(laid.key_blocks):
        if key in block:
            return j
    return None


def scaled(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Moved and scaled to 0 … 1."""
    low, high = min(values.values()), max(values.values())
    return {at: (value - low) / (high - low) if high > low else 0.0 for at, value in values.items()}


def by_mass(values: dict[tuple[int, int], float], own: set[tuple[int, int]], p: float) -> set[tuple[int, int]]:
    """Own pairs, then the heaviest others, one at least, until all together reach `p` of the whole."""
    weights = scaled(values)
    total = sum(weights.values())
    reached = sum(weights[at] for at in own)
    taken = set(own)
    if total == 0 or p == 1:
        return set(values)
    others = sorted((at for at in values if at not in own), key=lambda at: (-values[at], at))
    for place, at in enumerate(others):
        if place and reached >= p * total:
            break
        taken.add(at)
        reached += weights[at]
    return taken


def by_number(values: dict[tuple[int, int], float], own: set[tuple[int, int]], number: int) -> set[tuple[int, int]]:
    """Own pairs, then the highest others, `number` in all."""
    others = sorted((at for at in values if at not in own), key=lambda at: (-values[at], at))
    return own | set(others[: max(0, number - len(own))])


def chosen(laid: Laid, options: dict[str, object], kind: int, tokens: int) -> Tensor:
    """Bool (B, heads, queries, key blocks)."""
    found = torch.einsum("bnhd,bhcd->bhnc", laid.q, means(laid.k, laid.key_blocks, laid.real)).detach()
    usable = counts(laid.real, laid.key_blocks)[:, 0] > 0
    out = torch.zeros(found.shape, dtype=torch.bool)
    mine = [own_block(laid, query, tokens) for query in range(found.shape[2])]
    top = options["top"]
    for b in range(found.shape[0]):
        blocks = [j for j in range(found.shape[3]) if usable[b, j]]
        asking = [i for i in range(found.shape[2]) if laid.asked[b, i]]
        groups = [[i] for i in asking] if options["scope"] == "query" else [asking]
        for h in range(found.shape[1]):
            for queries in groups:
                values = {(i, j): float(found[b, h, i, j]) for i in queries for j in blocks}
                if not values:
                    continue
                own = {(i, mine[i]) for i in queries if (i, mine[i]) in values}
                if top is None:
                    taken = by_mass(values, own, 0.25 if options["p"] is None else options["p"])  # type: ignore[arg-type]
                else:
                    taken = by_number(values, own, top[kind] * len(queries))  # type: ignore[index]
                for i, j in taken:
                    out[b, h, i, j] = True
    return out


def mixture_of_blocks(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    options = plain(case.spec)
    tile, kind = tile_of(case, options)
    laid = cut(case, tile)
    kept = chosen(laid, options, kind, case.x.shape[1])
    allowed = torch.ones(*kept.shape[:3], laid.k.shape[1], dtype=torch.bool)
    for j, block in enumerate(laid.key_blocks):
        for token in block:
            allowed[..., token] = kept[..., j]
    return answer(case, laid, attend(scores(laid.q, laid.k, allowed & laid.real[:, None, None]), laid.v))
