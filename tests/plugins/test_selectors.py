"""Selectors of plugins that leave something unsaid, or map something else than blocks: each told with its name, exit code 2."""

from __future__ import annotations

import json

import pytest
import torch

import ultrazoo
from ultrazoo import registry
from ultrazoo.cli import main
from ultrazoo.errors import RegistryError, SiteError, UsageError

CODE = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
import torch
from torch import nn
from ultrazoo.attention.parts.selectors import Bounds, SelectorSpec

class Rows(nn.Module):
    def __init__(self, dtype, missing):
        super().__init__()
        self.dtype, self.missing = dtype, missing
    def forward(self, scene):
        return lambda lo, hi: torch.ones(1, 1, hi - lo, scene.place.selectable - self.missing, dtype=self.dtype)

@dataclass(frozen=True, kw_only=True)
class Mine(SelectorSpec):
    name: ClassVar[str] = "mine/selector"
    static: ClassVar[bool] = {static}
{methods}
"""
MAP = """
    def map(self, place, site, lo, hi):
        return np.ones((1, hi - lo, place.selectable - {missing}), dtype={dtype})
"""
BOUNDS = """
    def bounds(self, place, site, keep=None):
        return Bounds(1, 1, 1)
"""
BUILD = """
    def build(self, site):
        return Rows(torch.{dtype}, {missing})
"""


def code(static: bool, *methods: str) -> str:
    return CODE.format(static=static, methods="".join(methods) or "    pass\n")


GOOD = {
    "static": code(True, MAP.format(dtype="bool", missing=0)),
    "dynamic": code(False, BOUNDS, BUILD.format(dtype="bool", missing=0)),
}
SAID = {
    "no map": (code(True), "'mine/selector' is static and has no map; give it map(place, site, lo, hi)"),
    "map of ints": (
        code(True, MAP.format(dtype="int", missing=0)),
        "'mine/selector' maps one query block to int64 (1, 1, 2); a map is bool (1, rows, 2) or (",
    ),
    "narrow map": (
        code(True, MAP.format(dtype="bool", missing=1)),
        "'mine/selector' maps one query block to bool (1, 1, 1); a map is bool (1, rows, 2)",
    ),
    "no array": (
        code(True, MAP.format(dtype="bool", missing=0).replace("np.ones", "torch.ones").replace("dtype=bool", "")),
        "'mine/selector' has a map of type Tensor; a map is numpy's, bool (1, rows, 2)",
    ),
    "no bounds": (
        code(False, BUILD.format(dtype="bool", missing=0)),
        "'mine/selector' is not static and does not say how much it keeps; give it bounds(place, site, keep)",
    ),
    "no module": (
        code(False, BOUNDS),
        "neither static nor has it a module that looks at the data; give it build(site)",
    ),
}
RAN = {
    "rows of ints": (code(False, BOUNDS, BUILD.format(dtype="int64", missing=0)), r"got int64 \(1, 1, 2, 2\)"),
    "narrow rows": (code(False, BOUNDS, BUILD.format(dtype="bool", missing=1)), r"got bool \(1, 1, 2, 1\)"),
}
AROUND = {
    "alone": {"name": "mine/selector"},
    "union": {"name": "union", "of": [{"name": "band"}, {"name": "mine/selector"}]},
    "cached": {"name": "cached", "of": {"name": "mine/selector"}},
}
RECIPE = """\
schema: 1
name: r
video: {{grid: [1, 4, 4]}}
backbone: {{name: dit, preset: s_2, layers: 1}}
attention: {{"*": {{name: block_sparse, order: {{name: raster, block: 8}}, selector: {selector}}}}}
"""
INSIDE = {
    "selector": "{name: mine/selector}",
    "selector.of.0": "{name: union, of: [{name: mine/selector}, {name: band}]}",
    "selector.of.of.0": "{name: cached, of: {name: union, of: [{name: mine/selector}, {name: pooled}]}}",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    registry.forget("selector", "mine/selector")


def write(place, source: str, selector: str) -> None:
    (place / "mine.py").write_text(source)
    (place / "r.yaml").write_text(RECIPE.format(selector=selector))


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("case", SAID)
def test_what_a_selector_leaves_unsaid_is_a_problem(place, capsys, case, path):
    source, words = SAID[case]
    write(place, source, INSIDE[path])
    for verb in ("check", "plan"):
        assert main([verb, "r.yaml", "--plugin", "mine.py"]) == 2
        registry.forget("selector", "mine/selector")
        shown = capsys.readouterr()
        told = shown.out + shown.err
        assert words in told
        assert f"attention.*.{path} " in told
        assert "internal error" not in told


@pytest.mark.parametrize("case", SAID)
def test_so_it_is_of_an_attention_alone(place, case):
    source, words = SAID[case]
    registry.load_file(write_file(place, source))
    with pytest.raises(SiteError) as caught:
        attention({"name": "mine/selector"})
    assert words in str(caught.value)


@pytest.mark.parametrize("case", RAN)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("far", ["drop", "mean"])
def test_rows_of_the_wrong_kind_are_told_where_they_are_made(place, case, far, around):
    source, words = RAN[case]
    registry.load_file(write_file(place, source))
    module = attention(AROUND[around], far)
    allowed = r"a map is bool \(1, 1, 2, 2\) or "
    with pytest.raises(UsageError, match=f"selector 'mine/selector': query blocks 0 to 1: {allowed}.*{words}"):
        module(torch.randn(2, 16, 16), (1, 4, 4))


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("path", INSIDE)
def test_selectors_that_say_everything_are_left_alone(place, capsys, case, path):
    write(place, GOOD[case], INSIDE[path])
    assert main(["plan", "r.yaml", "--json", "--plugin", "mine.py"]) == 0
    assert json.loads(capsys.readouterr().out)
    module = attention({"name": "mine/selector"})
    assert module(torch.randn(2, 16, 16), (1, 4, 4)).isfinite().all()


def write_file(place, source: str):
    (place / "mine.py").write_text(source)
    return place / "mine.py"


def attention(selector, far="drop"):
    order = {"name": "raster", "block": 8}
    return ultrazoo.create_attention(
        "block_sparse", dim=16, heads=2, order=order, selector=selector, far=far, grid=(1, 4, 4)
    )


LATE = code(
    True,
    """
    def map(self, place, site, lo, hi):
        return np.ones((1, hi - lo, place.selectable - (hi - lo > 1)), dtype=bool)
""",
)
TENSOR = (
    code(False, BOUNDS, "    def build(self, site):\n        return Tensors()\n")
    + """
class Tensors(nn.Module):
    def forward(self, scene):
        return torch.ones(1)
"""
)
FAR = """
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from ultrazoo.attention.parts.far import FarSpec

class Out(nn.Module):
    def forward(self, scene, block_map, near, lse):
        return {out}

@dataclass(frozen=True, kw_only=True)
class Mine(FarSpec):
    name: ClassVar[str] = "mine/far"
{build}
"""
BUILT = "    def build(self, site):\n        return Out()\n"


def test_a_map_that_is_wrong_beyond_its_first_row_is_told(place, capsys):
    write(place, LATE, "{name: mine/selector}")
    assert main(["plan", "r.yaml", "--plugin", "mine.py"]) == 2
    told = capsys.readouterr().err
    assert "selector 'mine/selector' maps query blocks 0 to 1 to bool (1, 2, 1); a map is bool (1, 2, 2) or (" in told


def test_a_module_that_gives_no_function_is_told(place):
    registry.load_file(write_file(place, TENSOR))
    with pytest.raises(UsageError, match="'mine/selector': its module gives a function of lo and hi, got Tensor"):
        attention({"name": "mine/selector"})(torch.randn(2, 16, 16), (1, 4, 4))


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("near.double()", r"gives float64 \(2, 2, 16, 8\); it is asked for float32 \(2, 2, 16, 8\)"),
        ("near[:, :, 1:]", r"gives float32 \(2, 2, 15, 8\)"),
        ("None", "gives NoneType"),
        ("near", ""),
    ],
)
def test_what_a_far_field_gives_is_checked(place, out, words):
    registry.load_file(write_file(place, FAR.format(out=out, build=BUILT)))
    try:
        module = attention("band", "mine/far")
        if not words:
            assert module(torch.randn(2, 16, 16), (1, 4, 4)).isfinite().all()
            return
        with pytest.raises(UsageError, match=f"far field 'mine/far' {words}"):
            module(torch.randn(2, 16, 16), (1, 4, 4))
    finally:
        registry.forget("far_field", "mine/far")


def test_a_far_field_without_a_module_is_a_problem(place):
    registry.load_file(write_file(place, FAR.format(out="near", build="    pass\n")))
    try:
        with pytest.raises(SiteError, match=r"'mine/far' has no module; give it build\(site\)"):
            attention("band", "mine/far")
    finally:
        registry.forget("far_field", "mine/far")


@pytest.mark.parametrize(
    ("raising", "words"),
    [
        ("        return 1 / 0\n", "internal error: ZeroDivisionError: division by zero; in line 21 of "),
        ("        return None\n", "loaded from plugins: selector 'mine/selector'"),
    ],
)
def test_an_error_inside_a_plugin_names_it(place, capsys, raising, words):
    source = code(
        False, "    def bounds(self, place, site, keep=None):\n" + raising, BUILD.format(dtype="bool", missing=0)
    )
    write(place, source, "{name: mine/selector}")
    assert main(["plan", "r.yaml", "--plugin", "mine.py"]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "selector 'mine/selector'" in told


def test_an_option_cannot_be_called_cycle(place):
    with pytest.raises(
        RegistryError, match="has an option 'cycle', which in recipes is for what changes by layer; rename it"
    ):
        registry.load_file(write_file(place, code(True, "    cycle: int = 1\n")))
