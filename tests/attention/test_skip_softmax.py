"""Skip-softmax: what is skipped, what never is, and thresholds that make no sense."""

from __future__ import annotations

import pytest
import torch

from ultrazoo.attention.skip_softmax import SkipSoftmaxAttentionSpec
from ultrazoo.errors import KernelError
from ultrazoo.grid import Grid
from ultrazoo.kernels import attend, record
from ultrazoo.spec import Site
from ultrazoo.testing import error_ratio


def inputs(keys: int = 3 * 128 + 5) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(1, 2, 131, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    return q.double(), k.double(), v.double()


def test_zero_skips_nothing() -> None:
    q, k, v = inputs()
    found = attend(q, k, v, kernel="skip_softmax", threshold=0.0)
    assert error_ratio(found, attend(q, k, v)) < 1e-12


def test_a_weak_tile_behind_a_strong_one_is_dropped_and_one_before_it_is_not() -> None:
    q, k, v = inputs()
    q = torch.ones_like(q)
    strong = torch.zeros_like(k)
    strong[:, :, :128] = 4.0
    found = attend(q, strong, v, kernel="skip_softmax", threshold=0.5)
    assert error_ratio(found, attend(q, strong[:, :, :128], v[:, :, :128])) < 1e-12
    # exp(-16) of the mass is missing there; with the strong tile at the end the weak ones were counted
    late = strong.roll(-128, dims=2)
    assert error_ratio(attend(q, late, v, kernel="skip_softmax", threshold=0.5), attend(q, late, v)) < 1e-12
    assert error_ratio(found, attend(q, strong, v)) > 1e-9


def test_it_runs_by_name_alone_and_exact_kernels_take_no_threshold() -> None:
    q, k, v = inputs()
    with record() as runs:
        attend(q, k, v)
    assert runs[0].kernel != "skip_softmax"
    with pytest.raises(KernelError, match="takes no threshold"):
        attend(q, k, v, threshold=0.1, kernel="sdpa")
    with pytest.raises(KernelError, match="needs a threshold"):
        attend(q, k, v, kernel="skip_softmax")


def test_rows_without_keys_are_zero() -> None:
    q, k, v = inputs()
    mask = torch.zeros(1, 1, 1, k.shape[2], dtype=torch.bool)
    assert attend(q, k, v, key_mask=mask, kernel="skip_softmax", threshold=0.1).abs().max() == 0


def test_a_factor_becomes_a_threshold_by_the_number_of_keys() -> None:
    # the figure of the specification: 0.81 at 75 600 tokens for a target sparsity of 0.7
    spec = SkipSoftmaxAttentionSpec(scale_factor=2822.62 * 2.718281828 ** (4.388 * 0.7))
    assert abs(spec.value(75_600) - 0.81) < 0.005
    at = Site(dim=8, heads=1, head_dim=8, grid=Grid(1, 8, 8))
    (problem,) = spec.problems(at)
    assert problem.path == "scale_factor"
    (both,) = SkipSoftmaxAttentionSpec(scale_factor=1.0, threshold=0.1).problems(at)
    assert "threshold" in str(both)
