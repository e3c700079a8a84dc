"""Masks and weights that broadcast: kernels that pick keys out see the same as those that broadcast; and block maps that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo.errors import UsageError
from ultrazoo.kernels import attend
from ultrazoo.kernels.block_map import BlockMap
from ultrazoo.ops.blocks import even_blocks
from ultrazoo.testing import error_ratio

BATCH, HEADS, N = 2, 3, 13
SHAPES = [
    (N,),
    (1, N),
    (1, 1, N),
    (HEADS, 1, N),
    (BATCH, 1, 1, N),
    (1, HEADS, 1, N),
    (BATCH, HEADS, 1, N),
    (BATCH, 1, 1, 1),
]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    q, k, v = (3 * torch.randn(BATCH, HEADS, N, 8, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v


def every_pair(size: int, queries: int = N, keys: int = N) -> BlockMap:
    blocks = even_blocks(queries, size), even_blocks(keys, 4)
    count = blocks[1].count
    return BlockMap(
        *blocks, lambda lo, hi: torch.ones(1, 1, hi - lo, count, dtype=torch.bool), BATCH, HEADS, torch.device("cpu")
    )


def expected(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Softmax row by row; a row without any key is zero."""
    whole = added.expand(BATCH, HEADS, N, N)
    out = torch.zeros_like(q)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(N):
                scores = (k[b, h] @ q[b, h, i]) * 8**-0.5 + whole[b, h, i]
                if scores.max() > float("-inf"):
                    out[b, h, i] = scores.softmax(-1) @ v[b, h]
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["gathered", "by_key", "skip_softmax", "sdpa", "math", "auto", "auto with a map"])
@pytest.mark.parametrize("name", ["key_mask", "log_weight"])
def test_a_mask_of_any_shape_means_what_broadcasting_says(name: str, kernel: str, shape: tuple[int, ...]) -> None:
    if (name, kernel) == ("log_weight", "by_key"):
        pytest.skip("by_key takes no log_weight")
    g = torch.Generator().manual_seed(2)
    weight = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    if name == "key_mask":
        weight = torch.zeros_like(weight).masked_fill(weight < 0, float("-inf"))
    options: dict[str, Any] = {name: weight == 0 if name == "key_mask" else weight, "kernel": kernel.split(" ")[0]}
    if kernel in ("gathered", "by_key", "auto with a map"):
        options["block_map"] = every_pair(1 if kernel == "by_key" else 4)
    if kernel == "skip_softmax":
        options["threshold"] = 0.0
    q, k, v = tensors()
    wanted = expected(q, k, v, weight)
    # torch's operator has its own answer for rows without any key
    rows = wanted.abs().amax(-1, keepdim=True) > 0
    assert rows.any()
    assert error_ratio(attend(q, k, v, **options) * rows, wanted) < 1e-6
    if shape[-1] > 1:
        assert error_ratio(attend(q, k, v), wanted) > 1e-2


@pytest.mark.parametrize("name", ["key_mask", "bias", "log_weight"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*jit.trace:FutureWarning")
@pytest.mark.parametrize("lse", [False, True], ids=["sdpa", "math"])
@pytest.mark.parametrize("shape", [(N,), (HEADS, 1, N)], ids=str)
def test_few_dimensions_in_graphs(name: str, lse: bool, shape: tuple[int, ...]) -> None:
    def run(q: Tensor, z: Tensor) -> Any:
        return attend(q, q, q, return_lse=lse, **{name: z})

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, z: Tensor) -> Any:
            return run(q, z)

    q, z = tensors()[0], torch.randn(shape, dtype=torch.float64)
    z = z > 0 if name == "key_mask" else z
    wanted = run(q, z)
    sizes = {"q": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.STATIC}, "z": None}
    for made in (
        torch.compile(run, backend="eager", fullgraph=True),
        torch.export.export(Module(), (q, z), dynamic_shapes=sizes).module(),
        torch.export.export(Module(), (q, z), dynamic_shapes=sizes, strict=True).module(),
        torch.jit.trace(run, (q, z), check_trace=False),
    ):
        found = made(q, z)
        pairs = zip(found, wanted, strict=True) if lse else [(found, wanted)]
        assert all(error_ratio(a, b) < 1e-6 for a, b in pairs)


@pytest.mark.parametrize("kernel", ["auto", "gathered", "math"])
def test_a_map_s_blocks_hold_the_tokens(kernel: str) -> None:
    q, k, v = tensors()
    with pytest.raises(UsageError, match="blocks of q hold its 13 tokens, those of block_map hold 16"):
        attend(q, k, v, block_map=every_pair(4, queries=16), kernel=kernel)
    with pytest.raises(UsageError, match="blocks of k hold its 13 tokens, those of block_map hold 12"):
        attend(q, k, v, block_map=every_pair(4, keys=12), kernel=kernel)


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (lambda lo, hi: torch.ones(1, 1, hi - lo, 4), r"float32 \(1, 1, 4, 4\)"),
        (lambda lo, hi: torch.ones(1, 1, hi - lo, 3, dtype=torch.bool), r"bool \(1, 1, 4, 3\)"),
        (lambda lo, hi: torch.ones(1, HEADS + 1, hi - lo, 4, dtype=torch.bool), r"bool \(1, 4, 4, 4\)"),
        (lambda lo, hi: torch.ones(hi - lo, 4, dtype=torch.bool), r"bool \(4, 4\)"),
        (lambda lo, hi: torch.ones(1, 1, hi - lo, 4, dtype=torch.bool).numpy(), "ndarray"),
    ],
    ids=["numbers", "narrow", "heads", "flat", "numpy"],
)
def test_rows_of_a_map_are_bool_and_as_wide_as_the_keys(rows: Any, got: str) -> None:
    blocks = even_blocks(N, 4)
    wrong = BlockMap(blocks, blocks, rows, BATCH, HEADS, torch.device("cpu"))
    with pytest.raises(UsageError, match=rf"query blocks 0 to 3: a map is bool \(1, 1, 4, 4\) or .*, got {got}"):
        attend(*tensors(), block_map=wrong)
