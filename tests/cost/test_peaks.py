"""The peak that a plan promises for an attention, beside the peak of tensors that are alive when it runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live import Live
from benchmarks.test_zoo_memory import NAMES, SITE, spec_of
from ultrazoo.attention import grouped
from ultrazoo.attention.parts import far, scene, states
from ultrazoo.attention.standalone import Standalone, reset_parameters
from ultrazoo.grid import Grid
from ultrazoo.kernels import block_map, dense, gathered

GRID = (8, 16, 32)
SMALL = 1 << 18
"""Bytes of what is gathered or scored at a time, of each kind: more tokens do not make it more, and it is not planned."""
KINDS = (grouped.SLAB_BYTES, states.STATE_BYTES, far.SCORE_BYTES, gathered.GROUP_BYTES, block_map.CHUNK_BYTES)
ABOVE = {"monarch": 6.0}
"""Most that a plan may promise over what is measured, 2 unless given: monarch takes up to half a gigabyte at a time."""


def peak(block: Standalone, x: torch.Tensor) -> int:
    timestep = torch.tensor([500.0])
    with torch.inference_mode(), Live(x, timestep, *block.parameters()) as live:
        block(x, GRID, timestep)
    return live.peak


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_peak_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(name)
    site = SITE.at(grid=Grid(*GRID))
    block = Standalone(spec, site)
    reset_parameters(block)
    x = torch.randn(1, site.tokens, site.dim, generator=torch.Generator().manual_seed(0))
    planned = spec.expand(site).cost(site).peak_elements * x.element_size()
    # windows are attended to all at once, as on a GPU
    monkeypatch.setitem(grouped.SLAB_BYTES, "cpu", grouped.SLAB_BYTES_ELSEWHERE)
    assert planned <= ABOVE.get(name, 2.0) * peak(block, x)
    for kind in KINDS:
        monkeypatch.setitem(kind, "cpu", SMALL)
    monkeypatch.setitem(scene.SCORES, "cpu", SMALL // 4)
    monkeypatch.setattr(gathered, "STEP_BYTES", SMALL)
    monkeypatch.setattr(dense, "SCORE_BYTES", SMALL)
    assert planned >= 0.95 * (peak(block, x) - (len(KINDS) + 2) * SMALL)
