"""Whole backbones through torch.export with dynamic sizes and through torch.compile, against eager."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from tests.backbones.models import tiny_dit, tiny_wan, wan_inputs
from ultrazoo.attention.contract import export_form
from ultrazoo.testing import assert_close

RATIO = 1e-5


def test_wan_exports_with_dynamic_sizes():
    model = tiny_wan(layers=2).eval()
    latents, time, text = wan_inputs((3, 8, 12))
    batch, frames, rows, columns, words = Dim("B"), Dim("F", min=2), Dim("H", min=2), Dim("W", min=2), Dim("L", min=2)
    shapes = {
        "latents": {0: batch, 2: frames, 3: 2 * rows, 4: 2 * columns},
        "timestep": {0: batch},
        "text": {0: batch, 1: words},
    }
    with torch.no_grad(), export_form(model, "pt2"):
        program = torch.export.export(model, (latents, time, text), dynamic_shapes=shapes).module()
    for size, count in (((3, 8, 12), 2), ((5, 14, 6), 1), ((2, 4, 22), 3)):
        inputs = wan_inputs(size, batch=count, seed=7)
        with torch.no_grad():
            assert_close(f"{size}, batch {count}", program(*inputs), model(*inputs), RATIO)


def test_dit_exports_with_dynamic_sizes():
    model = tiny_dit(layers=2).eval()
    batch, frames, rows, columns = Dim("B"), Dim("F", min=2), Dim("H", min=2), Dim("W", min=2)
    shapes = {
        "latents": {0: batch, 2: frames, 3: 2 * rows, 4: 2 * columns},
        "timestep": {0: batch},
        "labels": {0: batch},
    }

    def inputs(count, *size):
        generator = torch.Generator().manual_seed(count)
        latents = torch.randn(count, 4, *size, generator=generator)
        return latents, torch.linspace(1, 900, count), torch.arange(count)

    with torch.no_grad(), export_form(model, "pt2"):
        program = torch.export.export(model, inputs(2, 3, 8, 12), dynamic_shapes=shapes).module()
    for count, *size in ((2, 3, 8, 12), (1, 5, 14, 6), (3, 2, 4, 22)):
        with torch.no_grad():
            assert_close(f"{size}", program(*inputs(count, *size)), model(*inputs(count, *size)), RATIO)


@pytest.mark.parametrize("timestep", ["sample", "frame"])
def test_wan_compiles_without_graph_breaks(timestep):
    model = tiny_wan(layers=2).eval()
    inputs = wan_inputs((3, 8, 12), timestep=timestep)
    with torch.no_grad():
        plain = model(*inputs)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close("compiled", compiled(*inputs), plain, RATIO)
