"""The kernel door: exact kernels agree, reasons are given, what ran is seen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ultrazoo import registry
from ultrazoo.errors import KernelError, UsageError
from ultrazoo.kernels import attend, record, table
from ultrazoo.kernels.block_map import BlockMap
from ultrazoo.kernels.door import PREFERENCE
from ultrazoo.kernels.math import MathSpec
from ultrazoo.ops.blocks import even_blocks, of_sizes
from ultrazoo.testing import error_ratio

EXACT = ("sdpa", "math")


def inputs(queries: int = 9, keys: int = 13, dtype: torch.dtype = torch.float64, value: int = 8) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, value)
    return tuple((3 * z).to(dtype).requires_grad_() for z in (q, k, v))


def softmax_loop(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_kernels_compute_softmax_attention(kernel: str, scale: float | None) -> None:
    q, k, v = inputs(value=5)
    expected = softmax_loop(q, k, v, scale=scale)
    found = attend(q, k, v, scale=scale, kernel=kernel)
    assert error_ratio(found, expected) < 1e-12
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected)), strict=True):
        assert error_ratio(a, b) < 1e-12


@pytest.mark.parametrize("kernel", EXACT)
def test_masks_weights_and_bias_add_up(kernel: str) -> None:
    q, k, v = inputs()
    mask = torch.rand(2, 1, 1, 13) > 0.3
    weight, bias = torch.randn(2, 1, 1, 13), torch.randn(3, 9, 13)
    total = torch.zeros(2, 1, 1, 13).masked_fill(~mask, float("-inf")) + weight + bias
    found = attend(q, k, v, key_mask=mask, log_weight=weight, bias=bias, kernel=kernel)
    assert error_ratio(found, softmax_loop(q, k, v, total)) < 1e-6
    assert error_ratio(found, softmax_loop(q, k, v)) > 1e-2


@pytest.mark.parametrize("kernel", EXACT)
def test_lse_and_its_gradient(kernel: str) -> None:
    q, k, v = inputs()
    out, lse = attend(q, k, v, return_lse=True, kernel=kernel)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
    assert error_ratio(lse, scores.logsumexp(-1)) < 1e-12
    weight, other = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out * weight).sum() + (lse * other).sum(), (q, k, v))
    wanted = (softmax_loop(q, k, v) * weight).sum() + (scores.logsumexp(-1) * other).sum()
    for a, b in zip(found, torch.autograd.grad(wanted, (q, k, v)), strict=True):
        assert error_ratio(a, b) < 1e-10


def test_query_chunks_of_the_math_kernel_are_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    whole = attend(q, k, v, kernel="math")
    monkeypatch.setattr("ultrazoo.kernels.math.CHUNK_ELEMENTS", 2 * 3 * 13 * 2)
    assert error_ratio(attend(q, k, v, kernel="math"), whole) < 1e-12


def test_a_row_without_keys_is_zero_and_has_no_mass() -> None:
    q, k, v = inputs()
    out, lse = attend(q, k, v, key_mask=torch.zeros(2, 1, 1, 13, dtype=torch.bool), return_lse=True, kernel="math")
    assert out.abs().max() == 0
    assert (lse == float("-inf")).all()


def test_what_ran_is_seen() -> None:
    q, k, v = inputs()
    with record() as outer, record() as runs:
        attend(q, k, v)
        attend(q, k, v, kernel="math")
    assert [(run.kernel, run.q, run.k) for run in runs] == [
        ("sdpa", (2, 3, 9, 8), (2, 3, 13, 8)),
        ("math", (2, 3, 9, 8), (2, 3, 13, 8)),
    ]
    assert outer == runs


def test_a_forced_kernel_that_cannot_run_lists_every_candidate() -> None:
    q, k, v = inputs()
    with pytest.raises(KernelError) as caught:
        attend(q, k, v, kernel="flash_attn")
    text = str(caught.value)
    assert "'flash_attn' was asked for and cannot run" in text
    assert "runs on cuda, inputs are on cpu" in text
    assert "does not take float64" in text
    assert "sdpa: can run" in text


def test_kernels_without_block_maps_refuse_one() -> None:
    q, k, v = inputs()
    blocks = even_blocks(9, 4), even_blocks(13, 4)
    everything = BlockMap(*blocks, lambda lo, hi: torch.ones(1, 1, hi - lo, 4, dtype=torch.bool), 2, 3, q.device)
    for kernel in EXACT:
        with pytest.raises(KernelError, match="takes no block_map"):
            attend(q, k, v, block_map=everything, kernel=kernel)
    assert error_ratio(attend(q, k, v, block_map=everything), softmax_loop(q, k, v)) < 1e-12


def test_the_table_says_why_a_kernel_is_absent() -> None:
    rows = {row.name: row for row in table()}
    assert {name for names in PREFERENCE.values() for name in names} <= set(rows)
    assert rows["sdpa"].reason == rows["math"].reason == ""
    for name in ("flash_attn", "flash_attn_3", "flash_attn_4", "flex_flash", "xformers"):
        assert rows[name].reason == registry.find("kernel", name).absent()
        if not torch.cuda.is_available():
            assert "install" in rows[name].reason or "CUDA" in rows[name].reason


def test_lossy_kernels_never_run_by_themselves() -> None:
    assert all(registry.find("kernel", name).exact for names in PREFERENCE.values() for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "math", "flash_attn", "flash_attn_3", "flash_attn_4", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    spec = registry.find("kernel", name)
    if spec.absent():
        pytest.skip(spec.absent())
    q, k, v = (torch.randn(2, 4, 257, 64, device="cuda").to(dtype) for _ in range(3))
    expected = softmax_loop(q.double(), k.double(), v.double())
    with record() as runs:
        found = attend(q, k, v, kernel=name)
    assert runs[0].kernel == name
    assert error_ratio(found, expected) < 1e-2
    if "lse" in spec.takes:
        out, lse = attend(q, k, v, return_lse=True, kernel=name)
        scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * 64**-0.5
        assert error_ratio(out, expected) < 1e-2
        assert error_ratio(lse, scores.logsumexp(-1)) < 1e-2


def test_math_is_exact_in_low_precision() -> None:
    q, k, v = inputs(dtype=torch.bfloat16)
    found = attend(q, k, v, kernel=MathSpec.name)
    assert error_ratio(found, softmax_loop(*(z.double() for z in (q, k, v)))) < 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_mask": torch.ones(2, 1, 1, 13)}, "key_mask is bool.*float32.*are a bias"),
        ({"key_mask": torch.ones(2, 1, 1, 13, dtype=torch.uint8)}, "key_mask is bool"),
        ({"key_mask": torch.ones(2, 13, dtype=torch.bool)}, r"key_mask broadcasts to \(2, 3, 1, 13\), it is \(2, 13\)"),
        ({"key_mask": torch.ones(2, 1, 9, 13, dtype=torch.bool)}, r"broadcasts to \(2, 3, 1, 13\)"),
        ({"log_weight": torch.ones(2, 1, 1, 9)}, r"log_weight broadcasts to \(2, 3, 1, 13\)"),
        ({"bias": torch.ones(9, 12)}, r"bias broadcasts to \(2, 3, 9, 13\), it is \(9, 12\)"),
        ({"k": torch.ones(2, 1, 13, 8)}, "same batch and heads"),
        ({"v": torch.ones(2, 3, 12, 8)}, "k and v as many tokens"),
        ({"k": torch.ones(2, 3, 13, 6)}, "same head size"),
        ({"q": torch.ones(3, 9, 8)}, r"q is \(B, heads, Lq, D\)"),
        ({"q": torch.ones(2, 3, 0, 8)}, "may be 0"),
    ],
)
@pytest.mark.parametrize("kernel", ["auto", *EXACT])
def test_inputs_that_do_not_fit_are_told_before_any_kernel(kernel: str, change: dict[str, Tensor], words: str) -> None:
    q, k, v = inputs(dtype=torch.float32)
    with pytest.raises(UsageError, match=words):
        attend(**{"q": q, "k": k, "v": v, "kernel": kernel, **change})


@pytest.mark.parametrize(
    ("kernel", "folders", "words"),
    [
        ("flash_attn", {}, "is not installed"),
        ("flash_attn", {"flash_attn/cute/interface.py": "def flash_attn_func(): ..."}, "without flash_attn_func"),
        ("flash_attn_4", {"flash_attn/__init__.py": "def flash_attn_func(): ..."}, "flash-attn-4 is not installed"),
        ("flash_attn", {"flash_attn/__init__.py": "raise OSError('undefined symbol')"}, "does not import: OSError"),
        ("flash_attn", {"flash_attn/__init__.py": "import flash_attn_parts"}, "does not import: ModuleNotFoundError"),
        ("flash_attn", {"flash_attn/__init__.py": "def flash_attn_func(): ..."}, "needs a CUDA device"),
    ],
)
def test_a_package_counts_when_its_function_is_there(
    kernel: str, folders: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of version 4 is a namespace package flash_attn, and is not version 2."""
    from ultrazoo.kernels import flash_attn

    for path, text in folders.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ours = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    if importlib.util.find_spec("flash_attn") is not None and not folders:
        pytest.skip("flash-attn is installed here")
    flash_attn._package.cache_clear()
    try:
        assert words in registry.find("kernel", kernel).absent()
    finally:
        flash_attn._package.cache_clear()
        for name in ours:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("kernel", "passes", "words"),
    [
        ("sdpa", {"block_map"}, "takes no block_map"),
        ("gathered", set(), "is for block maps only"),
        ("flex", {"bias"}, "takes no bias"),
        ("xformers", {"lse"}, "does not return lse"),
        ("skip_softmax", set(), "needs a threshold"),
        ("flash_attn_3", {"key_mask"}, "takes no key_mask"),
    ],
)
def test_what_can_never_run_is_known_without_inputs(kernel: str, passes: set[str], words: str) -> None:
    assert words in registry.find("kernel", kernel).never(passes)
    assert registry.find("kernel", "math").never(passes - {"block_map"}) == []


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([128, 128], ""),
        ([64, 64], "takes query blocks of 128 tokens alone, these are of 64"),
        (
            [128, 128, 104],
            "takes query blocks of 128 tokens alone, the last of these is of 104: 128 does not divide 360",
        ),
        ([128, 104, 128, 7], "takes query blocks of 128 tokens alone, these are of 7 to 128"),
    ],
    ids=str,
)
def test_a_kernel_for_blocks_of_one_size_says_which_are_not(sizes: list[int], words: str) -> None:
    blocks = of_sizes(np.array(sizes))
    found = registry.find("kernel", "flash_attn_4").never({"block_map"}, blocks, even_blocks(256, 128))
    assert found == ([words] if words else [])


@pytest.mark.parametrize("learns", [False, True])
def test_sums_of_the_math_kernel_stay_wide_under_autocast(learns: bool) -> None:
    """An exponential sum of 4096 equal keys is beyond fp16, and so is its product with values of 30."""
    q, v = torch.zeros(1, 1, 2, 8), torch.full((1, 1, 4096, 8), 30.0)
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.float16):
        out, lse = attend(q, torch.zeros_like(v), v, return_lse=True, kernel="math")
    torch.testing.assert_close(out.float(), torch.full_like(q, 30.0))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, torch.full((1, 1, 2), 4096.0).log())


def test_values_that_no_query_sees_do_not_reach_it() -> None:
    """NaN there is not multiplied by a weight of zero."""
    q, v = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 4, 8)
    v[0] = torch.nan
    mask = torch.tensor([False, True]).view(2, 1, 1, 1).expand(-1, -1, -1, 4)
    with torch.no_grad():
        out, _ = attend(q, q.new_ones(2, 1, 4, 8), v, key_mask=mask, return_lse=True, kernel="math")
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_the_math_kernel_under_transforms() -> None:
    q, k, v = torch.randn(3, 2, 1, 2, 5, 4).unbind(0)
    with torch.no_grad():
        many = torch.func.vmap(lambda *given: attend(*given, kernel="math"))(q, k, v)
        one = torch.stack([attend(*given, kernel="math") for given in zip(q, k, v, strict=True)])
    torch.testing.assert_close(many, one)
