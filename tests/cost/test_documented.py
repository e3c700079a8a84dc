"""docs/cost-model.md says what the code assumes."""

from __future__ import annotations

import re
from pathlib import Path

from ultrazoo.cost import GPUS, companions, memory
from ultrazoo.grid import Grid

PAGE = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_gpu_table_is_the_codes():
    rows = {cells(line)[0]: cells(line) for line in PAGE.splitlines() if line.startswith("|")}
    for one in GPUS:
        row = rows[one.name]
        want = (one.gib, one.tflops, one.tflops_fp32, one.gb_per_s)
        assert tuple(map(float, row[1:5])) == want, one.name
        assert float(row[5]) == one.attention, one.name
        assert float(row[7]) == one.matmul, one.name
        # what is assumed in the code is called so on the page, and the other way round
        assert ("assumed" in row[6]) == ("assumed" in one.attention_source), one.name
        assert ("assumed" in row[8]) == ("assumed" in one.matmul_source), one.name


def test_the_constants_are_the_codes():
    plain = re.sub(r"(?<=\d) (?=\d)", "", PAGE)
    for made, channels in ((companions.wan21_vae, 384), (companions.wan22_vae, 1024), (companions.sd_vae, 512)):
        first = made(Grid(1, 1, 1)).flops - 4 * channels
        later = made(Grid(2, 1, 1)).flops - first - 8 * channels
        assert f"| {first} | {later} | {channels} |" in plain
    assert memory.STATE_BYTES["bfloat16"] == memory.STATE_BYTES["float32"] == 16
    assert f"`fits` adds {memory.FRAGMENTATION:.0%}".replace("%", " %") in PAGE
    assert f"leaves {memory.RESERVED_GIB:g} GiB" in PAGE
