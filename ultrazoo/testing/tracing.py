"""Compilation and export: no graph breaks, and one exported program for every batch, length, height and width."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attention.contract import export_form
from ..grid import Grid
from .base import ContractBase, picked
from .compare import assert_close
from .scenario import Example, Runner, Scenario, other_grids


def exports(target: str):  # type: ignore[no-untyped-def]
    """Examples whose traits name the export target."""
    return lambda example: target in example.expanded.traits().export


class OnMap(nn.Module):
    """The runner on a token map (B, T, H, W, C), whose sizes an exporter can leave open."""

    def __init__(self, runner: Runner):
        super().__init__()
        self.runner = runner

    def forward(self, z: Tensor, timestep: Tensor | None = None) -> Tensor:
        b, t, h, w, c = z.shape
        return self.runner(z.reshape(b, t * h * w, c), (t, h, w), timestep)  # type: ignore[no-any-return]


class Tracing(ContractBase):
    """Graphs of the forward."""

    @picked(first=1)
    def test_compiles_without_graph_breaks(self, example: Example) -> None:
        """`torch.compile(fullgraph=True)`, then a second size through the same compiled function.

        With the trait `fullgraph` off, graphs may break, and the answer must be the same.
        """
        torch._dynamo.reset()
        scenario = Scenario(example)
        whole = example.expanded.traits().fullgraph
        compiled = torch.compile(scenario.runner, fullgraph=whole, backend="eager")
        with torch.no_grad():
            for grid in (scenario.grid, *other_grids(example)[:1]):
                at = Scenario(example, grid=grid)
                got = compiled(at.x, tuple(grid), at.timestep)
                assert_close(f"compiled at {grid}", got, at.run(), self.allowed(torch.float32))

    @picked(first=1, of=exports("pt2"))
    def test_exports_with_dynamic_sizes(self, example: Example) -> None:
        """`torch.export` with B, T, H, W open equals eager at the traced size, at ragged ones and at batch 1 and 2."""
        lowest = example.expanded.traits().min_grid
        grid = Grid(*(n if n == 1 else max(n, low) for n, low in zip(example.site.grid, lowest, strict=True)))
        self.check_export(example, grid)

    def check_export(self, example: Example, grid: Grid) -> None:
        scenario = Scenario(example, grid=grid)
        lowest = example.expanded.traits().min_grid
        model = OnMap(scenario.runner).eval()
        z = scenario.x.unflatten(1, tuple(grid))
        # a size of 1 is specialised by the exporter: images and videos are two exports
        sizes = {
            axis: torch.export.Dim(name, min=max(2, low), max=4096)
            for axis, name, low, size in zip((1, 2, 3), ("T", "H", "W"), lowest, grid, strict=True)
            if size > 1
        }
        batch = torch.export.Dim("B", min=1, max=64)
        shapes = {"z": {0: batch, **sizes}, "timestep": None if scenario.timestep is None else {0: batch}}
        with torch.no_grad(), export_form(model, "pt2"):
            program = torch.export.export(model, (z, scenario.timestep), dynamic_shapes=shapes)
        exported = program.module()
        with torch.no_grad():
            for size in (
                grid,
                *(
                    g
                    for g in other_grids(replace(example, site=example.site.at(grid=grid)))
                    if (g.t == 1) == (grid.t == 1)
                ),
            ):
                for count in (1, 2):
                    at = Scenario(example, grid=size, batch=count)
                    got = exported(at.x.unflatten(1, tuple(size)), at.timestep)
                    expected = OnMap(scenario.runner)(at.x.unflatten(1, tuple(size)), at.timestep)
                    assert_close(f"exported, batch {count} at {size}", got, expected, self.allowed(torch.float32))
