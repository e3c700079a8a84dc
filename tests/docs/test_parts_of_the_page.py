"""The selectors and the far field that a page shows keep the whole contract, against dense masks in fp64."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.docs.shell import ROOT, blocks
from tests.oracles.block_sparse import Tokens, block_means, token_mask
from tests.oracles.blocks import Layout, layout
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.budgets import BudgetSpec
from ultrazoo.attention.parts.far import FarSpec
from ultrazoo.attention.parts.orders import CurveSpec, Place, RasterSpec, TilesSpec
from ultrazoo.attention.parts.scene import Scene
from ultrazoo.attention.parts.selectors import BandSpec, SelectorSpec, UnionSpec
from ultrazoo.grid import Grid
from ultrazoo.spec import AttentionSpec, Rope, Segment, Site
from ultrazoo.testing import Case, attend, contract_suite, extra_rows, plain, scores

PAGE = "docs/add-an-attention.md"


def _shown(title: str) -> ModuleType:
    """A file of the page as a module; what it defines is not registered."""
    (block,) = (one for one in blocks(PAGE) if one.title == title)
    module = ModuleType(f"shown_{title.removesuffix('.py')}")
    # dataclasses look their module up by name
    sys.modules[module.__name__] = module
    exec(compile(block.text, str(block), "exec"), module.__dict__)
    return module


shown: Any = _shown("blocks.py")


@dataclass(frozen=True, kw_only=True)
class Shown(BlockSparseSpec):
    """Block-sparse attention with the parts of the page."""

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 5, 7), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        image = site.at(grid=Grid(1, 4, 5), has_timestep=False)
        text = site.at(extra=(Segment("text", 5),))
        budget = BudgetSpec(of=shown.LongSpec(), heads=(0.2, 0.5, 1.0))
        forced = UnionSpec(of=(shown.LongSpec(share=0.3), BandSpec(width=0)))
        return [
            (cls(order=RasterSpec(block=(8, 4)), selector=shown.CombSpec(every=3), far=shown.RestSpec()), text),
            (cls(order=TilesSpec(tile=(2, 2, 3)), selector=shown.LongSpec(share=0.3), far=shown.RestSpec()), site),
            (cls(order=CurveSpec(block=6), selector=budget, far=shown.RestSpec(weight=0.4)), site),
            (cls(order=RasterSpec(block=4), selector=forced), image),
        ]


def _chosen(selector: dict[str, Any], where: Layout, tokens: Tokens, shares: list[float] | None = None) -> Tensor:
    """Bool (B, heads, query blocks, selectable key blocks), block by block."""
    batch, _, heads, _ = tokens.k.shape
    found = torch.zeros(batch, heads, len(where.queries), where.selectable, dtype=torch.bool)
    if selector["name"] == "union":
        for one in selector["of"]:
            found |= _chosen(one, where, tokens)
    elif selector["name"] == "budget":
        found = _chosen(selector["of"], where, tokens, list(selector["heads"]))
    elif selector["name"] == "band":
        # of the block itself, in an order whose blocks of queries and keys are the same
        found |= torch.eye(len(where.queries), where.selectable, dtype=torch.bool)
    elif selector["name"] == "acme/comb":
        found[..., :: selector["every"]] = True
    else:
        means, counts = block_means(tokens.k, where.keys[: where.selectable], tokens.real)
        for b in range(batch):
            real = [j for j in range(where.selectable) if counts[b, j] > 0]
            for head in range(heads):
                share = selector["share"] if shares is None else shares[head]
                many = -int(-share * len(real) // 1)
                best = sorted(real, key=lambda j: -float(means[b, j, head].detach().norm()))[:many]
                found[b, head][:, best] = True
    return found


def _oracle(case: Case) -> Any:
    options, tokens = plain(case.spec), Tokens.of(case)
    where = layout(options["order"], case.grid, tokens.segments)
    chosen = _chosen(options["selector"], where, tokens)
    batch, count, heads, size = tokens.k.shape
    always = torch.ones(*chosen.shape[:3], len(where.keys) - where.selectable, dtype=torch.bool)
    mask = token_mask(where, torch.cat([chosen, always], -1), count) & tokens.real[:, None, None, :]
    rows = attend(scores(tokens.q, tokens.k, mask), tokens.v).unflatten(-1, (heads, size)).clone()
    weight = options["far"].get("weight", 0.0)
    for b in range(batch):
        for head in range(heads):
            for i, query in enumerate(where.queries):
                left = [j for j in range(where.selectable) if not chosen[b, head, i, j]]
                keys = [key for j in left for key in where.keys[j] if tokens.real[b, key]]
                if keys:
                    mean = tokens.v[b, keys, head].mean(0)
                    rows[b, query, head] = (1 - weight) * rows[b, query, head] + weight * mean
    y = case.host.out(rows[:, : case.x.shape[1]].flatten(2))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)


TestShown = contract_suite(Shown, oracle=_oracle)


@pytest.mark.parametrize("spec", [SelectorSpec, FarSpec, Scene, Place])
def test_the_page_names_what_there_is(spec: type) -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8").partition("## A selector and a far field\n")[2]
    start = text.partition(f"**{spec.__name__}**")[2]
    told = re.split(r"\n\n|\n- \*\*", start, maxsplit=1)[0]
    names = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", told))
    others = {"module", "orders", "scene", "cached", "budget", "selectable", "count", "starts", "sizes", "tokens"}
    there = {*dir(spec), *getattr(spec, "__dataclass_fields__", {})}
    assert len(names & there) >= 4
    assert names - there <= others
