"""Branches side by side, fused: compress → project and adapt → group → softmax → restore → lift, dense masks all along."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultrazoo.testing import Case, affine, attend, extra_rows, plain, real_keys, scores

from . import cells, gates, windows
from .names import stored


def raw_projection(
    case: Case, which: str, x: Tensor, adapt: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Tensor:
    """Raw q, k or v of a branch: the host's, the host's plus a low-rank term, or the branch's own."""
    if adapt["name"] == "own":
        return affine(weights, f"adapt.{which}", x)
    if adapt["name"] == "shared":
        return case.host.raw(x, which)
    assert adapt["name"] == "lora"
    base = "q" if which == "k" and adapt["key_from"] == "query" else which
    low = affine(weights, f"adapt.{which}.lora_A", x)
    return case.host.raw(x, base) + affine(weights, f"adapt.{which}.lora_B", low)


def real_tokens(case: Case) -> Tensor:
    """The input with zeros where a token is not real: nothing of it may leak through cells, lifts or gates."""
    return case.x if case.key_valid is None else case.x * case.key_valid[..., None]


def flat(z: Tensor) -> Tensor:
    """(B, T, H, W, C) → (B, N, C)."""
    return z.reshape(z.shape[0], -1, z.shape[-1])


class Branch:
    """One branch of one call: its logits, values and, after the softmax, its way back to the grid."""

    def __init__(self, case: Case, name: str, options: Mapping[str, Any]):
        self.case, self.options = case, options
        self.weights = case.own(f"branches.{stored(name)}.")
        self.compress = options["compress"]
        self.layout, self.shift, self.coords = options["layout"], options["shift"], options["coords"]
        layer = case.site.layer

        full_map = real_tokens(case).reshape(case.x.shape[0], *case.grid, -1)
        key_map = full_map
        if self.compress is not None:
            conv = {k.removeprefix("compress."): v for k, v in self.weights.items() if k.startswith("compress.")}
            key_map = cells.compress(full_map, self.compress, conv)
        query_map = key_map if self.compresses_queries else full_map
        self.cell_grid = tuple(query_map.shape[1:4])
        query_map = self.resize_for_layout(query_map, layer)
        key_map = self.resize_for_layout(key_map, layer)
        self.query_grid, self.key_grid = tuple(query_map.shape[1:4]), tuple(key_map.shape[1:4])

        self.query_labels = self.labels(self.query_grid, layer)
        self.key_labels = self.labels(self.key_grid, layer)
        self.project(flat(query_map), flat(key_map))

    @property
    def compresses_queries(self) -> bool:
        return self.compress is not None and self.compress["of"] == "both"

    def factor(self, of_queries: bool) -> tuple[int, int, int]:
        if self.compress is None or (of_queries and not self.compresses_queries):
            return (1, 1, 1)
        return cells.factors(self.compress["factor"])

    def resize_for_layout(self, z: Tensor, layer: int) -> Tensor:
        return cells.resize(z, windows.resized(z.shape[1:4], self.layout, self.shift, layer))

    def labels(self, grid: tuple[int, ...], layer: int) -> list[list[int]]:
        return [windows.axis_labels(grid[a], a, self.layout, self.shift, layer) for a in range(3)]

    def positions(self, labels: list[list[int]], of_queries: bool) -> Tensor:
        return windows.token_positions(labels, self.factor(of_queries), self.coords["origin"], self.coords["cell"])

    def lengths(self) -> list[float]:
        """How many positions a window spans on each axis, of queries or keys, whichever are more.

        With the grid's origin the window is the whole axis; members n apart, each a cell of f, span n*f per member.
        """
        out = []
        for axis in range(3):
            spans = []
            for labels, of_queries in ((self.query_labels, True), (self.key_labels, False)):
                row = labels[axis]
                step = self.factor(of_queries)[axis] if self.coords["cell"] == "centre" else 1
                if self.coords["origin"] == "grid":
                    spans.append(len(row) * step)
                    continue
                members = max(([i for i, one in enumerate(row) if one == label] for label in set(row)), key=len)
                spacing = members[1] - members[0] if len(members) > 1 else 1
                spans.append(len(members) * spacing * step)
            out.append(float(max(spans)))
        return out

    def project(self, xq: Tensor, xk: Tensor) -> None:
        case, adapt = self.case, self.options["adapt"]
        rule = self.coords["rule"] or "none"
        at_q, at_k = self.positions(self.query_labels, True), self.positions(self.key_labels, False)
        lengths = self.lengths()
        q = case.host.split(raw_projection(case, "q", xq, adapt, self.weights), "q", at_q, rule=rule, lengths=lengths)
        k = case.host.split(raw_projection(case, "k", xk, adapt, self.weights), "k", at_k, rule=rule, lengths=lengths)
        v = case.host.split(raw_projection(case, "v", xk, adapt, self.weights), "v")
        self.q, self.k, self.v = q, k, v

    def logits(self) -> Tensor:
        """(B, heads, query tokens, key tokens), minus infinity outside the group."""
        allowed = windows.same_group(self.query_labels, self.key_labels)[None, None]
        if self.case.key_valid is not None:
            allowed = allowed & self.valid_keys(self.case.key_valid)[:, None, None, :]
        return scores(self.q, self.k, allowed)

    def valid_keys(self, valid: Tensor) -> Tensor:
        """A cell is a key when a token in it is real: any of them, or the first where only that one is taken."""
        if self.compress is None:
            return valid
        grid, factor = self.case.grid, cells.factors(self.compress["factor"])
        on_map = valid.reshape(valid.shape[0], *grid)
        columns = []
        for place in itertools.product(*(range(n) for n in self.key_grid)):
            members = [cells.cell(place[a], factor[a], grid[a]) for a in range(3)]
            if self.compress["name"] == "stride":
                members = [m[:1] for m in members]
            columns.append(torch.stack([on_map[:, t, h, w] for t, h, w in itertools.product(*members)]).any(0))
        return torch.stack(columns, dim=1)

    def restore(self, y: Tensor) -> Tensor:
        """(B, query tokens, heads*D) → (B, N, heads*D)."""
        z = y.reshape(y.shape[0], *self.query_grid, -1)
        if not self.compresses_queries:
            return flat(cells.resize(z, self.case.grid))
        assert self.compress is not None
        if self.compress["ragged"] == "exact":
            z = cells.resize(z, self.cell_grid)
        conv = {k.removeprefix("lift."): v for k, v in self.weights.items() if k.startswith("lift.")}
        return flat(cells.lift(z, self.case.grid, self.compress, conv))


def branched_heads(case: Case, options: Mapping[str, Any]) -> Tensor:
    """Grid rows before the output projection: (B, N, heads*D)."""
    branches = {name: Branch(case, name, o) for name, o in options["branches"].items()}
    fuse = options["fuse"]
    if fuse["name"] == "lse":
        return joint_softmax(case, list(branches.values()))
    outputs = {}
    for name, branch in branches.items():
        logits, v = with_extra(case, branch, branch.logits(), branch.v)
        outputs[name] = branch.restore(attend(logits, v))
    return fused(case, fuse, outputs)


def fused(case: Case, fuse: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> Tensor:
    weights, head_dim = case.own("fuse."), case.site.head_dim
    if fuse["name"] == "weights":
        return gates.weighted(outputs, fuse, weights)
    if fuse["name"] == "token_gate":
        return gates.token_gate(outputs, fuse, weights, real_tokens(case), head_dim)
    assert fuse["name"] == "time_gate"
    assert case.timestep is not None
    return gates.time_gate(outputs, fuse, weights, case.timestep, case.grid, head_dim)


def with_extra(case: Case, branch: Branch, logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every group sees every real extra key beside its own."""
    if case.extra is None:
        return logits, v
    real = real_keys(case)[..., case.x.shape[1] :]
    return torch.cat([logits, scores(branch.q, case.extra.k, real)], -1), torch.cat([v, case.extra.v], 1)


def joint_softmax(case: Case, branches: list[Branch]) -> Tensor:
    """One softmax over the keys of all branches; the extra keys stand in it once, scored by the host's own query."""
    logits = torch.cat([b.logits() for b in branches], dim=-1)
    v = torch.cat([b.v for b in branches], dim=1)
    logits, v = with_extra(case, branches[0], logits, v)
    return attend(logits, v)


def branched(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention, from `plain(spec)`."""
    y = case.host.out(branched_heads(case, plain(case.spec)))
    extra = extra_rows(case)
    return y if extra is None else (y, extra)
