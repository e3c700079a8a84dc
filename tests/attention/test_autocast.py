"""Autocast does not reach the arithmetic of block-sparse designs: scores, sums and softmax stay in fp32."""

from __future__ import annotations

import pytest
import torch

import ultrazoo
from tests.attention.raw import block_of, given, noise
from ultrazoo.attention.block_sparse import BlockSparseSpec
from ultrazoo.attention.parts.far import CoarseSpec
from ultrazoo.attention.pisa import PisaSpec
from ultrazoo.attention.sla2 import Sla2Spec
from ultrazoo.attention.sol import SolSpec
from ultrazoo.attention.sparse_linear import SparseLinearSpec
from ultrazoo.attention.subblock import SubblockSpec
from ultrazoo.spec import AttentionSpec
from ultrazoo.testing import error_ratio


@pytest.mark.parametrize(
    "spec",
    [
        SolSpec(tau=0.3, block=8),
        SubblockSpec(block=8, multiple=1),
        PisaSpec(block=8, density=0.3),
        SparseLinearSpec(block=(8, 8)),
        SparseLinearSpec(form="paper", block=(8, 8), share=0.2),
        Sla2Spec(block=(8, 8), share=0.2),
        Sla2Spec(block=(8, 8), share=0.2, router="soft"),
        BlockSparseSpec(far=CoarseSpec(gate="none")),
    ],
    ids=lambda spec: spec.name,
)
def test_autocast_changes_nothing(spec: AttentionSpec) -> None:
    q, k, v = (noise(i, 2, 60, 2, 8, scale=2.0).float() for i in range(3))
    module = block_of(spec, 2, 8, 60).float()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "proj" in name:
                parameter.copy_(noise(len(name), *parameter.shape))
        plain = given(spec, q, k, v, module)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(given(spec, q, k, v, module), plain)
        assert error_ratio(given(spec, q.bfloat16(), k.bfloat16(), v.bfloat16(), module), plain) > 1e-4


def test_a_gate_works_under_autocast() -> None:
    """The gate reads the stream, whose type autocast may have changed."""
    spec = BlockSparseSpec(far=CoarseSpec())
    module = block_of(spec, 2, 8, 60).float()
    q, k, v = (noise(i, 2, 60, 2, 8).bfloat16() for i in range(3))
    module.far.gate = torch.nn.Linear(48, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = given(spec, q, k, v, module)
    assert bool(y.isfinite().all())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["full", "block_sparse"])
def test_norms_in_fp32_meet_projections_in_16_bits(name: str) -> None:
    """Autocast leaves q and k as their norm makes them and v as the projection does: attention runs all the same."""
    module = ultrazoo.create_attention(name, dim=32, heads=2, qk_norm="rms")
    x = noise(0, 1, 60, 32).float()
    plain = module(x, (3, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, (3, 4, 5))
    assert 1e-4 < error_ratio(y, plain) < 0.05
