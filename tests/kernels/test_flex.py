"""Compiled block lists against the gathered ones, on this processor and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ultrazoo import registry
from ultrazoo.errors import KernelError
from ultrazoo.kernels import Inputs, attend, record
from ultrazoo.kernels.block_map import BlockMap
from ultrazoo.ops.blocks import Blocks, even_blocks, of_sizes
from ultrazoo.testing import error_ratio

HEADS = 3


def call(blocks: Blocks, device: str = "cpu", size: int = 32) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(blocks.tokens)
    q, k, v = (torch.randn(2, HEADS, blocks.tokens, size, generator=g).to(device) for _ in range(3))
    chosen = torch.rand(2, HEADS, blocks.count, blocks.count, generator=g) < 0.5
    # one row without any key
    chosen[0, 0, 1] = False
    chosen = chosen.to(device)
    return q, k, v, BlockMap(blocks, blocks, lambda lo, hi: chosen[:, :, lo:hi], 2, HEADS, q.device)


@pytest.mark.parametrize(
    "blocks", [even_blocks(230, 64), of_sizes(np.array([24, 24, 20, 24, 16]))], ids=["tail", "ragged"]
)
def test_lists_compiled_equal_lists_gathered(blocks: Blocks) -> None:
    why = registry.find("kernel", "flex").absent()
    if why:
        pytest.skip(why)
    q, k, v, block_map = call(blocks)
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 1, blocks.tokens, generator=g) < 0.8
    weight = torch.randn(2, 1, 1, blocks.tokens, generator=g)
    common: dict[str, Any] = {"block_map": block_map, "key_mask": mask, "log_weight": weight}
    with torch.no_grad(), record() as runs:
        expected = attend(q, k, v, kernel="gathered", **common)
        found = attend(q, k, v, kernel="flex", **common)
    assert [run.kernel for run in runs] == ["gathered", "flex"]
    assert error_ratio(found, expected) < 1e-5
    # the mask and the weights count
    assert error_ratio(attend(q, k, v, block_map=block_map), expected) > 0.05


@pytest.mark.parametrize("shape", [(1, HEADS), (2, HEADS), (1, 1)], ids=str)
def test_masks_may_differ_by_head(shape: tuple[int, int]) -> None:
    why = registry.find("kernel", "flex").absent()
    if why:
        pytest.skip(why)
    q, k, v, block_map = call(even_blocks(230, 64))
    mask = torch.rand(*shape, 1, 230, generator=torch.Generator().manual_seed(2)) < 0.5
    with torch.no_grad():
        expected = attend(q, k, v, block_map=block_map, key_mask=mask, kernel="gathered")
        found = attend(q, k, v, block_map=block_map, key_mask=mask, kernel="flex")
        first = attend(q, k, v, block_map=block_map, key_mask=mask[:1, :1], kernel="gathered")
    assert error_ratio(found, expected) < 1e-5
    if shape != (1, 1):
        assert error_ratio(first, expected) > 0.05


def test_lists_count_past_the_compiler_s_own_limit() -> None:
    """There torch runs the function as it is written, which looks at no list."""
    why = registry.find("kernel", "flex").absent()
    if why:
        pytest.skip(why)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (64, 96):
            q, k, v, block_map = call(even_blocks(tokens, 32))
            expected = attend(q, k, v, block_map=block_map, kernel="gathered")
            assert error_ratio(attend(q, k, v, block_map=block_map, kernel="flex"), expected) < 1e-5
            assert error_ratio(attend(q, k, v), expected) > 0.05


def test_what_it_cannot_do_on_a_cpu_is_said() -> None:
    q, k, v, block_map = call(even_blocks(64, 32))
    with pytest.raises(KernelError) as caught:
        attend(q.requires_grad_(), k, v, block_map=block_map, return_lse=True, kernel="flex")
    text = str(caught.value)
    assert "has no backward on a cpu" in text
    assert "does not return lse on a cpu" in text
    assert "gathered: can run" in text
    with pytest.raises(KernelError, match="is for block maps only"):
        attend(q, k, v, kernel="flex")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "flex_flash", "flash_attn_4", "gathered"])
@pytest.mark.parametrize("blocks", [even_blocks(1024, 128), even_blocks(1000, 128), of_sizes(np.array([64, 48, 64]))])
def test_block_maps_on_a_gpu(name: str, blocks: Blocks) -> None:
    q, k, v, block_map = call(blocks, "cuda", 64)
    expected, norm = attend(q, k, v, block_map=block_map, return_lse=True, kernel="gathered")
    half = [z.to(torch.bfloat16) for z in (q, k, v)]
    why = registry.find("kernel", name).reasons(Inputs(*half, block_map=block_map, return_lse=True))
    if why:
        pytest.skip("; ".join(why))
    found, lse = attend(*half, block_map=block_map, return_lse=True, kernel=name)
    assert error_ratio(found, expected) < 1e-2
    real = norm.isfinite()
    assert bool((lse.isfinite() == real).all())
    assert error_ratio(lse[real], norm[real]) < 1e-2
