"""Sliding tile attention: every tile of queries sees the tiles around it, on all three axes, all or nothing.

STA (arXiv 2502.04507). Tiles of (6, 8, 8) tokens, a window of m tiles per axis, which may differ per head: tile b is seen from
tile a when ``|b - clamp(a, m // 2, n - 1 - m // 2)| <= m // 2`` on every axis of n tiles. Image queries see all text keys, text
queries see everything. An image (T = 1) takes a flat tile of the same volume: (1, 16, 24), (1, 16, 8), (1, 8, 8) or (1, 4, 4) for
384, 128, 64 or 16 tokens, the rule of HunyuanVideo-1.5 (code 60783e7).

Where we depart:

1. Any size: the last tile of an axis holds what is left. The published kernels take three grids only.
2. A window is odd, or the whole axis. The published rule gives an even window one tile more than it says.
3. A window of at least as many tiles as an axis has is the whole axis, as the published clamp has it.
4. A tile longer than an axis is refused; ``short: whole`` makes one tile of such an axis.

With tiles that divide and an odd window it is `neighborhood` with a kernel of m tiles and a stride of one. The published search
of windows per (step, layer, head) is a recipe: layer keys, `steps`, and `window` by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..errors import Problem
from ..grid import AXES, Grid
from ..ops.boxes import sliding_tiles
from ..spec import AttentionSpec, Rope, Segment, Site, Start, Traits, option
from .by_head import ByHeadSpec, head_range
from .full import FullSpec, kernel_problems
from .views import NO_EXPORT, Group, ViewsAttention, ViewsSpec, one_to

Tiles = int | Literal["full"]
Window = tuple[Tiles, Tiles, Tiles]

IMAGE_TILES = {384: (1, 16, 24), 128: (1, 16, 8), 64: (1, 8, 8), 16: (1, 4, 4)}
"""Tiles of an image by the volume of the video's tile (HunyuanVideo-1.5)."""


@dataclass(frozen=True, kw_only=True)
class SlidingTileSpec(ViewsSpec):
    """Tiles (T, H, W) of tokens and windows (T, H, W) of tiles, one for all heads or by head."""

    name: ClassVar[str] = "sliding_tile"
    source: ClassVar[str] = "STA, arXiv 2502.04507; code hao-ai-lab/FastVideo 2f3d407"
    formula: ClassVar[str] = (
        "y_i = W_o softmax over tiles b with |b - clamp(a_i)| <= m // 2 on all axes of (q_i k_j / sqrt(D)) v_j"
    )

    tile: tuple[int, int, int] = option((6, 8, 8), "tokens of a tile; flat with the same volume in an image", ge=1)
    window: Window | tuple[Window, ...] | Mapping[str, Window] = option(
        (3, 3, 3), "tiles seen along (T, H, W), odd or full; one per head, or by ranges of heads", ge=1
    )
    short: Literal["refuse", "whole"] = option(
        "refuse", "an axis with fewer tokens than a tile: a problem, or one tile"
    )
    kernel: str = option("auto", "a registered kernel, or auto")

    def tile_at(self, grid: Grid) -> tuple[int, int, int]:
        """The tile at a grid."""
        t, h, w = self.tile
        return IMAGE_TILES[t * h * w] if grid.t == 1 and t > 1 else self.tile

    def problems(self, site: Site) -> list[Problem]:
        found = kernel_problems(self.kernel) + self._tile_problems(site.grid) + self._head_problems(site)
        if found:
            return found
        counts = [-(-n // size) for n, size in zip(site.grid, self.tile_at(site.grid), strict=True)]
        for path, window in self._windows():
            for axis, size, count in zip(AXES, window, counts, strict=True):
                if size != "full" and size % 2 == 0 and size < count:
                    rule = f"an even window of {size} tiles along {axis} has no middle"
                    odd = f"{size - 1}, {size + 1}" if size + 1 < count else f"{size - 1}"
                    found.append(Problem(path, rule, f"use {odd} or full, which is {count} tiles there"))
        return found or self.mask_problems(self.kernel, site)

    def _tile_problems(self, grid: Grid) -> list[Problem]:
        t, h, w = self.tile
        flattened = grid.t == 1 and t > 1
        if flattened and t * h * w not in IMAGE_TILES:
            rule = (
                f"an image has no tile for {t * h * w} tokens; volumes with one are {', '.join(map(str, IMAGE_TILES))}"
            )
            return [Problem("tile", rule, f"for images give a flat tile, [1, {h}, {w}]")]
        found = []
        for axis, size, length in zip(AXES, self.tile_at(grid), grid, strict=True):
            if self.short == "refuse" and size > length:
                what = "an image's tile of " if flattened else ""
                rule = f"{what}{size} along {axis} is more than the {length} tokens there"
                flat = f"give a flat tile, [1, {h}, {w}], with " if flattened else "use "
                found.append(Problem("tile", rule, f"{flat}{one_to(length)} along {axis}, or short: whole"))
        return found

    def _head_problems(self, site: Site) -> list[Problem]:
        if isinstance(self.window, Mapping):
            # whether ranges of heads add up does not depend on what the heads do
            keys = ByHeadSpec(groups={key: FullSpec() for key in self.window}).problems_of_keys(site)
            return [Problem(problem.path.replace("groups", "window", 1), problem.rule, problem.fix) for problem in keys]
        if self.window and isinstance(self.window[0], tuple) and len(self.window) != site.heads:
            rule = f"there are windows for {len(self.window)} heads, the attention has {site.heads}"
            return [Problem("window", rule, "give one per head, one for all, or ranges of heads")]
        if not self.window:
            return [Problem("window", "there is none", "give tiles along (T, H, W)")]
        return []

    def _windows(self) -> list[tuple[str, Window]]:
        """Every window with its path."""
        given: Any = self.window
        if isinstance(given, Mapping):
            return [(f"window.{key}", window) for key, window in given.items()]
        if isinstance(given[0], tuple):
            return [(f"window.{head}", window) for head, window in enumerate(given)]
        return [("window", given)]

    def groups(self, grid: Grid, heads: int) -> tuple[Group, ...]:
        tile = self.tile_at(grid)
        counts = [-(-n // size) for n, size in zip(grid, tile, strict=True)]
        owners: dict[tuple[int, ...], list[int]] = {}
        for path, window in self._windows():
            key = tuple(
                count if size == "full" else min(size, count) for size, count in zip(window, counts, strict=True)
            )
            last = path.partition(".")[2]
            of = list(range(heads)) if not last else head_range(last)
            owners.setdefault(key, []).extend(of)
        out = []
        for key, owned in owners.items():
            t, h, w = (sliding_tiles(n, size, many) for n, size, many in zip(grid, tile, key, strict=True))
            name = "x".join(map(str, key))
            out.append(Group(name, None if len(owners) == 1 else tuple(sorted(owned)), (t, h, w)))
        return tuple(out)

    def traits(self) -> Traits:
        searched = not isinstance(self.window, tuple) or (bool(self.window) and isinstance(self.window[0], tuple))
        start = (
            Start(
                "training-free",
                "arXiv 2502.04507: windows searched per step, layer and head, first 12-15 of 50 steps dense",
            )
            if searched
            else Start(
                "needs tuning", "arXiv 2502.04507: 1 600 steps of distillation for one window of (3, 3, 3) tiles"
            )
        )
        exact = bool(self.window) and all(size == "full" for _, window in self._windows() for size in window)
        if exact:
            start = Start("exact", "computes full attention")
        return Traits(start=start, exact_at_init=exact, export=(), notes=NO_EXPORT)

    @classmethod
    def examples(cls) -> list[tuple[AttentionSpec, Site]]:
        site = Site(dim=24, heads=3, head_dim=8, grid=Grid(3, 7, 5), rope=Rope(axes=(4, 2, 2)), qk_norm=True)
        windows: tuple[Window, ...] = ((1, 3, "full"), (3, 1, 1), (1, 3, 3))
        return [
            (cls(tile=(2, 2, 2), window=(1, 3, 1)), site.at(extra=(Segment("text", 4),))),
            (cls(tile=(2, 2, 1), window=windows), site),
            (cls(tile=(1, 3, 2), window={"0,2": (1, 1, 3), "1": ("full", 1, 1)}), site.at(rope=None)),
            (cls(tile=(4, 2, 2), window=(3, 1, 1)), site.at(grid=Grid(1, 9, 10), has_timestep=False)),
            (cls(tile=(4, 2, 3), window=(1, 1, 3), short="whole"), site.at(grid=Grid(2, 7, 10))),
        ]


SlidingTileSpec.module = ViewsAttention
