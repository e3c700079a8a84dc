"""What may depend on what: `visible`, other samples of the batch, padded keys, extra tokens, timesteps per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.contract import Call, Positions
from .base import ContractBase, picked, promises
from .compare import assert_close, error_ratio
from .scenario import Example, Scenario, other_grids, seeded


class BareHost:
    """A host whose output projection is left out, so that heads can be told apart."""

    def __init__(self, host: Any):
        self.host = host

    def project(self, x: Tensor, which: str) -> Any:
        return self.host.project(x, which)

    def heads(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.heads(*args, **kwargs)

    def rotate(self, z: Tensor, positions: Positions) -> Tensor:
        return self.host.rotate(z, positions)

    def out(self, y: Tensor) -> Tensor:
        return y


def some_queries(tokens: int) -> list[int]:
    """The corners of the sequence and a few places between."""
    return sorted({0, tokens - 1, tokens // 2, tokens // 3, (5 * tokens) // 7})


def influence(scenario: Scenario, queries: Sequence[int]) -> np.ndarray:
    """RMS gradient of each query's output in each head with respect to each token: (heads, queries, N), fp64."""
    runner, site = scenario.runner, scenario.site
    x = scenario.x.detach().requires_grad_()
    call = Call(grid=tuple(scenario.grid), timestep=scenario.timestep)
    y = runner.attention(x, BareHost(runner.host), call)
    rows = np.zeros((site.heads, len(queries), site.tokens))
    for head in range(site.heads):
        channels = slice(head * site.head_dim, (head + 1) * site.head_dim)
        weight = seeded("influence", site.head_dim)
        for i, query in enumerate(queries):
            (grad,) = torch.autograd.grad((y[0, query, channels] * weight).sum(), x, retain_graph=True)
            rows[head, i] = grad[0].square().mean(-1).sqrt().numpy()
    return rows


class Locality(ContractBase):
    """Independence of what is not seen."""

    def check_visible(self, example: Example, scenario: Scenario) -> None:
        """Gradients are zero outside `visible`; where it is exact, they are not zero inside."""
        queries = some_queries(scenario.site.tokens)
        expanded = example.spec.expand(scenario.site)
        declared = expanded.visible(scenario.site, queries)
        assert declared.dtype == bool
        assert declared.shape[0] in (1, scenario.site.heads)
        assert declared.shape[1:] == (len(queries), scenario.site.tokens)
        everything = expanded.visible(scenario.site)
        assert (everything[:, queries] == declared).all(), "visible(queries) is not those rows of visible()"
        measured = influence(scenario, queries)
        seen = measured > 1e-13 * measured.max()
        declared = np.broadcast_to(declared, seen.shape)
        beyond = np.argwhere(seen & ~declared)
        assert len(beyond) == 0, f"(head, query, token) that matter and are not declared: {beyond[:5].tolist()}"
        if expanded.traits().visible == "exact":
            missing = np.argwhere(declared & ~seen)
            assert len(missing) == 0, f"(head, query, token) declared and without influence: {missing[:5].tolist()}"

    def test_only_visible_tokens_matter(self, example: Example) -> None:
        self.check_visible(example, Scenario(example, torch.float64, batch=1, peak=0.3))

    def test_only_visible_tokens_matter_at_another_size(self, example: Example) -> None:
        for grid in other_grids(example)[:1]:
            self.check_visible(example, Scenario(example, torch.float64, batch=1, peak=0.3, grid=grid))

    def test_samples_of_a_batch_do_not_meet(self, example: Example) -> None:
        scenario = Scenario(example, torch.float64, batch=3)
        with torch.no_grad():
            together = scenario.run()
            for i in range(3):
                one = slice(i, i + 1)
                timestep = None if scenario.timestep is None else scenario.timestep[one]
                alone = scenario.run(scenario.x[one], timestep=timestep)
                assert_close(f"sample {i} alone", alone, together[one], self.allowed(torch.float64))

    @picked(of=promises("key_valid"))
    def test_invalid_tokens_are_never_keys(self, example: Example) -> None:
        scenario = Scenario(example, torch.float64, key_valid=True)
        valid = scenario.key_valid
        assert valid is not None
        assert not bool(valid.all())
        case = scenario.case()
        with torch.no_grad():
            got, expected = scenario.run(), self.oracle(case)
            noise = scenario.x.masked_fill(valid[..., None], 0.0).roll(1, dims=-1) * 5
            moved = scenario.run(scenario.x + noise)
            unmasked = scenario.run(key_valid=None)
        allowed = self.allowed(torch.float64)
        assert_close("valid rows", got[valid], expected[valid], allowed)
        assert_close("valid rows after the invalid tokens changed", moved[valid], got[valid], allowed)
        assert error_ratio(unmasked[valid], got[valid]) > 1e3 * allowed, "key_valid makes no difference at all"

    @picked(of=promises("extra"))
    def test_extra_tokens_equal_the_oracle_s(self, example: Example) -> None:
        for dtype in (torch.float64, torch.float32):
            scenario = Scenario(example, dtype, extra=True)
            with torch.no_grad():
                got, expected = scenario.run(), self.oracle(scenario.case())
            assert isinstance(got, tuple), "with extra tokens the result is (y, y_extra)"
            self.assert_answer(got, expected, dtype)

    @picked(of=promises("extra"))
    def test_masked_extra_tokens_change_nothing(self, example: Example) -> None:
        scenario = Scenario(example, torch.float64, extra=True)
        extra = scenario.extra
        assert extra is not None
        assert extra.key_mask is not None
        unreal = ~extra.key_mask[..., None, None]
        with torch.no_grad():
            y, y_extra = scenario.run()
            other = scenario.masked_extra(k=extra.k + 7.0 * unreal, v=extra.v - 9.0 * unreal)
            moved, moved_extra = scenario.run(extra=other)
            seen, _ = scenario.run(extra=scenario.masked_extra(key_mask=torch.ones_like(extra.key_mask)))
        allowed = self.allowed(torch.float64)
        assert_close("grid rows", moved, y, allowed)
        assert_close("extra rows", moved_extra, y_extra, allowed)
        assert error_ratio(seen[0], y[0]) > 1e3 * allowed, "a masked extra key and a real one look the same"

    @picked(of=lambda example: example.site.has_timestep)
    def test_timesteps_per_frame_and_per_token(self, example: Example) -> None:
        """The same time in every form gives the same answer; different times are followed token by token."""
        scenario = Scenario(example, torch.float64)
        base = scenario.timestep
        assert base is not None
        frames, tokens = scenario.grid.t, scenario.site.tokens
        with torch.no_grad():
            per_sample = scenario.run()
            for count in (frames, tokens):
                same = scenario.run(timestep=base[:, None].expand(-1, count).contiguous())
                assert_close(f"(B, {count})", same, per_sample, self.allowed(torch.float64))
                scenario.timestep = 1000 * torch.sigmoid(seeded("times", base.shape[0], count))
                expected = self.oracle(scenario.case())
                assert_close(f"different (B, {count})", scenario.run(), expected, self.allowed(torch.float64))
                scenario.timestep = base
