"""Head groups, each with an attention of its own, group after group; what a group adds acts on its heads alone."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import Tensor

from ultrazoo.testing import Case, ExtraTokens, ReferenceHost


class Undone(ReferenceHost):
    """A host whose output projection waits until all heads are there."""

    def out(self, y: Tensor) -> Tensor:
        return y


def heads_of(key: str) -> list[int]:
    """``0,2-4`` → [0, 2, 3, 4]."""
    out: list[int] = []
    for part in key.split(","):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return out


def picked_extra(extra: ExtraTokens | None, heads: list[int]) -> ExtraTokens | None:
    if extra is None:
        return None
    return replace(extra, q=extra.q[:, :, heads], k=extra.k[:, :, heads], v=extra.v[:, :, heads])


def by_head(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """Each group's oracle on its own heads; the columns are put where the heads belong, then projected once."""
    size = case.site.head_dim
    columns: dict[int, Tensor] = {}
    extra_columns: dict[int, Tensor] = {}
    for i, (key, group) in enumerate(case.spec.groups.items()):  # type: ignore[attr-defined]
        heads = heads_of(key)
        host = Undone(case.host.weights, case.host.heads, size, case.host.rope, tuple(heads))
        part = replace(
            case,
            spec=group,
            site=case.site.at(heads=len(heads), host_heads=case.site.heads),
            host=host,
            weights=case.own(f"groups.{i}."),
            extra=picked_extra(case.extra, heads),
        )
        oracle = getattr(importlib.import_module(f"tests.oracles.{group.name}"), group.name)
        found = oracle(part)
        y, y_extra = found if case.extra is not None else (found, None)
        for j, head in enumerate(heads):
            columns[head] = y[..., j * size : (j + 1) * size]
            if y_extra is not None:
                extra_columns[head] = y_extra[..., j * size : (j + 1) * size]
    rows = case.host.out(torch.cat([columns[head] for head in sorted(columns)], dim=-1))
    if case.extra is None:
        return rows
    return rows, torch.cat([extra_columns[head] for head in sorted(extra_columns)], dim=-1)
