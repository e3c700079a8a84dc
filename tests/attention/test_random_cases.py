"""Random cases of every registered attention against its oracle: example, grid, batch, dtype, extra tokens, invalid tokens.

A case is named by its attention and a number and depends on nothing else. All are part of the proof; a few rounds, chosen by
a fixed seed, run always. What the registry gains is here by itself.
"""

from __future__ import annotations

import importlib
import random
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ultrazoo import registry
from ultrazoo.grid import Grid
from ultrazoo.testing import TOLERANCES, error_ratio
from ultrazoo.testing.scenario import Example, Scenario, examples_of, pair_up

NAMES = sorted(row.name for row in registry.entries("attention") if row.builtin)
CASES, ALWAYS, SEED = 2000, 150, 11
ROUNDS = -(-CASES // len(NAMES))
QUICK = random.Random(SEED).sample(range(ROUNDS), max(1, round(ALWAYS / len(NAMES))))


@dataclass(frozen=True)
class Drawn:
    """One case, legal for its attention."""

    name: str
    example: Example
    grid: Grid
    batch: int
    dtype: torch.dtype
    extra: bool
    key_valid: bool

    def scenario(self, dtype: torch.dtype) -> Scenario:
        more: dict[str, Any] = {"extra": self.extra, "key_valid": self.key_valid}
        return Scenario(self.example, dtype, grid=self.grid, batch=self.batch, **more)


def drawn(name: str, number: int) -> Drawn:
    """Case `number` of an attention; a grid that its example refuses is drawn again."""
    draw = random.Random(f"{name} {number}")
    example = draw.choice(examples_of(registry.find("attention", name)))
    for _ in range(60):
        grid = Grid(draw.randint(1, 6), draw.randint(1, 9), draw.randint(1, 9))
        site = example.site.at(grid=grid)
        if not example.spec.expand(site).problems(site):
            break
    else:
        grid = example.site.grid
    traits = example.spec.expand(example.site.at(grid=grid)).traits()
    return Drawn(
        name,
        example,
        grid,
        draw.randint(1, 3),
        draw.choice([torch.float32, torch.float32, torch.float64, torch.float64, torch.bfloat16]),
        traits.extra and draw.random() < 0.4,
        traits.key_valid and draw.random() < 0.4,
    )


def compared(case: Drawn, dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """(name, got, expected) of rows that are real, each (rows, channels)."""
    oracle = getattr(importlib.import_module(f"tests.oracles.{case.name}"), case.name)
    scenario = case.scenario(dtype)
    with torch.no_grad():
        found = pair_up(scenario.run(), oracle(scenario.case()))
    rows = []
    for name, got, expected in found:
        real = scenario.key_valid
        if name == "extra rows":
            real = None if scenario.extra is None else scenario.extra.key_mask
        got, expected = (z.flatten(0, 1) if real is None else z[real] for z in (got, expected))
        rows.append((name, got, expected))
    return rows


def rows_that_differ(case: Drawn, dtype: torch.dtype) -> dict[str, float]:
    """Which rows are beyond the table of tolerances: error ratio and share of rows, by name; nothing where all is well."""
    wrong = {}
    for name, got, expected in compared(case, dtype):
        ratio = error_ratio(got, expected)
        if not ratio <= TOLERANCES[dtype].output:
            scale = float(expected.square().mean().sqrt())
            far = (got.double() - expected).square().mean(-1).sqrt() > TOLERANCES[dtype].output * scale
            wrong[f"{name}: error ratio {ratio:.3g}, share of rows"] = float(far.double().mean())
    return wrong


def verdict(case: Drawn) -> str:
    """What is wrong with a case; nothing where it is right."""
    if case.dtype == torch.bfloat16:
        scenario = case.scenario(torch.bfloat16)
        with torch.no_grad():
            found = scenario.run()
        answers = found if isinstance(found, tuple) else (found,)
        if not all(y.dtype == torch.bfloat16 and bool(y.isfinite().all()) for y in answers):
            return "not finite, or not bf16"
        return ""
    wrong = rows_that_differ(case, case.dtype)
    if not wrong:
        return ""
    if case.dtype == torch.float32 and case.example.expanded.traits().selects and max(wrong.values()) < 0.2:
        # rounding may choose another block for some rows, and then it does not in fp64
        wrong = rows_that_differ(case, torch.float64)
    return str(wrong) if wrong else ""


def failures(numbers: list[int], names: list[str]) -> list[str]:
    found = []
    for number in numbers:
        for name in names:
            case = drawn(name, number)
            try:
                said = verdict(case)
            except Exception:
                said = traceback.format_exc(limit=-4)
            if said:
                found.append(f"{name} {number}: {said}\n    {case}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_some_cases_of_every_attention(name: str) -> None:
    found = failures(QUICK, [name])
    assert not found, "\n".join(found)


@pytest.mark.proof
@pytest.mark.parametrize("number", range(ROUNDS))
def test_two_thousand_cases(number: int) -> None:
    found = failures([number], NAMES)
    assert not found, "\n".join(found)


def test_cases_differ_and_repeat() -> None:
    cases = [drawn(name, number) for name in NAMES for number in range(20)]
    assert len(NAMES) * ROUNDS >= CASES
    assert len(NAMES) * len(QUICK) >= 0.8 * ALWAYS
    assert drawn("full", 3) == drawn("full", 3)
    assert {case.batch for case in cases} == {1, 2, 3}
    assert {case.dtype for case in cases} == {torch.float32, torch.float64, torch.bfloat16}
    for fact in ("extra", "key_valid"):
        share = sum(getattr(case, fact) for case in cases) / len(cases)
        assert 0.2 < share < 0.6
    assert len({case.grid for case in cases}) > len(cases) / 4
    assert {1} < {case.grid.t for case in cases}


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cases with an oracle that is a little off, and with one that raises."""
    module = importlib.import_module("tests.oracles.full")
    right = module.full

    def off(case: Any) -> Any:
        found = right(case)
        return tuple(1.001 * y for y in found) if isinstance(found, tuple) else 1.001 * found

    numbers = [n for n in range(20) if drawn("full", n).dtype != torch.bfloat16]
    monkeypatch.setattr(module, "full", off)
    assert len(failures(numbers, ["full"])) == len(numbers)

    def broken(case: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "full", broken)
    assert "ZeroDivisionError" in failures(numbers[:1], ["full"])[0]
