"""Generalised neighbourhood attention (arXiv:2504.16922), token by token: the keys of every token of an axis, then a dense mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ultrazoo.testing import Case, plain

from .masked import masked, product_mask


def keys_of(token: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The keys of one token on one axis."""
    residue, index = token % dilation, token // dilation
    same = [p for p in range(length) if p % dilation == residue]
    group = [i for i in range(len(same)) if i // stride == index // stride]
    if causal:
        return [same[j] for j in range(len(same)) if j <= index and group[-1] - j < kernel]
    lead = min(group[0] + stride // 2, len(same) - 1)
    left = kernel // 2
    right = kernel // 2 + kernel % 2 - 1
    centre = min(max(lead, left), len(same) - 1 - right)
    return [same[j] for j in range(centre - left, centre + right + 1)]


def three(value: Any, time: Any) -> list[Any]:
    """One value or two are for (H, W), time then has its own."""
    if not isinstance(value, list):
        return [time, value, value]
    return [time, *value] if len(value) == 2 else value


def axis_keys(grid: tuple[int, int, int], options: dict[str, Any]) -> list[list[list[int]]]:
    """Per axis and token, its keys."""
    rules = zip(
        three(options["kernel_size"], "full"), three(options["stride"], 1), three(options["dilation"], 1), strict=True
    )
    axes = []
    for axis, (length, (kernel, stride, dilation)) in enumerate(zip(grid, rules, strict=True)):
        causal = options["causal"] and axis == 0
        if kernel == "full" or (options["short"] == "whole" and kernel * dilation > length):
            kernel, stride, dilation = length, 1, 1
        axes.append([keys_of(p, length, kernel, stride, dilation, causal) for p in range(length)])
    return axes


def neighborhood(case: Case) -> Tensor | tuple[Tensor, Tensor]:
    """The whole attention under the product of the three axes."""
    options = plain(case.spec)
    return masked(case, product_mask(axis_keys(case.grid, options)), options["scale"])
