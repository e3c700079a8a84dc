"""Options, sizes and calls drawn at random, legal or not: every attention answers with finite numbers or with an error of ours.

What a legal case must be is proved against oracles (`test_random_cases`). Here nothing may end in an error of torch, a NaN or
a gradient that is none, whatever is asked.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo import registry
from ultrazoo.attention.contract import Extra
from ultrazoo.attention.standalone import create_attention
from ultrazoo.errors import UltrazooError
from ultrazoo.options import declared, to_data
from ultrazoo.spec import Rope, Segment

NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)
KERNELS = sorted(row.name for row in registry.entries("kernel") if row.builtin and row.name != "flex")
"""flex compiles for seconds where it can run."""
CASES = 15

WHOLE = (0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 200, -1)
REAL = (0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0, 1.5, 1e-12, 1e6, -1.0)
ANY: tuple[Any, ...] = (
    *(None, True, False, "full", "none", "auto", "x", [], [1, 1, 1], [2, 2, 2], [3, 3, 3], [2, 4, 4], [64, 64, 64]),
    *([0, 2, 2], [1, 2], [99, 99], [1.5, 2, 2], ["full", 3, 3], [2, 2, 2, 2], {"a": 1}, 3, 0.5, -1),
    *({"name": "topk", "count": 3}, {"name": "topk", "share": 0.3, "multiple": 4}, {"name": "topp", "p": 0.5}),
    *(
        {"name": "band", "width": 2},
        {"name": "sink"},
        {"name": "tiles", "tile": [2, 2, 2]},
        {"name": "raster", "block": 8},
    ),
    *({"name": "mean"}, {"name": "coarse"}, {"name": "linear"}, {"name": "drop"}),
)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in nested options but names."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if key != "name":
            yield (*path, key)
            yield from leaves(value, (*path, key))


def changed(draw: random.Random, name: str) -> tuple[dict[str, Any], int]:
    """An example's options with a few of them replaced, and its heads."""
    cls = registry.find("attention", name)
    spec, site = draw.choice(cls.examples())
    options = {key: copy.deepcopy(value) for key, value in to_data(spec).items() if key != "name"}
    own = [(row.name,) for row in declared(cls)]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        paths = [*leaves(options), *own]
        if not paths:
            break
        *above, last = draw.choice(paths)
        node: Any = options
        for key in above:
            node = node[key]
        old = node[last] if isinstance(node, list) or last in node else None
        if last == "kernel":
            node[last] = draw.choice(KERNELS)
        elif isinstance(old, int) and not isinstance(old, bool):
            node[last] = draw.choice(WHOLE)
        elif isinstance(old, float):
            node[last] = draw.choice(REAL)
        else:
            node[last] = draw.choice(ANY)
    return options, site.heads


def call_of(draw: random.Random, batch: int, grid: tuple[int, int, int], heads: int, head_dim: int) -> dict[str, Any]:
    tokens, call = grid[0] * grid[1] * grid[2], dict[str, Any]()
    if draw.random() < 0.7:
        sizes = draw.choice([(batch,), (batch, grid[0]), (batch, tokens)])
        call["timestep"] = torch.full(sizes, 500.0)
    if draw.random() < 0.3:
        valid = torch.rand(batch, tokens) > 0.4
        # a sample of padding alone
        valid[0] &= draw.random() < 0.7
        call["key_valid"] = valid
    if draw.random() < 0.4:
        count = draw.choice([1, 5, 9])
        mask = torch.rand(batch, count) > 0.5 if draw.random() < 0.7 else None
        first = draw.randint(0, count)
        lengths = (("text", first), ("audio", count - first)) if draw.random() < 0.6 else ()
        policies = {
            "rows": draw.choice(["dense", "dense", "pattern"]),
            "keys": draw.choice(["always", "always", "compete"]),
        }
        segments = tuple(Segment(kind, length, **policies) for kind, length in lengths)  # type: ignore[arg-type]
        q, k, v = (3 * torch.randn(batch, count, heads, head_dim) for _ in range(3))
        call["extra"] = Extra(q, k, v, mask, segments)
    return call


def finite(module: Any, found: Tensor | tuple[Tensor, ...], learns: bool) -> str:
    """What is not finite in an answer and, where it learns, in gradients."""
    answers = found if isinstance(found, tuple) else (found,)
    if not all(bool(z.isfinite().all()) for z in answers):
        return "the answer is not finite"
    if learns:
        torch.autograd.backward([z.sum() for z in answers])
        for path, parameter in module.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {path} is not finite"
    return ""


def verdict(name: str, number: int) -> str:
    """What is wrong with case `number` of an attention; nothing where it answers, or refuses in words."""
    draw = random.Random(f"{name} {number}")
    torch.manual_seed(number)
    options, heads = changed(draw, name)
    if draw.random() < 0.3:
        heads = draw.choice([1, 2, 3])
    grid = (draw.choice([1, 1, 2, 3, 5]), draw.choice([1, 2, 4, 5, 8]), draw.choice([1, 3, 4, 7, 8]))
    place: dict[str, Any] = {"layer": draw.choice([0, 1, 2]), "layers": 3, "qk_norm": draw.random() < 0.5}
    if "rope" not in options and draw.random() < 0.4:
        place["rope"] = Rope(axes=(4, 2, 2))
    if draw.random() < 0.5:
        place["grid"] = grid
    batch, learns = draw.choice([1, 2]), draw.random() < 0.5
    said = f"{name} {number}: {options} at {grid}, {heads} heads, {place}"
    try:
        module = create_attention(name, dim=heads * 8, heads=heads, **place, **options)
        x = 3 * torch.randn(batch, grid[0] * grid[1] * grid[2], heads * 8)
        with torch.set_grad_enabled(learns):
            found = module(x, grid, **call_of(draw, batch, grid, heads, 8))
        wrong = finite(module, found, learns)
    except UltrazooError:
        return ""
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    return f"{said}: {wrong}" if wrong else ""


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_or_an_error_in_words(name: str) -> None:
    found = [said for number in range(CASES) if (said := verdict(name, number))]
    assert not found, "\n".join(found)


@pytest.mark.proof
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_or_an_error_in_words_in_many_cases(name: str) -> None:
    found = [said for number in range(CASES, 20 * CASES) if (said := verdict(name, number))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("wrong", [ValueError("sizes"), RuntimeError("shape"), None], ids=str)
def test_other_errors_and_numbers_that_are_none_are_found(
    wrong: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultrazoo.attention.full import FullAttention

    def forward(self: Any, x: Tensor, host: Any, call: Any) -> Any:
        if wrong is not None:
            raise wrong
        return (x * float("nan"), x) if call.extra is not None else x * float("nan")

    monkeypatch.setattr(FullAttention, "forward", forward)
    found = [said for number in range(CASES) if (said := verdict("full", number))]
    assert found
    assert all(("not finite" if wrong is None else str(wrong)) in said for said in found)


def test_cases_are_legal_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all refused nor none."""
    answered = []
    monkeypatch.setitem(globals(), "finite", lambda *_: answered.append(1) or "")
    assert all(verdict(name, number) == "" for name in NAMES for number in range(3))
    assert 0.15 < len(answered) / (3 * len(NAMES)) < 0.9


@pytest.mark.parametrize(
    ("name", "options", "grid", "words"),
    [
        ("sliding_tile", {"tile": [6, 8, 8]}, (3, 5, 7), "use 1 to 3 along t, or short: whole"),
        (
            "sliding_tile",
            {"tile": [2, 2, 2], "window": [2, 2, 2]},
            (9, 9, 9),
            "use 1, 3 or full, which is 5 tiles there",
        ),
        ("neighborhood", {"kernel_size": 9}, (3, 5, 7), "9 along h is more than the 5 tokens there; use 1 to 5"),
        ("neighborhood", {"kernel_size": 3, "dilation": 4}, (3, 5, 7), "use 1 to 2, or a kernel of 1"),
        ("neighborhood", {"kernel_size": 3, "stride": 5}, (3, 5, 7), "use 1 to 3"),
        ("t3", {"counts": [3, 2, 2]}, (1, 8, 8), "use at most 1 along T"),
        (
            "block_sparse",
            {"selector": {"name": "pooled", "rule": {"name": "topk", "count": 99}}},
            (3, 5, 7),
            "at most 1",
        ),
        (
            "block_sparse",
            {"selector": {"name": "pooled", "rule": {"name": "topk", "count": 0}}},
            (3, 5, 7),
            "at least 1",
        ),
        ("video_sparse", {"sparsity": 1.0}, (3, 5, 7), "less than 1"),
        ("radial", {"block": 64}, (3, 5, 7), "at most 35"),
        ("skip_softmax", {"scale_factor": 50}, (1, 4, 4), "less than 16"),
    ],
)
def test_legal_values_are_told(name: str, options: dict[str, Any], grid: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UltrazooError) as caught:
        create_attention(name, dim=16, heads=2, grid=grid, **options)
    assert words in str(caught.value)
